"""The stage that prunes a model. Torch is loaded when it runs, not before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact, draft, identity, json_digest, require_space, write_text
from edgetune.compress.prune import tokenizer_files
from edgetune.compress.prune.shapes import check, head_size, heads, pruned_config
from edgetune.data.contract import hold
from edgetune.data.golden import Golden
from edgetune.progress import Report, silent
from edgetune.recipe_prune import Prune
from edgetune.sources import copy_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from edgetune.compress.prune.cut import Keep
    from edgetune.data.calibration import CalibrationSet

STAGE = "compress.prune/2"
SEARCH_TOP_K = 64  # buckets in which the search compares distributions


def planned_identity(
    config: Prune, source_identity: str, calibration_digest: str | None, kept_tokens: Sequence[int] | None = None
) -> str:
    """Give the identity of the model that `run` would make."""
    return identity(STAGE, _config(config), [source_identity], _sources(config, calibration_digest, kept_tokens))


def run(
    config: Prune,
    source: Artifact,
    out: Path,
    *,
    calibration: CalibrationSet | None,
    kept_tokens: Sequence[int] | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
) -> Artifact:
    """Prune a `model` artifact into a smaller one, in shapes that stock Transformers loads.

    Blocks are chosen first, widths then within those that stay, all from one pass over the calibration rows, which
    holds one block at a time; a search holds the model. One that was killed goes on after the last block that it took
    out. `kept_tokens` are the ids that stay, ascending, where `config.vocabulary` says how many; where nothing else is
    cut, `calibration` is not read.
    Raises UnsupportedError before any work, StageError where a loss of the search is not finite.
    """
    from edgetune.compress.checkpoint import read_config
    from edgetune.compress.finished import Lazily
    from edgetune.compress.layerwise import load_model
    from edgetune.compress.streamed import open_model

    model_config = read_config(source.path)
    check(config, model_config)
    if kept_tokens is not None:
        tokenizer_files.check_folder(source.path)
        model_config = tokenizer_files.renumbered(model_config, kept_tokens)
    require_space(out.parent, source.size_bytes)
    ids, digest = (calibration.ids, calibration.digest) if calibration is not None else (None, None)
    with draft(
        out, kind="model", stage=STAGE, config=_config(config), parents=[source],
        sources=_sources(config, digest, kept_tokens), versions=_versions(),
    ) as pending:  # fmt: skip
        model: Any = open_model(source)
        stored = Lazily(model.stored.shapes, model.stored.read)
        stats = Statistics(int(model_config["num_hidden_layers"]))
        if config.cuts_blocks:
            assert ids is not None, "cutting blocks reads calibration rows"
            stats = measure(model, ids, model_config, work=pending.work, device=device, progress=progress)
            pending.notes["block_influence"] = [float(f"{value:.4g}") for value in stats.influence]
        kept = list(range(len(stats.influence)))
        if config.layers is not None and config.search == "kl" and ids is not None:
            removed = _search(config, load_model(source), ids, pending.work / "search.json", device, progress)
            kept = [index for index in kept if index not in {block for block, _ in removed}]
            pending.notes["search"] = [[block, float(f"{loss:.4g}")] for block, loss in removed]
        elif config.layers is not None:
            from edgetune.compress.prune.depth import most_influential

            kept = most_influential(stats.influence, config.layers)
        keep = choose(config, stats, kept, model_config, kept_tokens)
        parameters = write(config, stored, keep, model_config, pending.path)
        if kept_tokens is None:
            copy_tokenizer(source.path, pending.path)
            Golden.read(source.path).write(pending.path)
        else:
            tokenizer_files.write(source.path, pending.path, kept_tokens)
        hold(pending.path)
        pending.seed, pending.calibration = seed, digest if config.cuts_blocks else None
        pending.notes |= {
            "kept_layers": kept,
            "parameters": parameters,
            "parameters_before": sum(tensor.numel() for tensor in stored.values()),
        }
    return pending.artifact


class Statistics:
    """What one pass over the calibration rows tells of a model's parts."""

    def __init__(self, n_layers: int) -> None:
        self.influence = [0.0] * n_layers  # mean over tokens
        self.neurons: dict[int, Tensor] = {}  # block -> energy [I]
        self.heads: dict[int, Tensor] = {}  # block -> energy [H]
        self.inputs: dict[tuple[int, str], Tensor] = {}  # block, layer behind a norm -> energy [C]


def measure(
    model: Any,
    rows: NDArray[np.int64],
    model_config: dict[str, Any],
    *,
    work: Path | None = None,
    device: str,
    progress: Report,
) -> Statistics:
    """Look at the float model once. rows [N, T] are token ids; model and `work` as in `layerwise.observe`."""
    from edgetune.compress.layerwise import observe
    from edgetune.compress.prune.depth import block_influence
    from edgetune.compress.prune.width import feature_energy, head_energy

    stats, D = Statistics(len(model.model.layers)), head_size(model_config)

    def see(index: int, name: str, X: Tensor) -> None:
        if name == "mlp.down_proj":
            stats.neurons[index] = stats.neurons.get(index, 0) + feature_energy(X).cpu()
        elif name == "self_attn.o_proj":
            stats.heads[index] = stats.heads.get(index, 0) + head_energy(X, D).cpu()
        else:
            stats.inputs[index, name] = stats.inputs.get((index, name), 0) + feature_energy(X).cpu()

    def see_block(index: int, before: Tensor, after: Tensor) -> None:
        stats.influence[index] += block_influence(before, after) / rows.size

    observe(model, rows, see, see_block, work=work, device=device, progress=progress)
    return stats


def choose(
    config: Prune,
    stats: Statistics,
    kept: list[int],
    model_config: dict[str, Any],
    kept_tokens: Sequence[int] | None = None,
) -> Keep:
    """Name what stays of the blocks that stay."""
    import torch

    from edgetune.compress.prune.cut import Keep
    from edgetune.compress.prune.width import channel_energy, group_energy, most_important

    neurons = groups = hidden = None
    if config.intermediate_size is not None:
        neurons = {index: most_important(stats.neurons[index], config.intermediate_size) for index in kept}
    if config.kv_heads is not None:
        n_kv = heads(model_config)[1]
        groups = {index: most_important(group_energy(stats.heads[index], n_kv), config.kv_heads) for index in kept}
    if config.hidden_size is not None:
        seen = [energy for (index, _), energy in stats.inputs.items() if index in kept]
        hidden = most_important(channel_energy(seen), config.hidden_size)
    tokens = None if kept_tokens is None else torch.tensor(kept_tokens)
    return Keep(kept, neurons, groups, hidden, tokens)


def write(config: Prune, state: Mapping[str, Tensor], keep: Keep, model_config: dict[str, Any], folder: Path) -> int:
    """Write weights and `config.json` of the pruned model, one tensor after the other; gives its parameters."""
    from transformers import AutoConfig

    from edgetune.compress.checkpoint import WEIGHTS
    from edgetune.compress.prune.cut import cut
    from edgetune.compress.tensor_file import TensorFile

    n_heads, n_kv = heads(model_config)
    made_config, parameters = pruned_config(config, model_config, keep.layers), 0
    with TensorFile(folder / WEIGHTS, {"format": "pt"}) as out:
        for name, tensor in cut(state, keep, head_size=head_size(model_config), queries_per_group=n_heads // n_kv):
            if not (name == "lm_head.weight" and made_config.get("tie_word_embeddings")):
                out.add(name, [tensor])
                parameters += tensor.numel()
    AutoConfig.for_model(**made_config).save_pretrained(folder)
    return parameters


def _search(
    config: Prune, model: Any, rows: NDArray[np.int64], file: Path, device: str, progress: Report
) -> list[tuple[int, float]]:
    """Take out blocks one by one, each removal kept in `file`: (block, mean KL to the whole model)."""
    from edgetune.compress.divergence import bucket_log_probs, summed_kl, top_tokens
    from edgetune.compress.pieces import Blocks
    from edgetune.compress.prune.depth import greedy

    assert config.layers is not None, "a search is for blocks"
    picked = np.linspace(0, len(rows) - 1, min(config.search_samples, len(rows))).round().astype(int)
    blocks = Blocks(model, rows[picked], device=device)
    n, n_tokens = len(model.model.layers), rows[picked].size
    whole = blocks.embedded
    for index in range(n):
        whole = blocks.run(index, whole)
    reference = []
    for logits in blocks.logits(whole):
        ids = top_tokens(logits, SEARCH_TOP_K)
        reference.append((ids, bucket_log_probs(logits, ids)))

    def without(kept: list[int]) -> list[float]:
        losses, hidden = [], blocks.embedded
        for place, index in enumerate(kept):
            left = hidden
            for later in kept[place + 1 :]:
                left = blocks.run(later, left)
            parts = zip(reference, blocks.logits(left), strict=True)
            losses.append(sum(summed_kl(log_p, logits, ids) for (ids, log_p), logits in parts) / n_tokens)
            hidden = blocks.run(index, hidden)
        return losses

    removed = [(int(block), float(loss)) for block, loss in _read(file)]
    for taken in greedy(n, config.layers, without, removed):
        removed.append(taken)
        write_text(file, json.dumps(removed))
        progress(len(removed), n - config.layers, "blocks taken out")
    return removed


def _read(file: Path) -> Iterator[tuple[int, float]]:
    if file.is_file():
        yield from json.loads(file.read_bytes())


def _sources(config: Prune, calibration_digest: str | None, kept_tokens: Sequence[int] | None) -> dict[str, str]:
    read = {"calibration": calibration_digest} if config.cuts_blocks and calibration_digest is not None else {}
    return read if kept_tokens is None else read | {"tokens": json_digest(list(kept_tokens))}


def _config(config: Prune) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}

"""Read an exported GGUF file back: types, weights, and llama.cpp with it against the same weights in torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np

from edgetune.data.golden import Golden
from edgetune.errors import ContractError
from edgetune.export.contract import RuntimeFacts, check_contract
from edgetune.export.gguf_child import n_cpus, run_child
from edgetune.export.gguf_families import ROPE_TENSORS, family, gguf_name, stored, written_shape
from edgetune.export.gguf_read import dequantize, read_tensors
from edgetune.export.gguf_vocab import Vocabulary
from edgetune.export.gguf_write import Weights, read_config, tensors
from edgetune.export.parity import Logits, Tolerance, hold, parity
from edgetune.export.perplexity import EIGHT_BITS, LIMIT, compare, hold_perplexity, text_windows, token_losses
from edgetune.export.stops import Ends, Led, Ran, hold_loop, lead

if TYPE_CHECKING:
    from torch import Tensor

LOOP = "llama-cpp-python"
PART, LOGITS = 2**18, 2**28  # numbers that a thread takes at once, which its cache holds; bytes of logits

# Root mean square error of a tensor, relative to the tensor: far above what rounding costs, far below a wrong tensor.
_WEIGHT_ERROR = {"F32": 1e-6, "F16": 0.001, "BF16": 0.005, "Q8_0": 0.02, "Q6_K": 0.08, "Q5_K": 0.15, "Q5_1": 0.15}
_WEIGHT_ERROR |= {"Q5_0": 0.15, **dict.fromkeys(("Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"), 0.25)}
_WEIGHT_ERROR |= dict.fromkeys(("Q3_K", "IQ3_S", "IQ3_XXS"), 0.4) | dict.fromkeys(("Q2_K", "IQ2_S", "IQ2_XS"), 0.65)
_WEIGHT_ERROR |= {"IQ2_XXS": 0.7, **dict.fromkeys(("IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "Q2_0", "Q1_0"), 0.9)}

# llama.cpp multiplies F16 weights with float16 activations, BF16 with bfloat16, and quantized ones with int8, which
# alone costs a mean KL of 0.01 on the golden texts of SmolLM2-135M. Structure is held by the weights, tensor by tensor.
TOLERANCES: dict[str, Tolerance] = {
    "F32": Tolerance(max_abs=1e-3),
    "F16": Tolerance(mean_kl=1e-3),
    "BF16": Tolerance(mean_kl=5e-3),
}
GELU = Tolerance(mean_kl=1e-6)  # measured on models of 3 and 7 blocks: up to 8e-9
QUANTIZED = Tolerance(mean_kl=0.05)


def tolerance(target: str, activation: str = "silu") -> Tolerance:
    """Give how far llama.cpp's logits may lie from the same weights in torch.

    GELU comes from a table of float16 values there, so that no logit's distance can be promised.
    """
    return GELU if target == "F32" and "gelu" in activation else TOLERANCES.get(target, QUANTIZED)


def check_types(file: Path, types: Mapping[str, str]) -> None:
    """Raise ContractError where a tensor of the file has another type than was chosen, or is missing."""
    found = {name: tensor.kind for name, tensor in read_tensors(file).items()}
    for name in ROPE_TENSORS:
        found.pop(name, None)
    if found != types:
        name = next(n for n in sorted({*found, *types}) if found.get(n) != types.get(n))
        raise ContractError(f"{file.name}: tensor {name} has type {found.get(name)}, {types.get(name)} was asked for")


class FileWeights(Mapping[str, "Tensor"]):
    """The weights of a file by their Transformers names, dequantized to float32 when they are asked for.

    Each is compared with its source the first time. Raises ContractError where one is another tensor.
    """

    def __init__(self, file: Path, weights: Weights, model_config: Mapping[str, Any]) -> None:
        self._file, self._weights, self._config, self._of = file, weights, model_config, family(model_config)
        written = read_tensors(file)
        pairs = list(tensors(weights, model_config))
        self._places = {re.sub("^embed_out", "lm_head", hf): (hf, written[name]) for name, hf in pairs}  # as in memory
        if model_config.get("tie_word_embeddings"):
            embedding = next((hf, written[name]) for name, hf in pairs if name == "token_embd.weight")
            self._places.setdefault("lm_head.weight", embedding)
        self._seen: set[str] = set()
        self._threads = ThreadPoolExecutor(n_cpus())

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Tensor:
        import torch

        source, tensor = self._places[name]
        shape = written_shape(self._weights.shapes[source], source, self._of)
        array = np.empty(shape, np.float32)

        def read(part: slice) -> None:
            array[part] = dequantize(tensor.kind, tensor.data[part]).reshape(array[part].shape)

        for _ in self._threads.map(read, _parts(shape)):
            pass
        found = torch.from_numpy(np.ascontiguousarray(stored(array, source, self._config, self._of)))
        if source not in self._seen:
            self._compare(source, found, tensor.kind)
            self._seen.add(source)
        return found

    def _compare(self, source: str, found: Tensor, kind: str) -> None:
        wanted, values = self._weights.get(source), found.numpy()

        def sums(part: slice) -> tuple[float, float]:
            given = wanted[part].float().numpy()
            off = (values[part] - given).ravel()
            return float(off @ off), float(given.ravel() @ given.ravel())

        error, size = np.sum(list(self._threads.map(sums, _parts(tuple(found.shape)))), axis=0)
        relative = (error / max(size, 1e-30)) ** 0.5
        kept = self._weights.kept(source, kind)
        if not relative <= (_WEIGHT_ERROR[kind] if kept is None else kept.error):
            name = gguf_name(source, self._of)
            raise ContractError(
                f"{self._file.name}: {name} ({kind}) differs from its source by {relative:.3g} of its norm"
            )


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the first axis so that a part holds PART numbers at most, or one row."""
    step = max(1, PART // max(1, int(np.prod(shape[1:]))))
    return (slice(start, start + step) for start in range(0, shape[0], step))


class FileModel:
    """A model in torch, float32, with the weights of a file.

    A module's weights are in memory while it computes, so the largest tensor bounds them. Raises ContractError where a
    weight is missing and, once it computes, where one is another than its source's.
    """

    def __init__(self, file: Path, weights: Weights, model_config: Mapping[str, Any]) -> None:
        import torch
        from accelerate import init_empty_weights
        from accelerate.hooks import attach_align_device_hook
        from transformers import AutoConfig, AutoModelForCausalLM

        found = FileWeights(file, weights, model_config)
        settings = {k: v for k, v in model_config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
        with init_empty_weights(include_buffers=False):
            self._model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
        left = [name for name, _ in self._model.named_parameters() if name not in found]
        if left:
            raise ContractError(f"{file.name}: {', '.join(left[:3])} of the model is in no tensor of the file")
        attach_align_device_hook(self._model, execution_device=torch.device("cpu"), offload=True, weights_map=found)
        self._n_vocab = int(model_config["vocab_size"])

    def logits(self, rows: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """Give the logits [T, V] of each row; rows are read together as far as their logits fit into LOGITS."""
        import torch

        at_once = max(1, LOGITS // (4 * self._n_vocab * max(map(len, rows))))
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            ids = torch.zeros((len(part), max(map(len, part))), dtype=torch.long)  # a row does not see what fills it up
            for row, given in zip(ids, part, strict=True):
                row[: len(given)] = torch.tensor(given)
            with torch.inference_mode():
                logits = self._model(input_ids=ids, use_cache=False).logits.float().numpy()
            yield from (one[: len(given)] for one, given in zip(logits, part, strict=True))


@dataclass(frozen=True)
class Said:
    """What llama.cpp makes of a file."""

    facts: RuntimeFacts
    ids: list[list[int]]  # of texts
    logits: Iterator[Logits]  # of rows
    losses: list[list[float]]  # of windows
    ran: list[Ran] | str  # what the loop of llama-cpp-python did, or why it failed


def ask(
    file: Path, texts: Sequence[str], rows: Sequence[Sequence[int]], windows: Sequence[Sequence[int]],
    runs: Sequence[Led], work: Path,
) -> Said:  # fmt: skip
    """Load a file in llama.cpp, in a child process, and ask all that a contract needs. Raises StageError."""
    job = {
        "file": str(file), "texts": texts, "rows": rows, "windows": windows, "led": [vars(run) for run in runs],
        "folder": str(work),
    }  # fmt: skip
    said = run_child("edgetune.export.gguf_probe", job, work / "probe.json")
    facts = RuntimeFacts(frozenset(said["stop_ids"]), said["bos_id"], said["adds_bos"], said["chat_template"])
    logits = (np.load(work / f"{index}.npy") for index in range(len(rows)))
    ran = said["failed"] if "failed" in said else [Ran(n, stopped) for n, stopped in said["ran"]]
    return Said(facts, said["ids"], logits, said["losses"], ran)


def verify(
    file: Path, target: str, types: Mapping[str, str], weights: Weights, source: Path, golden: Golden,
    vocabulary: Vocabulary, work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Hold a written file to its contract and give the notes for the manifest. Raises ContractError."""
    check_types(file, types)
    declared_stops = vocabulary.stop_ids
    if set(declared_stops) != set(golden.stop_ids):
        raise ContractError(
            f"stop set differs: the checkpoint declares {declared_stops}, training ended answers at {golden.stop_ids}"
        )
    texts = [c.text for c in golden.conversations] + [t.text for t in golden.texts]
    rows = [c.ids for c in golden.conversations] + [t.ids for t in golden.texts]
    given = [normalize("NFC", text) for text in texts] if vocabulary.composes else texts
    windows, runs = text_windows(source), lead(golden)
    said = ask(file, given, rows, windows, runs, work)
    tokenized = dict(zip(texts, said.ids, strict=True))
    contract = check_contract(golden, said.facts, tokenized.__getitem__)
    hold_loop(runs, said.ran, LOOP)
    model_config = read_config(source)
    model = FileModel(file, weights, model_config)
    ends = Ends(golden, said.facts.stop_ids)
    result = parity(model.logits(rows), said.logits, ends.see)
    held = tolerance(target, family(model_config).activation)
    hold(result, held, f"{file.name} ({target})")
    stops = ends.hold()
    losses = (token_losses(*pair) for pair in zip(model.logits(windows), windows, strict=True))
    perplexity = compare(losses, said.losses)
    limit = LIMIT if target in TOLERANCES else EIGHT_BITS
    hold_perplexity(perplexity, file.name, limit)
    return {
        "contract": contract, "parity": result.note(held), "perplexity": perplexity.note(limit),
        "generation": {"loop": LOOP, **stops},
    }  # fmt: skip

"""The only walker over decoder blocks: shows each layer its inputs, and puts the quantized weight in its place.

Blocks are done in order, and within a block the layers in the order in which they are called, so that each is
calibrated on what the layers before it really give once they are quantized. Layers with a shared input share
one Hessian and are solved stacked. Shapes: N rows, T tokens, B rows of a batch, C in-features, R out-features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from edgetune.adapt.allocator import give_back
from edgetune.artifact import Artifact
from edgetune.compress.architectures import SHARED_INPUTS, check_architecture
from edgetune.compress.checkpoint import open_config
from edgetune.compress.correction import Pair, corrected_weight
from edgetune.compress.damping import Moments, Seen, joined
from edgetune.compress.finished import LayerResult, Lazily, Made, read_block, read_layer, write_block
from edgetune.compress.hessian import all_finite, output_loss
from edgetune.compress.shortcuts import LAST, shortcuts
from edgetune.compress.spill import Batch, Spill
from edgetune.compress.streamed import present
from edgetune.compress.tune import Outputs, call_with
from edgetune.devices import compute_dtype
from edgetune.errors import ArtifactError, DataError, EdgetuneError, StageError, UnsupportedError
from edgetune.progress import Report, silent

BATCH_TOKENS = 2048  # tokens in one forward
TRIM_BLOCKS = 6  # so often what the solver freed goes back to the system, which costs new pages
# names of the layers, their weights stacked [R, C], H [C, C], and the cross moments [C, C] of `gptaq.py` where asked
# for -> what was made
Solve = Callable[[Sequence[str], Tensor, Tensor | None, Tensor | None], tuple[Made, tuple[str, ...]]]
# names, weights, and the moments of the rows shown and of those held out -> the solver for all rows, and its damping
Choose = Callable[[Sequence[str], Tensor, Sequence[Moments]], tuple[Solve[Made], float]]

# E [R, C] and H [C, C] of one layer -> what is kept beside its integers; a block's layers and float weights, what it
# gives with other weights, the number of batches, and the device -> its layers on other grids
Correct = Callable[[Tensor, Tensor], Pair]
Tune = Callable[[Mapping[str, LayerResult[Any]], Mapping[str, Tensor], Outputs, int, str], dict[str, LayerResult[Any]]]


class _CapturedError(Exception):
    """Ends a forward as soon as the wanted inputs were seen."""


def load_model(source: Artifact) -> nn.Module:
    """Load a `model` artifact in the dtype of its file. Raises ArtifactError, UnsupportedError."""
    open_config(source.path)
    return load_whole(source.path, "auto")


def load_whole(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    """Load any model that Transformers knows, no tensor of which may be missing. Raises ArtifactError."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:
        raise ArtifactError(f"{folder} lacks the tensor {sorted(info['missing_keys'])[0]}; make it again")
    model.eval()
    return model  # type: ignore[no-any-return]


def decoder_blocks(model: Any) -> nn.ModuleList:
    """Give the blocks of a supported model, each with all its linear layers. Raises UnsupportedError."""
    check_architecture(model.config.to_dict())
    blocks: nn.ModuleList = model.model.layers
    for index, block in enumerate(blocks):
        for name in (name for group in SHARED_INPUTS for name in group):
            if type(block.get_submodule(name)) is not nn.Linear:
                raise UnsupportedError(f"model.layers.{index}.{name} is no plain linear layer; merge adapters first")
    return blocks


@torch.no_grad()
def quantize_blocks(
    model: Any,
    rows: NDArray[np.int64] | None,
    solve: Solve[Made],
    *,
    work: Path,
    key: str,
    device: str = "cpu",
    progress: Report = silent,
    both: bool = False,
    fast: bool = False,
    correct: Correct | None = None,
    tune: Tune | None = None,
    choose: Choose[Made] | None = None,
) -> Mapping[str, LayerResult[Made]]:
    """Quantize every linear layer of every block; the model is used up, a block's weights are let go when it is done.

    The model is whole, or a skeleton of `open_model`, whose blocks are read when it is their turn.
    rows [N, T] are token ids; without them no forward is run and `solve` gets no Hessian. With `both` the float model
    is followed beside the quantized one, and `solve` gets their cross moments; `fast` is that of `Hessian`.
    `correct` gives each layer a pair beside its integers, `tune` each block other scales; `choose` gives each layer its
    own solver, by rows held out of the calibration. Each finished block is kept
    in `work` under `key`, and its codes are read from there when they are looked at; a walk that is begun again puts
    those back and ends in the same bytes.
    Raises StageError naming the layer, and the row where an activation is not finite.
    """
    blocks, dtype, spill = decoder_blocks(model), compute_dtype(device), Spill(work)
    batches = None if rows is None else enter(model, rows, device, dtype, spill)
    for batch in batches or []:
        batch.unquantized = batch.hidden if both or tune else None
    files: dict[str, Path] = {}
    for index, block in enumerate(blocks):
        prefix = f"model.layers.{index}"
        file = work / f"{prefix}.safetensors"
        with present(model, prefix):
            original = dict(block.state_dict())
            block.to(device=device, dtype=dtype)
            done = read_block(file, key, prefix)
            if batches is not None and (both or tune):
                _follow(block, index, batches, keep=both)
            if done is None:
                fast_here = fast and dtype == torch.bfloat16
                given = original if tune is None else dict(original)
                done = _quantize_block(block, index, given, batches, solve, correct, choose, device, fast_here)
                if tune is not None and batches is not None:
                    done = tune(done, original, partial(_outputs, block, index, batches), len(batches), device)
                    for batch in batches:
                        batch.seen.clear()  # by scales that are no more
                write_block(file, key, done)
            original.clear()
            for name, result in done.items():
                _put(block, name.removeprefix(f"{prefix}."), result.weight())
            files |= dict.fromkeys(done, file)
            for batch in batches or []:
                if index + 1 < len(blocks):
                    with shortcuts(block, batch.seen):
                        batch.hidden = block(batch.hidden, **batch.block_kwargs[index])
                    _check_finite(batch.hidden, batch.first_row, f"the output of {prefix}")
                batch.seen.clear()
                batch.inputs.clear()
            block.to("meta")
        del done
        if (index + 1) % TRIM_BLOCKS == 0:
            give_back()
        progress(index + 1, len(blocks), prefix)
    spill.close()
    return Lazily(files, lambda name: read_layer(files[name], name))


@torch.no_grad()
def second_moments(
    model: Any, rows: NDArray[np.int64], *, work: Path | None = None, device: str = "cpu", progress: Report = silent
) -> dict[str, Tensor]:
    """Give the mean of the squared inputs, float32 [C], of every linear layer, from one pass of the float model.

    rows [N, T] are token ids; model and `work` as in `observe`.
    llama.cpp calls this an importance matrix (in_sum2 / counts).
    """
    sums: dict[str, Tensor] = {}

    def see(index: int, name: str, X: Tensor) -> None:
        squares = X.float().square().sum((0, 1), dtype=torch.float64)  # [C]
        key = f"{index}.{name}"
        sums[key] = sums[key] + squares if key in sums else squares

    observe(model, rows, see, work=work, device=device, progress=progress)
    moments: dict[str, Tensor] = {}
    for index in range(len(model.model.layers)):
        for group in SHARED_INPUTS:
            mean = (sums[f"{index}.{group[0]}"] / rows.size).float().cpu()
            moments |= {f"model.layers.{index}.{name}": mean for name in group}
    return moments


@torch.no_grad()
def observe(
    model: Any,
    rows: NDArray[np.int64],
    see: Callable[[int, str, Tensor], None],
    see_block: Callable[[int, Tensor, Tensor], None] | None = None,
    *,
    work: Path | None = None,
    device: str = "cpu",
    progress: Report = silent,
) -> None:
    """Run the float model once, block by block, and show what passes; the model is left as it was.

    The model is whole or a skeleton of `open_model`. With `work` activations that are too many for memory go there.
    `see(block, name, X)` gets the inputs [B, T, C] of the first layer of each group in SHARED_INPUTS, and
    `see_block(block, before, after)` the residual stream. Raises StageError naming the row that is not finite.
    """
    blocks, dtype, spill = decoder_blocks(model), compute_dtype(device), Spill(work)
    batches = enter(model, rows, device, dtype, spill)
    for index, block in enumerate(blocks):
        with present(model, f"model.layers.{index}"):
            original = dict(block.state_dict())
            block.to(device=device, dtype=dtype)
            for batch in batches:
                with _watch(block, index, batch, partial(see, index)):
                    after = block(batch.hidden, **batch.block_kwargs[index])
                if see_block is not None:
                    see_block(index, batch.hidden, after)
                batch.hidden = after
            block.to("cpu")
            block.load_state_dict(original, assign=True)
        progress(index + 1, len(blocks), f"model.layers.{index}")


def enter(model: Any, rows: NDArray[np.int64], device: str, dtype: torch.dtype, spill: Spill) -> list[Batch]:
    """Run everything before the first block: embeddings, positions and masks, with recorders in place of blocks."""
    vocabulary = int(model.config.vocab_size)
    if rows.ndim != 2 or not rows.size or rows.min() < 0 or rows.max() >= vocabulary:
        raise DataError(f"calibration rows must be ids [N, T] below {vocabulary}, found {rows.dtype} {rows.shape}")
    inner, blocks = model.model, model.model.layers
    recorders = [_Recorder() for _ in blocks]
    n_rows, batches = max(1, BATCH_TOKENS // rows.shape[1]), []
    inner.layers = nn.ModuleList(recorders)
    try:
        with present(model, "model.embed_tokens", "model.norm"):
            inner.to(device)
            for first in range(0, len(rows), n_rows):
                ids = torch.from_numpy(rows[first : first + n_rows]).to(device)
                hidden = inner.embed_tokens(ids).to(dtype)
                inner(inputs_embeds=hidden, use_cache=False)
                batches.append(Batch(first, hidden, [recorder.kwargs for recorder in recorders], spill))
            inner.to("cpu")
    finally:
        inner.layers = blocks
    return batches


class _Recorder(nn.Module):
    """Stands in for a decoder block and remembers what it was called with."""

    kwargs: dict[str, Any]

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden_states


def _quantize_block(
    block: nn.Module,
    index: int,
    original: dict[str, Tensor],
    batches: list[Batch] | None,
    solve: Solve[Made],
    correct: Correct | None,
    choose: Choose[Made] | None,
    device: str,
    fast: bool,
) -> dict[str, LayerResult[Made]]:
    done: dict[str, LayerResult[Made]] = {}
    for group in SHARED_INPUTS:
        names = [f"model.layers.{index}.{name}" for name in group]
        weights = [original.pop(f"{name}.weight").to(device=device, dtype=torch.float32) for name in group]
        for name, weight in zip(names, weights, strict=True):
            if not all_finite(weight):
                raise StageError(f"{name} has a weight that is not finite; make the model again")
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        sizes = [len(weight) for weight in weights]
        weights.clear()
        parts: list[Moments] = []
        if batches is not None:
            seen = Seen(whole.shape[1], apart=choose is not None, device=device, fast=fast)
            parts = _collect(block, index, group[0], batches, seen)
            del seen
        found = _quantize_group(names, whole, sizes, parts, solve, correct, choose, fast)
        for name, short in zip(names, group, strict=True):
            done[name], made = next(found)
            _put(block, short, made)
        del weight, whole, found, made  # the next group has no room for them
    return done


def _quantize_group(
    names: Sequence[str],
    whole: Tensor,
    sizes: Sequence[int],
    parts: list[Moments],
    solve: Solve[Made],
    correct: Correct | None,
    choose: Choose[Made] | None,
    fast: bool,
) -> Iterator[tuple[LayerResult[Made], Tensor]]:
    """Give each layer of a group and what its weight is then; `whole` has their weights, of so many rows each."""
    try:
        solving, damping = choose(names, whole, parts) if choose is not None else (solve, None)
        H, cross = joined(parts)
        stacked, fallbacks = solving(names, whole, H, cross)
    except EdgetuneError as error:
        raise type(error)(f"{' + '.join(names)}: {error}") from error
    del cross
    start = 0
    for name, weight in zip(names, torch.split(whole, list(sizes)), strict=True):
        quantized = stacked.rows(start, start + len(weight))
        start += len(weight)
        made = quantized.dequantize()
        assert correct is None or H is not None, "a correction is fitted to the inputs of calibration rows"
        try:
            pair = correct(weight - made, H) if correct is not None and H is not None else None
        except EdgetuneError as error:
            raise type(error)(f"{name}: {error}") from error
        made = corrected_weight(made, pair)
        E = weight - made
        loss, most = (float(E.square().sum()), float(weight.square().sum())) if H is None else (
            output_loss(E, H, fast=fast), output_loss(weight, H, fast=fast)
        )  # fmt: skip
        share = float(f"{loss / most if most else 0.0:.3g}")
        pair = pair and (pair[0].cpu(), pair[1].cpu())
        yield LayerResult(quantized.cpu(), share, fallbacks, pair, damping=damping), made


def _collect(block: nn.Module, index: int, name: str, batches: list[Batch], seen: Seen) -> list[Moments]:
    """Show `seen` a layer's inputs, and give their moments; each forward ends where the layer is reached."""
    for batch in batches:

        def see(called: str, X: Tensor, batch: Batch = batch) -> None:
            if called != name:
                return
            seen.add(X, batch.inputs.pop(name) if name in batch.inputs else None, batch.first_row)
            if name in LAST.values():
                batch.seen[name] = X
            raise _CapturedError

        with _watch(block, index, batch, see), shortcuts(block, batch.seen):
            try:
                block(batch.hidden, **batch.block_kwargs[index])
            except _CapturedError:
                continue
    return seen.parts


def _outputs(
    block: nn.Module, index: int, batches: list[Batch], weights: Mapping[str, Tensor], i: int
) -> tuple[Tensor, Tensor]:
    """Give a block's output [B, T, C] for a batch, its layers having other weights, and the float model's."""
    batch = batches[i]
    assert batch.unquantized is not None
    made = call_with(block, f"model.layers.{index}.", weights, batch.hidden, **batch.block_kwargs[index])
    return made, batch.unquantized


def _follow(block: nn.Module, index: int, batches: list[Batch], *, keep: bool) -> None:
    """Send the float model's hidden states through the block, which still is float; `keep` what its layers read."""
    for batch in batches:
        assert batch.unquantized is not None
        with _watch(block, index, batch, batch.inputs.__setitem__ if keep else lambda *_: None):
            batch.unquantized = block(batch.unquantized, **batch.block_kwargs[index])


@contextmanager
def _watch(block: nn.Module, index: int, batch: Batch, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand the input [B, T, C] of the first layer of each group to `see`. Raises StageError where not finite."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            _check_finite(args[0], batch.first_row, f"the input of model.layers.{index}.{name}")
            see(name, args[0])

        return before

    handles = [block.get_submodule(group[0]).register_forward_pre_hook(hook(group[0])) for group in SHARED_INPUTS]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(X: Tensor, first_row: int, what: str) -> None:
    if all_finite(X):
        return
    row = first_row + int((~torch.isfinite(X).flatten(1).all(1)).nonzero()[0])
    raise StageError(f"calibration row {row} makes {what} not finite; check the model's weights or leave it out")


def _put(block: nn.Module, name: str, made: Tensor) -> None:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter), name
    weight.data = made.to(device=weight.device, dtype=weight.dtype)

"""Peak memory of preference and reward training, predicted: trl's trainers on padded rows, block by block as modules.

A pair is two sequences that are computed together. The reference is a pass without gradients while what the first pass
keeps is there; it works on less than the way back. DPO, IPO, KTO and GRPO never hold the logits of a batch: trl makes
them a tile of tokens and vocabulary at a time, twice. ORPO holds them all, and of a 4-bit base trl turns what is not in
4 bits into 32, so that all of ORPO computes in 32.

What follows from trl's code is within 15 % of measured peaks; `tests/test_preference_memory.py` holds it there.

Letters: those of `training_memory`.
"""

from __future__ import annotations

from edgetune.recipe_training import PAIRED, Adapt, Prefer
from edgetune.training_memory import (
    LENGTH_BYTES,
    MIB,
    PROCESS,
    Lengths,
    Shape,
    block_bytes,
    held_bytes,
    module_bytes,
    trained_numbers,
)

TILE = (4096, 32768)  # tokens and words of the vocabulary whose logits trl makes at once
TILE_BYTES = 29  # of a logit of a tile on its way back on a CPU, beside itself; on a GPU a kernel works in place
LOGITS = {"cpu": 4, "cuda": 5}  # copies of all logits that ORPO's way back holds; five follow from its code
TRL = 100 * MIB  # what trl imports beside what every training does


def preference_bytes(config: Prefer, shape: Shape, lengths: Lengths, device: str, b: int) -> float:
    """Predict the peak of resident memory on a CPU, of device memory on a GPU.

    `lengths` are those of single sequences, prompts and sampled answers included; `b` is `number_bytes` of the device.
    """
    adapter, gpu = Adapt(method=config.adapter, r=config.r), device.startswith("cuda")
    micro = config.micro_batch_size or config.batch_size
    n_sequences = micro * (2 if config.method in PAIRED else 1)
    longest, labels = lengths.rows[0][0], n_sequences * max(n for _, n in lengths.rows)
    tokens = n_sequences * longest
    held = held_bytes(adapter, shape, b)
    if config.method == "orpo" and adapter.four_bit and not gpu:
        held, b = held + (4 - b) * shape.embeddings, 4
    kept = tokens * module_bytes(config.adapter, shape, shape.Q, device, b)
    blocks = shape.n_layers * shape.C * b * tokens + kept if config.gradient_checkpointing else shape.n_layers * kept
    if config.method == "orpo":
        head = LOGITS["cuda" if gpu else "cpu"] * b * tokens * shape.V
    else:
        rows, words = min(labels if gpu else tokens, TILE[0]), min(shape.V, TILE[1])
        head = rows * words * (b if gpu else b + TILE_BYTES)
    backward = blocks + max(block_bytes(shape, tokens, b), float(head))
    gradients = 4.0 * trained_numbers(adapter, shape)
    working = backward + gradients if micro < config.batch_size else max(backward, gradients)
    n_lengths = min(len({n for n, _ in lengths.rows}), config.max_steps or len(lengths.rows))
    kernels = LENGTH_BYTES * n_lengths if b == 2 and not gpu else 0
    return PROCESS["cuda" if gpu else "cpu"] + TRL + held + working + kernels

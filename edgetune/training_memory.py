"""Peak memory of training, predicted from a model's shape, and the way of training that fits a budget.

All the time there are the base, and AdamW's two moments of what is trained. From the way forward to the way back each
block keeps what its backward reads, or with gradient checkpointing its input only, and the loss keeps logits at
labelled positions; as gradients come, this goes. Constants are fitted to measured peaks, and
`tests/test_training_memory.py` holds them.

Letters: C hidden size, I intermediate size, Q and K widths of queries and keys, V vocabulary, r rank, b bytes a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.compress.architectures import linear_shapes
from edgetune.data.render import Rendered
from edgetune.errors import RecipeError
from edgetune.recipe_training import LORA, Adapt

GB, MIB = 1e9, 1 << 20
NF4_BYTES = 0.5 + 0.015  # a weight: 4 bits, and its share of a double-quantized scale (arXiv:2305.14314)
# Python with all that training imports; a CUDA context (770 MiB on an H100) and what torch's allocator rounds up.
PROCESS = {"cpu": 1000 * MIB, "cuda": 900 * MIB}
PROCESS_FLOAT32 = 620 * MIB  # where nothing is in 16 bits on a CPU, oneDNN makes no kernels
SHORT = 256  # tokens of a row up to which attention is by plain products on a CPU: packed.SHORT
FUSED = ("llama", "mistral", "qwen2")
LOSS_BYTES = 14  # a logit on the way back: in float32, log-probability, two gradients; the allocator's holes
LENGTH_BYTES = 25 * MIB  # oneDNN's kernels in 16 bits for each length of a batch, made once and kept
LENGTH_STEP = 32  # lengths come in its multiples: packed.TOKENS
EVAL_ROWS = 32  # rows at once where training is watched, without a budget
PASS_TOKENS = 256  # what a pass over the blocks costs beside its tokens, in tokens
GROUPED = 50  # batches that are sorted at once, at most: Trainer's sampler
RECOMPUTING = 4 / 3  # time of a step with gradient checkpointing over one without


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on."""

    C: int
    I: int  # noqa: E741
    Q: int
    K: int
    V: int
    n_heads: int
    n_layers: int
    linear: int  # weights of all linear layers in blocks
    embeddings: int  # weights of embeddings and head, once where they are tied
    lora_per_rank: int
    fused: bool  # whether its blocks run as `fused_decoder`

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Read it from a `config.json`. Raises UnsupportedError for an unknown architecture."""
        shapes = linear_shapes(config)
        hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
        tied = bool(config.get("tie_word_embeddings", False))
        return cls(
            hidden, int(config["intermediate_size"]), shapes["model.layers.0.self_attn.q_proj"][0],
            shapes["model.layers.0.self_attn.k_proj"][0], vocabulary, int(config["num_attention_heads"]),
            int(config["num_hidden_layers"]),
            sum(R * C for R, C in shapes.values()), hidden * vocabulary * (1 if tied else 2),
            sum(R + C for R, C in shapes.values()), config["model_type"] in FUSED,
        )  # fmt: skip

    @property
    def weights(self) -> int:
        return self.linear + self.embeddings


@dataclass(frozen=True)
class Lengths:
    """Tokens and labels of rows, the longest first: what the largest batch is made of."""

    rows: tuple[tuple[int, int], ...]
    shared: int = 0  # tokens that all rows begin with, computed once a batch

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int]], shared: int = 0) -> Lengths:
        return cls(tuple(sorted(rows, reverse=True)), shared)

    @property
    def mean(self) -> tuple[float, float]:
        """Give own tokens and labels of the mean row."""
        n = len(self.rows)
        return sum(tokens for tokens, _ in self.rows) / n, sum(labels for _, labels in self.rows) / n

    def most(self, n_rows: int) -> tuple[int, int, int]:
        """Give tokens and labels of the `n_rows` longest rows together, and tokens of the longest."""
        rows = self.rows[:n_rows]
        missing = n_rows - len(rows)  # rows of which only the longest are known, or that come again
        tokens = sum(n for n, _ in rows) + missing * rows[-1][0] + self.shared
        return tokens, sum(n for _, n in rows) + missing * rows[-1][1], rows[0][0] + self.shared

    def drawn(self, n_rows: int, step: int = 0) -> tuple[int, int, int]:
        """Give the same as `most` of the batch that is to be expected in a step, the largest in the first.

        Rows are drawn in parts, each sorted and cut into batches: `order.GroupedByLength`. The longest row of all is
        in the first batch, the others of a part are as good as evenly spaced among all rows.
        """
        n_batches = max(min(len(self.rows) // (4 * n_rows), GROUPED), 1)
        first, apart = step % n_batches * n_rows, len(self.rows) / (n_batches * n_rows)
        if apart <= 1:  # one part, and rows come again
            return self.most(n_rows)
        rows = [self.rows[int((i + 0.5) * apart)] for i in range(first, first + n_rows)]
        return Lengths((self.rows[0], *rows[1:]) if step == 0 else tuple(rows), self.shared).most(n_rows)

    def spread(self, n_rows: int) -> int:
        """Give how many tokens lie between the longest batch of `n_rows` rows and the shortest."""
        if len(self.rows) < n_rows:  # only the longest are known, or rows come again
            return 0
        return sum(n for n, _ in self.rows[:n_rows]) - sum(n for n, _ in self.rows[-n_rows:])


def lengths_of(rows: Sequence[Rendered]) -> Lengths:
    """Measure rendered rows."""
    from edgetune.packed import shared_start

    shared = shared_start((row.ids for row in rows), min(row.start for row in rows) - 1)
    return Lengths.of([(len(row.ids) - shared, row.n_labels) for row in rows], max(shared, 0))


def number_bytes(device: str) -> int:
    """Bytes of a number in the dtype that a device trains in."""
    from edgetune.devices import compute_dtype

    return compute_dtype(device).itemsize


def peak_bytes(config: Adapt, shape: Shape, lengths: Lengths, device: str, b: int) -> float:
    """Predict the peak of resident memory on a CPU, of device memory on a GPU. `b` is `number_bytes` of the device."""
    on_gpu = device.startswith("cuda")
    process, in_float32 = PROCESS["cuda" if on_gpu else "cpu"], config.method == "full" and not on_gpu
    if in_float32:
        b, process = 4, PROCESS_FLOAT32  # its weights' dtype; a GPU's autocast holds activations in 16 bits
    micro = config.micro_batch_size or config.batch_size
    at_once = min(EVAL_ROWS, micro) if config.memory_gb is not None else EVAL_ROWS
    watched = min(at_once, config.eval_rows)
    tokens, labels, _ = lengths.most(watched)
    # Logits at labels, in float32, and their logarithms.
    watching = max(block_bytes(shape, tokens, b), float(labels * shape.V * (b + 8)))
    peak = 0.0
    for n_blocks, batch in _batches(config, shape, lengths, on_gpu=on_gpu):
        backward = _backward(config, shape, batch, device, b, n_blocks)
        gradients = 4.0 * trained_numbers(config, shape, n_blocks)
        # What is kept goes as gradients come, but for those that earlier rows of the step left. Gradients of all
        # weights do not fit into the holes.
        together = in_float32 or micro < config.batch_size
        working = backward + gradients if together else max(backward, gradients)
        peak = max(peak, held_bytes(config, shape, b, n_blocks) + max(working, watching))
    return process + peak + kernel_bytes(config, lengths, device, b)


def _batches(
    config: Adapt, shape: Shape, lengths: Lengths, *, on_gpu: bool
) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Give batches one of which takes most, and how many blocks each trains: `trained_numbers`."""
    micro, every = config.micro_batch_size or config.batch_size, config.unfreeze_steps
    if config.method != "full" or on_gpu:
        yield shape.n_layers + 1, lengths.most(micro)  # in 16 bits holes in freed memory take what is drawn less
    elif every is None:
        yield shape.n_layers + 1, lengths.drawn(micro)
    else:
        all_free = shape.n_layers * every
        for step in range(min(config.max_steps or all_free + 1, all_free)):
            yield 1 + step // every, lengths.drawn(micro, step)
        if config.max_steps is None or config.max_steps > all_free:
            yield shape.n_layers + 1, lengths.drawn(micro)


def kernel_bytes(config: Adapt, lengths: Lengths, device: str, b: int) -> float:
    """What oneDNN keeps for each length of a batch, in 16 bits on a CPU."""
    if b != 2 or device.startswith("cuda") or config.method == "full":
        return 0.0
    n_lengths = 1 + lengths.spread(config.micro_batch_size or config.batch_size) // LENGTH_STEP
    return float(LENGTH_BYTES * min(n_lengths, config.max_steps or n_lengths))


def held_bytes(config: Adapt, shape: Shape, b: int, n_blocks: int | None = None) -> float:
    """Weights, and AdamW's moments of what is trained: `trained_numbers`."""
    moments = 8.0 * trained_numbers(config, shape, n_blocks)
    if config.method == "full":
        # A pull holds the base, what is off from it and its squares; ewc also the weight of each square.
        pull = (16 if config.ewc else 0) or (8 if config.l2 else 0)
        return moments + (4.0 + pull) * shape.weights
    linear = (NF4_BYTES + (b if config.keep_dense else 0)) if config.four_bit else b
    return linear * shape.linear + b * shape.embeddings + moments + 4.0 * trained_numbers(config, shape, n_blocks)


def trained_numbers(config: Adapt, shape: Shape, n_blocks: int | None = None) -> int:
    """How many numbers are trained, all or with the last `n_blocks` blocks; one more counts embeddings.

    A head of its own is trained with the last block.
    """
    if config.method == "full":
        if n_blocks is None or n_blocks > shape.n_layers:
            return shape.weights
        return shape.linear * n_blocks // shape.n_layers + shape.embeddings - shape.C * shape.V
    return config.r * shape.lora_per_rank if config.method in LORA else 0


def _backward(config: Adapt, shape: Shape, batch: tuple[int, int, int], device: str, b: int, n_blocks: int) -> float:
    """What the last `n_blocks` blocks keep for the way back, with the one that is being worked on."""
    tokens, labels, _ = batch
    kept, n = _kept(config, shape, batch, device, b), min(n_blocks, shape.n_layers)
    blocks = n * shape.C * b * tokens + kept if config.gradient_checkpointing else n * kept
    return blocks + max(block_bytes(shape, tokens, b), float(labels * shape.V * (b + LOSS_BYTES)))


def _kept(config: Adapt, shape: Shape, batch: tuple[int, int, int], device: str, b: int) -> float:
    """What one block keeps for its backward: in our blocks what `fused_decoder` saves, in modules also their casts."""
    (tokens, _, longest), s = batch, shape
    by_products = longest <= SHORT and not device.startswith("cuda")  # then attention keeps its scores
    attended = s.n_heads * longest if by_products else s.Q
    if s.fused and config.method in ("qlora", "lora", "rslora") and not config.dropout:
        return float(tokens * b * (4 * s.C + 2 * s.Q + 2 * s.K + 3 * s.I + 7 * config.r + attended))
    return tokens * module_bytes(config.method, s, attended, device, b)


def module_bytes(method: str, shape: Shape, attended: int, device: str, b: int) -> float:
    """What a block that runs as modules keeps of a token for its backward; `attended` numbers are of attention."""
    s = shape
    if method == "ia3":  # frozen layers keep no input: activations, and what its factors multiply
        kept = b * (s.Q + 4 * s.K + 4 * s.I + attended)
    elif method == "prefix":  # padded rows, so torch's own attention
        kept = b * (4 * s.Q + 3 * s.I)
    else:
        kept = b * (8 * s.C + 4 * s.Q + 4 * s.K + 5 * s.I + attended)
    if b < 4:
        kept += 8 * s.C  # what a norm casts
    if method == "dora":  # peft's layer: each linear layer's input, and its outputs twice and more
        inputs, outputs = 5 * s.C + s.Q + s.I, s.Q + 2 * s.K + 2 * s.C + 2 * s.I
        kept += 2 * inputs + outputs if device.startswith("cuda") else 4 * inputs + 9 * outputs  # 16 bits, or 32
    return float(kept)


def block_bytes(shape: Shape, tokens: int, b: int) -> float:
    """What a block works on beside what it keeps: the gradients of its widest part, and one dequantized weight."""
    return float(b * (tokens * (6 * shape.I + 4 * shape.C) + 2 * shape.I * shape.C))


def fitted(config: Adapt, shape: Shape, lengths: Lengths, device: str, b: int) -> Adapt:
    """Choose rows at once and gradient checkpointing so that `memory_gb` suffices; the batch of a step stays.

    Of all ways that fit it is the fastest: few passes, and no block twice. Raises RecipeError where none fits.
    """
    if config.memory_gb is None:
        return config
    ways = [
        config.model_copy(update={"micro_batch_size": rows, "gradient_checkpointing": twice})
        for rows in range(config.batch_size, 0, -1) if config.batch_size % rows == 0
        for twice in ((False, True) if config.method != "prefix" else (False,))
    ]  # fmt: skip
    needs = [peak_bytes(way, shape, lengths, device, b) for way in ways]
    fits = [way for way, need in zip(ways, needs, strict=True) if need <= config.memory_gb * GB]
    if not fits:
        raise RecipeError(
            f"adapt.memory_gb={config.memory_gb:g}: {config.method} needs {min(needs) / GB:.1f} GB even in its "
            "smallest way; give more, shorten the rows (data.max_length), or hold the base in 4 bits (method: qlora)"
        )

    def cost(way: Adapt) -> float:
        assert way.micro_batch_size is not None, "it was just set"
        passes = config.batch_size // way.micro_batch_size
        tokens = passes * (lengths.most(way.micro_batch_size)[0] + PASS_TOKENS)
        return tokens * (RECOMPUTING if way.gradient_checkpointing else 1.0)

    return min(fits, key=cost)


def said(config: Adapt) -> str:
    """Say what was chosen: "4 rows at once, 4 times a step, with gradient checkpointing"."""
    micro = config.micro_batch_size or config.batch_size
    times = f", {config.batch_size // micro} times a step" if micro < config.batch_size else ""
    checkpointing = ", with gradient checkpointing" if config.gradient_checkpointing else ""
    return f"{micro} row{'s' if micro > 1 else ''} at once{times}{checkpointing}"

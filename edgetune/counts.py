"""What a prediction is reckoned from: sizes of a model, speeds of a machine, and how much text rows are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.compress.architectures import linear_shapes
from edgetune.data.formats import Row
from edgetune.data.render import Rendered
from edgetune.training_memory import Lengths, lengths_of
from edgetune.training_time import matmul_gflops


@dataclass(frozen=True)
class Sizes:
    """What the arithmetic needs of a model: weights of the linear layers, of the head, and the widths."""

    linear: int
    head: int
    lora_per_rank: int
    hidden: int
    intermediate: int
    vocabulary: int
    n_layers: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        """Read them from a `config.json`. Raises UnsupportedError for an unknown architecture."""
        shapes = linear_shapes(config).values()
        hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
        return cls(
            sum(R * C for R, C in shapes), hidden * vocabulary, sum(R + C for R, C in shapes), hidden,
            int(config["intermediate_size"]), vocabulary, int(config["num_hidden_layers"]),
        )  # fmt: skip

    @property
    def bytes_16(self) -> int:
        return 2 * (self.linear + self.head)

    def solving_bytes(self, solved: int) -> int:
        """Give the bytes of a block in 16 bits, before and after, and of its widest layers while they are solved."""
        h, i = self.hidden, self.intermediate
        return 4 * self.linear // self.n_layers + solved * max(28 * h * i, 14 * h * i + 8 * i**2)


@dataclass(frozen=True)
class Speeds:
    """Matrix products of a machine in GFLOP/s: in float32, and in the dtype that training computes in; and threads."""

    float32: float
    training: float
    threads: int = 2  # of torch, which share what is done element by element

    @classmethod
    def measure(cls, device: str) -> Speeds:
        """Measure this machine: its CPU, which runs what is exported, and the device that trains."""
        import torch

        from edgetune.devices import compute_dtype

        float32, dtype = matmul_gflops(torch.float32), compute_dtype(device)
        same = device == "cpu" and dtype == torch.float32
        return cls(float32, float32 if same else matmul_gflops(dtype, device), torch.get_num_threads())


UNKNOWN = Lengths(((0, 0),))


@dataclass(frozen=True)
class Counts:
    """How much text a set of rows is."""

    n_rows: int
    n_tokens: int
    n_labels: int
    lengths: Lengths = UNKNOWN

    @classmethod
    def of(cls, rows: Sequence[Rendered]) -> Counts:
        """Count rows; tokens that all of them begin with are computed once a batch and hardly count."""
        return cls.total(lengths_of(rows))

    @classmethod
    def total(cls, lengths: Lengths) -> Counts:
        """Add up rows."""
        return cls(len(lengths.rows), sum(n for n, _ in lengths.rows), sum(n for _, n in lengths.rows), lengths)

    @classmethod
    def guess(cls, rows: Iterable[Row]) -> Counts:
        """Guess before there is a tokenizer: four characters a token, and a template's tokens around each turn."""
        found, first = [], None
        for row in rows:
            first = row if first is None else first
            n_tokens = n_labels = 0
            for role, text in row.messages or (("assistant", row.text or ""),):
                if ((role, text),) != first.messages[:1]:  # what all rows begin with
                    n_tokens += len(text) // 4 + 6
                    n_labels += len(text) // 4 + 1 if role == "assistant" else 0
            found.append((n_tokens, n_labels))
        return cls.total(Lengths.of(found))


NOTHING = Counts(0, 0, 0)

"""Which merge is nearer to what was trained: measured on the rows set aside, against the adapter on its 4-bit base.

Shapes: N labelled positions of one row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgetune.adapt.base import load_base
from edgetune.compress.checkpoint import read_config
from edgetune.data.render import Rendered
from edgetune.devices import compute_dtype
from edgetune.progress import Report, silent

WAYS = ("base16", "base4")


@dataclass(frozen=True)
class Choice:
    """The merge with the smallest divergence, and what was measured: one entry for the adapter and each way."""

    into: str
    table: list[dict[str, Any]]


def kept_bytes(base: Path, rows: Sequence[Rendered]) -> int:
    """Give the bytes that the adapter's float32 log-probabilities take while `choose` works."""
    return 4 * int(read_config(base)["vocab_size"]) * sum(row.n_labels for row in rows)


def choose(
    base: Path,
    adapter: Path,
    rows: Sequence[Rendered],
    work: Path,
    *,
    device: str = "cpu",
    progress: Report = silent,
) -> Choice:
    """Score the adapter on its 4-bit base, then each merge, as `device` computes; one model is in memory at a time.

    The adapter's log-probabilities wait in `work` meanwhile: they are N x V for each row.
    """
    from peft import PeftModel

    from edgetune.adapt.merge import merged

    trained = PeftModel.from_pretrained(load_base(base, device, four_bit=True), str(adapter))
    total = len(rows) * (1 + len(WAYS))
    for place, logits in enumerate(labelled_logits(trained, rows)):
        np.save(work / f"row-{place}.npy", logits.numpy())
        progress(place + 1, total, "rows, the adapter")
    del trained
    kept = [np.load(work / f"row-{place}.npy", mmap_mode="r") for place in range(len(rows))]
    table = [_score("adapter on the nf4 base", rows, (torch.from_numpy(np.array(one)) for one in kept), kept)]
    for number, into in enumerate(WAYS, 1):
        stored = merged(base, adapter, four_bit=into == "base4").to(torch.bfloat16)
        model = stored.to(device=device, dtype=compute_dtype(device))
        logits_of = _told(labelled_logits(model, rows), number * len(rows), total, f"rows, {into}", progress)
        table.append(_score(into, rows, logits_of, kept))
        del stored, model
    return Choice(min(table[1:], key=lambda entry: float(entry["kl_per_token"]))["hop"], table)


def _told(found: Iterator[Tensor], done: int, total: int, label: str, progress: Report) -> Iterator[Tensor]:
    """Pass on what is found and report each."""
    for place, one in enumerate(found, done + 1):
        yield one
        progress(place, total, label)


@torch.inference_mode()
def labelled_logits(model: Any, rows: Sequence[Rendered]) -> Iterator[Tensor]:
    """Logits [N, V] in float32 at the positions that predict a labelled token, row by row."""
    model.eval()
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = causal.get_input_embeddings().weight.device
    for row in rows:
        ids = torch.tensor([row.ids], device=device)
        places = torch.tensor(row.labels[1:], device=device).nonzero().flatten()
        yield causal(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0].float().cpu()


def _score(hop: str, rows: Sequence[Rendered], found: Iterator[Tensor], kept: Sequence[Any]) -> dict[str, Any]:
    """One line of the table: KL to the adapter and what the seam ledger shows, means over labelled tokens."""
    n_tokens = n_right = n_exact = 0
    kl = nll = 0.0
    for row, logits, reference in zip(rows, found, kept, strict=True):
        gold = torch.tensor(row.ids[1:])[torch.tensor(row.labels[1:])]
        own = functional.log_softmax(logits.double(), dim=-1)
        other = functional.log_softmax(torch.from_numpy(np.array(reference)).double(), dim=-1)
        kl += float((other.exp() * (other - own)).sum())
        nll += float(functional.nll_loss(own, gold, reduction="sum"))
        right = own.argmax(-1) == gold
        n_tokens, n_right, n_exact = n_tokens + len(gold), n_right + int(right.sum()), n_exact + int(right.all())
    return {
        "hop": hop,
        "n_rows": len(rows),
        "kl_per_token": round(kl / n_tokens, 6),
        "exact_match": round(n_exact / len(rows), 6),
        "token_accuracy": round(n_right / n_tokens, 6),
        "nll_per_token": round(nll / n_tokens, 6),
    }

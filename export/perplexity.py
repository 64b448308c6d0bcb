"""Has an exported file the perplexity of the same weights in torch? Paired token by token, on general text.

Letters: W windows, T tokens of one, V vocabulary; d is a token's negative log likelihood in the runtime less that in
torch, nats. exp(mean d) - 1 is by how much the runtime's perplexity is higher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.general import general_text
from edgetune.data.golden import Golden
from edgetune.errors import ContractError
from edgetune.export.gguf_write import read_config
from edgetune.export.parity import Logits

N_TOKENS, WINDOW = 1536, 128  # in all, and of a window
LIMIT = 0.005  # that the two perplexities may lie apart, as a share, where products are in floats
EIGHT_BITS = 0.05  # where activations are rounded to 8 bits: sound files of SmolLM2-135M lay at up to 1.7 %
SURE = 0.999  # that a file which is refused lies beyond the limit
LONGEST = 16  # characters of a token, at most, in what is cut for a window

Floats = NDArray[np.float64]
Losses = Sequence[float] | Floats


@dataclass(frozen=True)
class Perplexity:
    """Two perplexities of the same tokens, and how surely they differ."""

    reference: float
    runtime: float
    mean: float  # of d
    error: float  # standard error of that mean, over windows
    n_windows: int
    n_tokens: int  # that are predicted

    @property
    def difference(self) -> float:
        """By how much the runtime's perplexity is higher, as a share of the reference's."""
        return float(np.expm1(self.mean))

    @property
    def least(self) -> float:
        """The smallest difference that chance leaves possible, as a share; 0 where none is sure."""
        from scipy.stats import t

        sure = abs(self.mean) - float(t.ppf(SURE, self.n_windows - 1)) * self.error
        return 0.0 if sure <= 0 else float(np.expm1(np.copysign(sure, self.mean)))

    def note(self, limit: float) -> dict[str, Any]:
        """Give the manifest's entry: four significant digits, and the limit that was held."""
        shares = {"difference": self.difference, "error": self.error, "limit": limit}
        return {
            "reference": float(f"{self.reference:.6g}"),
            "runtime": float(f"{self.runtime:.6g}"),
            **{name: float(f"{share:.4g}") for name, share in shares.items()},
            "n_windows": self.n_windows,
            "n_tokens": self.n_tokens,
        }


def text_windows(folder: Path) -> list[list[int]]:
    """Cut general text, the half that measures, into windows of ids by a model folder's own tokenizer.

    The windows lie evenly over the text, so that they share little; each begins as a conversation does, with a BOS or
    without. They are shorter, and more, where the model takes fewer positions.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    golden = Golden.read(folder)
    begin = [golden.bos_id] * golden.n_bos if golden.bos_id is not None else []
    size = min(WINDOW, int(read_config(folder).get("max_position_embeddings") or WINDOW))
    text = general_text(None, "measure")
    count = N_TOKENS // size
    found = []
    for start in range(0, len(text), len(text) // count)[:count]:
        word = text.find(" ", start)
        ids = tokenizer.encode(text[word : word + LONGEST * size], add_special_tokens=False).ids
        found.append([*begin, *ids][:size])
    return found


def token_losses(logits: Logits, ids: Sequence[int]) -> Floats:
    """Give the negative log likelihood of ids[1:] under logits [T, V]: [T - 1], nats.

    Raises ContractError where one is not finite.
    """
    rows = logits[:-1]
    top = rows.max(axis=1)
    chosen = rows[np.arange(len(rows)), np.asarray(ids[1:])]
    total = np.exp(rows - top[:, None]).sum(axis=1, dtype=np.float64)
    losses: Floats = np.log(total) + top.astype(np.float64) - chosen
    if not np.isfinite(losses).all():
        raise ContractError("logits of general text are not finite")
    return losses


def compare(reference: Iterable[Losses], runtime: Iterable[Losses]) -> Perplexity:
    """Compare the losses of the same windows, each [T - 1]. Tokens of a window hang together, windows do not."""
    ours, theirs = ([np.asarray(window, np.float64) for window in side] for side in (reference, runtime))
    assert len(ours) == len(theirs) > 1, "both sides read the same windows, two or more"
    sizes = np.array([len(window) for window in ours], np.float64)
    sums = np.array([float((b - a).sum()) for a, b in zip(ours, theirs, strict=True)])
    n_windows, n_tokens = len(ours), int(sizes.sum())
    mean = float(sums.sum() / n_tokens)
    squares = float(((sums - mean * sizes) ** 2).sum())
    error = (squares * n_windows / (n_windows - 1)) ** 0.5 / n_tokens
    reference_loss = float(np.concatenate(ours).mean())
    return Perplexity(
        float(np.exp(reference_loss)), float(np.exp(reference_loss + mean)), mean, error, n_windows, n_tokens
    )


def hold_perplexity(found: Perplexity, what: str, limit: float = LIMIT) -> None:
    """Raise ContractError where the perplexities lie further apart than `limit`, and chance cannot have done it.

    The rule: the mean of d, brought nearer to zero by Student's t (99.9 %, W - 1 degrees of freedom: 4.0 for 12
    windows) times its standard error over windows, still means more than `limit`. So of files that lie on the limit one
    in 1,000 is refused.
    """
    if not abs(found.least) <= limit:
        raise ContractError(
            f"perplexity of {what} on {found.n_tokens} tokens of general text is {found.runtime:.5g} in its runtime "
            f"and {found.reference:.5g} in torch: {found.difference:+.2%}, standard error {found.error:.2%}, "
            f"where {limit:.2%} and what chance adds are allowed"
        )

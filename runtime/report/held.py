"""What an exported file was held to before it could be a candidate, as sentences from its manifest's notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from edgetune.compress.vllm_rules import SAYS

# of `export.parity.Tolerance`
LIMITS = {"mean_kl": "mean KL", "max_abs": "largest difference", "top1_agreement": "same first token"}


class Held(NamedTuple):
    """A sentence, and the note that it was read from."""

    text: str
    note: str


def held(notes: dict[str, Any]) -> Iterator[Held]:
    """Give the contract, the proof of the integers, the parity of logits and vLLM's rules, each where it is noted."""
    if (found := notes.get("contract")) is not None:
        extra = found.get("extra_stop_ids")
        yield Held(
            "its runtime agrees with training on chat template, BOS, stop set and the ids of "
            f"{found['tokens']:,} tokens ({found['conversations']} conversations, {found['texts']} texts)"
            + (f"; it stops at {extra} too, which stand in no golden answer" if extra else ""),
            "contract",
        )
    if (found := notes.get("integers")) is not None:
        yield Held(f"the integers of all {found['layers']} layers are the checkpoint's", "integers")
    parity = notes.get("parity") or {}
    for what, measured in [("", parity)] if "n_positions" in parity else [(f", {k}", v) for k, v in parity.items()]:
        limits = ", ".join(f"{LIMITS[name]} {limit:g}" for name, limit in measured["tolerance"].items())
        yield Held(
            f"logits against the same weights in torch{what.replace('_', ' ')}: "
            f"mean KL {measured['mean_kl']:.2g} nats, "
            f"the same first token at {measured['top1_agreement']:.1%} of {measured['n_positions']:,} positions "
            f"(allowed: {limits})",
            "parity",
        )
    for which, says in SAYS.items():
        if rules := (notes.get("vllm") or {}).get(which):
            yield Held(f"{says}: {'; '.join(rules)}", f"vllm.{which}")

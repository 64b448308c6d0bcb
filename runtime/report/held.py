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
    """Give the contract, the proof of the integers, parity, perplexity, the end of generation and vLLM's rules.

    Each where it is noted.
    """
    if (found := notes.get("contract")) is not None:
        extra = found.get("extra_stop_ids")
        yield Held(
            "its runtime agrees with training on chat template, BOS, stop set and the ids of "
            f"{found['tokens']:,} tokens ({found['conversations']} conversations, {found['texts']} texts)"
            + (f"; it stops at {extra} too, which stand in no golden answer" if extra else ""),
            "contract",
        )
    if (found := notes.get("integers")) is not None:
        kept, n_layers = found.get("kept", found["layers"]), found["layers"]
        if kept:
            which = f"all {n_layers} layers" if kept == n_layers else f"{kept} of {n_layers} layers"
            yield Held(f"the integers of {which} are the checkpoint's", "integers")
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
    if (found := notes.get("perplexity")) is not None:
        yield Held(
            f"perplexity of {found['n_tokens']:,} tokens of general text in its runtime {found['runtime']:.4g}, of the "
            f"same weights in torch {found['reference']:.4g}: {found['difference']:+.2%}, standard error "
            f"{found['error']:.2%} (allowed: {found['limit']:.2%} and what chance adds){_in_floats(found)}",
            "perplexity",
        )
    if (found := notes.get("generation")) is not None:
        ties = f", but for {found['near_ties']} near ties" if found["near_ties"] else ""
        yield Held(
            f"generation in {found['loop']} goes on through the end of a golden answer and stops at each end token; at "
            f"{found['positions']:,} places of golden answers its first choice is to end where that of the same "
            f"weights in torch is{ties}",
            "generation",
        )
    for which, says in SAYS.items():
        if rules := (notes.get("vllm") or {}).get(which):
            yield Held(f"{says}: {'; '.join(rules)}", f"vllm.{which}")


def _in_floats(found: dict[str, Any]) -> str:
    """What the perplexity of the same graph is with float activations, where that was measured, too."""
    floats = found.get("float_activations")
    return f"; with float activations {floats['difference']:+.2%} ({floats['limit']:.2%})" if floats else ""

"""What an export was held to stands in the report."""

from __future__ import annotations

from typing import Any

from edgetune.compress.scheme import Scheme
from edgetune.compress.vllm_rules import broken_rules
from edgetune.export.parity import ParityResult, Tolerance
from edgetune.runtime.report import beside
from edgetune.runtime.report.held import held
from tests.report_sample import sample_report

PARITY = ParityResult(max_abs=2.5, mean_kl=0.0028531, top1_agreement=0.98412, n_positions=566).note(
    Tolerance(mean_kl=0.05)
)
CONTRACT = {"conversations": 8, "texts": 4, "tokens": 1566, "n_bos": 1, "stop_ids": [2], "extra_stop_ids": [0, 4]}


PERPLEXITY = {
    "reference": 14.679, "runtime": 14.741, "difference": 0.004224, "error": 0.0025, "limit": 0.005, "n_windows": 12,
    "n_tokens": 1524,
}  # fmt: skip
GENERATION = {"loop": "llama-cpp-python", "positions": 401, "ends": 8, "near_ties": 0}


def said(notes: dict[str, Any]) -> list[str]:
    return [found.text for found in held(notes)]


def test_each_proof_is_a_sentence() -> None:
    assert said({}) == []
    assert said({"contract": CONTRACT, "integers": {"layers": 210, "differences": 0}, "parity": PARITY}) == [
        "its runtime agrees with training on chat template, BOS, stop set and the ids of 1,566 tokens "
        "(8 conversations, 4 texts); it stops at [0, 4] too, which stand in no golden answer",
        "the integers of all 210 layers are the checkpoint's",
        "logits against the same weights in torch: mean KL 0.0029 nats, the same first token at 98.4% of 566 positions "
        "(allowed: mean KL 0.05)",
    ]
    both = said({"parity": {"float_activations": PARITY, "shipped": PARITY}})
    assert [one.split(":")[0] for one in both] == [
        "logits against the same weights in torch, float activations",
        "logits against the same weights in torch, shipped",
    ]  # fmt: skip


def test_perplexity_and_the_end_of_generation_are_sentences() -> None:
    assert said({"perplexity": PERPLEXITY, "generation": GENERATION}) == [
        "perplexity of 1,524 tokens of general text in its runtime 14.74, of the same weights in torch 14.68: +0.42%, "
        "standard error 0.25% (allowed: 0.50% and what chance adds)",
        "generation in llama-cpp-python goes on through the end of a golden answer and stops at each end token; at 401 "
        "places of golden answers its first choice is to end where that of the same weights in torch is",
    ]
    (tied,) = said({"generation": GENERATION | {"near_ties": 2}})
    assert tied.endswith("in torch is, but for 2 near ties")


def test_broken_rules_of_vllm_are_named() -> None:
    scheme = Scheme(bits=5, group_size=64, sym=False)
    rules = broken_rules("gptq", [scheme], {"q": (64, 64)})
    (loads, runs) = said({"vllm": rules})
    assert loads.startswith("vLLM would not load it: ")
    assert rules["reads"]
    assert runs.startswith("Marlin, vLLM's fast kernel, would not run it: ")
    assert said({"vllm": {"reads": [], "marlin": []}}) == []


def test_the_report_shows_them_with_their_place() -> None:
    report = sample_report(n_rows=20)
    name = next(iter(report.artifacts))
    report.artifacts[name]["notes"] = {"contract": CONTRACT}
    (line,) = [one for one in beside.lines(report) if one.source.endswith("notes.contract")]
    assert (line.subject, line.source) == (name, f"artifacts.{name}.notes.contract")

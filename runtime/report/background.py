"""What stands behind the figures: training, machine, method, stages, and all that went otherwise than asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from edgetune.runtime.evidence import Accuracy, Latency, Machine, Report
from edgetune.runtime.report import measures
from edgetune.runtime.report.columns import DASH, number, seconds
from edgetune.runtime.statistics import flips, rows_in_words


def curve(training: dict[str, Any] | None, key: str) -> list[tuple[float, float]]:
    """Read a curve of (optimizer step, loss) as `adapt.sft` notes it."""
    points = [(float(step), float(loss)) for step, loss in (training or {}).get(key) or []]
    return [point for point in points if all(map(math.isfinite, point))]


CURVES = {
    "heldout_exact_match": "Exact match of the rows set aside",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_s": "Tokens a second",
    "reward_margin": "Reward margin, chosen less rejected",
    "reward": "Mean reward",
    "heldout_pair_accuracy": "Pairs set aside whose chosen answer is likelier",
    "heldout_reward": "Mean reward of the rows set aside",
}


def curves(training: dict[str, Any] | None) -> list[tuple[str, list[tuple[float, float]]]]:
    """What was noted by step beside the loss, as (title, curve); preference training after `adapt`."""
    preferred = (training or {}).get("preference")
    found = [(title, curve(training, key)) for key, title in CURVES.items()]
    if isinstance(preferred, dict):
        titles = {"loss": "Loss", "heldout_loss": "Loss of the rows set aside", **CURVES}
        found += [(f"Preference training: {title}", curve(preferred, key)) for key, title in titles.items()]
    return [(title, points) for title, points in found if len(points) > 1]


def facts(training: dict[str, Any] | None) -> list[tuple[str, str]]:
    flat: dict[str, Any] = {}
    for key, value in (training or {}).items():
        inner = {f"{key}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        flat |= {k.replace("_", " ").capitalize(): v for k, v in inner.items()}
    return [
        (k, f"{v:,}" if isinstance(v, int) else str(v)) for k, v in flat.items() if isinstance(v, str | int | float)
    ]


def machine_facts(machine: Machine) -> list[tuple[str, str]]:
    return [
        ("Processor", f"{machine.cpu}, {machine.cores} cores"),
        ("Instructions", ", ".join(machine.cpu_flags) or "none that engines use"),
        ("Memory", f"{machine.memory_mib:,} MiB"),
        ("GPU", machine.gpu or "none"),
        ("System", machine.platform),
        ("Python", machine.python),
    ]


def method(report: Report) -> list[str]:
    said = [
        "Exact match is teacher-forced: at every position of the gold answer, its end included, the most likely token "
        "is the gold token. Under greedy decoding that is the same as generating the answer and comparing it.",
        "Each measurement runs in a child process of its own; candidates are interleaved so that drift hits all alike; "
        "warm-up runs are kept apart and left out.",
    ]
    bench = report.recipe.get("bench", {})
    if bench:
        lengths = " and ".join(str(n) for n in bench.get("prompt_tokens", []))
        new = bench.get("new_tokens")
        new = " and ".join(map(str, new)) if isinstance(new, list) else new
        said.append(
            f"Latency: prompts of {lengths} tokens, {new} new tokens, {bench.get('repeats')} "
            f"measured runs after {bench.get('warmup')} warm-up runs, {bench.get('threads')} threads."
        )
        if (bench.get("runs") or 1) > 1:
            said.append(
                f"All of it {bench['runs']} times in fresh processes; the noise floor is the repeatability limit of "
                "ISO 5725-1 of their medians, and no verdict on latency is finer than it."
            )
        said.append(
            "Percentiles have bounds by order statistics, which hold whatever the distribution. Tokens of one "
            "generation count for fewer samples than they are (Kish's design effect), so the bounds are wide, and of "
            "few generations a high percentile has none above. Tables show 95 % intervals; a budget takes each bound "
            "one-sided at 95 %."
        )
    accuracy = measures.accuracy_budget(report)
    said.append(
        "Exact match has Wilson's score interval at 95 %. A loss has one-sided bounds: Tango's score bounds for exact "
        "match and, with effective counts of flips, for slot F1 and tasks, Student's t for the perplexity of a task. "
        "Agreement and slot F1 have Wilson's interval at what their tokens and slots are worth, since those of one row "
        "hang together (Korn and Graubard); the mean divergence has a bootstrap-t interval over whole rows, its median "
        f"and p99 order statistics; perplexity a bootstrap-t over whole texts where there are {measures.FEW_TEXTS} or "
        "more. All at 95 %."
    )
    if any(seam.exact_rows is not None for seam in report.seams):
        said.append("A change from hop to hop has Tango's two-sided 95 % interval over the rows that both hops scored.")
    n_judged = sum(any(" loss" in check.budget for check in verdict.checks) for verdict in report.verdicts)
    if n_judged > 1:
        said.append(
            f"{n_judged} candidates are judged on the same rows: Holm's correction keeps the chance that any of them "
            f"passes which loses as much as the margin at {1 - accuracy.confidence:.0%} for all together."
        )
    said += _rows_in_words(report, accuracy)
    said.append(
        "Divergence is taken from a reference pack: every token of at least 2 % and the rest as one bucket, and inside "
        "the rest an unbiased estimate from two drawn tokens."
    )
    return said


def _rows_in_words(report: Report, budget: measures.Judged) -> Iterator[str]:
    """Say which loss above zero the held-out rows can show, at the share of rows that flipped most."""
    scores = {score.subject.name: score for score in report.accuracy}
    reference = scores.get(report.reference)
    if reference is None or budget.max_loss is None or budget.metric != "exact_match":
        return
    shares = []
    for verdict in report.verdicts:
        score = scores.get(verdict.candidate)
        if score is not None and measures.paired(score, reference):
            changed = flips([r.exact for r in score.rows], [r.exact for r in reference.rows])
            shares.append((changed.harmful + changed.beneficial) / len(score.rows))
    if shares and max(shares) > 0:
        margins = sorted({0.01, budget.max_loss} - {0})  # no loss at all is shown by no number of rows
        n_rows = len(reference.rows)
        yield (
            "; ".join(
                rows_in_words(n_rows, margin, max(shares), budget.confidence, n_candidates=len(shares))
                for margin in margins
            )
            + "."
        )


def stage_line(stage: dict[str, Any]) -> tuple[str, str, str, str]:
    took = stage.get("seconds")
    return (
        str(stage.get("name", DASH)),
        DASH if took is None else seconds(float(took)),
        "made before" if stage.get("done_before") else "made now",
        str(stage.get("identity") or DASH)[:12],
    )


def notes(report: Report, scores: dict[str, tuple[int, Accuracy]]) -> Iterator[tuple[str, str]]:
    """Give (subjects, what is to be known of them); what holds of several is said once."""
    subjects: dict[str, list[str]] = {}
    for subject, text in _notes(report, scores):
        subjects.setdefault(text, []).append(subject)
    for text, found in subjects.items():
        yield ", ".join(dict.fromkeys(found)), text


def _notes(report: Report, scores: dict[str, tuple[int, Accuracy]]) -> Iterator[tuple[str, str]]:
    for failure in report.failures:
        yield failure.subject, f"{failure.stage} failed: {failure.reason}"
    for name, manifest in report.artifacts.items():
        for fallback in manifest.get("fallbacks", []):
            yield name, f"fell back: {fallback}"
    measurements: list[Accuracy | Latency] = [*report.accuracy, *report.latency]
    for measured in measurements:
        if measured.load.busy:
            what = "accuracy" if isinstance(measured, Accuracy) else "latency"
            share = number(measured.load.others_during * 100, 0)
            yield measured.subject.name, f"the machine was busy during {what}: other processes held {share} % of it"
    timed = next((one.subject for one in report.latency if one.subject.name == report.reference), None)
    for latency in report.latency:
        if timed is not None and latency.subject.on_gpu != timed.on_gpu:
            ours, theirs = ("a GPU" if one.on_gpu else "the CPU" for one in (latency.subject, timed))
            yield (
                latency.subject.name,
                f"timed on {ours}, but {timed.name} on {theirs}: their times compare devices too",
            )
        for case in latency.cases:
            if case.steady is False:
                yield latency.subject.name, f"warm-up with {case.prompt_tokens} prompt tokens never became steady"
    reference = scores.get(report.reference)
    for name, (_, score) in scores.items():
        if reference and not measures.paired(score, reference[1]):
            yield name, "scored on other rows than the reference: no loss, no flips"
    for warning in report.warnings:
        yield "", warning

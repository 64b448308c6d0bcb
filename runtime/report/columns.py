"""The figures that the report shows: one literal table of columns, and how a number is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DASH = "–"


@dataclass(frozen=True)
class Column:
    """One figure of a subject."""

    key: str
    group: Literal["accuracy", "latency", "footprint"]
    title: str
    unit: str
    digits: int
    summary: bool  # shown before the reader asks for more
    meaning: str  # one plain line
    source: str  # where its raw samples stand in report.json
    listed: bool = True  # a column of the table of candidates; else the table of its section shows it


COLUMNS: tuple[Column, ...] = (
    Column("exact", "accuracy", "Exact match", "%", 1, True,
           "Share of held-out rows whose whole greedy answer is the gold answer; below it the 95 % interval.",
           "accuracy[].rows[].exact"),
    Column("loss", "accuracy", "Loss", "points", 2, True,
           "Score of the reference minus score of this one on the same rows, in percentage points; "
           "below it the bounds that the verdict judges.",
           "accuracy[].rows[]"),
    Column("harmful", "accuracy", "Flips to wrong", "rows", 0, False,
           "Rows that the reference answers right and this one answers wrong.",
           "accuracy[].rows[].exact"),
    Column("beneficial", "accuracy", "Flips to right", "rows", 0, False,
           "Rows that the reference answers wrong and this one answers right.",
           "accuracy[].rows[].exact"),
    Column("mcnemar", "accuracy", "Flips, p", "McNemar", 3, False,
           "Chance of flips as one-sided as these, were both directions equally likely: McNemar's exact test, with "
           "Holm's correction for the number of candidates.",
           "accuracy[].rows[].exact"),
    Column("slot_f1", "accuracy", "Slot F1", "%", 1, False,
           "Harmonic mean of precision and recall over all fields (slots) of the answers, of the rows whose answers "
           "were made; below it the 95 % interval and their number.",
           "accuracy[].rows[].slot_true_positives, .slot_predicted, .slot_gold"),
    Column("kl", "accuracy", "KL per token", "nats", 4, False,
           "How far the next-token probabilities moved from the reference, mean over answer tokens; 0 is no change.",
           "accuracy[].rows[].kl_tokens"),
    Column("kl_p50", "accuracy", "KL median", "nats", 5, False,
           "KL divergence from the reference that half of the answer tokens do not exceed.",
           "accuracy[].rows[].kl_tokens"),
    Column("kl_p99", "accuracy", "KL p99", "nats", 3, False,
           "KL divergence from the reference that 99 % of the answer tokens do not exceed.",
           "accuracy[].rows[].kl_tokens"),
    Column("kl_max", "accuracy", "KL max", "nats", 2, False,
           "KL divergence from the reference at the answer token where it is largest.",
           "accuracy[].rows[].kl_tokens"),
    Column("agree", "accuracy", "Top-1 agreement", "%", 2, False,
           "Share of answer tokens where this one and the reference rank the same token first.",
           "accuracy[].rows[].n_agree, .n_tokens"),
    Column("alike", "accuracy", "Never diverges", "% of rows", 1, False,
           "Share of rows where this one and the reference rank the same token first at every answer token.",
           "accuracy[].rows[].first_divergence"),
    Column("parts_at", "accuracy", "First divergence", "token", 0, False,
           "Of the rows that diverge, the median answer token at which this one and the reference first rank another "
           "token first; 1 is the first of the answer.",
           "accuracy[].rows[].first_divergence"),
    Column("ppl", "accuracy", "Perplexity", "general text", 2, False,
           "Perplexity of text outside the task; a rise over base is what the adaptation forgot.",
           "accuracy[].text.nll, .n_tokens"),
    Column("ttft_p50", "latency", "TTFT p50", "ms", 1, False,
           "Time to first token: from the prompt's arrival to the first token chosen; half of the runs are faster.",
           "latency[].cases[].generations[].ttft_ms"),
    Column("ttft_p90", "latency", "TTFT p90", "ms", 1, False,
           "Time to first token that 90 % of the measured runs keep.",
           "latency[].cases[].generations[].ttft_ms", listed=False),
    Column("ttft_p95", "latency", "TTFT p95", "ms", 1, True,
           "Time to first token that 95 % of the measured runs keep.",
           "latency[].cases[].generations[].ttft_ms"),
    Column("ttft_p99", "latency", "TTFT p99", "ms", 1, False,
           "Time to first token that 99 % of the measured runs keep; of fewer than 100 runs it is near the slowest.",
           "latency[].cases[].generations[].ttft_ms", listed=False),
    Column("itl_p50", "latency", "ITL p50", "ms", 2, False,
           "Inter-token latency: the wait for each further token; half of the waits are shorter.",
           "latency[].cases[].generations[].itl_ms"),
    Column("itl_p90", "latency", "ITL p90", "ms", 2, False,
           "Inter-token latency that 90 % of the measured tokens keep.",
           "latency[].cases[].generations[].itl_ms", listed=False),
    Column("itl_p95", "latency", "ITL p95", "ms", 2, True,
           "Inter-token latency that 95 % of the measured tokens keep.",
           "latency[].cases[].generations[].itl_ms"),
    Column("itl_p99", "latency", "ITL p99", "ms", 2, False,
           "Inter-token latency that 99 % of the measured tokens keep.",
           "latency[].cases[].generations[].itl_ms", listed=False),
    Column("tpot_p50", "latency", "TPOT p50", "ms", 2, False,
           "Time per output token: the mean wait for a further token of one run, (last − first) / (n − 1); half of the "
           "runs are faster.",
           "latency[].cases[].generations[].itl_ms", listed=False),
    Column("tpot_p90", "latency", "TPOT p90", "ms", 2, False,
           "Time per output token that 90 % of the measured runs keep.",
           "latency[].cases[].generations[].itl_ms", listed=False),
    Column("tpot_p95", "latency", "TPOT p95", "ms", 2, False,
           "Time per output token that 95 % of the measured runs keep.",
           "latency[].cases[].generations[].itl_ms", listed=False),
    Column("tpot_p99", "latency", "TPOT p99", "ms", 2, False,
           "Time per output token that 99 % of the measured runs keep; of fewer than 100 runs it is near the slowest.",
           "latency[].cases[].generations[].itl_ms", listed=False),
    Column("prefill", "latency", "Prefill", "tokens/s", 0, False,
           "Prompt tokens divided by the median time to first token.",
           "latency[].cases[].generations[].ttft_ms"),
    Column("decode", "latency", "Decode", "tokens/s", 1, False,
           "Further tokens divided by the sum of their own waits; nothing is subtracted.",
           "latency[].cases[].generations[].itl_ms"),
    Column("load", "latency", "Load", "ms", 0, False,
           "Time to open the artifact in its engine, apart from all other figures.",
           "latency[].load_ms"),
    Column("first_run", "latency", "First run", "ms", 0, False,
           "Time to first token of the very first generation, on the shortest prompt, apart from all other figures.",
           "latency[].first_run_ms"),
    Column("size", "footprint", "Size", "MB", 1, True,
           "Size on disk of everything that ships, in 10⁶ bytes.",
           "latency[].subject.size_bytes"),
    Column("memory", "footprint", "Peak memory", "MB", 0, True,
           "Highest resident memory of the child process that measured latency, in 10⁶ bytes.",
           "latency[].peak_rss_bytes"),
    Column("bpw", "footprint", "Bits per weight", "bits", 2, False,
           "Stored bits per weight, scales and zero points counted.",
           "artifacts.*.scheme.bits_per_weight"),
)  # fmt: skip
BY_KEY = {column.key: column for column in COLUMNS}


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Write a number with fixed decimals, thousands separators and a true minus; a dash where there is none."""
    if value is None or value != value:
        return DASH
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval_text(low: float | None, high: float | None, digits: int, *, signed: bool = False) -> str:
    """Write an interval, or the one bound that it has; nothing where it has none."""
    below, above = (number(x, digits, signed=signed) for x in (low, high))
    if low is None or high is None:
        return f"{below} or more" if low is not None else f"{above} or less" if high is not None else ""
    return f"{below} to {above}"


def seconds(value: float) -> str:
    """Write a duration as people say it: 4.2 s, 12 min 05 s, 1 h 03 min."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class Budget:
    """One budget as a heading: the column it bounds, and the factor from the stored value to its unit."""

    column: str
    title: str
    unit: str
    factor: float
    digits: int


# key in the evidence -> how it is shown
BUDGETS = {
    "exact_match loss": Budget("loss", "Exact match loss", "points", 100.0, 2),
    "slot_f1 loss": Budget("loss", "Slot F1 loss", "points", 100.0, 2),
    "itl_ms p95": Budget("itl_p95", "ITL p95", "ms", 1.0, 2),
    "ttft_ms p95": Budget("ttft_p95", "TTFT p95", "ms", 1.0, 1),
    "itl_ms p50": Budget("itl_p50", "ITL p50", "ms", 1.0, 2),
    "ttft_ms p50": Budget("ttft_p50", "TTFT p50", "ms", 1.0, 1),
    "size_mb": Budget("size", "Size", "MB", 1.0, 1),
    "peak_memory_mb": Budget("memory", "Peak memory", "MB", 1.0, 0),
}


def budget(key: str) -> Budget:
    """Say how a budget is shown; one that is not known is shown as it is stored."""
    if key.endswith(" loss") and ": " in key:  # of a task, whose losses have a table of their own
        unit = "%" if key.endswith("perplexity loss") else "points"  # its loss is a relative rise
        return Budget("", f"{key[0].upper()}{key[1:]}".replace("_", " "), unit, 100.0, 2)
    return BUDGETS.get(key, Budget("", key, "", 1.0, 3))

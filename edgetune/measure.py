"""The measuring stages: each writes an `evidence` artifact, so that a finished measurement is not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from pydantic import TypeAdapter

from edgetune.artifact import Artifact, draft, file_digest, identity, write_text
from edgetune.errors import ArtifactError
from edgetune.progress import Report, silent
from edgetune.recipe import Bench
from edgetune.runtime import accuracy as scoring
from edgetune.runtime import latency as timing
from edgetune.runtime.accuracy import ScoredRow
from edgetune.runtime.engine import TokenRow
from edgetune.runtime.engines.tensorrt_engine import EngineFiles
from edgetune.runtime.evidence import Accuracy, Failure, Latency, TaskScore
from edgetune.runtime.machine import facts
from edgetune.runtime.reference_rows import FILE as ROWS
from edgetune.runtime.reference_rows import ReferenceRows
from edgetune.runtime.tasks import TaskWork, score_tasks
from edgetune.runtime.worker import Job

ACCURACY_STAGE = "measure.accuracy/5"
LATENCY_STAGE = "measure.latency/3"
TASKS_STAGE = "measure.tasks/2"
PACK = "reference.npz"
ACCURACY = "accuracy.json"
PACKAGE_OF_ENGINE = {
    "torch": "torch",
    "llama.cpp": "llama-cpp-python",
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime-genai",
}
Timed = TypeAdapter(list[Latency | Failure])
Tasks = TypeAdapter(list[TaskScore])


def accuracy_identity(
    job: Job,
    parents: Sequence[str],
    rows: Sequence[ScoredRow],
    text_rows: Sequence[TokenRow],
    *,
    generate_rows: int | None,
    reference: str | None,
    stands_for: str | None = None,
) -> str:
    """Identity of the evidence that `accuracy` would make; `reference` is the identity of the reference's evidence."""
    sources = _workload(rows, text_rows, reference, stands_for)
    return identity(ACCURACY_STAGE, _accuracy_config(job, generate_rows), parents, sources)


def accuracy(
    job: Job,
    parents: Sequence[Artifact],
    out: Path,
    *,
    rows: Sequence[ScoredRow],
    text_rows: Sequence[TokenRow],
    tokenizer: Path,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    generate_rows: int | None,
    reference: Artifact | None,
    stands_for: str | None = None,
    timeout_s: float = scoring.TIMEOUT_S,
    progress: Report = silent,
) -> Artifact:
    """Score an artifact on the held-out rows in its own runtime; without `reference` it becomes the reference.

    With `stands_for`, the digest of the reference's rows in the ids of another vocabulary, it is neither: no
    probability of the one is one of the other.
    A reference's pack has its rows beside it, so that other boxes can score against it (`edgetune score`). Of the
    first `generate_rows` rows (None: all) those that are not exact are continued, so that slots can be counted.
    """
    sources = _workload(rows, text_rows, reference.identity if reference else None, stands_for)
    builds = reference is None and stands_for is None
    with draft(
        out,
        kind="evidence",
        stage=ACCURACY_STAGE,
        config=_accuracy_config(job, generate_rows),
        parents=parents,
        sources=sources,
    ) as pending:
        found = scoring.score(
            job,
            rows,
            text_rows,
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            generate_rows=generate_rows,
            reference=reference.path / PACK if reference else None,
            build_reference=pending.path / PACK if builds else None,
            stands_for=stands_for,
            work=pending.work,
            timeout_s=timeout_s,
            progress=lambda done, total: progress(done, total, "rows"),
        )
        if builds:
            ReferenceRows.of(rows, text_rows, stop_ids).save(pending.path / ROWS)
        write_text(pending.path / ACCURACY, found.model_dump_json(indent=1) + "\n")
    return pending.artifact


def read_accuracy(evidence: Artifact) -> Accuracy:
    """Read the evidence of `accuracy`. Raises ArtifactError where it is damaged."""
    try:
        return Accuracy.model_validate_json((evidence.path / ACCURACY).read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{evidence.path / ACCURACY} is damaged: {str(error).splitlines()[0]}") from error


def tasks_identity(job: Job, parents: Sequence[str], works: Sequence[TaskWork]) -> str:
    """Identity of the evidence that `tasks` would make."""
    return identity(TASKS_STAGE, _accuracy_config(job, None), parents, _tasks(works))


def tasks(
    job: Job,
    parents: Sequence[Artifact],
    out: Path,
    *,
    works: Sequence[TaskWork],
    tokenizer: Path,
    stop_ids: Sequence[int],
    timeout_s: float = scoring.TIMEOUT_S,
    progress: Report = silent,
) -> Artifact:
    """Score an artifact on the recipe's tasks in its own runtime."""
    config, sources = _accuracy_config(job, None), _tasks(works)
    with draft(out, kind="evidence", stage=TASKS_STAGE, config=config, parents=parents, sources=sources) as pending:
        found = score_tasks(
            job,
            works,
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            work=pending.work,
            timeout_s=timeout_s,
            progress=lambda done, total: progress(done, total, "rows"),
        )
        write_text(pending.path / "tasks.json", Tasks.dump_json(found, indent=1).decode() + "\n")
    return pending.artifact


def read_tasks(evidence: Artifact) -> list[TaskScore]:
    """Read the evidence of `tasks`. Raises ArtifactError where it is damaged."""
    try:
        return Tasks.validate_json((evidence.path / "tasks.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{evidence.path / 'tasks.json'} is damaged: {str(error).splitlines()[0]}") from error


def latency_identity(jobs: Sequence[Job], parents: Sequence[str], bench: Bench, stream: Sequence[int]) -> str:
    """Identity of the evidence that `latency` would make on this machine."""
    return identity(LATENCY_STAGE, _latency_config(jobs, bench), parents, _stream(stream))


def latency(
    jobs: Sequence[Job],
    parents: Sequence[Artifact],
    out: Path,
    *,
    bench: Bench,
    stream: Sequence[int],
    seed: int,
    progress: Report = silent,
) -> Artifact:
    """Time all candidates together. A candidate that fails is a Failure in the evidence."""
    config, sources = _latency_config(jobs, bench), _stream(stream)
    with draft(out, kind="evidence", stage=LATENCY_STAGE, config=config, parents=parents, sources=sources) as pending:
        found = timing.measure(
            jobs,
            bench,
            timing.make_prompts(stream, bench.prompt_tokens),
            seed=seed,
            progress=progress,
        )
        write_text(pending.path / "latency.json", Timed.dump_json(found, indent=1).decode() + "\n")
    return pending.artifact


def read_latency(evidence: Artifact) -> list[Latency | Failure]:
    """Read the evidence of `latency`. Raises ArtifactError where it is damaged."""
    try:
        return Timed.validate_json((evidence.path / "latency.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{evidence.path / 'latency.json'} is damaged: {str(error).splitlines()[0]}") from error


def is_clean(found: Sequence[Latency | Failure]) -> bool:
    """Tell whether every candidate was timed to its end on a machine that was not busy."""
    return all(isinstance(one, Latency) and not one.load.busy for one in found)


def _accuracy_config(job: Job, generate_rows: int | None) -> dict[str, object]:
    return {
        "name": job.name,
        "engine": _engine(job),
        "n_threads": job.n_threads,
        "settings": _settings(job),
        "generate_rows": generate_rows,
    }


def _engine(job: Job) -> list[str | None]:
    """Engine and version of its package: an upgrade measures anew."""
    package = PACKAGE_OF_ENGINE.get(job.engine)
    if job.engine == "tensorrt":
        package = EngineFiles.read(job.path).settings["library"]
    return [job.engine, metadata.version(package) if package else None]


def _settings(job: Job) -> dict[str, object]:
    """Settings without folders, which are the store's business; the digest of what lies there takes their place."""
    return {
        key: file_digest(Path(value) / "manifest.json") if key == "adapter" else value
        for key, value in job.settings.items()
    }


def _workload(
    rows: Sequence[ScoredRow], text_rows: Sequence[TokenRow], reference: str | None, stands_for: str | None
) -> dict[str, str]:
    digests = {"rows": scoring.workload_digest(rows), "text": scoring.workload_digest(text_rows)}
    more = {"reference": reference, "stands_for": stands_for}
    return digests | {name: value for name, value in more.items() if value}


def _tasks(works: Sequence[TaskWork]) -> dict[str, str]:
    digests = {f"task {work.task.name}": work.digest for work in works}
    return digests | {f"{work.task.name} stands for": work.stands_for for work in works if work.stands_for}


def _latency_config(jobs: Sequence[Job], bench: Bench) -> dict[str, object]:
    return {
        "bench": bench.as_config(),
        "jobs": [[job.name, _engine(job), job.n_threads, _settings(job)] for job in jobs],
        "machine": facts(),
    }


def _stream(stream: Sequence[int]) -> dict[str, str]:
    return {"prompts": identity("prompts", {"ids": list(stream)})}

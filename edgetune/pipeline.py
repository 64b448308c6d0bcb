"""Runs a recipe from base to report: what is missing is made, what fails becomes a row, the rest goes on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from edgetune import measure, sources, workload
from edgetune.artifact import Artifact, Store, write_text
from edgetune.compress import moments
from edgetune.compress.chain import vocabulary
from edgetune.devices import compute_dtype
from edgetune.errors import ArtifactError
from edgetune.estimate import PROBE
from edgetune.export_names import export_name, last_hop
from edgetune.graph import IMPORTANCE, SENSITIVITY, TIMES, Graph, scored_steps, why_not_run
from edgetune.outcome import Hop, Outcome
from edgetune.plan import Preflight, known_stages, preflight
from edgetune.progress import reporting
from edgetune.questions import Asked
from edgetune.recipe import Candidate, Recipe
from edgetune.runtime.accuracy import TIMEOUT_S
from edgetune.runtime.evidence import Failure, Latency, Report, TaskScore
from edgetune.runtime.report.write import write_report
from edgetune.runtime.tasks import TaskWork
from edgetune.runtime.worker import Job
from edgetune.sources import DOWNLOAD
from edgetune.stages import Stages
from edgetune.steps import Steps
from edgetune.task_work import load_probe, probe_task
from edgetune.trained import train

REFERENCE = "reference"  # link to the reference's evidence, which holds its pack and the rows of it
EXTRA_NEW_TOKENS = 16  # a wrong answer may be so much longer than the longest right one


def run(recipe: Recipe, folder: Path, store: Store, console: Console, *, measure_again: bool = False) -> Report:
    """Carry out a recipe and write its report into `folder`. Raises before any work where it cannot be done.

    `measure_again` times anew what was timed before; a timing on a busy machine or with a failure always is.
    """
    with reporting(console, DOWNLOAD) as progress:
        ready = preflight(recipe, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.json", recipe.model_dump_json(indent=1) + "\n")
    return Pipeline(recipe, ready, Stages(store, folder, console), measure_again=measure_again).run()


class Pipeline:
    """One recipe's way from base to report. Each method makes or finds one thing."""

    def __init__(self, recipe: Recipe, ready: Preflight, stages: Stages, *, measure_again: bool = False) -> None:
        self.recipe, self.ready, self.stages, self.measure_again = recipe, ready, stages, measure_again

    def prepare(self) -> Artifact:
        """Make the base and everything that its tokenizer decides."""
        made = self.ready.source.identity
        source = self.ready.source
        self.base = self.stages.run("base", made, lambda out, progress: sources.run(source, out, progress))
        self.work = workload.load(self.recipe.data, self.base)
        self.graph = Graph(self.recipe, self.base.identity, self.work)
        known_stages(self.graph)  # what it refuses would else end the run after training
        self.asked = Asked(self.recipe, self.graph)
        return self.base

    def adapt(self) -> Artifact:
        """Train what the recipe trains; without it the base is the model."""
        self.trained = train(self.recipe, self.stages, self.graph, self.work, self.base)
        self.model = self.trained.model
        return self.model

    def build(self, name: str, candidate: Candidate) -> list[Artifact] | None:
        """Compress and export one candidate: what each step made, the last of which ships; None where it failed."""
        made = self.steps.run(name, candidate)
        if made is None or candidate.export is None:
            return made
        label = f"{name}: {export_name(candidate)}"
        chain = [self.model, *made]
        shipped = self.stages.attempt(name, label, lambda: self._export(label, name, candidate, chain))
        return None if shipped is None else [*made, shipped]

    def _export(self, label: str, name: str, candidate: Candidate, chain: list[Artifact]) -> Artifact:
        made, export, source = self.graph.shipped(candidate), candidate.export, chain[-1]
        assert export is not None, "only a candidate with an export gets here"
        if export.tensorrt is not None:
            from edgetune.export import tensorrt

            engine = export.tensorrt
            return self.stages.run(
                label, made, lambda out, progress: tensorrt.run(engine, source, out, progress=progress)
            )
        if export.onnx is not None:
            from edgetune.export import onnx

            config = export.onnx
            return self.stages.run(label, made, lambda out, progress: onnx.run(config, source, out, progress=progress))
        from edgetune.export import gguf

        assert export.gguf is not None, "an export has exactly one key"
        to_gguf, importance, device = export.gguf, None, self.recipe.device
        more: dict[str, Any] = {}
        weighed, rows = self.graph.moments(candidate), self.graph.gguf_rows(candidate)
        if weighed is not None:
            assert rows is not None, "what is weighed is calibrated"
            floats = chain[candidate.n_float_steps]
            found = self.stages.run(
                f"{name}: {IMPORTANCE}",
                weighed,
                lambda out, progress: moments.run(floats, out, calibration=rows, device=device, progress=progress),
            )
            importance = moments.read(found)
            if to_gguf.allocate is not None:
                times = self._time_types(name, candidate, floats, found)
                more = {"times": times, "sensitivity": self._measure_types(name, candidate, floats, found)}
        calibrated: dict[str, Any] = {"calibration_digest": rows.digest} if rows is not None else {}
        if rows is not None and to_gguf.gptq:
            calibrated |= {"rows": rows.ids, "device": device}
        return self.stages.run(
            label,
            made,
            lambda out, progress: gguf.run(
                to_gguf, source, out, moments=importance, progress=progress, **more, **calibrated
            ),
        )

    def _time_types(self, name: str, candidate: Candidate, floats: Artifact, weighed: Artifact) -> Artifact | None:
        """See what a token takes in each type here, where the budget is one of time; refuse before more is measured."""
        from edgetune.export import gguf_times
        from edgetune.export.gguf_allocation import check_times
        from edgetune.export.gguf_write import read_config

        made, rows = self.graph.types_times(candidate), self.graph.types_measured(candidate)
        config = candidate.export.gguf if candidate.export else None
        if made is None or rows is None or config is None or config.allocate is None:
            return None
        bench, seed = self.recipe.bench, self.recipe.seed
        found = self.stages.run(
            f"{name}: {TIMES}",
            made,
            lambda out, progress: gguf_times.run(
                config, floats, out, moments=weighed, measured=rows, bench=bench, runtime=candidate.runtime, seed=seed,
                progress=progress,
            ),
        )  # fmt: skip
        check_times(config.allocate, read_config(floats.path), gguf_times.read(found))
        return found

    def _measure_types(self, name: str, candidate: Candidate, floats: Artifact, weighed: Artifact) -> Artifact:
        """Measure what ggml's types cost each layer, where a GGUF export chooses them by it."""
        from edgetune.export import gguf_sensitivity

        made, rows = self.graph.types_sensitivity(candidate), self.graph.types_measured(candidate)
        asked = candidate.export.gguf.allocate if candidate.export and candidate.export.gguf else None
        assert made is not None, "only what is allocated is measured"
        assert rows is not None, "by rows"
        assert asked is not None, "of choices"
        return self.stages.run(
            f"{name}: {SENSITIVITY}",
            made,
            lambda out, progress: gguf_sensitivity.run(
                asked, floats, out, moments=weighed, measured=rows, device=self.recipe.device, progress=progress
            ),
        )

    def score(
        self,
        job: Job,
        parents: list[Artifact],
        *,
        generate: bool,
        reference: Artifact | None,
        called: str | None = None,
        n_tokens: int | None = None,
    ) -> Artifact:
        """Score one subject on the held-out rows; `generate` continues wrong answers as far as the recipe asks.

        `called` names the stage where the subject has no name of its own. `n_tokens` is the size of its vocabulary
        where that was pruned.
        """
        asked = self.asked.of(n_tokens)
        reference = reference if asked.stands_for is None else None
        generate_rows = self.recipe.data.generated_rows if generate else 0
        job = self._on_device(job)
        made = measure.accuracy_identity(
            job, [p.identity for p in parents], asked.rows, asked.text_rows, generate_rows=generate_rows,
            reference=reference.identity if reference else None, stands_for=asked.stands_for,
        )  # fmt: skip
        longest = max(len(row.ids) - row.start for row in asked.rows)
        return self.stages.run(
            f"{called or job.name}: accuracy",
            made,
            lambda out, progress: measure.accuracy(
                job, parents, out, rows=asked.rows, text_rows=asked.text_rows, tokenizer=asked.tokenizer,
                stop_ids=asked.stop_ids, max_new_tokens=longest + EXTRA_NEW_TOKENS,
                generate_rows=generate_rows, reference=reference, stands_for=asked.stands_for,
                timeout_s=self.recipe.data.score_timeout_s or TIMEOUT_S, progress=progress,
            ),
        )  # fmt: skip

    def score_tasks(
        self, job: Job, artifact: Artifact, works: list[TaskWork] | None = None, called: str = "tasks",
        n_tokens: int | None = None,
    ) -> Artifact:  # fmt: skip
        """Score one subject on `works`, the recipe's tasks where absent; `n_tokens` as `score` takes it."""
        asked = self.asked.of(n_tokens)
        job, scored = self._on_device(job), works if works is not None else asked.tasks
        return self.stages.run(
            f"{job.name}: {called}",
            measure.tasks_identity(job, [artifact.identity], scored),
            lambda out, progress: measure.tasks(
                job, [artifact], out, works=scored, tokenizer=asked.tokenizer,
                stop_ids=asked.stop_ids, timeout_s=self.recipe.data.score_timeout_s or TIMEOUT_S,
                progress=progress,
            ),
        )  # fmt: skip

    def score_probe(self) -> list[TaskScore]:
        """Ask the base and what was trained the general probe, both in the dtype of training."""
        task = probe_task(self.recipe)
        if task is None:
            return []
        works, asked = [load_probe(task, self.base.path)], list[TaskScore]()
        for name, artifact in (("base", self.base), ("reference", self.model)):
            job = self._job(name, artifact, dtype=self._training_dtype)
            found = self.stages.attempt(
                name,
                PROBE,
                lambda j=job, a=artifact: self.score_tasks(j, a, works, PROBE),  # type: ignore[misc]
            )
            asked += measure.read_tasks(found) if found is not None else []
        return asked

    def _hops_of_steps(self, name: str, candidate: Candidate, made: list[Artifact], reference: Artifact) -> list[Hop]:
        """Score the models on the way; candidates that share a step share its score."""
        hops = []
        for place, (step, between) in enumerate(zip(scored_steps(candidate), made, strict=False)):
            n_tokens = vocabulary(candidate, place + 1)
            job, hop = Job.of(step, between, n_threads=self.recipe.bench.threads), f"{name}: {step}"
            evidence = self.stages.attempt(
                name,
                "accuracy",
                lambda j=job, a=between, c=hop, n=n_tokens: self.score(  # type: ignore[misc]
                    j, [a], generate=False, reference=reference, called=c, n_tokens=n
                ),
            )
            if evidence is not None:
                hops.append(Hop.read(hop, evidence))
        return hops

    def run(self) -> Report:
        """Do everything, and write the report."""
        self.prepare()
        self.adapt()
        self.steps = Steps(self.recipe, self.stages, self.graph, self.base, self.model)
        reference = self.score(self._job("reference", self.model), [self.model], generate=True, reference=None)
        _link(self.stages.folder / REFERENCE, reference.path)
        hops = [*self._hops_before(reference), Hop.read(self.trained.hop(self.recipe), reference)]
        found = Outcome(self.recipe, self.stages, self.work, self.trained, hops, {"reference": hops[-1].accuracy})
        found.probe = self.score_probe()
        if self.recipe.tasks:
            found.tasks += measure.read_tasks(self.score_tasks(self._job("reference", self.model), self.model))
        for name, candidate in self.recipe.candidates.items():
            made = self.build(name, candidate)
            if made is not None:
                found.hops += self._hops_of_steps(name, candidate, made, reference)
                self._ship(name, candidate, made[-1] if made else self.model, reference, found)
        run_here = {n: a for n, a in found.shipped.items() if why_not_run(self.recipe.candidates[n]) is None}
        found.updates = self.steps.updates
        found.timed = self._time(run_here)
        report = found.report()
        write_report(report, self.stages.folder)
        return report

    def _ship(self, name: str, candidate: Candidate, artifact: Artifact, reference: Artifact, found: Outcome) -> None:
        """Link what a candidate ships, and score it where this machine runs it."""
        job, n_tokens = self._job(name, artifact), vocabulary(candidate)
        found.shipped[name], found.sizes[name] = artifact, job.size_bytes
        _link(self.stages.folder / "candidates" / name, artifact.path)
        if why_not_run(candidate) is not None:
            return
        evidence = self.stages.attempt(
            name,
            "accuracy",
            lambda: self.score(job, [artifact], generate=True, reference=reference, n_tokens=n_tokens),
        )
        if evidence is not None:
            found.hops.append(Hop.read(f"{name}: {last_hop(candidate)}", evidence))
            found.scored[name] = found.hops[-1].accuracy
        if self.recipe.tasks:
            asked = self.stages.attempt(name, "tasks", lambda: self.score_tasks(job, artifact, n_tokens=n_tokens))
            found.tasks += measure.read_tasks(asked) if asked is not None else []

    def _job(self, name: str, artifact: Artifact, **settings: Any) -> Job:
        """The job of an artifact, in the engine that the recipe gives its candidate, else in the one that ships it.

        An adapter runs on the base that it was trained on, and ships with it.
        """
        threads, candidate = self.recipe.bench.threads, self.recipe.candidates.get(name)
        if artifact.manifest.kind != "adapter":
            runtime = candidate.runtime if candidate is not None else None
            engine = runtime.engine if runtime is not None else None
            return Job.of(
                name, artifact, n_threads=threads, engine=engine, **(runtime.settings if runtime else {}), **settings
            )
        under, four_bit = self.trained.under(self.recipe, artifact)
        job = Job.of(name, under, n_threads=threads, **settings, adapter=str(artifact.path), quantize_base=four_bit)
        return replace(job, size_bytes=under.size_bytes + artifact.size_bytes)

    def _on_device(self, job: Job) -> Job:
        """Let torch score where it trained; times are taken where the recipe's `runtime` says."""
        if job.engine != "torch" or "device" in job.settings or self.recipe.device == "cpu":
            return job
        return replace(job, settings=job.settings | {"device": self.recipe.device})

    @property
    def _training_dtype(self) -> str:
        return str(compute_dtype(self.recipe.device)).removeprefix("torch.")

    def _hops_before(self, reference: Artifact) -> list[Hop]:
        """Score what comes before the reference, in the dtype of training."""
        hops = []
        for hop, name, artifact in self.trained.before(self.recipe):
            apart = artifact.manifest.kind == "adapter"
            parents = [self.trained.under(self.recipe, artifact)[0], artifact] if apart else [artifact]
            job = self._job(name, artifact, dtype=self._training_dtype)
            found = self.score(job, parents, generate=False, reference=reference)
            hops.append(Hop.read(hop, found))
        return hops

    def _time(self, shipped: dict[str, Artifact]) -> list[Latency | Failure]:
        bench = self.recipe.bench
        jobs = [self._job("reference", self.model, dtype="bfloat16")]
        jobs += [self._job(name, artifact) for name, artifact in shipped.items()]
        parents = [self.model, *shipped.values()]
        sizes = [n for name in shipped if (n := vocabulary(self.recipe.candidates[name])) is not None]
        stream = self.work.prompt(max(bench.prompt_tokens))
        if sizes:  # all get the same ids, which all have; no engine takes longer over one than over another
            stream = [token % min(sizes) for token in stream]
        made = measure.latency_identity(jobs, [p.identity for p in parents], bench, stream)
        before = self.stages.store.get(made)
        if before is not None and (self.measure_again or not measure.is_clean(measure.read_latency(before))):
            self.stages.store.forget(made)
        evidence = self.stages.run(
            "latency",
            made,
            lambda out, progress: measure.latency(
                jobs, parents, out, bench=bench, stream=stream, seed=self.recipe.seed, progress=progress
            ),
        )
        return measure.read_latency(evidence)


def _link(link: Path, target: Path) -> None:
    """Point `link` at an artifact of the store, replacing what it pointed at before in one step."""
    if link.exists() and not link.is_symlink():
        raise ArtifactError(f"{link} is not a link of edgetune's; move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    beside.replace(link)

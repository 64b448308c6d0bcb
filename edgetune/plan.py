"""What a recipe will do, and what can be refused before the first hour is spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import workload
from edgetune.artifact import Artifact, Store
from edgetune.backends import require
from edgetune.compress import chain
from edgetune.compress.allocate import schemes
from edgetune.compress.architectures import SUPPORTED, linear_shapes
from edgetune.compress.prune import tokenizer_files
from edgetune.compress.vllm_rules import SAYS, broken_rules
from edgetune.counts import UNKNOWN, Counts, Speeds
from edgetune.data.checks import prompt_digest, refuse_few, refuse_leaks
from edgetune.data.task_rows import read_examples
from edgetune.devices import check_device
from edgetune.errors import DataError, EdgetuneError, UnsupportedError
from edgetune.estimate import Cost, Estimator, measured_stages
from edgetune.graph import Graph, learns_rows, stage_names, why_not_run
from edgetune.hub import is_hub_id
from edgetune.progress import Report, silent
from edgetune.recipe import Candidate, Recipe
from edgetune.recipe_tasks import OF_FLIPS
from edgetune.runtime.statistics import rows_in_words
from edgetune.sources import Source, find
from edgetune.task_work import check_task, guess_counts, probe_task
from edgetune.training_memory import Lengths, said

EXPECTED_FLIPS = 0.03  # share of rows whose answer changes, before it was measured


@dataclass(frozen=True)
class Preflight:
    """A recipe that can be carried out, as far as that can be known before it is."""

    source: Source
    model_config: dict[str, Any]


def preflight(recipe: Recipe, *, weights: bool = True, progress: Report = silent) -> Preflight:
    """Check data, base, candidates and packages before any work. Raises an error that names what is wrong.

    A base on a hub is downloaded, which `progress` tells of; without `weights` only what says what it is.
    """
    workload.check_files(recipe.data, trained=learns_rows(recipe))
    probe = probe_task(recipe)
    for task in (*recipe.tasks, *([probe] if probe is not None else [])):
        check_task(task)
    source = find(recipe.base, recipe.revision, weights=weights, progress=progress)
    config = source.model_config()
    for name, candidate in recipe.candidates.items():
        try:
            check_candidate(candidate, config)
        except EdgetuneError as error:
            raise type(error)(f"candidates.{name}: {error}") from error
    if any(chain.vocabulary(candidate) is not None for candidate in recipe.candidates.values()):
        tokenizer_files.check_source(source)
    if recipe.adapt is not None:
        from edgetune.adapt import methods

        methods.check(recipe.adapt, config)
        if recipe.adapt.memory_gb is not None and config.get("model_type") not in SUPPORTED:
            named = ", ".join(config.get("architectures") or []) or config.get("model_type")
            raise UnsupportedError(
                f"adapt.memory_gb: what {named} takes is not known; set micro_batch_size and gradient_checkpointing"
            )
    if recipe.prefer is not None:
        from edgetune.adapt import preference, rewards

        require("trl")
        rewards.sources_of(recipe.prefer.rewards)
        asked = [example.rows[0] for example in preference.read(recipe.prefer)]
        heldout = workload.heldout_rows(recipe.data)
        held = recipe.data.heldout or recipe.data.sources[0].path  # a split is taken out of the training rows
        refuse_leaks([(prompt_digest(row), row.line) for row in asked], heldout, Path(recipe.prefer.train), Path(held))
    distilled = [part for candidate in recipe.candidates.values() for part in candidate.distilled]
    for student in {part.student for part in distilled if part.student is not None}:
        if is_hub_id(student):
            find(student, weights=weights, progress=progress)  # now, while it is shown
    for part in (recipe.adapt, recipe.prefer, *distilled):
        for logger in part.report_to if part is not None else ():
            if logger != "tensorboard":
                require(logger)
    runtimes = (found.runtime for found in recipe.candidates.values())
    for device in (recipe.device, *(r.torch.device for r in runtimes if r is not None and r.torch is not None)):
        check_device(device or "cpu")
    return Preflight(source, config)


def known_stages(graph: Graph) -> list[tuple[str, str]]:
    """Give `graph.stages`, once what only token ids tell is refused: too few rows, too little general text, no prompts.

    Raises DataError.
    """
    if learns_rows(graph.recipe):
        refuse_few(len(graph.work.train), graph.recipe.data.places, graph.work.n_too_long)
    for name, candidate in graph.recipe.candidates.items():
        for config in candidate.distilled:
            if config.writes and not any(row.asks for row in graph.work.train):
                raise DataError(
                    f"candidates.{name}: distill.{config.writes}: no training row has a prompt with an answer that is "
                    "learned; leave it out"
                )
    return list(graph.stages())


def check_candidate(candidate: Candidate, model_config: dict[str, Any]) -> None:
    """Refuse a chain of compression and export that this architecture or format cannot take.

    The exporter is asked about the config that the chain will make.
    """
    planned = chain.check(candidate, model_config)
    if candidate.export is None:
        return
    if candidate.export.gguf is not None:
        from edgetune.export import gguf

        if candidate.quantizer is not None and (candidate.export.gguf.gptq or candidate.export.gguf.allocate):
            raise UnsupportedError(gguf.TWICE if candidate.export.gguf.gptq else gguf.ROUNDED)
        gguf.check_rows(candidate.export.gguf, planned, chain.chosen_sizes(candidate))
        gguf.check(candidate.export.gguf, planned)
        require("llama_cpp")
    if candidate.export.onnx is not None:
        from edgetune.export import onnx

        onnx.check(candidate.export.onnx, planned, candidate.quantizer)
        require("onnxruntime_genai")
    if candidate.export.tensorrt is not None:
        from edgetune.export import tensorrt

        tensorrt.check(candidate.export.tensorrt, planned, candidate.quantizer)
        for backend in ("onnx", "onnxruntime", candidate.export.tensorrt.library.replace("-", "_")):
            require(backend)


def rows_said(recipe: Recipe) -> str | None:
    """Say whether the rows can show the loss that the accuracy budget allows, to all candidates together.

    How many rows will flip is not known yet, so EXPECTED_FLIPS is taken; the report says it with what was seen. None
    where there is no such budget, it allows no loss, which no number of rows shows, or its metric is not one of rows
    that are right or wrong.
    """
    budget = recipe.budgets.accuracy
    if budget is None or budget.metric not in OF_FLIPS or budget.max_loss == 0:
        return None
    tasks = {task.name: task for task in recipe.tasks}
    n_rows = len(read_examples(tasks[budget.task]) if budget.task else workload.heldout_rows(recipe.data))
    judged = sum(why_not_run(candidate) is None for candidate in recipe.candidates.values())
    return rows_in_words(n_rows, budget.max_loss, EXPECTED_FLIPS, budget.confidence, n_candidates=max(judged, 1))


@dataclass(frozen=True)
class PlannedStage:
    """One line of the plan. `done` is None where an earlier stage must run before it can be known.

    `cost` is None where the architecture is one that edgetune exports and knows no more of.
    """

    name: str
    done: bool | None
    cost: Cost | None
    how: str | None = None  # what was chosen to fit a budget of memory


def served(candidate: Candidate, model_config: dict[str, Any]) -> str | None:
    """Say what vLLM's rules make of the integers that a candidate ships; None where it ships another format."""
    config = candidate.quantizer
    if config is None or candidate.export is not None:
        return None
    shapes = linear_shapes(chain.configs(candidate, model_config)[-1])
    broken = broken_rules(config.checkpoint, list(schemes(config).values()), shapes)
    said = [f"{says}: {'; '.join(broken[which])}" for which, says in SAYS.items() if broken[which]]
    chosen = "; of bits and groups, where a layer gets them" if said and config.allocate is not None else ""
    rules = "vLLM loads it, and Marlin, its fast kernel, runs it, by their rules"
    return f"{'. '.join(said)}{chosen}" if said else rules


def plan(recipe: Recipe, store: Store, ready: Preflight | None = None) -> list[PlannedStage]:
    """List what a recipe makes and measures, in order, which artifacts the store already has, and what each costs.

    `ready` is what `preflight` without weights gave, where it was asked already.
    """
    ready = ready or preflight(recipe, weights=False)
    base = store.get(ready.source.identity)
    if base is None:
        train = Counts.guess(workload.train_rows(recipe.data))
        heldout = Counts.guess(workload.heldout_rows(recipe.data))
        states: list[tuple[str, bool | None]] = [(name, None) for name in stage_names(recipe)]
        states[0] = ("base", False)
    else:
        work = workload.load(recipe.data, base)
        train, heldout = Counts.of(work.train), Counts.of(work.heldout)
        stages = known_stages(Graph(recipe, base.identity, work, weights=False))
        states = [(name, store.get(made) is not None) for name, made in stages]
    states += [(name, None) for name in measured_stages(recipe)]
    if ready.model_config.get("model_type") not in SUPPORTED:
        return [PlannedStage(name, done, None) for name, done in states]
    probe, speeds = probe_task(recipe), Speeds.measure(recipe.device)
    estimator = Estimator(
        recipe, ready.model_config, train, heldout, speeds, guess_counts(recipe.tasks),
        guess_counts([probe] if probe is not None else []), _asked(recipe, base),
    )  # fmt: skip
    adapt = recipe.adapt
    how = said(estimator.fitted(adapt)) if adapt is not None and adapt.memory_gb is not None else None
    if adapt is not None and not dict(states)["adapt"]:
        from edgetune.adapt import step_time

        fitted = estimator.fitted(adapt)
        measured = step_time.measure(fitted, ready.model_config, train.lengths, recipe.device)
        estimator.step_s = measured.step_s(fitted)
    return [PlannedStage(name, done, estimator.cost(name), how if name == "adapt" else None) for name, done in states]


def _asked(recipe: Recipe, base: Artifact | None) -> Lengths:
    """Give the lengths of what `prefer` trains on."""
    if recipe.prefer is None:
        return UNKNOWN
    from edgetune.adapt import preference

    return preference.lengths_of(recipe.prefer, None if base is None else base.path)

"""The identities of everything a recipe makes, known as soon as its base and its rows are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from edgetune.adapt import merge, preference, sft, trainer
from edgetune.compress import answers, distill, moments, sensitivity, teacher, update_kept, update_left
from edgetune.compress.chain import STAGES, so_far, step_names, vocabulary
from edgetune.data.calibration import CalibrationSet
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import DataError, UnsupportedError
from edgetune.export import gguf_kept, gguf_sensitivity, gguf_times
from edgetune.export_names import export_name
from edgetune.recipe import Candidate, CompressStep, Gptq, Recipe
from edgetune.recipe_distill import Distill
from edgetune.recipe_export import Calibration, GgufExport
from edgetune.recipe_prune import Prune
from edgetune.recipe_training import Adapt
from edgetune.sources import Source, find
from edgetune.vocabularies import CutVocabulary, Vocabularies
from edgetune.workload import Workload

IMPORTANCE, STUDENT, TIMES = "importance matrix", "student", "times of types"
ANSWERS, TEACHER = "teacher's answers", "teacher's distributions"
SENSITIVITY, UPDATE_LEFT, UPDATE_KEPT = "sensitivity of layers", "update left", "update kept by choice"


class Graph:
    """Planned identities of one recipe. The pipeline makes what they name, `plan` looks them up."""

    def __init__(self, recipe: Recipe, base_identity: str, work: Workload, *, weights: bool = True) -> None:
        """Without `weights` a student on a hub is not downloaded: nothing is found of what is made with it."""
        self.recipe = recipe
        self._weights = weights
        self.base = base_identity
        self.work = work
        self._vocabularies = Vocabularies(recipe.data, work)
        self._calibrations: dict[tuple[Calibration, int | None], CalibrationSet] = {}
        self._measured: dict[tuple[Calibration, Calibration | None, int | None], CalibrationSet] = {}
        self._students: dict[str, Source] = {}

    @cached_property
    def adapter(self) -> str | None:
        """Identity of the adapter, None where the recipe adapts nothing."""
        if self.recipe.adapt is None:
            return None
        return sft.planned_identity(
            self.recipe.adapt, self.base, self.work.train, self.recipe.seed, self.work.calibration_text,
            golden=self.work.golden, mixture=self.work.mixture,
        )  # fmt: skip

    @cached_property
    def rows(self) -> str:
        """Digest of the training rows."""
        return rows_digest(self.work.train)

    @cached_property
    def set_aside(self) -> list[Rendered]:
        """Rows that training is watched by, on which `merge: auto` measures; as many without `adapt`."""
        places, _ = trainer.set_aside(self.recipe.adapt or Adapt(), self.work.train, self.recipe.seed)
        return [self.work.train[place] for place in places]

    def measured_on(self, merge: str | None) -> list[Rendered]:
        """Rows that a merge looks at."""
        return self.set_aside if merge == "auto" else []

    @cached_property
    def adapted(self) -> str:
        """Identity of what `adapt` leaves: the merged model, a model trained as a whole, or an adapter apart."""
        config = self.recipe.adapt
        if config is None or self.adapter is None:
            return self.base
        if not merges(config):
            return self.adapter
        return merge.planned_identity(self.base, self.adapter, config.merge, self.measured_on(config.merge))

    @cached_property
    def examples(self) -> list[preference.Example]:
        """Rows of preference training."""
        return preference.read(self.recipe.prefer) if self.recipe.prefer else []

    @cached_property
    def preferred(self) -> str | None:
        """Identity of the adapter of preference training, None where there is none."""
        if self.recipe.prefer is None:
            return None
        return preference.planned_identity(self.recipe.prefer, self.adapted, self.examples, self.recipe.seed)

    @cached_property
    def model(self) -> str:
        """Identity of what candidates are made from: all adapters merged, the base itself, or an adapter apart."""
        if self.recipe.prefer is None or self.preferred is None:
            return self.adapted
        into = self.recipe.prefer.merge
        return merge.planned_identity(self.adapted, self.preferred, into, self.measured_on(into))

    def calibration(self, config: Calibration, n_tokens: int | None = None) -> CalibrationSet:
        """Give the calibration rows of a stage, of a model of `n_tokens` tokens; equal settings share them."""
        if (config, n_tokens) not in self._calibrations:
            made = self.rendered(n_tokens).calibration(config, self.recipe.seed)
            self._calibrations[config, n_tokens] = made
        return self._calibrations[config, n_tokens]

    def cut(self, n_tokens: int | None) -> CutVocabulary | None:
        """Give the tokens that stay where a chain leaves so many; None for the base's own vocabulary."""
        return None if n_tokens is None else self._vocabularies.cut(n_tokens)

    def rendered(self, n_tokens: int | None) -> Workload:
        """Give the rows in the ids of a model that has so many tokens; None for the base's own vocabulary."""
        cut = self.cut(n_tokens)
        return self.work if cut is None else cut.work

    def moments(self, candidate: Candidate) -> str | None:
        """Identity of the importance matrix that a GGUF export reads, None where it reads none."""
        gguf = weighed_export(candidate)
        if gguf is None:
            return None
        return moments.planned_identity(
            self.floats(candidate), self.calibration(gguf.calibration, vocabulary(candidate)).digest
        )

    def types_measured(self, candidate: Candidate) -> CalibrationSet | None:
        """Give the rows that a GGUF export chooses types by, None where it chooses none."""
        gguf = candidate.export.gguf if candidate.export else None
        if gguf is None or gguf.allocate is None:
            return None
        return self._apart(gguf.allocate.rows, gguf.calibration, vocabulary(candidate))

    def types_sensitivity(self, candidate: Candidate) -> str | None:
        """Identity of what each type costs a candidate's layers, None where its export chooses none."""
        rows, moments = self.types_measured(candidate), self.moments(candidate)
        gguf = candidate.export.gguf if candidate.export else None
        if rows is None or moments is None or gguf is None or gguf.allocate is None:
            return None
        return gguf_sensitivity.planned_identity(gguf.allocate, self.floats(candidate), moments, rows.digest)

    def types_times(self, candidate: Candidate) -> str | None:
        """Identity of what a token takes in each type here, None where a GGUF export has no budget of time."""
        rows, moments = self.types_measured(candidate), self.moments(candidate)
        gguf = candidate.export.gguf if candidate.export else None
        if rows is None or moments is None or gguf is None or gguf.allocate is None or not gguf.allocate.ms_per_token:
            return None
        return gguf_times.planned_identity(
            gguf, self.recipe.bench, candidate.runtime, self.floats(candidate), moments, rows.digest
        )

    def gguf_rows(self, candidate: Candidate) -> CalibrationSet | None:
        """Give the calibration rows that a GGUF export reads, by itself or through its importance matrix."""
        gguf = candidate.export.gguf if candidate.export else None
        if gguf is None or not (gguf.gptq or weighed_export(candidate)):
            return None
        return self.calibration(gguf.calibration, vocabulary(candidate))

    def floats(self, candidate: Candidate) -> str:
        """Identity of the last model in a candidate's chain whose weights are not integers."""
        before = self.steps(candidate)[: candidate.n_float_steps]
        return before[-1] if before else self.model

    def steps(self, candidate: Candidate) -> list[str]:
        """Identities of what a candidate's compress steps make, in their order."""
        made: list[str] = []
        for place, step in enumerate(candidate.compress):
            made.append(self._step(step, made[-1] if made else self.model, vocabulary(candidate, place)))
        return made

    def _step(self, step: CompressStep, source: str, n_tokens: int | None) -> str:
        method = step.method
        if isinstance(method, Distill):
            student, said = self.student(method) or source, self.said(method, n_tokens)
            rows = self.rows if n_tokens is None else rows_digest(self.rendered(n_tokens).train)
            written = self.answers(method)
            return distill.planned_identity(
                method, student, self.model, said, rows, self.recipe.seed, *([] if written is None else [written])
            )
        shown = self.shown_to(method, n_tokens)
        digest = shown.digest if shown is not None else None
        more = [one for one in (self.sensitivity(step, source, n_tokens), self.update_kept(step, source)) if one]
        planned: str = STAGES[type(method)].planned_identity(method, source, digest, *more, **self.kept_tokens(method))
        return planned

    def shown_to(self, method: Any, n_tokens: int | None) -> CalibrationSet | None:
        """Give the calibration rows that a compress step reads, None where it reads none."""
        config = getattr(method, "calibration", None)
        if config is None or (isinstance(method, Prune) and not method.cuts_blocks):
            return None
        return self.calibration(config, n_tokens)

    def sensitivity(self, step: CompressStep, source: str, n_tokens: int | None) -> str | None:
        """Identity of what each layer's bits cost `source`, None where a step chooses none."""
        rows, method = self.measured(step, n_tokens), step.quantizer
        if rows is None or method is None:
            return None
        shown = self.calibration(method.calibration, n_tokens).digest if isinstance(method, Gptq) else None
        return sensitivity.planned_identity(method, source, shown, rows.digest)

    def update_kept(self, step: CompressStep, source: str) -> str | None:
        """Identity of what each choice of bits could keep of the training in `source`, None where a step asks not."""
        method = step.quantizer if step.keeps_update else None
        return None if method is None else update_kept.planned_identity(method, self.base, source)

    def measured(self, step: CompressStep, n_tokens: int | None) -> CalibrationSet | None:
        """Give the rows that a step chooses bits by, of a model of `n_tokens` tokens; None where it chooses none."""
        method = step.quantizer
        if method is None or method.allocate is None:
            return None
        return self._apart(method.allocate.rows, method.calibration, n_tokens)

    def _apart(self, rows: Calibration, taken: Calibration | None, n_tokens: int | None) -> CalibrationSet:
        key = rows, taken, n_tokens
        if key not in self._measured:
            self._measured[key] = self.rendered(n_tokens).apart(rows, taken, self.recipe.seed)
        return self._measured[key]

    def kept_tokens(self, method: object) -> dict[str, tuple[int, ...]]:
        """Give what a stage that cuts the vocabulary is told beside its config."""
        cut = self.cut(method.vocabulary) if isinstance(method, Prune) else None
        return {} if cut is None else {"kept_tokens": cut.kept}

    def said(self, config: Distill, n_tokens: int | None = None) -> str:
        """Identity of what the adapted model says of the training rows, in the tokens of a student that has so many.

        Raises DataError where the training rows are other tokens to the student.
        """
        if n_tokens is not None:
            self._vocabularies.refuse_other_rows(n_tokens)
        cut = self.cut(n_tokens)
        return teacher.planned_identity(
            config, self.model, self.rows, None if cut is None else cut.kept, self.answers(config)
        )

    def answers(self, config: Distill) -> str | None:
        """Identity of what the adapted model answers to the training rows, None where their own answers are learned."""
        return answers.planned_identity(config, self.model, self.rows) if config.answers == "teacher" else None

    def student(self, config: Distill) -> str | None:
        """Identity of a student that the recipe names, None where the step before made it."""
        if config.student is None:
            return None
        return self.base if config.student == "base" else self.student_source(config.student).identity

    def student_source(self, name: str) -> Source:
        """Find a named student; its files are read once."""
        if name not in self._students:
            self._students[name] = find(name, weights=self._weights)
        return self._students[name]

    def update_left(self, candidate: Candidate) -> str | None:
        """Identity of what is left of the training in a candidate's integers, None where other steps come before."""
        if not meets_update(self.recipe, candidate):
            return None
        return update_left.planned_identity(self.base, self.model, self.compressed(candidate))

    def compressed(self, candidate: Candidate) -> str:
        """Identity of what is exported: what the last compress step makes, or the model itself."""
        return self.steps(candidate)[-1] if candidate.compress else self.model

    def shipped(self, candidate: Candidate) -> str:
        """Identity of what ships."""
        source = self.compressed(candidate)
        if candidate.export is None:
            return source
        if candidate.export.gguf is not None:
            from edgetune.export import gguf

            config = candidate.export.gguf
            rows = self.gguf_rows(candidate)
            digest = rows.digest if rows is not None else None
            return gguf.planned_identity(
                config, source, digest, self.types_sensitivity(candidate), self.types_times(candidate)
            )
        if candidate.export.tensorrt is not None:
            from edgetune.export import tensorrt

            return tensorrt.planned_identity(candidate.export.tensorrt, source)
        from edgetune.export import onnx

        assert candidate.export.onnx is not None, "an export has exactly one key"
        return onnx.planned_identity(candidate.export.onnx, source)

    def stages(self) -> Iterator[tuple[str, str]]:
        """Every stage that makes an artifact, as (name, identity), in the order of work; shared ones once."""
        seen = {self.base}
        yield "base", self.base
        training = [("adapt", self.adapter), ("merge", self.adapted), ("prefer", self.preferred)]
        for name, made in [*training, ("merge preferred", self.model), *self._candidates()]:
            if made is not None and made not in seen:
                seen.add(made)
                yield name, made

    def _candidates(self) -> Iterator[tuple[str, str | None]]:
        for name, candidate in self.recipe.candidates.items():
            try:
                yield from self._candidate(name, candidate)
            except (DataError, UnsupportedError) as error:
                raise type(error)(f"candidates.{name}: {error}") from error

    def _candidate(self, name: str, candidate: Candidate) -> Iterator[tuple[str, str | None]]:
        steps = self.steps(candidate)
        named = zip(candidate.compress, step_names(candidate), [self.model, *steps], steps, strict=False)
        for place, (step, label, source, made) in enumerate(named):
            yield f"{name}: {UPDATE_KEPT}", self.update_kept(step, source)
            yield f"{name}: {SENSITIVITY}", self.sensitivity(step, source, vocabulary(candidate, place))
            if step.distill is not None:
                yield f"{name}: {STUDENT}", self.student(step.distill)
                yield f"{name}: {ANSWERS}", self.answers(step.distill)
                yield f"{name}: {TEACHER}", self.said(step.distill, vocabulary(candidate, place))
            yield f"{name}: {label}", made
        yield f"{name}: {UPDATE_LEFT}", self.update_left(candidate)
        yield f"{name}: {IMPORTANCE}", self.moments(candidate)
        yield f"{name}: {TIMES}", self.types_times(candidate)
        yield f"{name}: {SENSITIVITY}", self.types_sensitivity(candidate)
        yield f"{name}: {export_name(candidate)}", self.shipped(candidate)


def stage_names(recipe: Recipe) -> list[str]:
    """Name what a recipe makes, as `Graph.stages` does, as far as the recipe alone tells what candidates share."""
    names = ["base"]
    if recipe.adapt is not None:
        names += ["adapt", *(["merge"] if merges(recipe.adapt) else [])]
    names += ["prefer", "merge preferred"] if recipe.prefer is not None else []
    seen: set[tuple[object, ...]] = set()

    def add(name: str, *what: object) -> None:
        if what not in seen:
            seen.add(what)
            names.append(name)

    for name, candidate in recipe.candidates.items():
        for place, (step, label) in enumerate(zip(candidate.compress, step_names(candidate), strict=True)):
            if (method := step.distill) is not None:
                if method.student not in (None, "base"):
                    add(f"{name}: {STUDENT}", method.student)
                written = (ANSWERS, method.max_new_tokens) if method.answers == "teacher" else ()
                if written:
                    add(f"{name}: {ANSWERS}", *written)
                add(f"{name}: {TEACHER}", method.temperature, method.top_k, vocabulary(candidate, place), *written)
            if step.quantizer is not None and step.quantizer.allocate is not None:
                if step.keeps_update:
                    add(f"{name}: {UPDATE_KEPT}", UPDATE_KEPT, update_kept.shared(step.quantizer))
                add(f"{name}: {SENSITIVITY}", so_far(candidate, place), sensitivity.shared(step.quantizer))
            add(f"{name}: {label}", so_far(candidate, place + 1))
        if meets_update(recipe, candidate):
            add(f"{name}: {UPDATE_LEFT}", UPDATE_LEFT, so_far(candidate, 1))
        floats = so_far(candidate, candidate.n_float_steps)
        if (gguf := weighed_export(candidate)) is not None:
            add(f"{name}: {IMPORTANCE}", floats, gguf.calibration)
            if gguf.allocate is not None:
                if gguf.allocate.ms_per_token:
                    timed = gguf.type, gguf.gptq, *gguf.allocate.choices, str(candidate.runtime)
                    add(f"{name}: {TIMES}", floats, gguf.calibration, gguf.allocate.rows, *timed)
                asked = gguf.allocate.model_dump_json(exclude={"budget"})
                add(f"{name}: {SENSITIVITY}", floats, gguf.calibration, asked)
        names += [f"{name}: {export_name(candidate)}"] if candidate.export else []
    return names


def meets_update(recipe: Recipe, candidate: Candidate) -> bool:
    """Whether a candidate's integers are those of the trained model itself."""
    trained = recipe.adapt is not None or recipe.prefer is not None
    return trained and candidate.quantizer is not None and len(candidate.compress) == 1


def learns_rows(recipe: Recipe) -> bool:
    """Whether some stage trains on the training rows."""
    steps = (step for candidate in recipe.candidates.values() for step in candidate.compress)
    return recipe.adapt is not None or any(step.distill is not None for step in steps)


def merges(config: Adapt) -> bool:
    """Whether an adapter is merged; method full leaves none, and some stay apart."""
    return config.method != "full" and not config.separate


def weighed_export(candidate: Candidate) -> GgufExport | None:
    """Give the GGUF export that reads an importance matrix, None where the candidate has none such."""
    gguf = candidate.export.gguf if candidate.export else None
    if gguf is None or not gguf.weighed or gguf_kept.planned(candidate.quantizer) == gguf.type:
        return None
    return gguf


def why_not_run(candidate: Candidate) -> str | None:
    """Say why this machine builds what the candidate ships but cannot run it; None where it can."""
    if candidate.export is None or candidate.export.tensorrt is None:
        return None
    from edgetune.runtime import engine

    return engine.why_not_run("tensorrt")


def scored_steps(candidate: Candidate) -> list[str]:
    """Name the steps that are scored in torch on their way: those that make what is not itself what ships."""
    return step_names(candidate)[: None if candidate.export is not None else -1]

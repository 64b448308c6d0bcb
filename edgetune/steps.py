"""Runs the compress steps of a candidate, each a stage of its own: prune, distill, quantize."""

from __future__ import annotations

from typing import Any

from edgetune import sources
from edgetune.artifact import Artifact
from edgetune.compress import answers, distill, sensitivity, teacher, update_kept, update_left
from edgetune.compress.allocate import admissible
from edgetune.compress.chain import STAGES, step_names, vocabulary
from edgetune.graph import ANSWERS, SENSITIVITY, STUDENT, TEACHER, UPDATE_KEPT, UPDATE_LEFT, Graph
from edgetune.recipe import Candidate, CompressStep, Gptq, Recipe
from edgetune.recipe_distill import Distill
from edgetune.runtime.evidence import UpdateLeft
from edgetune.stages import Stages
from edgetune.trained import LOGS


class Steps:
    """The chains of one recipe. Every chain begins at `model`, which is also every student's teacher."""

    def __init__(self, recipe: Recipe, stages: Stages, graph: Graph, base: Artifact, model: Artifact) -> None:
        self.recipe, self.stages, self.graph, self.base, self.model = recipe, stages, graph, base, model
        self.updates: list[UpdateLeft] = []  # filled as candidates are made

    def run(self, name: str, candidate: Candidate) -> list[Artifact] | None:
        """Give what each step of a candidate made, in order; None where one failed, which is noted."""
        made: list[Artifact] = []
        planned = zip(candidate.compress, step_names(candidate), self.graph.steps(candidate), strict=True)
        for place, (step, called, identity) in enumerate(planned):
            source, label = made[-1] if made else self.model, f"{name}: {called}"
            tokens = vocabulary(candidate, place)
            found = self.stages.attempt(
                name,
                label,
                lambda s=step, a=source, w=label, i=identity, n=tokens: self._step(  # type: ignore[misc]
                    name, w, s, a, i, n
                ),
            )
            if found is None:
                return None
            made.append(found)
        self._compare(name, candidate, made)
        return made

    def _compare(self, name: str, candidate: Candidate, made: list[Artifact]) -> None:
        """See what the integers left of the training, where they are those of the trained model."""
        planned, label = self.graph.update_left(candidate), f"{name}: {UPDATE_LEFT}"
        if planned is None:
            return
        found = self.stages.attempt(
            name,
            label,
            lambda: self.stages.run(
                label,
                planned,
                lambda out, progress: update_left.run(self.base, self.model, made[0], out, progress=progress),
            ),
        )
        if found is not None:
            self.updates.append(UpdateLeft(candidate=name, layers=update_left.read(found)))

    def _step(
        self, name: str, label: str, step: CompressStep, source: Artifact, identity: str, n_tokens: int | None
    ) -> Artifact:
        """Carry out one step of a chain that has left `n_tokens` tokens so far, None for all of the base's."""
        recipe, method = self.recipe, step.method
        if isinstance(method, Distill):
            return self._distill(name, label, method, source, identity, n_tokens)
        stage, shown = STAGES[type(method)], self.graph.shown_to(method, n_tokens)
        more: dict[str, Any] = dict(self.graph.kept_tokens(method))
        if (kept := self._kept(name, step, source)) is not None:
            more["kept"] = kept
        if (read := self._sensitivity(name, step, source, n_tokens)) is not None:
            more["sensitivity"] = read
        return self.stages.run(
            label,
            identity,
            lambda out, progress: stage.run(
                method, source, out, calibration=shown, device=recipe.device, seed=recipe.seed, progress=progress,
                **more,
            ),
        )  # fmt: skip

    def _kept(self, name: str, step: CompressStep, source: Artifact) -> Artifact | None:
        """See what each choice could keep of the training, where a step asks for it; refuse before more is measured."""
        from edgetune.compress.checkpoint import read_config

        made, method = self.graph.update_kept(step, source.identity), step.quantizer
        if made is None or method is None:
            return None
        found = self.stages.run(
            f"{name}: {UPDATE_KEPT}",
            made,
            lambda out, progress: update_kept.run(method, self.base, source, out, progress=progress),
        )
        admissible(method, read_config(source.path), update_kept.read(found))
        return found

    def _sensitivity(self, name: str, step: CompressStep, source: Artifact, n_tokens: int | None) -> Artifact | None:
        """Measure what bits cost each layer, where a step chooses them by it."""
        made, rows = self.graph.sensitivity(step, source.identity, n_tokens), self.graph.measured(step, n_tokens)
        method = step.quantizer
        if made is None or rows is None or method is None:
            return None
        shown = self.graph.calibration(method.calibration, n_tokens) if isinstance(method, Gptq) else None
        return self.stages.run(
            f"{name}: {SENSITIVITY}",
            made,
            lambda out, progress: sensitivity.run(
                method, source, out, measured=rows, calibration=shown, device=self.recipe.device, progress=progress
            ),
        )  # fmt: skip

    def _distill(
        self, name: str, label: str, config: Distill, source: Artifact, identity: str, n_tokens: int | None
    ) -> Artifact:
        recipe, cut, rows = self.recipe, self.graph.cut(n_tokens), self.graph.rendered(n_tokens).train
        kept = None if cut is None else cut.kept
        student = self._student(name, config) if config.student is not None else source
        written = self._answers(name, config)
        said = self.stages.run(
            f"{name}: {TEACHER}",
            self.graph.said(config, n_tokens),
            lambda out, progress: teacher.run(
                config, self.model, out, rows=self.graph.work.train, kept_tokens=kept, answers=written,
                device=recipe.device, progress=progress,
            ),
        )  # fmt: skip
        return self.stages.run(
            label,
            identity,
            lambda out, progress: distill.run(
                config, student, self.model, said, out, rows=rows, kept_tokens=kept, answers=written,
                device=recipe.device,
                seed=recipe.seed, progress=progress, log_folder=self.stages.folder / LOGS / name,
            ),
        )  # fmt: skip

    def _answers(self, name: str, config: Distill) -> Artifact | None:
        """Give what the teacher writes to the training rows, None where they keep their own answers."""
        made = self.graph.answers(config)
        if made is None:
            return None
        recipe, rows = self.recipe, self.graph.work.train
        return self.stages.run(
            f"{name}: {ANSWERS}",
            made,
            lambda out, progress: answers.run(
                config, self.model, out, rows=rows, device=recipe.device, progress=progress
            ),
        )

    def _student(self, name: str, config: Distill) -> Artifact:
        """Give the student that the recipe names, as a model artifact."""
        if config.student in (None, "base"):
            return self.base
        found = self.graph.student_source(config.student)
        return self.stages.run(
            f"{name}: {STUDENT}", found.identity, lambda out, progress: sources.run(found, out, progress)
        )

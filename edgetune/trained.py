"""Trains what a recipe trains, each a stage of its own: adapt and merge, then prefer and merge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.adapt import merge, preference, sft
from edgetune.adapt.callbacks import read_speed
from edgetune.artifact import Artifact
from edgetune.graph import Graph, merges
from edgetune.recipe import Recipe
from edgetune.runtime.evidence import Seam
from edgetune.stages import Stages
from edgetune.workload import Workload

LOGS, PREFER_LOGS = "tensorboard", "prefer"  # in the folder of the run, and in that one


@dataclass(frozen=True)
class Trained:
    """The model that candidates are made from, which is also the reference, and what led to it."""

    base: Artifact
    adapter: Artifact | None  # what `adapt` trained, before it is merged
    adapted: Artifact  # what `prefer` begins with
    preferred: Artifact | None  # the adapter that `prefer` trained
    model: Artifact

    def before(self, recipe: Recipe) -> list[tuple[str, str, Artifact]]:
        """List what comes before the model as (hop, name, artifact): the base, the adapter on its base, what preference
        training began with, and its adapter on that."""
        subjects: list[tuple[str, str, Artifact]] = []
        if self.model is not self.base:
            subjects.append(("base", "base", self.base))
        if self.adapter is not None and recipe.adapt is not None and merges(recipe.adapt):
            four_bit = recipe.adapt.four_bit
            subjects.append(("adapter on the nf4 base" if four_bit else "adapter on the base", "adapter", self.adapter))
        if self.adapter is not None and self.preferred is not None:
            subjects.append(("adapted", "adapted", self.adapted))
        if self.preferred is not None and recipe.prefer is not None:
            where = "the nf4 model" if recipe.prefer.four_bit else "the model"
            subjects.append((f"preferred adapter on {where}", "preferred adapter", self.preferred))
        return subjects

    def under(self, recipe: Recipe, adapter: Artifact) -> tuple[Artifact, bool]:
        """Give the model that an adapter of this training was trained on, and whether it was held in 4 bits."""
        if adapter is self.preferred:
            assert recipe.prefer is not None, "prefer left this adapter"
            return self.adapted, recipe.prefer.four_bit
        assert recipe.adapt is not None, "adapt left this adapter"
        return self.base, recipe.adapt.four_bit

    def hop(self, recipe: Recipe) -> str:
        """Name the hop to the model itself."""
        if self.preferred is not None:
            return "preferred"
        if self.adapter is None or recipe.adapt is None:
            return "base"
        if merges(recipe.adapt):
            return "merged"
        return "trained" if recipe.adapt.method == "full" else "adapter kept apart"

    def tried_merges(self) -> list[Seam]:
        """What `merge: auto` measured, on rows of its own: lines of the ledger that stand aside."""
        tried = [("", entry) for entry in self.adapted.manifest.notes.get("merge", [])]
        if self.preferred is not None:
            tried += [("preferred, ", entry) for entry in self.model.manifest.notes.get("merge", [])]
        return [
            Seam.model_validate(
                entry | {"hop": f"{what}on rows set aside: {entry['hop']}", "engine": "torch", "aside": True}
            )
            for what, entry in tried
        ]

    def notes(self, folder: Path) -> dict[str, Any] | None:
        """The curves and facts of both trainings; tokens/s are read from the folder of the run."""
        notes = dict(self.adapter.manifest.notes) if self.adapter is not None else {}
        if self.adapter is not None:
            speed = read_speed(folder / LOGS / sft.SPEED, self.adapter.identity)
            notes |= {"tokens_per_s": speed} if speed else {}
        if "merged_into" in self.adapted.manifest.notes:
            notes["merged_into"] = self.adapted.manifest.notes["merged_into"]
        if self.preferred is not None:
            speed = read_speed(folder / LOGS / PREFER_LOGS / preference.SPEED, self.preferred.identity)
            merged = {k: v for k, v in self.model.manifest.notes.items() if k == "merged_into"}
            notes["preference"] = self.preferred.manifest.notes | merged | ({"tokens_per_s": speed} if speed else {})
        return notes or None


def train(recipe: Recipe, stages: Stages, graph: Graph, work: Workload, base: Artifact) -> Trained:
    """Train and merge, then prefer and merge; without either in the recipe the base is the model."""
    logs = stages.folder / LOGS
    adapter: Artifact | None = None
    adapted = base
    if recipe.adapt is not None and graph.adapter is not None:
        config = recipe.adapt
        adapted = adapter = trained = stages.run(
            "adapt",
            graph.adapter,
            lambda out, progress: sft.run(
                config, base, out, rows=work.train, golden=work.golden, mixture=work.mixture,
                general=work.calibration_text, device=recipe.device, seed=recipe.seed, progress=progress,
                log_folder=logs,
            ),
            together=True,
        )  # fmt: skip
        if merges(config):
            adapted = stages.run(
                "merge",
                graph.adapted,
                lambda out, progress: merge.run(
                    base, trained, out, config.merge, graph.measured_on(config.merge), device=recipe.device,
                    progress=progress,
                ),
            )  # fmt: skip
    if recipe.prefer is None or graph.preferred is None:
        return Trained(base, adapter, adapted, None, adapted)
    prefer = recipe.prefer
    preferred = stages.run(
        "prefer",
        graph.preferred,
        lambda out, progress: preference.run(
            prefer, adapted, out, examples=graph.examples, device=recipe.device, seed=recipe.seed, progress=progress,
            log_folder=logs / PREFER_LOGS,
        ),
    )  # fmt: skip
    model = stages.run(
        "merge preferred",
        graph.model,
        lambda out, progress: merge.run(
            adapted,
            preferred,
            out,
            prefer.merge,
            graph.measured_on(prefer.merge),
            device=recipe.device,
            progress=progress,
        ),
    )
    return Trained(base, adapter, adapted, preferred, model)

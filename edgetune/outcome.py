"""What a run found, made into its report: verdicts, the seam ledger, and what must be said beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from edgetune import __version__, measure, workload
from edgetune.artifact import Artifact
from edgetune.commands import run_commands
from edgetune.compress.chain import about_zeros
from edgetune.graph import why_not_run
from edgetune.recipe import Recipe
from edgetune.runtime.accuracy import seam, summary
from edgetune.runtime.evidence import Accuracy, Failure, Latency, Report, RowText, TaskScore, UpdateLeft, Verdict
from edgetune.runtime.machine import describe
from edgetune.runtime.verdict import Scored, accuracy_levels, judge
from edgetune.stages import Stages
from edgetune.trained import Trained
from edgetune.workload import Workload


class Hop(NamedTuple):
    """One line of the seam ledger: what was scored, and the artifact that holds its rows."""

    name: str
    evidence: Artifact
    accuracy: Accuracy

    @classmethod
    def read(cls, name: str, evidence: Artifact) -> Hop:
        return cls(name, evidence, measure.read_accuracy(evidence))


@dataclass
class Outcome:
    """What one recipe's stages made and measured, filled as the run goes on; candidates by name."""

    recipe: Recipe
    stages: Stages
    work: Workload
    trained: Trained
    hops: list[Hop]
    scored: dict[str, Accuracy]  # the reference's among them
    shipped: dict[str, Artifact] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes; of an adapter with its base
    tasks: list[TaskScore] = field(default_factory=list)
    probe: list[TaskScore] = field(default_factory=list)
    updates: list[UpdateLeft] = field(default_factory=list)
    timed: list[Latency | Failure] = field(default_factory=list)

    @property
    def latencies(self) -> dict[str, Latency]:
        return {found.subject.name: found for found in self.timed if isinstance(found, Latency)}

    @property
    def failures(self) -> list[Failure]:
        return [*self.stages.failures, *(found for found in self.timed if isinstance(found, Failure))]

    def report(self) -> Report:
        """Judge every candidate and put it all together."""
        trained, shipped = self.trained, self.shipped
        base = [hop.accuracy for hop in self.hops if hop.name == "base"] if trained.model is not trained.base else []
        accuracy = [*base, *self.scored.values()]
        held = {id(found) for found in accuracy}
        rows = workload.heldout_rows(self.recipe.data)
        return Report(
            name=self.recipe.name,
            edgetune=__version__,
            recipe=self.recipe.model_dump(mode="json"),
            machine=describe(),
            reference="reference",
            accuracy=accuracy,
            latency=list(self.latencies.values()),
            seams=[
                *trained.tried_merges(),
                *(
                    seam(name, found, evidence=f"{made.path.name}/{measure.ACCURACY}", reported=id(found) in held)
                    for name, made, found in self.hops
                ),
            ],
            verdicts=self._verdicts(),
            failures=self.failures,
            artifacts={name: artifact.manifest.model_dump(mode="json") for name, artifact in shipped.items()},
            commands={name: self._commands(name) for name in shipped},
            warnings=[*self._warnings(), *self.fallbacks()],
            stages=self.stages.done,
            training=trained.notes(self.stages.folder),
            texts=[
                RowText(prompt=row.messages[-2][1] if row.messages else "", gold=rendered.target_text)
                for row, rendered in zip(rows, self.work.heldout, strict=True)
            ],
            tasks=self.tasks,
            probe=self.probe,
            updates=self.updates,
        )

    def _commands(self, name: str) -> list[str]:
        return run_commands(self.shipped[name], self.stages.folder / "candidates" / name)

    def _verdicts(self) -> list[Verdict]:
        budgets, names = self.recipe.budgets, list(self.recipe.candidates)
        subjects = {
            name: Scored(
                self.scored.get(name), {found.task: found for found in self.tasks if found.subject.name == name}
            )
            for name in ("reference", *names)
        }
        levels = accuracy_levels(budgets, {name: subjects[name] for name in names}, subjects["reference"])
        return [
            judge(
                name, budgets, size_bytes=self.sizes.get(name), accuracy=self.scored.get(name),
                reference=self.scored["reference"], tasks=subjects[name].tasks,
                reference_tasks=subjects["reference"].tasks, level=levels[name], latency=self.latencies.get(name),
                failures=[failure for failure in self.failures if failure.subject == name],
                not_run=self._not_run(name),
            )
            for name in names
        ]  # fmt: skip

    def _not_run(self, name: str) -> str | None:
        why = why_not_run(self.recipe.candidates[name])
        if why is None or name not in self.shipped:
            return None
        return f"{why}. On the target: {self._commands(name)[0]}"

    def _warnings(self) -> list[str]:
        said = []
        if self.work.n_too_long:
            said.append(f"{self.work.n_too_long} training rows were longer than max_length and were left out.")
        if self.work.mixture.leaks:
            said.append(f"{self.work.mixture.leaks} training rows ask what a held-out group asks and were left out.")
        busy = [found.load for found in self.latencies.values() if found.load.busy]
        if busy:
            load = max(busy, key=lambda one: one.others_during)
            said.append(
                "The machine was busy while latency was measured: others used up to "
                f"{load.others_during:.0%} of it ({load.others_before:.0%} just before)."
            )
        if (score := summary(self.scored["reference"])["exact_match"]) is not None and score < 0.1:
            said.append(f"The reference itself has an exact match of {score:.1%}: there is little to lose.")
        zeros = {name: about_zeros(candidate) for name, candidate in self.recipe.candidates.items()}
        said += [f"{name}: {line}." for name, line in zeros.items() if line is not None]
        return said

    def fallbacks(self) -> list[str]:
        """Say what fell back on the way, once each; what ships says its own in its manifest."""
        own = {artifact.identity for artifact in self.shipped.values()}
        said = (f"{name}: {line}" for (made, line), name in self.stages.fallbacks.items() if made not in own)
        return list(dict.fromkeys(said))

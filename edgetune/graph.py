"""The identities of everything a recipe makes, known as soon as its base and its rows are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from edgetune.adapt import merge, preference, sft
from edgetune.compress import moments, quantize
from edgetune.data.calibration import CalibrationSet
from edgetune.data.render import Rendered
from edgetune.recipe import Calibration, Candidate, GgufExport, Gptq, Recipe
from edgetune.recipe_training import Adapt
from edgetune.workload import Workload

UNWEIGHED = ("F32", "F16", "BF16", "Q8_0")  # llama.cpp rounds these without an importance matrix


class Graph:
    """Planned identities of one recipe. The pipeline makes what they name, `plan` looks them up."""

    def __init__(self, recipe: Recipe, base_identity: str, work: Workload) -> None:
        self.recipe = recipe
        self.base = base_identity
        self.work = work
        self._calibrations: dict[Calibration, CalibrationSet] = {}

    @cached_property
    def adapter(self) -> str | None:
        """Identity of the adapter, None where the recipe adapts nothing."""
        if self.recipe.adapt is None:
            return None
        return sft.planned_identity(self.recipe.adapt, self.base, self.work.train, self.recipe.seed)

    @cached_property
    def set_aside(self) -> list[Rendered]:
        """Rows that training is watched by, on which `merge: auto` measures."""
        return sft.set_aside(self.recipe.adapt, self.work.train, self.recipe.seed)[0] if self.recipe.adapt else []

    @cached_property
    def adapted(self) -> str:
        """Identity of what `adapt` leaves: the merged model, a model trained as a whole, or an adapter apart."""
        config = self.recipe.adapt
        if config is None or self.adapter is None:
            return self.base
        if not merges(config):
            return self.adapter
        rows = self.set_aside if config.merge == "auto" else []
        return merge.planned_identity(self.base, self.adapter, config.merge, rows)

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
        return self.adapted if self.preferred is None else merge.planned_identity(self.adapted, self.preferred)

    def calibration(self, config: Calibration) -> CalibrationSet:
        """Give the calibration rows of a stage; equal settings share them."""
        if config not in self._calibrations:
            self._calibrations[config] = self.work.calibration(config, self.recipe.seed)
        return self._calibrations[config]

    def moments(self, candidate: Candidate) -> str | None:
        """Identity of the importance matrix that a GGUF export reads, None where it reads none."""
        gguf = weighed_export(candidate)
        if gguf is None:
            return None
        return moments.planned_identity(self.model, self.calibration(gguf.calibration).digest)

    def compressed(self, candidate: Candidate) -> str:
        """Identity of what is exported: the checkpoint of the compress step, or the model itself."""
        if not candidate.compress:
            return self.model
        method = candidate.compress[0].method
        digest = self.calibration(method.calibration).digest if isinstance(method, Gptq) else None
        return quantize.planned_identity(method, self.model, digest)

    def shipped(self, candidate: Candidate) -> str:
        """Identity of what ships."""
        source = self.compressed(candidate)
        if candidate.export is None:
            return source
        if candidate.export.gguf is not None:
            from edgetune.export import gguf

            config = candidate.export.gguf
            digest = self.calibration(config.calibration).digest if self.moments(candidate) else None
            return gguf.planned_identity(config, source, digest)
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
            yield f"{name}: importance matrix", self.moments(candidate)
            yield f"{name}: {compress_name(candidate)}", self.compressed(candidate)
            yield f"{name}: {export_name(candidate)}", self.shipped(candidate)


def stage_names(recipe: Recipe) -> list[str]:
    """Name what a recipe makes, as `Graph.stages` does; candidates that share a stage each name it."""
    names = ["base"]
    if recipe.adapt is not None:
        names += ["adapt", *(["merge"] if merges(recipe.adapt) else [])]
    names += ["prefer", "merge preferred"] if recipe.prefer is not None else []
    for name, candidate in recipe.candidates.items():
        names += [f"{name}: importance matrix"] if weighed_export(candidate) else []
        names += [f"{name}: {compress_name(candidate)}"] if candidate.compress else []
        names += [f"{name}: {export_name(candidate)}"] if candidate.export else []
    return names


def merges(config: Adapt) -> bool:
    """Whether an adapter is merged; method full leaves none, and some stay apart."""
    return config.method != "full" and not config.separate


def weighed_export(candidate: Candidate) -> GgufExport | None:
    """Give the GGUF export that reads an importance matrix, None where the candidate has none such."""
    gguf = candidate.export.gguf if candidate.export else None
    return gguf if gguf is not None and gguf.imatrix and gguf.type not in UNWEIGHED else None


def compress_name(candidate: Candidate) -> str:
    """Name the compress step as the seam ledger does: "gptq int4 g32"."""
    if not candidate.compress:
        return "16-bit"
    method = candidate.compress[0].method
    group = "row" if method.group_size == -1 else f"g{method.group_size}"
    return f"{'gptq' if isinstance(method, Gptq) else 'rtn'} int{method.bits} {group}{' sym' if method.sym else ''}"


def export_name(candidate: Candidate) -> str:
    """Name the export: "gguf Q4_K_M", "onnx int4"."""
    if candidate.export is None:
        return "checkpoint"
    if candidate.export.gguf is not None:
        return f"gguf {candidate.export.gguf.type}"
    if candidate.export.tensorrt is not None:
        return f"tensorrt {candidate.export.tensorrt.precision}"
    assert candidate.export.onnx is not None, "an export has exactly one key"
    own = " own graph" if candidate.export.onnx.builder == "own" else ""
    return f"onnx {candidate.export.onnx.precision}{own}"


def why_not_run(candidate: Candidate) -> str | None:
    """Say why this machine builds what the candidate ships but cannot run it; None where it can."""
    if candidate.export is None or candidate.export.tensorrt is None:
        return None
    from edgetune.runtime import engine

    return engine.why_not_run("tensorrt")

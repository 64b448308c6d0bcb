"""What a token costs in each ggml type on this machine: whole models, decoded by llama.cpp as it will run the file.

Each file has the blocks' layers in one type where its blocks divide their rows, else in the first choice that divides
all, and everything else as the export will write it. All are decoded alternately by the product's own measurement of
latency. Shapes do not matter to the prediction: a layer's time is taken for its share of the weights.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import backends
from edgetune.artifact import Artifact, draft, identity, require_space, write_text
from edgetune.compress import moments as moments_stage
from edgetune.compress.architectures import linear_shapes
from edgetune.errors import ArtifactError, StageError
from edgetune.export.gguf_allocation import offered
from edgetune.export.gguf_child import convert
from edgetune.export.gguf_families import family, gguf_name, shared_heads
from edgetune.export.gguf_types import choose_types, n_bytes
from edgetune.export.gguf_write import artifact_weights, read_config, written_shapes
from edgetune.progress import Report, silent
from edgetune.recipe import Bench
from edgetune.recipe_runtime import Runtime
from edgetune.runtime import latency
from edgetune.runtime.evidence import Failure, Latency
from edgetune.runtime.machine import facts
from edgetune.runtime.worker import Job

if TYPE_CHECKING:
    from edgetune.data.calibration import CalibrationSet
    from edgetune.recipe_export import AllocateTypes, GgufExport

STAGE = "export.gguf_times/1"
FILE = "times.json"
ENGINE = "llama.cpp"


def planned_identity(
    config: GgufExport, bench: Bench, runtime: Runtime | None, source: str, moments: str, measured_digest: str
) -> str:
    """Give the identity of the evidence that `run` would make on this machine."""
    return identity(STAGE, _config(config, bench, runtime), [source, moments], {"prompt": measured_digest})


def run(
    config: GgufExport,
    source: Artifact,
    out: Path,
    *,
    moments: Artifact,
    measured: CalibrationSet,
    bench: Bench,
    runtime: Runtime | None,
    seed: int = 0,
    progress: Report = silent,
) -> Artifact:
    """Write `times.json` of a `model` artifact: type -> ms a token with all layers of the blocks in it.

    Prompts are cut from `measured`; of `bench` the shortest prompt and first number of new tokens are taken.
    Raises StageError where llama.cpp fails, or where times are drowned in noise.
    """
    versions = {name: metadata.version(name) for name in ("edgetune",)}
    versions |= {name: backends.version(name) or "" for name in ("gguf", "llama_cpp")}
    with draft(
        out, kind="evidence", stage=STAGE, config=_config(config, bench, runtime), parents=[source, moments],
        sources={"prompt": measured.digest}, versions=versions,
    ) as pending:  # fmt: skip
        try:
            jobs = _jobs(config, source, moments, bench, runtime, pending.work, progress)
            asked = _bench(bench)
            prompts = latency.make_prompts(measured.ids.ravel().tolist(), asked.prompt_tokens)
            found = latency.measure(jobs, asked, prompts, seed=seed, progress=progress)
        finally:
            for file in pending.work.glob("*.gguf"):
                file.unlink()
        timed = {job.name: _median(one) for job, one in zip(jobs, found, strict=True)}
        loads = [one.load for one in found if isinstance(one, Latency)]
        if any(load.busy for load in loads):
            share = max(load.others_during for load in loads)
            pending.fallbacks = [f"others used {share:.0%} of the machine while types were timed; they may be faster"]
        assert config.allocate is not None, "only allocate asks for times"
        times = type_times(timed, config.allocate, read_config(source.path))
        pending.notes = {"files_ms": timed}
        write_text(pending.path / FILE, json.dumps(times, indent=1) + "\n")
    return pending.artifact


def read(evidence: Artifact) -> dict[str, float]:
    """Read ms a token by type. Raises ArtifactError where the file is damaged."""
    try:
        return {kind: float(ms) for kind, ms in json.loads((evidence.path / FILE).read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{evidence.path / FILE} is damaged: {str(error).splitlines()[0]}") from error


def type_times(
    files_ms: Mapping[str, float], config: AllocateTypes, model_config: Mapping[str, Any]
) -> dict[str, float]:
    """Give ms a token with all layers in each type, from those of files that have the stand-in where it does not fit.

    A file of which a share f of the weights is in the type takes f t(type) + (1 - f) t(stand-in).
    """
    spare, times = stand_in(config, model_config), dict[str, float]()
    for kind, ms in files_ms.items():
        share = _share(kind, model_config)
        times[kind] = float(f"{(ms - (1 - share) * files_ms[spare]) / share:.6g}")
        if times[kind] <= 0:
            raise StageError(f"{kind} packs {share:.0%} of the weights, too few to be timed here; leave it out, or "
                             "measure on an idle machine with more bench.repeats")  # fmt: skip
    return times


def stand_in(config: AllocateTypes, model_config: Mapping[str, Any]) -> str:
    """Give the first choice whose blocks divide all rows: `check_types` sees that there is one."""
    widths = {C for _, C in linear_shapes(dict(model_config)).values()}
    return next(kind for kind in config.choices if all(offered(kind, width) for width in widths))


def _share(kind: str, model_config: Mapping[str, Any]) -> float:
    """Share of the weights of the blocks whose rows the blocks of a type divide."""
    sizes = [(R * C, offered(kind, C)) for R, C in linear_shapes(dict(model_config)).values()]
    return sum(n for n, fits in sizes if fits) / sum(n for n, _ in sizes)


def _jobs(
    config: GgufExport, source: Artifact, moments: Artifact, bench: Bench, runtime: Runtime | None, work: Path,
    progress: Report,
) -> list[Job]:  # fmt: skip
    """Write a file of each type, and give how each is run."""
    assert config.allocate is not None, "only allocate asks for times"
    model_config = read_config(source.path)
    weights, of = artifact_weights(source, model_config), family(model_config)
    spare, linear = stand_in(config.allocate, model_config), linear_shapes(model_config)
    weighed = {gguf_name(f"{module}.weight", of): values for module, values in moments_stage.read(moments).items()}
    shapes, types = written_shapes(weights, model_config), dict[str, dict[str, str]]()
    for kind in config.allocate.choices:
        if not _share(kind, model_config):
            continue
        given = {
            gguf_name(f"{name}.weight", of): kind if offered(kind, width) else spare
            for name, (_, width) in linear.items()
        }
        types[kind], _ = choose_types(
            shapes, config.type, gptq=config.gptq, n_shared=shared_heads(model_config), weighed=True, given=given
        )
    for file in work.glob("*.gguf"):  # what a killed run left
        file.unlink()
    require_space(work, sum(n_bytes(shapes, of_one) for of_one in types.values()))
    jobs = []
    for name, of_one in types.items():
        file = work / f"{name}.gguf"
        convert(source, file, of_one, weighed, target=config.type, work=work, progress=progress)
        size = file.stat().st_size
        jobs.append(Job(name, "gguf", ENGINE, file, source.digest, size, bench.threads, _settings(runtime)))
    return jobs


def _median(found: Latency | Failure) -> float:
    """Median ms of a further token."""
    if isinstance(found, Failure):
        raise StageError(f"{found.subject}: {found.reason}")
    (case,) = found.cases
    return float(f"{statistics.median(ms for waits in latency.waits(case, 'itl_ms') for ms in waits):.6g}")


def _bench(bench: Bench) -> Bench:
    return Bench(
        prompt_tokens=[min(bench.prompt_tokens)], new_tokens=bench.output_lengths[0], threads=bench.threads,
        repeats=bench.repeats, warmup=bench.warmup, case_timeout_s=bench.case_timeout_s, runs=1,
    )  # fmt: skip


def _settings(runtime: Runtime | None) -> dict[str, Any]:
    """Give what the recipe sets of the engine."""
    return runtime.settings if runtime is not None else {}


def _config(config: GgufExport, bench: Bench, runtime: Runtime | None) -> dict[str, Any]:
    assert config.allocate is not None, "only allocate asks for times"
    return {
        "type": config.type, "gptq": config.gptq, "choices": list(config.allocate.choices),
        "bench": _bench(bench).as_config(),
        "engine": [ENGINE, backends.version("llama_cpp")], "settings": _settings(runtime), "machine": facts(),
    }  # fmt: skip

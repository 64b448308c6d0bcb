"""One artifact exported, or one file held to the contract of a reference model: the verb `export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from edgetune.artifact import Artifact
from edgetune.commands import run_commands
from edgetune.errors import UsageError
from edgetune.export.gguf_types import UNWEIGHED
from edgetune.found import base_of
from edgetune.progress import reporting
from edgetune.recipe import parse_as
from edgetune.recipe_export import Calibration, Export, GgufExport
from edgetune.runtime.engine import why_not_run
from edgetune.single import calibration_rows, refuse_existing

# Flags that each way of `export` reads, beside those that all read. Others that were given are refused.
CALIBRATED = ("gptq", "imatrix", "n_samples", "device")
ALWAYS = ("artifact", "out", "format", "store")
READ = {
    "--check": ("check", "max_kl"),
    "gguf, of an adapter": (),
    "onnx, of an adapter": ("graph",),
    "gguf": ("type", "rows", "general_share", "seed", *CALIBRATED),
    "gguf without --rows": ("type", *CALIBRATED),
    "gguf without --rows, --imatrix or --gptq": ("type",),
    "onnx": ("precision", "builder", "adapters"),
    "tensorrt": ("precision", "compute_capability", "max_length"),
}


@dataclass(frozen=True)
class Weighing:
    """What a GGUF file's rounding is weighed by: rows, and where to write the importance matrix beside it."""

    rows: Path | None
    imatrix: Path | None
    seed: int
    device: str


def way(form: str, kind: str, *, rows: bool, calibrated: bool) -> str:
    """Name a way of exporting, as READ does; general text alone may calibrate, too."""
    if kind == "adapter":
        return f"{form}, of an adapter"
    if form != "gguf" or rows:
        return form
    return "gguf without --rows" if calibrated else "gguf without --rows, --imatrix or --gptq"


def export_config(
    form: str, type_: str, precision: str, builder: str, compute_capability: list[str] | None, max_length: int | None,
    *, adapters: bool, weighed: bool, gptq: bool, n_samples: int, general_share: float,
) -> Export:  # fmt: skip
    """Check the flags of `export` as a recipe's keys are checked. Raises RecipeError, UsageError."""
    settings: dict[str, dict[str, object]] = {
        "gguf": {"type": type_, "imatrix": weighed or gptq, "gptq": gptq},
        "onnx": {"precision": precision, "builder": builder, "adapters": adapters},
        "tensorrt": {"precision": precision, "compute_capability": compute_capability, "max_length": max_length},
    }  # fmt: skip
    if form not in settings:
        raise UsageError(f"format {form!r} is not known; use {' or '.join(settings)}")
    if form != "gguf" and (weighed or gptq):
        raise UsageError(f"--rows, --imatrix and --gptq are for gguf; {form} takes its integers from a gptq artifact")
    if adapters and form != "onnx":
        raise UsageError(f"--adapters is for onnx; {form} adapters lie beside any file of their base")
    if weighed and type_ in UNWEIGHED:
        raise UsageError(f"type {type_} is rounded without an importance matrix; leave --rows and --imatrix out")
    if weighed or gptq:
        settings["gguf"]["calibration"] = {"n_samples": n_samples, "general_share": general_share}
    return parse_as(Export, {form: settings[form]}, "export")


def export(
    config: Export, source: Artifact, out: Path, weighing: Weighing, graph: Path | None, console: Console
) -> Artifact:
    """Write what `config` says. An adapter is written as it is, beside its base or `graph`. Raises UsageError."""
    refuse_existing(out)
    if source.manifest.kind == "adapter":
        return _adapter(config, source, out, graph, console)
    if config.gguf is not None:
        return _with_commands(_gguf(config.gguf, source, out, weighing, console), out, console)
    with reporting(console, "export") as progress:
        if config.tensorrt is not None:
            from edgetune.export import tensorrt

            made = tensorrt.run(config.tensorrt, source, out, progress=progress)
            if (why := why_not_run("tensorrt")) is not None:
                run = run_commands(made, out)[0]
                console.print(f"note: built, not run: {why}. On the target: {run}", highlight=False, soft_wrap=True)
            return made
        from edgetune.export import onnx

        assert config.onnx is not None, "an export has exactly one key"
        made = onnx.run(config.onnx, source, out, progress=progress)
    return _with_commands(made, out, console)


def _with_commands(made: Artifact, out: Path, console: Console) -> Artifact:
    for command in run_commands(made, out):
        console.print(f"run it: {command}", highlight=False, soft_wrap=True, markup=False)
    return made


def _adapter(config: Export, adapter: Artifact, out: Path, graph: Path | None, console: Console) -> Artifact:
    if config.tensorrt is not None:
        raise UsageError(f"{adapter.path} is an adapter; gguf and onnx take it as it is, tensorrt the merged model")
    base = base_of(adapter)[0]
    if config.onnx is not None:
        from edgetune.export import onnx_adapter

        if graph is None:
            raise UsageError(f"give --graph, the folder of an ONNX graph of {base.path} made with --adapters")
        with reporting(console, "export") as progress:
            return onnx_adapter.run(adapter, base, Artifact.open(graph), out, progress=progress)
    from edgetune.export import gguf_adapter

    assert config.gguf is not None, "an export has exactly one key"
    with reporting(console, "export") as progress:
        made = gguf_adapter.run(adapter, base, out, progress=progress)
    run = run_commands(made, out)[0]
    console.print(f"note: beside its base, exported from {base.path}: {run}", highlight=False, soft_wrap=True)
    return made


def _gguf(config: GgufExport, source: Artifact, out: Path, weighing: Weighing, console: Console) -> Artifact:
    from edgetune.compress.layerwise import second_moments
    from edgetune.compress.streamed import open_model
    from edgetune.export import gguf
    from edgetune.export.gguf_imatrix import write_imatrix
    from edgetune.export.gguf_write import read_config

    if not config.imatrix:
        if config.type not in UNWEIGHED:
            console.print("note: no --rows, so no importance matrix", highlight=False)
        with reporting(console, "export") as progress:
            return gguf.run(config, source, out, moments=None, calibration_digest=None, progress=progress)
    if source.manifest.kind != "model":
        raise UsageError(f"{source.path} is of kind {source.manifest.kind}; --rows are read by a model")
    gguf.check(config, read_config(source.path))  # what `run` would refuse, before an hour of calibration
    if weighing.imatrix is not None:
        refuse_existing(weighing.imatrix)
    calibration, rows = config.calibration, weighing.rows
    if rows is None:
        calibration = Calibration(n_samples=calibration.n_samples, general_share=1.0)
        console.print("note: no --rows, so the calibration is general text alone", highlight=False)
    found = calibration_rows(source, rows, calibration, weighing.seed)
    with reporting(console, "importance matrix") as progress:
        measured = second_moments(open_model(source), found.ids, device=weighing.device, progress=progress)
    moments = {name: mean.numpy() for name, mean in measured.items()}
    if weighing.imatrix is not None:
        said = str(rows) if rows is not None else "general text"
        write_imatrix(weighing.imatrix, moments, read_config(source.path), found.ids.shape, said)
    with reporting(console, "export") as progress:
        return gguf.run(
            config, source, out, moments=moments, calibration_digest=found.digest,
            rows=found.ids if config.gptq else None, device=weighing.device, progress=progress,
        )  # fmt: skip


def check(path: Path, reference: Artifact, max_kl: float, console: Console) -> bool:
    """Print each line of the contract; say whether all of them hold."""
    from rich.table import Table
    from rich.text import Text

    from edgetune.export.check import check as run

    table = Table("Contract", "", "Found", box=None, pad_edge=False)
    with reporting(console, "check"):
        found = run(path, reference, max_kl=max_kl)
    for one in found:
        state = Text("holds", style="green") if one.holds else Text("broken", style="red")
        table.add_row(Text(one.name), state, Text(one.found))
    console.print(table)
    return all(one.holds for one in found)

"""The verb `export`: a file for a runtime, or any file held to the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli import DEFAULT_STORE, MAX_SEED, StoreFolder, app, given_flags
from edgetune.errors import UsageError
from edgetune.terminal import console, quiet


@app.command()
def export(
    context: typer.Context,
    artifact: Annotated[
        str, typer.Argument(help="folder of a model, gptq or adapter artifact, or a base as in a recipe")
    ],
    out: Annotated[Path | None, typer.Option(help="folder to write; it must not exist", show_default=False)] = None,
    format: Annotated[str, typer.Option(help="gguf, onnx or tensorrt")] = "gguf",
    type: Annotated[str, typer.Option(help="gguf: Q4_K_M, Q8_0, F16 ...")] = "Q4_K_M",
    rows: Annotated[Path | None, typer.Option(help="gguf: training rows that weigh the rounding")] = None,
    gptq: Annotated[bool, typer.Option("--gptq", help="gguf: choose the codes by GPTQ; no more bytes")] = False,
    imatrix: Annotated[
        Path | None, typer.Option(help="gguf: write the importance matrix here too, for llama-quantize")
    ] = None,
    general_share: Annotated[float, typer.Option(help="gguf: share of general text in the calibration")] = 0.25,
    n_samples: Annotated[int, typer.Option(help="gguf: calibration samples")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="gguf: of the calibration")] = 0,
    device: Annotated[str, typer.Option(help="gguf: where the calibration is computed")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="onnx: int4 or int8 (from a gptq artifact), fp32, fp16; tensorrt: int4, fp16")
    ] = "int4",
    builder: Annotated[str, typer.Option(help="onnx: genai, or own for any shape, fp16 and int8")] = "genai",
    adapters: Annotated[bool, typer.Option("--adapters", help="onnx, builder own: room for LoRA adapters")] = False,
    graph: Annotated[
        Path | None, typer.Option(help="onnx, of an adapter: folder of its base's graph, made with --adapters")
    ] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="tensorrt: such as 8.6, may be repeated; 8.0, 8.6, 8.9 and 12.0")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="tensorrt: most tokens of context; 2048 if absent")] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="write nothing: hold this .gguf file or ONNX folder, anyone's, to the model; 3 if broken"),
    ] = None,
    max_kl: Annotated[float, typer.Option(min=0, help="with --check: mean KL a token that is allowed, nats")] = 0.1,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Write a GGUF file, an ONNX folder or a TensorRT engine, and hold it to its contract."""
    quiet()
    from edgetune import single_export as single
    from edgetune.artifact import Store
    from edgetune.devices import check_device
    from edgetune.single import open_artifact, refuse_unread

    given = given_flags(context)
    weighed = rows is not None or imatrix is not None
    if check is not None and out is not None:
        raise UsageError("--check writes nothing; leave --out away, or --check")
    if check is not None:
        refuse_unread(given, (*single.ALWAYS, *single.READ["--check"]), "--check")
        source = open_artifact(artifact, Store(store), console())
        raise typer.Exit(0 if single.check(check, source, max_kl, console()) else 3)
    if out is None:
        raise UsageError("give --out, the folder to write, or --check, a file to look at")
    config = single.export_config(
        format, type, precision, builder, compute_capability, max_length,
        adapters=adapters, weighed=weighed, gptq=gptq, n_samples=n_samples,
        general_share=general_share,
    )  # fmt: skip
    check_device(device)
    source = open_artifact(artifact, Store(store), console())
    way = single.way(format, source.manifest.kind, rows=rows is not None, calibrated=weighed or gptq)
    refuse_unread(given, (*single.ALWAYS, *single.READ.get(way, given)), way)
    weighing = single.Weighing(rows, imatrix, seed, device)
    typer.echo(single.export(config, source, out, weighing, graph, console()).path)

"""One stage at a time, for the verbs `compress` and `generate`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from edgetune import sources, workload
from edgetune.artifact import MANIFEST, Artifact, Store
from edgetune.data.calibration import CalibrationSet, make_calibration
from edgetune.data.formats import read_rows
from edgetune.data.general import general_text
from edgetune.data.golden import Golden
from edgetune.errors import UsageError
from edgetune.found import base_of
from edgetune.progress import reporting
from edgetune.recipe import CompressStep, Gptq, Rtn, parse_as
from edgetune.recipe_export import Calibration

QUANTIZERS = ("rtn", "gptq")  # what one step can do alone; pruning and distilling belong to a recipe
# Flags of `compress` that every method reads.
COMPRESS_READS = ("model", "out", "method", "bits", "group_size", "sym", "checkpoint", "device", "store")


def open_artifact(name: str, store: Store, console: Console) -> Artifact:
    """Give an artifact: the folder of one, or any base as a recipe names it, made into a model."""
    if (Path(name) / MANIFEST).is_file():
        return Artifact.open(Path(name))
    with reporting(console, sources.DOWNLOAD) as progress:
        source = sources.find(name, progress=progress)
    with reporting(console, "base") as progress:
        artifact, _ = store.once(source.identity, lambda out: sources.run(source, out, progress))
    return artifact


def open_model(model: str, store: Store, console: Console) -> Artifact:
    """Give a model artifact as `open_artifact` does. Raises UsageError where it is of another kind."""
    found = open_artifact(model, store, console)
    if found.manifest.kind != "model":
        raise UsageError(f"{model} is of kind {found.manifest.kind!r}; compress takes a model")
    return found


def refuse_unread(given: Collection[str], read: Collection[str], way: str) -> None:
    """Raise UsageError where a flag was given that this way of working does not read."""
    unread = sorted(set(given) - set(read))
    if unread:
        raise UsageError(f"--{unread[0].replace('_', '-')} is not read by {way}; leave it out")


def refuse_unread_compress(given: Collection[str], method: str) -> None:
    """Raise UsageError where a flag of `compress` was given that its method does not read."""
    if method == "rtn":
        refuse_unread(given, COMPRESS_READS, "rtn")
    elif "rows" not in given:
        refuse_unread(given, (*COMPRESS_READS, "n_samples"), "gptq without --rows")


def compress_config(
    method: str, *, bits: int, group_size: int, sym: bool, checkpoint: str, n_samples: int, general_share: float
) -> Rtn | Gptq:
    """Check the flags of `compress` as a recipe's keys are checked. Raises RecipeError."""
    if method not in QUANTIZERS:
        raise UsageError(f"method {method!r} is not known; use {' or '.join(QUANTIZERS)}")
    settings: dict[str, object] = {"bits": bits, "group_size": group_size, "sym": sym, "checkpoint": checkpoint}
    if method == "gptq":
        settings["calibration"] = {"n_samples": n_samples, "general_share": general_share}
    config = parse_as(CompressStep, {method: settings}, "compress").quantizer
    assert config is not None, "a quantizer's key gives a quantizer"
    return config


def compress(
    config: Rtn | Gptq, source: Artifact, out: Path, rows: Path | None, seed: int, device: str, console: Console
) -> Artifact:
    """Quantize one model. GPTQ without rows calibrates on general text alone, and says so."""
    from edgetune.compress import quantize

    refuse_existing(out)
    calibration = None
    if isinstance(config, Gptq):
        if rows is None:
            config = config.model_copy(
                update={"calibration": config.calibration.model_copy(update={"general_share": 1.0})}
            )
            console.print("note: no --rows, so the calibration is general text alone", highlight=False)
        calibration = calibration_rows(source, rows, config.calibration, seed)
    with reporting(console, "compress") as progress:
        return quantize.run(config, source, out, calibration=calibration, device=device, seed=seed, progress=progress)


def generate(path: Path, prompt: str, system: str | None, max_new_tokens: int, threads: int) -> str:
    """Answer one prompt. The system turn is that of the golden conversations, where training had one."""
    from edgetune.data.prompt import render_chat
    from edgetune.runtime.engine import ENGINE_OF_KIND, greedy, load_engine

    artifact = Artifact.open(path)
    if artifact.manifest.kind not in ENGINE_OF_KIND:
        kinds = ", ".join(ENGINE_OF_KIND)
        raise UsageError(f"{path} is of kind {artifact.manifest.kind}, which no engine runs; known: {kinds}")
    golden = Golden.read(path)
    if system is None:
        system = golden.system
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = render_chat(golden, messages)
    settings: dict[str, object] = {}
    if artifact.manifest.kind == "adapter":
        base, settings = base_of(artifact)
        path = base.path
    n_ctx = min(4096, artifact.manifest.notes.get("engine", {}).get("max_length", 4096))  # an engine has its own limit
    engine = load_engine(ENGINE_OF_KIND[artifact.manifest.kind], path, n_ctx=n_ctx, n_threads=threads, **settings)
    try:
        ids = greedy(engine, engine.tokenize(text), frozenset(golden.stop_ids), max_new_tokens)
        return engine.detokenize([token for token in ids if token not in golden.stop_ids])
    finally:
        engine.close()


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} is there already; choose another folder or remove it")


def calibration_rows(source: Artifact, rows: Path | None, config: Calibration, seed: int) -> CalibrationSet:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    stop = Golden.read(source.path).stop_ids
    task: list[tuple[int, ...]] = [(0,)]
    if rows is not None:
        task = [workload.render_row(row, tokenizer, stop, rows).ids for row in read_rows(rows)]
    general = workload.token_ids(tokenizer, general_text(None, "calibrate"))
    return make_calibration(
        task, general, n_samples=config.n_samples, n_tokens=config.n_tokens, general_share=config.general_share,
        seed=seed,
    )  # fmt: skip

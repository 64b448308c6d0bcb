"""Our GGUF and ONNX files against those of llama.cpp and onnxruntime-genai: bytes and KL to the float model.

    python benchmarks/export.py            # 48 calibration rows, 16 measured ones
    python benchmarks/export.py --quick    # 8 and 4
    python benchmarks/export.py --only onnx    # the other parts of --out stay in it

The model is SmolLM2 off the grid that its file came from (`folded.py`), of GGUF files also the same function in a wider
shape, of whose rows K-quants take all (`widened.py`, totals with `wide`). Rows of 512 tokens: the first half of
Python's language reference calibrates, of its second half the divergence is measured, in llama.cpp, from torch's
float32.
Stock: `llama-imatrix` and `llama-quantize` of the same llama.cpp (`peers.py`), on the float16 file of our writer.
Ours: `type: Q4_K_M` as recipes name it, the same with `gptq: true`, and that with `allocate` at no more bits, measured
on text that neither calibrates nor measures. Ratios are those of `gptq: true`, but for `allocated_kl_ratio`, of
the last to it. A `gptq` step of groups of 32 is written as `Q4_0` twice: its integers as they are, and its weights
rounded again, as any other exporter would; `kept_kl_ratio` is of these, `kept_to_gptq_kl_ratio` of the first to `Q4_0`
with `gptq: true`. All files are read with the same threads; no GGUF file is timed. The ONNX part: `onnx_sides.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_sides
import peers
from folded import folded
from numpy.typing import NDArray
from widened import widened

from edgetune.artifact import Artifact, draft, write_text
from edgetune.backends import require
from edgetune.compress import moments, quantize
from edgetune.compress.checkpoint import load_dequantized
from edgetune.compress.layerwise import load_model
from edgetune.data.calibration import CalibrationSet
from edgetune.data.general import general_text
from edgetune.export import gguf, gguf_sensitivity
from edgetune.recipe import Gptq
from edgetune.recipe_export import AllocateTypes, GgufExport
from edgetune.runtime.engines.llama_engine import LlamaEngine
from edgetune.runtime.machine import describe

RESULT = Path(__file__).resolve().parent / "results" / "export.json"
PARTS = ("gguf", "gguf-wide", "onnx")
TYPE, TOKENS, ROUNDS = "Q4_K_M", 512, 12
ROWS_THAT_CHOOSE, TOKENS_THAT_CHOOSE = 8, 128
CHOICES = ("Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")
STEP = {"bits": 4, "group_size": 32, "grid": "weighted", "damp_percent": 0.05, "hessian": "bfloat16"}
PACKAGES = ("edgetune", "torch", "transformers", "gguf", "llama-cpp-python", "onnxruntime", "onnxruntime-genai")


def make_rows(
    model: Path, n_calibration: int, n_measured: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], str]:
    """Give rows [N, T] that calibrate, that choose types and that measure, and the first as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def rows(part: str, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first n rows, and the ids behind them."""
        ids = np.asarray(tokenizer(general_text(None, part))["input_ids"], np.int64)
        n = min(n, len(ids) // TOKENS)
        return ids[: n * TOKENS].reshape(n, TOKENS), ids[n * TOKENS :]

    (calibration, rest), (measured, _) = rows("calibrate", n_calibration), rows("measure", n_measured)
    choosing = rest[: ROWS_THAT_CHOOSE * TOKENS_THAT_CHOOSE].reshape(-1, TOKENS_THAT_CHOOSE)
    return calibration, choosing, measured, tokenizer.decode(calibration.reshape(-1).tolist())


def stock(plain: Path, folder: Path, text: str | None, threads: int) -> Path:
    """Quantize a float16 file as llama.cpp's manual says, with an importance matrix of the text where there is one."""
    out = folder / f"stock{'' if text is None else '-imatrix'}.gguf"
    options: list[Any] = []
    if text is not None:
        (folder / "calibration.txt").write_text(text, encoding="utf-8")
        matrix = folder / "stock.imatrix.gguf"
        _run([peers.llama_tool("llama-imatrix"), "-m", plain, "-f", folder / "calibration.txt", "-o", matrix,
              "-c", TOKENS, "-t", threads, "-ngl", 0])  # fmt: skip
        options = ["--imatrix", matrix]
    _run([peers.llama_tool("llama-quantize"), *options, plain, out, TYPE, threads])
    return out


def ours(model: Artifact, folder: Path, rows: NDArray[np.int64], choosing: NDArray[np.int64]) -> dict[str, Path]:
    """Export as recipes do."""
    shown = CalibrationSet(rows)
    weighed = moments.run(model, folder / "moments", calibration=shown)

    def export(name: str, config: GgufExport, sensitivity: Artifact | None = None) -> Path:
        made = gguf.run(
            config, model, folder / name, moments=moments.read(weighed), calibration_digest=shown.digest,
            rows=rows if config.gptq else None, sensitivity=sensitivity,
        )  # fmt: skip
        return made.path / gguf.FILE

    plain, chosen = (export(f"ours-{gptq}", GgufExport(type=TYPE, gptq=gptq)) for gptq in (False, True))
    allocate = AllocateTypes(budget=block_bits(chosen), choices=list(CHOICES))
    sensitivity = gguf_sensitivity.run(
        allocate, model, folder / "sensitivity", moments=weighed, measured=CalibrationSet(choosing)
    )
    allocated = export("ours-allocated", GgufExport(type=TYPE, gptq=True, allocate=allocate), sensitivity)
    return {"ours": plain, "ours, gptq": chosen, "ours, gptq, allocated": allocated}


def integers(model: Artifact, folder: Path, rows: NDArray[np.int64]) -> dict[str, Path]:
    """Write the integers of a step as they are and rounded again, and those that the export chooses itself."""
    shown = CalibrationSet(rows)
    made = quantize.run(Gptq(**STEP), model, folder / "integers", calibration=shown)
    with draft(folder / "dequantized", kind="model", stage="benchmark/1", config={"of": made.identity}) as pending:
        for name in set(made.manifest.files) - {"model.safetensors", "config.json", "quantize_config.json"}:
            shutil.copyfile(made.path / name, pending.path / name)
        load_dequantized(made.path).save_pretrained(pending.path)
    chosen = GgufExport(type="Q4_0", gptq=True, imatrix=False)
    plain = GgufExport(type="Q4_0", imatrix=False)
    files = {
        "Q4_0, gptq": gguf.run(
            chosen, model, folder / "q4-gptq", moments=None, calibration_digest=shown.digest, rows=rows
        ),
        "Q4_0, kept": gguf.run(plain, made, folder / "q4-kept", moments=None),
        "Q4_0, rounded again": gguf.run(plain, pending.artifact, folder / "q4-again", moments=None),
    }
    return {name: file.path / gguf.FILE for name, file in files.items()}


def block_bits(file: Path) -> float:
    """Give the bits a weight of the matrices of all blocks."""
    found = [t for t in require("gguf").GGUFReader(file).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    return 8 * sum(int(t.n_bytes) for t in found) / sum(int(np.prod(t.shape)) for t in found)


def divergence(
    files: dict[str, Path], model: Artifact, rows: NDArray[np.int64], threads: int
) -> dict[str, list[float]]:
    """Give each file's KL to the float model, nats a token, the mean of each row."""
    import torch

    torch.set_num_threads(threads)
    reference: Any = load_model(model).float()
    engines = {name: LlamaEngine.load(file, n_ctx=TOKENS, n_threads=threads) for name, file in files.items()}
    found: dict[str, list[float]] = {name: [] for name in files}
    for row in rows:
        with torch.no_grad():
            wanted = reference(torch.from_numpy(row[None]), use_cache=False).logits[0].float().log_softmax(-1)
        for name, engine in engines.items():
            said = torch.from_numpy(engine.score(row.tolist())).log_softmax(-1)
            found[name].append(float((wanted.exp() * (wanted - said)).sum(-1).mean()))
        print(f"row {len(next(iter(found.values())))} of {len(rows)}", file=sys.stderr, flush=True)
    for engine in engines.values():
        engine.close()
    return found


def compare_gguf(
    part: str, model: Artifact, folder: Path, calibration: NDArray[np.int64], choosing: NDArray[np.int64],
    measured: NDArray[np.int64], text: str, threads: int,
) -> tuple[dict[str, float], dict[str, Any]]:  # fmt: skip
    """Make the files and measure them; give the totals, named after the part, and every row's figure."""
    folder.mkdir()
    plain = gguf.run(GgufExport(type="F16", imatrix=False), model, folder / "plain", moments=None).path / gguf.FILE
    files = {
        "stock": stock(plain, folder, None, threads),
        "stock, imatrix": stock(plain, folder, text, threads),
        **ours(model, folder, calibration, choosing),
        **integers(model, folder, calibration),
    }
    sizes = {name: file.stat().st_size for name, file in files.items()}
    rows = divergence(files, model, measured, threads)
    kl = {name: float(np.mean(found)) for name, found in rows.items()}
    for name in files:
        print(f"{name:<22} {sizes[name] / 1e6:7.1f} MB   KL {kl[name]:.4f}")
    totals = {
        "kl_ratio": kl["ours, gptq"] / kl["stock, imatrix"],
        "kl_ratio_without": kl["ours, gptq"] / kl["stock"],
        "bytes_ratio": sizes["ours, gptq"] / sizes["stock, imatrix"],
        "allocated_kl_ratio": kl["ours, gptq, allocated"] / kl["ours, gptq"],
        "allocated_bytes_ratio": sizes["ours, gptq, allocated"] / sizes["ours, gptq"],
        "kept_kl_ratio": kl["Q4_0, kept"] / kl["Q4_0, rounded again"],
        "kept_to_gptq_kl_ratio": kl["Q4_0, kept"] / kl["Q4_0, gptq"],
    }
    prefix = part.replace("-", "_")
    return {f"{prefix}_{name}": value for name, value in totals.items()}, {
        "type": TYPE,
        "model": model.digest,
        "bytes": sizes,
        "kl": rows,
    }


def benchmark(n_calibration: int, n_measured: int, threads: int, only: str | None, out: Path) -> None:
    """Measure all parts, or one, and write every row's figure."""
    began, model = time.monotonic(), folded()
    calibration, choosing, measured, text = make_rows(model.path, n_calibration, n_measured)
    before = json.loads(out.read_bytes()) if only and out.is_file() else {"totals": {}}
    totals, parts = before["totals"], {name: before[name] for name in PARTS if name in before}
    with tempfile.TemporaryDirectory(prefix="edgetune-export-") as temporary:
        for part, make in (("gguf", folded), ("gguf-wide", widened)):
            if only in (None, part):
                found, parts[part] = compare_gguf(
                    part, make(), Path(temporary) / part, calibration, choosing, measured, text, threads
                )
                totals |= found
        if only in (None, "onnx"):
            found, parts["onnx"] = onnx_sides.compare(
                model, Path(temporary), calibration, measured, threads, ROUNDS if n_measured > 4 else 3
            )
            totals |= found
    result = {
        "benchmark": "export",
        "totals": totals,
        "seconds": round(time.monotonic() - began, 1),
        "calibration_rows": len(calibration),
        "tokens": TOKENS,
        "threads": threads,
        "model": {"folded copy, digest": model.digest},
        **parts,
        "machine": describe().model_dump(mode="json"),
        "load_average": os.getloadavg(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(result, indent=1) + "\n")
    print(" ".join(f"{key}={value:.4f}" for key, value in totals.items()))


def _run(command: list[Any]) -> None:
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode:
        sys.exit(f"{Path(command[0]).name} failed: {ended.stderr.strip().splitlines()[-1:]}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=48, help="calibration rows of 512 tokens")
    parser.add_argument("--measured", type=int, default=16, help="rows of 512 tokens that measure")
    parser.add_argument("--quick", action="store_true", help="8 calibration rows, 4 measured ones")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    counts = (8, 4) if given.quick else (given.rows, given.measured)
    benchmark(*counts, given.threads, given.only, given.out)


if __name__ == "__main__":
    main()

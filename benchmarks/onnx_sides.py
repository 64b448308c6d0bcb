"""Our int4 ONNX folder against what onnxruntime-genai's builder makes of the model by default: a part of export.py.

Theirs: `python -m onnxruntime_genai.models.builder -p int4 -e cpu`, which rounds to groups of 32. Ours: GPTQ as the
quickstart's recipe names it (asymmetric groups of 32, weighted grid, correction), written by the same builder from the
checkpoint. Both are read by our ONNX Runtime engine. Decode is timed in turns, each folder in a process of its own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.compress import quantize
from edgetune.compress.layerwise import load_model
from edgetune.data.calibration import CalibrationSet
from edgetune.export import onnx
from edgetune.found import find
from edgetune.recipe import Gptq
from edgetune.recipe_export import OnnxExport
from edgetune.runtime.engines.onnx_engine import OnnxEngine
from edgetune.runtime.worker import Worker

N_PROMPT, N_NEW, TIMEOUT_S = 64, 32, 600
GRAPH = ("model.onnx", "model.onnx.data")


def stock(model: Path, folder: Path) -> Path:
    """Let the builder quantize as it does where nobody says how."""
    out = folder / "stock-onnx"
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out, "-p", "int4",
               "-e", "cpu", "-c", folder / "cache", "--extra_options", "hf_token=false"]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, errors="replace", env=environment, cwd=folder,
        check=False,
    )  # fmt: skip
    if ended.returncode:
        sys.exit(f"onnxruntime-genai's builder failed: {ended.stderr.strip().splitlines()[-1:]}")
    return out


def ours(model: Artifact, folder: Path, rows: NDArray[np.int64]) -> Path:
    """Quantize and export as a recipe does."""
    config = Gptq.model_validate({"bits": 4, "group_size": 32, "sym": False, "grid": "weighted", "correction": True})
    checkpoint = quantize.run(config, model, folder / "checkpoint", calibration=CalibrationSet(rows))
    return onnx.run(OnnxExport(), checkpoint, folder / "ours-onnx").path


def graph_bytes(folder: Path) -> int:
    """Bytes of the graph and its weights, without tokenizer and configuration."""
    return sum((folder / name).stat().st_size for name in GRAPH if (folder / name).is_file())


def divergence(
    folders: dict[str, Path], model: Artifact, rows: NDArray[np.int64], threads: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Give each folder's KL to the float model, nats a token, the mean of each row; and perplexities."""
    import torch

    torch.set_num_threads(threads)
    reference: Any = load_model(model).float()
    engines = {name: OnnxEngine.load(path, n_ctx=rows.shape[1], n_threads=threads) for name, path in folders.items()}
    kl: dict[str, list[float]] = {name: [] for name in folders}
    losses: dict[str, list[float]] = {name: [] for name in ("float", *folders)}
    for row in rows:
        gold = torch.from_numpy(row[1:])[:, None]
        with torch.no_grad():
            wanted = reference(torch.from_numpy(row[None]), use_cache=False).logits[0].float().log_softmax(-1)
        losses["float"].append(-float(wanted[:-1].gather(1, gold).mean()))
        for name, engine in engines.items():
            said = torch.from_numpy(engine.score(row.tolist())).log_softmax(-1)
            kl[name].append(float((wanted.exp() * (wanted - said)).sum(-1).mean()))
            losses[name].append(-float(said[:-1].gather(1, gold).mean()))
        print(f"onnx row {len(losses['float'])} of {len(rows)}", file=sys.stderr, flush=True)
    for engine in engines.values():
        engine.close()
    return kl, {name: float(np.exp(np.mean(found))) for name, found in losses.items()}


def decode_speeds(folders: dict[str, Path], threads: int, rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each folder in each round, in turns whose order changes."""
    ids = [3 + 7 * n % 8000 for n in range(N_PROMPT)]
    jobs = {name: find(path).job(name, "onnxruntime", n_threads=threads) for name, path in folders.items()}
    found: dict[str, list[float]] = {name: [] for name in folders}
    with Worker(jobs["stock"]) as theirs, Worker(jobs["ours"]) as own:
        workers = {"stock": theirs, "ours": own}
        for worker in workers.values():
            worker.load(n_ctx=N_PROMPT + N_NEW + 1, timeout_s=TIMEOUT_S)
        for n in range(rounds + 1):
            for name in sorted(workers, reverse=n % 2 == 0):
                request = {"ids": ids, "continuation": ids[:N_NEW]}
                _, first, *_, last = workers[name].call("generate_timed", timeout_s=TIMEOUT_S, **request)["stamps"]
                if n:  # the first round warms up
                    found[name].append(N_NEW / (last - first))
    return found


def compare(
    model: Artifact,
    folder: Path,
    calibration: NDArray[np.int64],
    measured: NDArray[np.int64],
    threads: int,
    rounds: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Make both folders and measure them; give the totals, and every sample."""
    folders = {"stock": stock(model.path, folder), "ours": ours(model, folder, calibration)}
    sizes = {name: graph_bytes(path) for name, path in folders.items()}
    kl, perplexity = divergence(folders, model, measured, threads)
    speeds = decode_speeds(folders, threads, rounds)
    totals = {
        "onnx_kl_ratio": float(np.mean(kl["ours"]) / np.mean(kl["stock"])),
        "onnx_bytes_ratio": sizes["ours"] / sizes["stock"],
        "onnx_speed_ratio": statistics.median(a / b for a, b in zip(speeds["ours"], speeds["stock"], strict=True)),
    }
    for name in folders:
        print(f"{name + ', onnx':<16} {sizes[name] / 1e6:7.1f} MB   KL {np.mean(kl[name]):.4f}   perplexity "
              f"{perplexity[name]:.2f}   {statistics.median(speeds[name]):.1f} tokens/s")  # fmt: skip
    return totals, {"bytes": sizes, "kl": kl, "perplexity": perplexity, "decode_tokens_per_s": speeds}

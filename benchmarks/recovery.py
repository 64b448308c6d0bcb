"""What learned grids, low-rank corrections and distillation into either buy: GPTQ and round to nearest, 4 and 3 bits.

    python benchmarks/recovery.py            # 4 and 3 bits
    python benchmarks/recovery.py --quick    # 3 bits, half of the sides

SmolLM2 off its grid, calibration rows and texts are those of `gptq.py`, of the texts every other row; groups of 64,
asymmetric. `gptq` has that benchmark's settings (`ours`), and each other side adds what it names. `scales` and
`adapter` are distilled by the float model on all of the text that the calibration rows are from, in rows of 256 tokens.
Each side is a process of its own, one after the other; what is kept is quality, and CPU-seconds, which a busy machine
makes larger. The totals are each addition's perplexity over that of the side without it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import gptq

from edgetune.artifact import Artifact, write_text
from edgetune.recipe import Gptq, Rtn
from edgetune.recipe_distill import Distill
from edgetune.runtime.machine import describe

RESULT = gptq.ROOT / "benchmarks" / "results" / "recovery.json"
GROUP_SIZE = 64
TUNE: dict[str, Any] = {"tune": {"steps": 8, "learning_rate": 5e-3}}
TAUGHT_TOKENS = 256  # of a row that is distilled on
DISTILL: dict[str, Any] = {
    "max_steps": 200, "batch_size": 8, "eval_steps": 25, "eval_rows": 32, "learning_rate": 5e-4, "label_weight": 0.0,
    "top_k": 32, "report_to": [],
}  # fmt: skip
SIDES: dict[str, dict[str, Any]] = {
    "rtn": {},
    "rtn + eora 32": {"recover": {"rank": 32}},
    "gptq": {},
    "gptq + tune": TUNE,
    "gptq + tune zeros": {"tune": TUNE["tune"] | {"zeros": True}},
    "gptq + eora 32": {"recover": {"rank": 32}},
    "gptq + eora 16": {"recover": {"rank": 16}},
    "gptq + lqer 32": {"recover": {"rank": 32, "method": "lqer"}},
    "gptq + scales 200": {"distill": DISTILL | {"into": "scales"}},
    "gptq + adapter 200": {"distill": DISTILL | {"into": "adapter", "rank": 16}},
}
QUICK = ("gptq", "gptq + tune", "gptq + eora 32")


def step(side: str, bits: int) -> Rtn | Gptq:
    """Give the step of a recipe that a side is."""
    more = {key: value for key, value in SIDES[side].items() if key != "distill"}
    grid: dict[str, Any] = {"bits": bits, "group_size": GROUP_SIZE, "sym": False} | more
    return Rtn(**grid) if side.startswith("rtn") else Gptq(**grid, **gptq.SETTINGS["ours"])


def quantize(side: str, bits: int, model: Path, rows: Path, out: Path) -> None:
    """Be one side."""
    import numpy as np

    from edgetune.compress.quantize import run
    from edgetune.data.calibration import CalibrationSet

    ids, source = np.asarray(json.loads(rows.read_text(encoding="utf-8")), dtype=np.int64), Artifact.open(model)
    taught = SIDES[side].get("distill")
    made = out if taught is None else out.with_name(f"{out.name} integers")
    integers = run(step(side, bits), source, made, calibration=CalibrationSet(ids))
    if taught is not None:
        distilled(Distill(**taught), source, integers, rows.with_name("taught.json"), out)


def distilled(config: Distill, source: Artifact, integers: Artifact, rows: Path, out: Path) -> None:
    """Train what is beside the integers by what the float model says of a text."""
    from edgetune.compress import distill, teacher
    from edgetune.data.render import Rendered

    taught = [
        Rendered(tuple(ids), (False, *[True] * (len(ids) - 1)), line, "", 0)
        for line, ids in enumerate(json.loads(rows.read_text(encoding="utf-8")), 1)
    ]
    said = teacher.run(config, source, out.with_name(f"{out.name} said"), rows=taught)
    distill.run(config, integers, source, said, out, rows=taught)


def taught_rows(model: Path) -> list[list[int]]:
    """Cut the text that calibrates into rows, the rest left out; its end is in the last one."""
    from transformers import AutoTokenizer

    from edgetune.data.general import general_text
    from edgetune.data.golden import Golden

    ids = AutoTokenizer.from_pretrained(model, local_files_only=True)(general_text(None, "calibrate"))["input_ids"]
    rows = [ids[start : start + TAUGHT_TOKENS] for start in range(0, len(ids) - TAUGHT_TOKENS + 1, TAUGHT_TOKENS)]
    rows[-1] = [*rows[-1][:-1], Golden.read(model).stop_ids[0]]
    return rows


def benchmark(all_bits: list[int], sides: list[str], seed: int, out: Path, *, add: bool) -> None:
    """Quantize each way, score each checkpoint, and write what was found after each."""
    from folded import folded

    began = time.monotonic()
    model = folded(seed).path
    rows = gptq.make_rows(model)
    texts = {name: text[::2] for name, text in rows.items() if name != "calibration"}
    before = json.loads(out.read_text(encoding="utf-8")) if add and out.is_file() else {}
    found: dict[str, dict[str, Any]] = before.get("found", {})
    settings = {"group_size": GROUP_SIZE, "sym": False, "seed": seed, "gptq": gptq.SETTINGS["ours"], "sides": SIDES,
                "rows": {name: [len(text), gptq.TOKENS] for name, text in (rows | texts).items()}}  # fmt: skip
    if before and not extends(settings, before["settings"]):
        sys.exit(f"{out} has other settings; leave --add out")

    def write() -> None:
        result = {
            "benchmark": "recovery", "totals": totals(found), "settings": settings,
            "seconds": round(time.monotonic() - began + before.get("seconds", 0), 1),
            "machine": describe().model_dump(mode="json"),
            "versions": {name: metadata.version(name) for name in gptq.PACKAGES}, "found": found,
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_text(work / "rows.json", json.dumps(rows["calibration"]))
        write_text(work / "texts.json", json.dumps(texts))
        write_text(work / "taught.json", json.dumps(taught_rows(model)))
        if "unquantized" not in found:
            found["unquantized"] = gptq.scored(model, work / "texts.json")
        for bits in all_bits:
            for side in sides:
                case, place = f"int{bits} {side}", work / f"{bits} {side}"
                if case in found:
                    continue
                command = [sys.executable, __file__, "--child", side, bits, model, work / "rows.json", place]
                spent = gptq.measured(command, work / "log", gptq.SPIN | os.environ)
                made = Artifact.open(place)
                assert made.manifest.scheme is not None, "a quantizer writes its scheme"
                found[case] = gptq.scored(place, work / "texts.json") | spent | {
                    "bits_per_weight": made.manifest.scheme["bits_per_weight"],
                }  # fmt: skip
                for key in ("mean_relative_error", "heldout_loss"):
                    found[case] |= {key: made.manifest.notes[key]} if key in made.manifest.notes else {}
                write()
                print(case, json.dumps(found[case]), flush=True)
    print(" ".join(f"{key}={value:.3f}" for key, value in totals(found).items()))


def extends(settings: dict[str, Any], before: dict[str, Any]) -> bool:
    """Tell whether settings are those of before, but for sides that are new."""
    sides = {name: settings["sides"].get(name) for name in before["sides"]}
    return settings | {"sides": sides} == before


def totals(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Give each addition's perplexity over that of the side without it."""
    made: dict[str, float] = {}
    for case, values in found.items():
        plain, plus, _ = case.partition(" + ")
        for text in ("in", "out") if plus and plain in found else ():
            made[f"{case.replace(' + ', '_').replace(' ', '_')}_{text}"] = values[text] / found[plain][text]
    return made


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--child"]:
        side, bits, model, rows, out = sys.argv[2:]
        quantize(side, int(bits), Path(model), Path(rows), Path(out))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 bits, half of the sides")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="keep the cases that the file has, and take the others")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    bits, sides = ([3], list(QUICK)) if given.quick else (given.bits, given.sides)
    benchmark(bits, sides, given.seed, given.out, add=given.add)


if __name__ == "__main__":
    main()

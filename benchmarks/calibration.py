"""What GPTQ is calibrated on: task rows, general text, what the model writes itself, and mixes. SmolLM2 off its grid.

    python benchmarks/calibration.py            # all sources
    python benchmarks/calibration.py --quick    # two sources, half of the measured rows

Bits, grid and settings are those of `gptq.py` (`ours`, asymmetric), and so are the rows of 512 tokens and two of the
texts: `in` is of the general text's kind, `out` is other questions and answers. `task` are held-out rows of the
project's commands under the template, whose training rows calibrate. Each source calibrates with as many tokens. One
quantization after the other, each a process of its own: what is kept is quality. The totals are each source's
perplexity over that of general text alone; `written_s` is how long the model wrote.
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

import gptq

from edgetune.artifact import Artifact, write_text
from edgetune.recipe import Gptq
from edgetune.runtime.machine import LoadMeter, describe

RESULT = gptq.ROOT / "benchmarks" / "results" / "calibration.json"
COMMANDS = gptq.ROOT / "calib_data" / "commands"
SOURCES = {
    "general": ("general",),
    "task": ("task",),
    "written": ("written",),
    "task and general": ("task", "general"),
    "task and written": ("task", "written"),
    "all three": ("task", "general", "written"),
}
QUICK = ("general", "task")
MOST_NEW = 256  # tokens of a question that the model writes, and of its answer


def packed(model: Path, rows: Path, n_rows: int) -> list[list[int]]:
    """Render chat rows under the model's template, one after the other, and cut them into rows of `TOKENS`."""
    from transformers import AutoTokenizer

    from edgetune.data.formats import read_rows
    from edgetune.data.golden import Golden
    from edgetune.workload import render_row

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    stop, stream = Golden.read(model).stop_ids, list[int]()
    for row in read_rows(rows):
        stream += render_row(row, tokenizer, stop, rows).ids
        if len(stream) >= n_rows * gptq.TOKENS:
            return [stream[i * gptq.TOKENS : (i + 1) * gptq.TOKENS] for i in range(n_rows)]
    sys.exit(f"{rows} has {len(stream)} tokens, {n_rows * gptq.TOKENS} are wanted")


def mixed(rows: dict[str, list[list[int]]], of: tuple[str, ...]) -> list[list[int]]:
    """Take equal parts of some sources, `ROWS` in all; the first ones give one more where that does not divide."""
    shares = [gptq.ROWS // len(of) + (place < gptq.ROWS % len(of)) for place in range(len(of))]
    return [row for name, n in zip(of, shares, strict=True) for row in rows[name][:n]]


def quantize(model: Path, rows: Path, out: Path) -> None:
    """Be one quantization."""
    import numpy as np

    from edgetune.compress.quantize import run
    from edgetune.data.calibration import CalibrationSet

    config = Gptq(bits=gptq.BITS, group_size=gptq.GROUP_SIZE, sym=False, **gptq.SETTINGS["ours"])
    ids = np.asarray(json.loads(rows.read_text(encoding="utf-8")), dtype=np.int64)
    run(config, Artifact.open(model), out, calibration=CalibrationSet(ids))


def benchmark(sources: list[str], quick: bool, seed: int, out: Path) -> None:
    """Quantize with each source, score each checkpoint, and write what was found."""
    from folded import folded

    from edgetune.compress import written

    began, meter = time.monotonic(), LoadMeter()
    source = folded(seed)
    model, own = source.path, gptq.make_rows(source.path)
    rows = {"general": own["calibration"], "task": packed(model, COMMANDS / "train.jsonl", gptq.ROWS)}
    texts = {"in": own["in"], "out": own["out"], "task": packed(model, COMMANDS / "heldout.jsonl", gptq.ROWS)}
    texts = {name: text[::2] if quick else text for name, text in texts.items()}
    n_written, written_s = 0, 0.0
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if any("written" in SOURCES[name] for name in sources):
            started = time.monotonic()
            n_tokens = (gptq.ROWS + 1) * gptq.TOKENS  # rendered, a row has a few tokens of its template more
            n_written = written.write(
                source, work / "written.jsonl", n_tokens=n_tokens, max_new_tokens=MOST_NEW, seed=seed
            )
            written_s = round(time.monotonic() - started, 1)
            rows["written"] = packed(model, work / "written.jsonl", gptq.ROWS)
            print(f"written: {n_written} rows in {written_s} s", flush=True)
        write_text(work / "texts.json", json.dumps(texts))
        found["unquantized"] = gptq.scored(model, work / "texts.json")
        for name in sources:
            write_text(work / "rows.json", json.dumps(mixed(rows, SOURCES[name])))
            command = [sys.executable, __file__, "--child", model, work / "rows.json", work / name]
            gptq.measured(command, work / "log", gptq.SPIN | os.environ)
            found[name] = gptq.scored(work / name, work / "texts.json")
            print(name, json.dumps(found[name]), flush=True)
    totals = {
        f"{name}_{text}".replace(" ", "_"): values[text] / found["general"][text]
        for name, values in found.items() if name in sources and name != "general" for text in texts
    }  # fmt: skip
    result = {
        "benchmark": "calibration", "totals": totals,
        "settings": {"bits": gptq.BITS, "group_size": gptq.GROUP_SIZE, "sym": False, "seed": seed,
                     "gptq": gptq.SETTINGS["ours"], "sources": SOURCES, "max_new_tokens": MOST_NEW,
                     "rows": {name: [len(text), gptq.TOKENS] for name, text in texts.items()}},
        "written_rows": n_written, "written_s": written_s, "seconds": round(time.monotonic() - began, 1),
        "machine": describe().model_dump(mode="json"), "load": meter.stop().model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in gptq.PACKAGES}, "perplexity": found,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(result, indent=1) + "\n")
    print(" ".join(f"{key}={value:.3f}" for key, value in totals.items()))


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--child"]:
        quantize(*map(Path, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sources, half of the measured rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    benchmark(list(QUICK) if given.quick else list(SOURCES), given.quick, given.seed, given.out)


if __name__ == "__main__":
    main()

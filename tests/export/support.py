"""Which family, compressed how, goes into which format: found by doing it, with the tiny models of the tests.

    python -m tests.export.support            # does everything, some ten minutes, and writes docs/support.md

Each cell is a chain of compress steps and an export, planned as a recipe's are and then made. "yes" means that the
artifact was written and kept its contract; a number is the note that the plan refused it with, before any work.
`test_support.py` does the same again and holds the page to it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.artifact import MANIFEST, Artifact, draft, write_text
from edgetune.compress import quantize
from edgetune.compress.prune import stage as pruning
from edgetune.data.calibration import CalibrationSet
from edgetune.data.golden import Golden
from edgetune.errors import UnsupportedError
from edgetune.plan import check_candidate
from edgetune.recipe import Candidate, Prune
from tests.export.test_gguf_families import MODELS, make

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
ROWS = CalibrationSet(np.random.default_rng(0).integers(3, 500, (8, 32)))
GPTQ, SYMMETRIC = ({"gptq": {"bits": 4, "group_size": 32, "sym": sym}} for sym in (False, True))
PRUNE = {"prune": {"layers": 2, "intermediate_size": 64}}
CHAINS: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "GPTQ int4": [GPTQ],
    "GPTQ int4, symmetric": [SYMMETRIC],
    "pruned": [PRUNE],
    "pruned, GPTQ int4": [PRUNE, GPTQ],
}
FORMATS: dict[str, dict[str, Any]] = {
    "GGUF Q8_0": {"gguf": {"type": "Q8_0", "imatrix": False}},
    "GGUF Q4_K_M": {"gguf": {"type": "Q4_K_M", "imatrix": False}},
    "ONNX int4 (genai)": {"onnx": {"precision": "int4"}},
    "ONNX int4 (own)": {"onnx": {"precision": "int4", "builder": "own"}},
    "ONNX fp16 (own)": {"onnx": {"precision": "fp16", "builder": "own"}},
    "TensorRT fp16": {"tensorrt": {"precision": "fp16", "max_length": 64, "compute_capability": ["8.6"]}},
    "TensorRT int4": {"tensorrt": {"precision": "int4", "max_length": 64, "compute_capability": ["8.6"]}},
}
Row = dict[str, str]  # format -> "yes", or why not


def rows_of(model: str, folder: Path) -> dict[str, Row]:
    """Do every chain and format of one model; give chain -> format -> "yes", or what the plan refused it with."""
    source = make(folder / "model", model)
    config = json.loads((source.path / "config.json").read_bytes())
    made: dict[str, Artifact] = {}
    found: dict[str, Row] = {}
    for chain, steps in CHAINS.items():
        found[chain] = {}
        for name, export in FORMATS.items():
            candidate = Candidate.model_validate({"compress": steps, "export": export})
            try:
                check_candidate(candidate, config)
            except UnsupportedError as error:
                found[chain][name] = str(error)
                continue
            compressed = source
            for place in range(len(steps)):
                key = json.dumps(steps[: place + 1])
                if key not in made:
                    made[key] = _compress(candidate, place, compressed, folder / f"step {len(made)}")
                compressed = made[key]
            _export(candidate, compressed, folder / f"{chain} {name}")
            found[chain][name] = "yes"
    return found


def _compress(candidate: Candidate, place: int, source: Artifact, out: Path) -> Artifact:
    method = candidate.compress[place].method
    if isinstance(method, Prune):
        return pruning.run(method, source, out, calibration=ROWS)
    quantizer = candidate.compress[place].quantizer
    assert quantizer is not None, "a chain here prunes and quantizes"
    return quantize.run(quantizer, source, out, calibration=ROWS)


def _export(candidate: Candidate, source: Artifact, out: Path) -> Artifact:
    from edgetune.export import gguf, onnx, tensorrt

    export = candidate.export
    assert export is not None, "every cell has a format"
    if export.gguf is not None:
        return gguf.run(export.gguf, source, out, moments=None)
    if export.onnx is not None:
        return onnx.run(export.onnx, source, out)
    assert export.tensorrt is not None, "an export has exactly one key"
    return tensorrt.run(export.tensorrt, source, out)


def without_template(model: Artifact, out: Path) -> Artifact:
    """Copy a model as a base comes that nobody taught to talk: no chat template, no golden conversation; a licence."""
    with draft(out, kind="model", stage="source/1", config={"of": model.identity}) as pending:
        shutil.copytree(model.path, pending.path, dirs_exist_ok=True)
        for name in (MANIFEST, "chat_template.jinja"):
            (pending.path / name).unlink()
        (pending.path / "LICENSE").write_text("Do as you like.")
        silent = {"conversations": [], "chat_template": "", "n_bos": 0}
        Golden.read(model.path).model_copy(update=silent).write(pending.path)
    return pending.artifact


def page(found: Mapping[str, Mapping[str, Row]]) -> str:
    """Write the page. Chains of a model that cannot be compressed at all are one line."""
    notes: list[str] = []
    lines = [HEAD, f"| Model | Compressed | {' | '.join(FORMATS)} |", f"|---|---|{'---|' * len(FORMATS)}"]
    for model, chains in found.items():
        seen: dict[tuple[str, ...], list[str]] = {}
        for chain, row in chains.items():
            seen.setdefault(tuple(_cell(row[name], notes) for name in FORMATS), []).append(chain)
        for cells, names in seen.items():
            lines.append(f"| {model} | {'; '.join(names)} | {' | '.join(cells)} |")
    lines += ["", "What the plan says, before any work:", "", *(f"{n}. {note}" for n, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def _cell(found: str, notes: list[str]) -> str:
    if found == "yes":
        return found
    if found not in notes:
        notes.append(found)
    return str(notes.index(found) + 1)


HEAD = """# What goes into what

Written by `python -m tests.export.support`, which makes every cell with a small random model of the family: planned as
a recipe is, compressed, exported and held to its contract (token ids, stop set, template, logits, perplexity, end of
generation; TensorRT's without the last two). `yes` was made and held; a number is the note below with which
`edgetune plan` and `run` refuse it. TensorRT engines are built, not run.
Checkpoints for torch and vLLM: [quantization.md](quantization.md).
"""


def main(models: Sequence[str]) -> None:
    """Do the models that are named, or all, and write the page if it was all."""
    found = {}
    for model in models or MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            found[model] = rows_of(model, Path(scratch))
        print(
            f"{model}: {sum(cell == 'yes' for row in found[model].values() for cell in row.values())} yes", flush=True
        )
    if models:
        print(page(found))
    else:
        write_text(PAGE, page(found))


if __name__ == "__main__":
    main(sys.argv[1:])

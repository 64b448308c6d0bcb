"""Every reader of files, given damaged ones: either what it reads, or one expected error in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetune import sources
from edgetune.artifact import Artifact
from edgetune.compress.checkpoint import read_layers
from edgetune.compress.quantize import run as quantize
from edgetune.data.golden import FILE as GOLDEN
from edgetune.data.golden import Golden
from edgetune.data.records import read_records
from edgetune.errors import EdgetuneError
from edgetune.export import gguf
from edgetune.export.gguf_vocab import read_vocabulary
from edgetune.export.lora_pairs import WEIGHTS, read_lora
from edgetune.export.onnx import GRAPH
from edgetune.gguf_header import read_header
from edgetune.past import read_timings
from edgetune.recipe import Rtn, load_recipe
from edgetune.recipe_export import GgufExport
from edgetune.runtime.engines.onnx_folder import check_graph, read_genai_config
from edgetune.runtime.reference import PackBuilder, ReferencePack
from edgetune.runtime.report.write import dump_report, read_report
from tests.export.test_gguf_adapter import make_adapter
from tests.export.test_onnx import exported
from tests.report_sample import sample_report

ROWS = b'{"instruction": "a", "input": "b", "output": "c"}\n' * 3
CSV = b'prompt,completion\n"a, b",c\nd,"e\nf"\n'
RECIPE = b"name: a\nbase: ./model\ndata: {train: t.jsonl, heldout: h.jsonl}\ncandidates: {q4: {export: {gguf: {}}}}\n"
Reader = Callable[[Path], Any]


def opened(folder: Path) -> Artifact:
    return Artifact.open(folder)


def records(path: Path) -> Any:
    return list(read_records(path))


def in_folder(read: Reader) -> Reader:
    return lambda path: read(path.parent)


@pytest.fixture(scope="module")
def places(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Reader]]:
    """Whole files, and who reads each; readers of a folder get the file's folder."""
    work = tmp_path_factory.mktemp("fuzz")
    file = gguf.run(GgufExport(type="F32", imatrix=False), tiny_model, work / "gguf", moments=None)
    graph = Path(shutil.copytree(exported("fp32", tiny_model, tmp_path_factory).path, work / "onnx"))
    rounded = quantize(Rtn(group_size=32), tiny_model, work / "rtn")
    adapter = make_adapter(tiny_model, work / "adapter")
    for name, text in (("rows.jsonl", ROWS), ("rows.json", b"[" + ROWS.strip().replace(b"\n", b",") + b"]"),
                       ("rows.csv", CSV), ("recipe.yaml", RECIPE)):  # fmt: skip
        (work / name).write_bytes(text)
    (work / "report.json").write_text(dump_report(sample_report()))
    builder = PackBuilder()
    builder.add(np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32))
    builder.build("w", "s").save(work / "pack.npz")
    rows = {f"rows.{end}": (work / f"rows.{end}", records) for end in ("jsonl", "json", "csv")}
    model = Path(shutil.copytree(tiny_model.path, work / "model"))
    lora = in_folder(lambda folder: read_lora(Artifact(folder, adapter.manifest)))

    return rows | {
        "gguf": (file.path / gguf.FILE, read_header),
        "graph": (graph / GRAPH, check_graph),
        "genai_config": (graph / "genai_config.json", in_folder(read_genai_config)),
        "manifest": (model / "manifest.json", in_folder(opened)),
        "golden": (model / GOLDEN, in_folder(Golden.read)),
        "tokenizer": (model / "tokenizer.json", in_folder(lambda folder: read_vocabulary(folder, 512))),
        "config": (model / "config.json", in_folder(lambda folder: sources.find(str(folder)).model_config())),
        "safetensors": (model / "model.safetensors", in_folder(lambda folder: sources.find(str(folder)))),
        "checkpoint": (rounded.path / "model.safetensors", in_folder(read_layers)),
        "checkpoint's config": (rounded.path / "config.json", in_folder(read_layers)),
        "adapter": (adapter.path / WEIGHTS, lora),
        "adapter's config": (adapter.path / "adapter_config.json", lora),
        "report": (work / "report.json", read_report),
        "evidence": (work / "report.json", read_timings),
        "pack": (work / "pack.npz", ReferencePack.read),
        "recipe": (work / "recipe.yaml", load_recipe),
    }  # fmt: skip


@pytest.fixture(scope="module")
def wholes(places: dict[str, tuple[Path, Reader]]) -> dict[str, bytes]:
    """What each file holds, which its reader takes as it is."""
    for path, read in places.values():
        read(path)
    return {name: path.read_bytes() for name, (path, _) in places.items()}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Cut it, overwrite some bytes, most often near its beginning, or repeat a piece."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.booleans())
        at = draw(st.integers(0, max(0, min(len(found), 400 if near else len(found)) - 1)))
        kind = draw(st.sampled_from(["cut", "byte", "bytes", "twice", "drop"]))
        if kind == "cut":
            del found[at:]
        elif kind == "byte" and found:
            found[at] = draw(st.integers(0, 255))
        elif kind == "bytes":
            found[at : at + 8] = draw(st.binary(min_size=0, max_size=12))
        elif kind == "twice":
            found[at:at] = found[at : at + 40]
        else:
            del found[at : at + draw(st.integers(1, 40))]
    return bytes(found)


NAMES = (
    "rows.jsonl", "rows.json", "rows.csv", "gguf", "graph", "genai_config", "manifest", "golden", "tokenizer", "config",
    "safetensors", "checkpoint", "checkpoint's config", "adapter", "adapter's config", "report", "evidence", "pack",
    "recipe",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(
    places: dict[str, tuple[Path, Reader]], wholes: dict[str, bytes], name: str, data: st.DataObject
) -> None:
    (path, read), whole = places[name], wholes[name]
    path.write_bytes(data.draw(damaged(whole)))
    said = ""
    try:
        read(path)
    except EdgetuneError as error:
        said = str(error).strip()
    finally:
        path.write_bytes(whole)
    assert "\n" not in said, said


def test_every_place_is_tried(places: dict[str, tuple[Path, Reader]]) -> None:
    assert set(NAMES) == set(places)

"""An ONNX graph as a whole, of either builder: its shapes, its data files, its embedding, and many rows at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.compress import quantize
from edgetune.errors import ContractError
from edgetune.export import onnx as onnx_export
from edgetune.export.decoder_run import graph_logits, open_graph
from edgetune.export.onnx_own import read_embedding
from edgetune.export.onnx_repack import settle
from edgetune.export.onnx_shapes import Promise, check_shapes
from edgetune.export.parity import torch_logits
from edgetune.recipe import Rtn
from edgetune.recipe_export import OnnxExport
from edgetune.runtime.engines.onnx_engine import OnnxEngine
from edgetune.runtime.engines.onnx_folder import check_graph
from tests.conftest import make_tiny_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

LENGTHS = (3, 17, 9, 40, 1, 26)  # of rows that are read together
KINDS = {
    "genai int4": OnnxExport(),
    "own int4": OnnxExport(builder="own"),
    "own fp32": OnnxExport(precision="fp32", builder="own"),
}
_made: dict[str, Artifact] = {}  # one build of each kind for all tests


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Give an untied tiny model: itself, its int4 checkpoint, or the export of a kind."""

    def made(kind: str) -> Artifact:
        if kind not in _made:
            out = tmp_path_factory.mktemp("whole") / "artifact"
            if kind == "model":
                _made[kind] = make_tiny_model(out, tie=False)
            elif kind == "gptq":
                _made[kind] = quantize.run(Rtn(bits=4, group_size=32, sym=False), made("model"), out)
            else:
                _made[kind] = onnx_export.run(KINDS[kind], made("model" if "fp32" in kind else "gptq"), out)
        return _made[kind]

    return made


@pytest.mark.parametrize(("kind", "by"), [("genai int4", "onnxruntime"), ("own int4", "onnx"), ("own fp32", "onnx")])
def test_the_manifest_says_what_was_checked(kind: str, by: str, make: Callable[[str], Artifact]) -> None:
    checked = make(kind).manifest.notes["graph"]
    assert (checked["inference"], checked["checker"]) == (by, f"onnx {onnx.__version__}")
    assert checked["outputs"] == 1 + 2 * 2
    assert (len(checked["logits"]), checked["logits"][2]) == (3, 512)
    assert (checked["cache"][1], checked["cache"][3]) == (2, 16)
    assert checked["values_without_shape"] == 0
    assert "MatMulNBits" not in checked["operators_without_schema"] if kind == "own fp32" else True


def declared(model: Any) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 511


def too_few_heads(model: Any) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.1.key", "present.1.key")):
            value.type.tensor_type.shape.dim[1].dim_value = 1


def narrow(model: Any) -> None:
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits" and n.name.startswith("/lm_head"))
    next(a for a in node.attribute if a.name == "N").i = 511


def wide(model: Any) -> None:
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits" and "down_proj" in n.name)
    next(a for a in node.attribute if a.name == "K").i = 160


def unwired(model: Any) -> None:
    model.graph.node[5].input[0] = "nothing"


def lost(model: Any) -> None:
    del model.graph.output[-1]


@pytest.mark.parametrize("kind", ["genai int4", "own int4"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (declared, r"logits is to have the shape .*512.*|contradict|not valid ONNX"),
        (too_few_heads, r"present.1.key is to have the shape|contradict|not valid ONNX"),
        (narrow, "logits is to have the shape|contradict|not valid ONNX"),
        (wide, "contradict|not valid ONNX"),
        (unwired, "not valid ONNX: .*nothing"),
        (lost, r"present.1.value is to have the shape .*declared None"),
    ],
)
def test_a_graph_that_gives_other_shapes_is_refused(
    kind: str, spoil: Callable[[Any], None], says: str, make: Callable[[str], Artifact], tmp_path: Path
) -> None:
    shutil.copytree(make(kind).path, tmp_path / "folder")
    graph, promise = tmp_path / "folder" / "model.onnx", Promise.of_folder(make(kind).path)
    check_shapes(graph, promise)
    model = onnx.load(str(graph), load_external_data=False)
    spoil(model)
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(ContractError, match=says):
        check_shapes(graph, promise)
    assert not list(graph.parent.glob("check.*"))


def test_an_embedding_of_its_own_is_rounded_to_8_bits(make: Callable[[str], Artifact]) -> None:
    """The builder leaves it in floats, which are most of a small model's bytes."""
    from safetensors.numpy import load_file

    made = make("genai int4")
    notes = made.manifest.notes
    assert notes["graph"]["operators"]["GatherBlockQuantized"] == 1
    stored = onnx.load(str(made.path / "model.onnx"), load_external_data=False).graph.initializer
    assert "model.embed_tokens.weight" not in {tensor.name for tensor in stored}
    assert notes["head"]["bits"] == notes["embedding"]["bits"] == 8
    assert 0 < notes["embedding"]["relative_error"] < 0.02
    assert notes["parity"]["float_activations"]["max_abs"] < 1e-4  # to the model with this embedding, both ways rounded
    table = load_file(make("model").path / "model.safetensors")["model.embed_tokens.weight"]
    found = read_embedding(made.path / "model.onnx")
    assert found is not None
    assert np.array_equal(found, read_embedding(make("own int4").path / "model.onnx"))  # type: ignore[arg-type]
    assert np.linalg.norm(found - table) / np.linalg.norm(table) < 0.02
    n_weights = table.size * 2 + 2 * 4 * 64 * 64 + 2 * 3 * 64 * 192
    assert (made.path / "model.onnx.data").stat().st_size < 1.3 * n_weights  # bytes: 8 bits a weight and scales


@pytest.mark.parametrize("kind", ["genai int4", "own int4"])
def test_data_is_split_below_a_limit_and_loads(kind: str, make: Callable[[str], Artifact], tmp_path: Path) -> None:
    shutil.copytree(make(kind).path, tmp_path / "folder")
    graph, limit = tmp_path / "folder" / "model.onnx", 40_000  # the largest table has 32,768 bytes
    whole = graph.with_name("model.onnx.data").stat().st_size
    settle(graph, rounds=False, file_limit=limit)
    files = sorted(graph.parent.glob("*.data*"))
    assert [file.name for file in files][:3] == ["model.onnx.data", "model.onnx.data.1", "model.onnx.data.2"]
    assert all(file.stat().st_size <= limit for file in files)
    assert len(files) > whole // limit
    check_shapes(graph, Promise.of_folder(graph.parent))
    check_graph(graph)
    rows = [list(range(3, 40)), list(range(100, 160))]
    for ours, theirs in zip(onnx_export.run_rows(graph.parent, rows), onnx_export.run_rows(make(kind).path, rows),
                            strict=True):  # fmt: skip
        assert np.array_equal(ours, theirs)
    before = {file.name: file.read_bytes() for file in files}
    settle(graph, rounds=False, file_limit=limit)
    assert {file.name: file.read_bytes() for file in sorted(graph.parent.glob("*.data*"))} == before


def test_rows_of_many_lengths_are_read_together(make: Callable[[str], Artifact]) -> None:
    """Six rows, padded at their left, in our own graph: in one run, in chunks, and token by token at the end."""
    from edgetune.compress.layerwise import load_whole

    model = load_whole(make("model").path, "float32")
    session = open_graph(make("own fp32").path / "model.onnx", n_threads=1)
    longest = max(LENGTHS)
    ids = np.random.default_rng(0).integers(3, 500, (len(LENGTHS), longest))
    mask = np.array([[0] * (longest - n) + [1] * n for n in LENGTHS])
    for cuts in ((), (20,), (1, 2, 30), tuple(range(35, longest))):
        found = graph_logits(session, ids, mask, cuts)
        for row, n in enumerate(LENGTHS):
            wanted = torch_logits(model, ids[row, longest - n :].tolist())
            assert np.abs(found[row, longest - n :] - wanted).max() < 1e-3, (cuts, row)


def test_five_rows_decode_together_in_the_genai_graph(make: Callable[[str], Artifact]) -> None:
    engine = OnnxEngine.load(make("genai int4").path, n_ctx=64, n_threads=1)
    ids = np.random.default_rng(1).integers(3, 500, (5, 24))
    for n in (1, 7, 19):
        alone = [engine.score(row[: n + 5].tolist()) for row in ids]
        first = engine.prefill_rows([row[:n].tolist() for row in ids])
        for row in range(5):
            assert np.abs(first[row] - alone[row][n - 1]).max() < 1e-3
        for at in range(n, n + 5):
            logits = engine.decode_rows(ids[:, at].tolist())
            for row in range(5):
                assert np.abs(logits[row] - alone[row][at]).max() < 0.05  # int8 activations of one token, or of many
    engine.close()

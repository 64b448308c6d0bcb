"""The ONNX Runtime engine: one answer by every way of asking, and nothing read outside the folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.errors import EngineError
from edgetune.runtime.engine import TokenRow, load_engine
from edgetune.runtime.engines import onnx_engine, onnx_folder
from edgetune.runtime.engines.onnx_engine import OnnxEngine
from edgetune.runtime.engines.onnx_folder import OnnxFolder, check_graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

from tests.export.test_onnx import exported  # noqa: E402

IDS = [int(i) for i in np.random.default_rng(0).integers(3, 500, 300)]


@pytest.fixture(scope="module")
def folder(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("fp32", tiny_model, tmp_path_factory).path


@pytest.fixture
def engine(folder: Path) -> Iterator[OnnxEngine]:
    engine = OnnxEngine.load(folder, n_ctx=512, n_threads=1)
    yield engine
    engine.close()


def test_prefill_and_decode_give_what_score_gives(engine: OnnxEngine) -> None:
    whole = engine.score(IDS)  # three chunks
    assert whole.shape == (300, engine.n_vocab) == (300, 512)
    for n in (1, 100, onnx_engine.CHUNK, 290):  # within, at and past the end of a chunk
        assert np.abs(engine.prefill(IDS[:n]) - whole[n - 1]).max() < 1e-4
        for i in range(n, n + 5):
            assert np.abs(engine.decode(IDS[i]) - whole[i]).max() < 1e-4


@pytest.mark.parametrize("n_shared", [0, 1, 40, 200])
def test_score_rows_gives_what_score_gives(engine: OnnxEngine, n_shared: int) -> None:
    head = IDS[:n_shared]
    rows = [TokenRow((*head, *IDS[200 + 7 * i : 220 + 9 * i]), n_shared + 3 + i) for i in range(5)]
    rows.append(TokenRow((*head, *IDS[:160]), n_shared + 2))  # longer than a chunk
    rows.append(rows[0])
    wanted = [engine.score(row.ids)[row.start - 1 : -1] for row in rows]
    for row, logits, known in zip(rows, engine.score_rows(rows), wanted, strict=True):
        assert logits.shape == (len(row.target), engine.n_vocab)
        assert np.abs(logits - known).max() < 1e-4


def test_score_rows_stops_sharing_where_a_target_begins(engine: OnnxEngine) -> None:
    rows = [TokenRow(tuple(IDS[:30]), 20), TokenRow(tuple(IDS[:30]), 5), TokenRow(tuple(IDS[:29]), 28)]
    wanted = [engine.score(row.ids)[row.start - 1 : -1] for row in rows]
    for logits, known in zip(engine.score_rows(rows), wanted, strict=True):
        assert np.abs(logits - known).max() < 1e-4


def test_score_rows_bears_other_use_of_the_engine_in_between(engine: OnnxEngine) -> None:
    rows = [TokenRow((*IDS[:50], i, *IDS[60:70]), 53) for i in range(3, 6)]
    wanted = [engine.score(row.ids)[52:-1] for row in rows]
    for logits, known in zip(engine.score_rows(rows), wanted, strict=True):
        assert np.abs(logits - known).max() < 1e-4
        engine.prefill(IDS[100:200])


def test_score_rows_reads_the_shared_prefix_once(engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    run = OnnxEngine._run
    monkeypatch.setattr(OnnxEngine, "_run", lambda self, ids: (read.append(len(ids)), run(self, ids))[1])
    rows = [TokenRow((*IDS[:100], i, *IDS[100:110]), 104) for i in range(3, 9)]
    assert len(list(engine.score_rows(rows))) == 6
    assert sum(read) == 100 + 6 * 10
    assert list(engine.score_rows([])) == []


def test_an_answer_is_the_callers_to_keep(engine: OnnxEngine) -> None:
    first = engine.prefill(IDS[:1])
    kept = first.copy()
    engine.decode(IDS[1])
    assert np.array_equal(first, kept)


def test_int4_activations_make_little_noise(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = OnnxEngine.load(exported("int4", tiny_model, tmp_path_factory).path, n_ctx=128, n_threads=1)
    whole = engine.score(IDS[:60])
    steps = np.stack([engine.prefill(IDS[:30]), *(engine.decode(i) for i in IDS[30:60])])
    p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
            for x in (whole[29:].astype(np.float64), steps.astype(np.float64)))  # fmt: skip
    assert (np.exp(p) * (p - q)).sum(-1).mean() < 1e-3


def test_tokenizer_and_stop_set_are_the_artifacts_own(engine: OnnxEngine, folder: Path) -> None:
    golden = Golden.read(folder)
    for case in (*golden.conversations, *golden.texts):
        assert engine.tokenize(case.text) == case.ids
    assert engine.stop_ids == {2}
    assert engine.version.startswith("onnxruntime 1.")


def test_tokenize_adds_no_bos(folder: Path, tmp_path: Path) -> None:
    graph = copied(folder, tmp_path)
    add_bos(graph.parent)
    text = Golden.read(folder).texts[0]
    tokenizer = onnx_folder.load_tokenizer(graph.parent)
    tokenizer.update_options(add_special_tokens="true")
    assert tokenizer.encode(text.text)[0] == 1  # so the folder does ask for one
    engine = OnnxEngine.load(graph.parent, n_ctx=16, n_threads=1)
    assert engine.tokenize(text.text) == text.ids


def test_the_table_of_engines_finds_it(folder: Path) -> None:
    engine = load_engine("onnxruntime", folder, n_ctx=16, n_threads=1)
    assert engine.prefill([1, 5]).shape == (512,)
    engine.close()


def test_an_idle_engine_burns_no_cpu(folder: Path) -> None:
    engine = OnnxEngine.load(folder, n_ctx=64, n_threads=2)
    idle = 0.0
    for _ in range(15):
        engine.prefill(IDS[:30])
        before = time.process_time()
        time.sleep(0.03)
        idle += time.process_time() - before
    assert idle < 15 * 0.002  # onnxruntime's default takes up to 14 ms after each run
    engine.close()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.prefill(IDS * 2), "600|640 tokens of context, n_ctx is 512"),
        (lambda e: e.prefill([5, 512]), "token id 512 is not in the vocabulary of 512"),
        (lambda e: e.score([-1]), "token id -1"),
        (lambda e: e.prefill([]), "empty row"),
    ],
)
def test_wrong_requests_are_one_line(engine: OnnxEngine, call: object, says: str) -> None:
    with pytest.raises(EngineError, match=says) as error:
        call(engine)  # type: ignore[operator]
    assert "\n" not in str(error.value)


def test_n_ctx_beyond_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match="n_ctx=513 is longer than the 512 positions"):
        OnnxEngine.load(folder, n_ctx=513, n_threads=1)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/model.data", ""])
def test_a_graph_that_reads_outside_its_folder_is_refused(folder: Path, tmp_path: Path, location: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in model.graph.initializer[3].external_data:
        if entry.key == "location":
            entry.value = location
    hostile = copied(folder, tmp_path)
    (tmp_path / "secret").write_bytes(b"0" * 10**6)
    hostile.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="not in its folder"):
        OnnxEngine.load(hostile.parent, n_ctx=16, n_threads=1)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/hostname", "..", ""])
def test_a_config_that_names_a_graph_elsewhere_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    hostile = copied(folder, tmp_path).parent
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    genai = json.loads((hostile / "genai_config.json").read_bytes())
    genai["model"]["decoder"]["filename"] = name
    (hostile / "genai_config.json").write_text(json.dumps(genai))
    with pytest.raises(EngineError, match="which is no file beside it"):
        OnnxEngine.load(hostile, n_ctx=16, n_threads=1)


@pytest.mark.parametrize("external", [False, True])
def test_a_table_that_is_only_looked_up_in_is_no_weight_of_a_token(tmp_path: Path, external: bool) -> None:
    floats = {name: onnx.numpy_helper.from_array(np.ones((9, 4), np.float32), name) for name in ("table", "head")}
    ends = [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("ids", "logits")]
    for head, left_out in (("head", 9 * 4 * 4), ("table", 0)):  # a tied head reads the table
        nodes = [
            onnx.helper.make_node("Gather", ["table", "ids"], ["x"]),
            onnx.helper.make_node("Gemm", ["x", head, ""], ["logits"], transB=1),
        ]
        graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer=list(floats.values()))
        place = tmp_path / head / "model.onnx"
        place.parent.mkdir()
        onnx.save(
            onnx.helper.make_model(graph), place, save_as_external_data=external, location="model.onnx.data",
            size_threshold=0,
        )  # fmt: skip
        stored = sum(file.stat().st_size for file in place.parent.iterdir())
        found = OnnxFolder(place.parent, {"model": {"decoder": {}}}, shares_cache=True)
        assert found.weight_bytes == stored - left_out


def test_a_tensor_that_hides_in_a_subgraph_is_found(folder: Path, tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="../secret")
    inner = onnx.helper.make_graph([], "inner", [], [], initializer=[tensor])
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner))
    (copied(folder, tmp_path)).write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="not in its folder"):
        check_graph(tmp_path / "copy" / "model.onnx")


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    graph = copied(folder, tmp_path)
    data = graph.with_name("model.onnx.data")
    data.rename(tmp_path / "data")
    data.symlink_to(tmp_path / "data")
    with pytest.raises(EngineError, match="not in its folder"):
        check_graph(graph)


@pytest.mark.parametrize("cut", ["graph", "data", "config", "noise", "missing"])
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, tmp_path: Path, cut: str) -> None:
    graph = copied(folder, tmp_path)
    files = {"graph": graph, "data": graph.with_name("model.onnx.data"), "config": graph.with_name("genai_config.json")}
    if cut in files:
        files[cut].write_bytes(files[cut].read_bytes()[:-100])
    elif cut == "noise":
        graph.write_bytes(np.random.default_rng(1).bytes(5000))
    else:
        graph.unlink()
    says = {"data": r"reads \d+ bytes of model.onnx.data, which has", "config": "genai_config.json cannot be read"}
    with pytest.raises(EngineError, match=says.get(cut, "damaged")) as error:
        OnnxEngine.load(graph.parent, n_ctx=16, n_threads=1)
    assert "\n" not in str(error.value)


def test_what_the_runtime_refuses_is_one_line(folder: Path, tmp_path: Path) -> None:
    graph = copied(folder, tmp_path)
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[-1].input[0] = "nowhere"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="onnxruntime cannot load") as error:
        OnnxEngine.load(graph.parent, n_ctx=16, n_threads=1)
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_shared_is_refused(folder: Path, tmp_path: Path) -> None:
    graph = copied(folder, tmp_path)
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "MultiHeadAttention"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="no GroupQueryAttention"):
        check_graph(graph)


def add_bos(folder: Path) -> None:
    """Make the tokenizer of a folder put a BOS before each text, as Llama 3's does."""
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    bos = "<|im_start|>"
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": bos, "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def copied(folder: Path, tmp_path: Path) -> Path:
    """Copy an export and give its graph."""
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "genai_config.json").read_bytes())
    return tmp_path / "copy" / str(config["model"]["decoder"]["filename"])

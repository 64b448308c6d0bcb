"""The onnxruntime-genai engine: the folder's logits as plain onnxruntime gives them, and the library's own answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.errors import EngineError
from edgetune.runtime.engine import TokenRow, greedy, load_engine
from edgetune.runtime.engines.genai_engine import GenaiEngine
from edgetune.runtime.engines.onnx_engine import OnnxEngine

genai = pytest.importorskip("onnxruntime_genai")

from tests.export.test_onnx import exported  # noqa: E402

IDS = [int(i) for i in np.random.default_rng(0).integers(3, 500, 60)]


@pytest.fixture(scope="module")
def folder(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("fp32", tiny_model, tmp_path_factory).path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[GenaiEngine]:
    engine = load_engine("onnxruntime-genai", folder, n_ctx=64, n_threads=1)
    assert isinstance(engine, GenaiEngine)
    yield engine
    engine.close()


def test_logits_are_those_of_onnxruntime(engine: GenaiEngine, folder: Path) -> None:
    plain = OnnxEngine.load(folder, n_ctx=64, n_threads=1)
    wanted = plain.score(IDS)
    assert np.abs(engine.score(IDS) - wanted).max() < 1e-4
    for n in (1, 30):  # a longer context first, then a shorter one: the first is forgotten
        assert np.abs(engine.prefill(IDS[:n]) - wanted[n - 1]).max() < 1e-4
        assert np.abs(engine.decode(IDS[n]) - wanted[n]).max() < 1e-4
    row = TokenRow(tuple(IDS[:20]), 12)
    (found,) = engine.score_rows([row])
    assert np.abs(found - wanted[11:19]).max() < 1e-4
    assert engine.stop_ids == plain.stop_ids
    assert engine.n_vocab == plain.n_vocab == 512
    assert engine.version.startswith("onnxruntime-genai ")
    plain.close()


@pytest.mark.parametrize("n_shared", [0, 1, 30])
def test_score_rows_reads_what_rows_share_once_and_each_row_in_one_call(
    engine: GenaiEngine, monkeypatch: pytest.MonkeyPatch, n_shared: int
) -> None:
    rows = [TokenRow((*IDS[:n_shared], i, *IDS[40 : 50 + i]), n_shared + 1 + i % 3) for i in range(3, 8)]
    wanted = [engine.score(row.ids)[row.start - 1 : -1] for row in rows]
    read: list[int] = []
    append = GenaiEngine._append
    monkeypatch.setattr(GenaiEngine, "_append", lambda self, ids: (read.append(len(ids)), append(self, ids))[1])
    found = list(engine.score_rows(rows))
    assert read == [n_shared] * (n_shared > 0) + [len(row.ids) - n_shared - 1 for row in rows]
    for logits, known in zip(found, wanted, strict=True):
        assert logits.shape == known.shape
        assert np.abs(logits - known).max() < 1e-4
    for logits, known in zip(engine.score_rows(rows), wanted, strict=True):
        assert np.abs(logits - known).max() < 1e-4
        engine.prefill(IDS[5:25])  # the caller may use the engine in between
    assert list(engine.score_rows([])) == []


def test_greedy_is_the_librarys_own_generate(engine: GenaiEngine, folder: Path) -> None:
    model = genai.Model(str(folder))
    plain = OnnxEngine.load(folder, n_ctx=64, n_threads=1)
    for seed in range(3):
        prompt = [int(i) for i in np.random.default_rng(seed).integers(3, 500, 12)]
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=12 + 20, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        theirs = [int(i) for i in generator.get_sequence(0)][12:]
        ours = greedy(engine, prompt, engine.stop_ids, 20)
        assert ours[: len(theirs)] == theirs
        assert greedy(plain, prompt, plain.stop_ids, 20) == ours
        assert ours[len(theirs) :] in ([], [*engine.stop_ids])  # the library leaves the stop token out
    plain.close()


def test_wrong_use_is_one_line(engine: GenaiEngine, folder: Path, tmp_path: Path) -> None:
    for ids, said in (([], "empty row"), ([512], "token id 512"), ([3] * 65, "n_ctx is 64")):
        with pytest.raises(EngineError, match=said):
            engine.prefill(ids)
    with pytest.raises(EngineError, match="longer than the 512 positions"):
        GenaiEngine.load(folder, n_ctx=1000, n_threads=1)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((broken / "genai_config.json").read_text())
    config["model"]["type"] = "abacus"
    (broken / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="onnxruntime-genai cannot load"):
        GenaiEngine.load(broken, n_ctx=64, n_threads=1)

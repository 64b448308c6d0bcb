"""The llama.cpp engine against Transformers, on a tiny random Llama in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.errors import EngineError
from edgetune.export.parity import torch_logits
from edgetune.runtime.engine import TokenRow, load_engine
from edgetune.runtime.engines import llama_engine
from edgetune.runtime.engines.llama_engine import LlamaEngine

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def engine(tiny_gguf: Artifact) -> Iterator[LlamaEngine]:
    engine = LlamaEngine.load(tiny_gguf.path, n_ctx=512, n_threads=1, flash_attention=False, kv_type="f32")
    yield engine
    engine.close()


def ids_of(seed: int, length: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 300, length)]


def test_logits_are_those_of_transformers(engine: LlamaEngine, tiny_model: Artifact) -> None:
    from transformers import AutoModelForCausalLM

    ids = ids_of(0, 40)
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path).eval()
    np.testing.assert_allclose(engine.score(ids), torch_logits(model, ids), atol=1e-3, rtol=0)


def test_prefill_and_decode_are_score(engine: LlamaEngine) -> None:
    ids = ids_of(1, 24)
    scored = engine.score(ids)
    engine.prefill(ids_of(2, 50))  # forgotten
    found = [engine.prefill(ids[:16])] + [engine.decode(token) for token in ids[16:]]
    np.testing.assert_allclose(np.stack(found), scored[15:], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found[0], scored[15], atol=1e-4, rtol=0)  # not overwritten by the next call


def test_score_rows_is_score(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_engine, "N_ROWS", 3)
    shared = ids_of(3, 20)
    rows = [TokenRow((*shared, *ids_of(10 + i, 4 + 3 * i)), 20 + i % 3) for i in range(11)]
    rows += [TokenRow((*shared[:5], *ids_of(4, 6)), 6), TokenRow((*shared, 7), 20)]  # a shorter prefix, one target
    for some in (rows[:11], rows, rows[:1], [rows[0], rows[0]]):
        found = [logits.copy() for logits in engine.score_rows(some)]
        assert [len(logits) for logits in found] == [len(row.target) for row in some]
        for row, logits in zip(some, found, strict=True):
            np.testing.assert_allclose(logits, engine.score(row.ids)[row.start - 1 : -1], atol=1e-4, rtol=0)
    assert list(engine.score_rows([])) == []


def test_score_rows_of_rows_longer_than_a_batch(tiny_gguf: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_engine, "N_BATCH", 32)
    engine = LlamaEngine.load(tiny_gguf.path, n_ctx=256, n_threads=1, flash_attention=False, kv_type="f32")
    rows = [TokenRow((5, 6, *ids_of(i, n)), start) for i, (n, start) in enumerate([(200, 90), (10, 2), (70, 71)])]
    for row, logits in zip(rows, list(engine.score_rows(rows)), strict=True):
        np.testing.assert_allclose(logits, engine.score(row.ids)[row.start - 1 : -1], atol=1e-4, rtol=0)
    np.testing.assert_allclose(engine.prefill(rows[0].ids), engine.score(rows[0].ids)[-1], atol=1e-4, rtol=0)
    engine.close()


def test_scoring_between_the_rows_of_score_rows_is_refused(engine: LlamaEngine) -> None:
    row = TokenRow((5, 6, 7, 8), 2)
    rows = engine.score_rows([row, row])
    next(rows)
    engine.score(ids_of(0, 9))
    with pytest.raises(EngineError, match="cut short"):
        next(rows)


def test_rows_go_on_after_a_context_that_could_not_be_made(
    tiny_gguf: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError("no memory")

    engine = LlamaEngine.load(tiny_gguf.path, n_ctx=64, n_threads=1)
    rows = [ids_of(0, 5), ids_of(1, 5)]
    before = engine.prefill_rows(rows)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_context", fail)
        with pytest.raises(EngineError, match="no memory"):
            engine.prefill_rows([*rows, ids_of(2, 5)])
    assert (engine._rows_ctx, engine._n_rows) == (None, 0)  # what is freed is read no more
    np.testing.assert_allclose(engine.prefill_rows(rows), before, atol=1e-4, rtol=0)
    engine.close()


def test_the_cache_of_a_token_has_heads_of_the_size_that_the_file_names(tmp_path: Path) -> None:
    from tests.export.test_gguf_families import export, make

    file = export(make(tmp_path / "model", "qwen3"), tmp_path / "gguf")
    engine = LlamaEngine.load(file.path, n_ctx=16, n_threads=1)
    assert engine.kv_bytes_per_token == 3 * 2 * (32 + 32) * 2  # layers, heads, keys and values, float16; not 64 / 4
    engine.close()


def test_the_tokenizer_and_its_facts(engine: LlamaEngine, tiny_model: Artifact) -> None:
    golden = Golden.read(tiny_model.path)
    for text in [*golden.conversations, *golden.texts]:
        assert engine.tokenize(text.text) == text.ids
    assert engine.tokenize("") == []
    assert engine.stop_ids == {0, 2}  # <|endoftext|>, which llama.cpp knows by its spelling, and <|im_end|>
    assert (engine.bos_id, engine.add_bos, engine.n_vocab) == (1, False, 512)
    assert engine.chat_template == golden.chat_template
    assert "llama-cpp-python" in engine.version


@pytest.mark.parametrize("ids", [[], list(range(300)), [5, 512], [5, -1]])
def test_rows_that_do_not_fit_are_refused(tiny_gguf: Artifact, ids: list[int]) -> None:
    engine = LlamaEngine.load(tiny_gguf.path, n_ctx=256, n_threads=1)
    for ask in (engine.prefill, engine.score):
        with pytest.raises(EngineError, match=r"do not fit a context of n_ctx=256|the vocabulary has 512"):
            ask(ids)
    engine.prefill(ids_of(0, 256))
    with pytest.raises(EngineError, match="257 tokens do not fit"):
        engine.decode(5)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.prefill([5])


def test_the_context_ends_where_training_did(tiny_gguf: Artifact) -> None:
    engine = load_engine("llama.cpp", tiny_gguf.path / "model.gguf", n_ctx=4096, n_threads=1)
    assert isinstance(engine, LlamaEngine)
    assert engine.n_ctx == 512
    engine.close()


def test_a_folder_with_no_or_two_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"holds 0 \.gguf files"):
        LlamaEngine.load(tmp_path, n_ctx=8, n_threads=1)
    with pytest.raises(EngineError, match="is no file"):
        LlamaEngine.load(tmp_path / "missing.gguf", n_ctx=8, n_threads=1)


LOAD = """
import sys
from pathlib import Path
from edgetune.errors import EngineError
from edgetune.runtime.engines.llama_engine import LlamaEngine
for path in sys.argv[1:]:
    try:
        LlamaEngine.load(Path(path), n_ctx=64, n_threads=1)
    except EngineError as error:
        print(error)
"""


def test_a_cut_file_is_one_line(tiny_gguf: Artifact, tmp_path: Path) -> None:
    """In a process of its own, and silent on stderr."""
    data = (tiny_gguf.path / "model.gguf").read_bytes()
    cuts = []
    for kept in (0, 3, 100, len(data) // 2, len(data) - 100):
        cuts.append(tmp_path / f"{kept}.gguf")
        cuts[-1].write_bytes(data[:kept])
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, cuts)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(cuts)
    for cut, line in zip(cuts, lines, strict=True):
        assert line.startswith(f"llama.cpp cannot load {cut}: ")
        assert "no reason" not in line

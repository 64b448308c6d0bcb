"""What all engines owe: several rows give what each gives alone, and greedy decoding is the library's own generate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.errors import EdgetuneError, UsageError
from edgetune.export import gguf
from edgetune.recipe_export import GgufExport
from edgetune.runtime.engine import Engine, RowsEngine, Traffic, greedy, load_engine
from edgetune.runtime.roofline import weight_bytes
from edgetune.runtime.worker import Job

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")

from tests.conftest import make_tiny_model
from tests.export.test_onnx import exported

NEVER = frozenset({-1})


def ids_of(seed: int, length: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 300, length)]


@pytest.fixture
def gguf_file(tiny_gguf: Artifact) -> Path:
    return tiny_gguf.path / gguf.FILE


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads of 32 values, which a quantized cache can hold."""
    folder = tmp_path_factory.mktemp("wide")
    model = make_tiny_model(folder / "model", hidden=128)
    made = gguf.run(GgufExport(type="F32"), model, folder / "gguf", moments=None, calibration_digest=None)
    return made.path / "model.gguf"


@pytest.fixture(params=["torch", "llama.cpp", "onnxruntime"])
def engine(
    request: pytest.FixtureRequest, tiny_model: Artifact, gguf_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    onnx = exported("fp32", tiny_model, tmp_path_factory).path
    path = {"torch": tiny_model.path, "llama.cpp": gguf_file, "onnxruntime": onnx}[request.param]
    settings = {"kv_type": "f32"} if request.param == "llama.cpp" else {}
    engine = load_engine(request.param, path, n_ctx=200, n_threads=1, **settings)
    yield engine
    engine.close()


def test_several_rows_give_what_each_gives_alone(engine: Engine) -> None:
    assert isinstance(engine, RowsEngine)
    for n_rows, length in ((3, 20), (2, 150), (3, 5)):  # other numbers of rows, and prompts longer than a chunk
        rows = [ids_of(seed, length) for seed in range(n_rows)]
        steps = [engine.prefill_rows(rows)]
        steps += [engine.decode_rows([step + row for row in range(n_rows)]) for step in (7, 9)]
        assert all(logits.shape == (n_rows, engine.n_vocab) for logits in steps)
        for row, ids in enumerate(rows):
            alone = [engine.prefill(ids), engine.decode(7 + row), engine.decode(9 + row)]
            for found, wanted in zip(steps, alone, strict=True):
                np.testing.assert_allclose(found[row], wanted, atol=4e-4, rtol=0)


def test_an_engine_knows_what_a_token_reads(engine: Engine, tiny_model: Artifact) -> None:
    assert isinstance(engine, Traffic)
    # layers, keys and values, heads of 16, float32
    assert engine.kv_bytes_per_token == 2 * 2 * (2 * 16) * 4
    weights = 4 * sum(entry.size // 4 for name, entry in tiny_model.manifest.files.items() if name.endswith("tensors"))
    assert 0.9 * weights < engine.weight_bytes < 1.3 * weights


def test_weights_of_a_gguf_file_leave_an_untied_embedding_out(gguf_file: Path, tmp_path: Path) -> None:
    untied = make_tiny_model(tmp_path / "model", tie=False)
    made = gguf.run(GgufExport(type="F32"), untied, tmp_path / "gguf", moments=None, calibration_digest=None)
    sizes = [weight_bytes(Job("x", "gguf", "llama.cpp", path, "0", 1, 1), 7) for path in (gguf_file, made.path)]
    assert sizes[0] == sizes[1] > 4 * 512 * 64  # the table counts once: as the head
    assert made.size_bytes > gguf_file.stat().st_size + 4 * 512 * 64
    assert weight_bytes(Job("x", "onnx", "onnxruntime", gguf_file, "0", 1, 1), 7) == 7


def test_greedy_in_llama_cpp_is_the_librarys_own(gguf_file: Path) -> None:
    import llama_cpp

    theirs = llama_cpp.Llama(str(gguf_file), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
    ours = load_engine("llama.cpp", gguf_file, n_ctx=128, n_threads=1)
    for seed in range(3):
        prompt = ids_of(seed, 12)
        generated = theirs.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        assert [token for token, _ in zip(generated, range(16), strict=False)] == greedy(ours, prompt, NEVER, 16)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_greedy_in_torch_is_the_librarys_own(tiny_model: Artifact, compiled: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model.path).eval()
    ours = load_engine("torch", tiny_model.path, n_ctx=128, n_threads=1, compiled=compiled)
    for seed in range(3):
        prompt = ids_of(seed, 12)
        made = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 12), max_new_tokens=16, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        assert made[0, 12:].tolist() == greedy(ours, prompt, NEVER, 16)
    ours.close()


@pytest.mark.parametrize(
    "settings",
    [{"kv_type": "q8_0", "flash_attention": True}, {"flash_attention": True}, {"n_ubatch": 16}, {"mmap": False}],
)
def test_settings_of_llama_cpp_reach_it_and_change_little(settings: dict[str, object], wide_file: Path) -> None:
    plain = load_engine("llama.cpp", wide_file, n_ctx=128, n_threads=1, flash_attention=False, kv_type="f32")
    engine = load_engine("llama.cpp", wide_file, n_ctx=128, n_threads=1, **settings)
    ids = ids_of(5, 60)
    moved = np.abs(engine.prefill(ids) - plain.prefill(ids)).max()
    assert moved < 0.5
    if "kv_type" in settings:
        assert moved > 1e-4  # eight bits are not thirty-two
        assert isinstance(engine, Traffic)
        assert isinstance(plain, Traffic)
        assert engine.kv_bytes_per_token == plain.kv_bytes_per_token * (34 / 32) / 4
    engine.close()
    plain.close()


def test_wrong_settings_are_refused(gguf_file: Path) -> None:
    with pytest.raises(UsageError, match="unknown kv_type 'q3'"):
        load_engine("llama.cpp", gguf_file, n_ctx=64, n_threads=1, kv_type="q3")
    with pytest.raises(EdgetuneError, match="cannot make a context"):  # 16 values are no block of 32
        load_engine("llama.cpp", gguf_file, n_ctx=64, n_threads=1, kv_type="q4_0", flash_attention=False)


@pytest.mark.slow
def test_compiled_torch_gives_the_same_logits(tiny_model: Artifact) -> None:
    plain = load_engine("torch", tiny_model.path, n_ctx=64, n_threads=1)
    compiled = load_engine("torch", tiny_model.path, n_ctx=64, n_threads=1, compiled=True)
    ids = ids_of(1, 20)
    np.testing.assert_allclose(compiled.prefill(ids), plain.prefill(ids), atol=1e-3, rtol=0)
    for token in (5, 6, 7):
        np.testing.assert_allclose(compiled.decode(token), plain.decode(token), atol=1e-3, rtol=0)
    compiled.close()
    plain.close()

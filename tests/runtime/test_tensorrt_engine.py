"""The TensorRT engine's bookkeeping, against a fake device; its real run needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.errors import EngineError
from edgetune.runtime.engine import Logits, TokenRow, load_engine, why_not_run
from edgetune.runtime.engines.tensorrt_engine import DECODE, PREFILL, EngineFiles, TensorrtEngine

V, LAYERS, K, D, CHUNK = 64, 2, 2, 4, 8
SETTINGS = {
    "library": "tensorrt-rtx", "version": "1", "compute_capability": ["8.6"], "max_length": 40, "chunk": CHUNK,
    "n_layers": LAYERS, "n_kv_heads": K, "head_size": D, "n_vocab": V, "stop_ids": [2],
}  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(0).integers(3, V, 40)]


class FakeDevice:
    """A device whose cache holds tokens, and whose logits at a position are drawn from all tokens up to it.

    It refuses what TensorRT refuses: shapes outside the profile, a past that is not what was written.
    """

    def __init__(self) -> None:
        self.profile: int | None = None
        self.buffers: dict[tuple[str, int], list[int]] = {}
        self.placed: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.runs: list[tuple[int, int, int]] = []  # profile, past, new
        self.brought_down = 0  # rows of logits
        self.closed = False

    def use_profile(self, number: int) -> None:
        self.profile = number

    def place_cache(self, name: str, slot: int, shape: tuple[int, ...]) -> None:
        self.placed[name] = (slot, shape)

    def run(self, inputs: dict[str, Any], n_tokens: int, n_wanted: int) -> Logits:
        ids, mask, positions = (inputs[name][0] for name in ("input_ids", "attention_mask", "position_ids"))
        past = len(mask) - len(ids)
        assert len(ids) == n_tokens <= CHUNK
        assert list(positions) == list(range(past, len(mask)))
        assert self.profile == (DECODE if n_tokens == 1 and past else PREFILL)
        self.runs.append((self.profile, past, n_tokens))
        self.brought_down += n_wanted
        for i in range(LAYERS):
            for part in ("key", "value"):
                read, read_shape = self.placed[f"past_key_values.{i}.{part}"]
                written, written_shape = self.placed[f"present.{i}.{part}"]
                assert read_shape == (1, K, past, D)
                assert written_shape == (1, K, len(mask), D)
                assert past == 0 or read != written
                held = self.buffers.get((f"{i}.{part}", read), [])[:past]
                assert len(held) == past
                self.buffers[f"{i}.{part}", written] = context = [*held, *map(int, ids)]
        return np.stack([draw(context[: past + n + 1]) for n in range(n_tokens - n_wanted, n_tokens)])

    def close(self) -> None:
        self.closed = True


def draw(context: list[int]) -> Logits:
    """Give logits that depend on every token and its place."""
    return np.random.default_rng(context).normal(size=V).astype(np.float32)


@pytest.fixture
def files(tiny_model: Artifact, tmp_path: Path) -> EngineFiles:
    (tmp_path / "tensorrt.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "tokenizer.json").write_bytes((tiny_model.path / "tokenizer.json").read_bytes())
    return EngineFiles.read(tmp_path)


@pytest.fixture
def engine(files: EngineFiles) -> TensorrtEngine:
    return TensorrtEngine(files, FakeDevice(), n_ctx=40)


def known(ids: list[int]) -> Logits:
    return np.stack([draw(ids[: n + 1]) for n in range(len(ids))])


def test_prefill_decode_and_score_see_the_same_context(engine: TensorrtEngine) -> None:
    assert np.array_equal(engine.score(IDS), known(IDS))  # five chunks
    for n in (1, CHUNK, CHUNK + 1, 30):
        assert np.array_equal(engine.prefill(IDS[:n]), known(IDS)[n - 1])
        for i in range(n, n + 5):
            assert np.array_equal(engine.decode(IDS[i]), known(IDS)[i])


def test_each_profile_gets_its_shapes(engine: TensorrtEngine, files: EngineFiles) -> None:
    device = FakeDevice()
    engine = TensorrtEngine(files, device, n_ctx=40)
    engine.prefill(IDS[: CHUNK + 2])
    engine.decode(5)
    engine.prefill(IDS[:1])  # one token without a past is prefill's: decode's profile begins at a past of one
    assert device.brought_down == 4  # of 12 positions, those whose logits somebody reads
    assert device.runs == [(PREFILL, 0, CHUNK), (PREFILL, CHUNK, 2), (DECODE, CHUNK + 2, 1), (PREFILL, 0, 1)]


@pytest.mark.parametrize("n_shared", [0, 1, 12])
def test_rows_share_what_they_begin_with(engine: TensorrtEngine, files: EngineFiles, n_shared: int) -> None:
    device = FakeDevice()
    engine = TensorrtEngine(files, device, n_ctx=40)
    rows = [TokenRow((*IDS[:n_shared], 3 + i, *IDS[15 : 25 + i]), n_shared + 3 + i) for i in range(4)]
    for row, found in zip(rows, engine.score_rows(rows), strict=True):
        assert np.array_equal(found, known(list(row.ids))[row.start - 1 : -1])
    read = sum(new for _, _, new in device.runs)
    assert read == n_shared + sum(len(row.ids) - 1 - n_shared for row in rows)
    assert list(engine.score_rows([])) == []


def test_rows_bear_other_use_of_the_engine_in_between(engine: TensorrtEngine) -> None:
    rows = [TokenRow((*IDS[:12], i, *IDS[15:20]), 14) for i in range(3, 6)]
    for row, found in zip(rows, engine.score_rows(rows), strict=True):
        assert np.array_equal(found, known(list(row.ids))[13:-1])
        engine.prefill(IDS[20:30])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.prefill(IDS + IDS), "48 tokens of context, n_ctx is 40"),
        (lambda e: e.prefill([5, V]), f"token id {V} is not in the vocabulary of {V}"),
        (lambda e: e.score([-1]), "token id -1"),
        (lambda e: e.prefill([]), "empty row"),
    ],
)
def test_wrong_requests_are_one_line(engine: TensorrtEngine, call: Callable[[TensorrtEngine], Any], says: str) -> None:
    with pytest.raises(EngineError, match=says) as error:
        call(engine)
    assert "\n" not in str(error.value)


def test_n_ctx_beyond_the_engine_is_refused(files: EngineFiles) -> None:
    with pytest.raises(EngineError, match="n_ctx=41 is longer than the 40 positions"):
        TensorrtEngine(files, FakeDevice(), n_ctx=41)


def test_tokenizer_stop_set_and_version(engine: TensorrtEngine, tiny_model: Artifact) -> None:
    from edgetune.data.golden import Golden

    for text in Golden.read(tiny_model.path).texts:
        assert engine.tokenize(text.text) == text.ids
    assert engine.detokenize([*engine.tokenize("turn the light"), 2]) == "turn the light"
    assert engine.stop_ids == {2}
    assert engine.version == "tensorrt-rtx 1"
    engine.close()


@pytest.mark.parametrize("wrong", ["cut", "lacking", "no tokenizer"])
def test_a_damaged_folder_is_one_line(files: EngineFiles, wrong: str) -> None:
    settings = files.folder / "tensorrt.json"
    if wrong == "cut":
        settings.write_text(settings.read_text()[:-9])
    elif wrong == "lacking":
        settings.write_text(json.dumps({k: v for k, v in SETTINGS.items() if k != "chunk"}))
    else:
        (files.folder / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match="lacks chunk" if wrong == "lacking" else "cannot be read as a TensorRT"):
        EngineFiles.read(files.folder)


def test_the_library_has_every_call_of_the_device() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    calls = ("set_optimization_profile_async", "set_input_shape", "set_tensor_address", "execute_async_v3")
    assert all(hasattr(trt.IExecutionContext, call) for call in calls)
    assert hasattr(trt.ICudaEngine, "create_execution_context")
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")


@pytest.mark.skipif(why_not_run("tensorrt") is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so(files: EngineFiles) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match="an NVIDIA GPU and torch sees none; run it on the target"):
        load_engine("tensorrt", files.folder, n_ctx=40, n_threads=1)


@pytest.mark.gpu
def test_the_real_engine_gives_the_logits_of_transformers(tiny_model: Artifact, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from edgetune.export import tensorrt
    from edgetune.recipe_export import TensorrtExport

    made = tensorrt.run(TensorrtExport(max_length=64), tiny_model, tmp_path / "engine")
    engine = load_engine("tensorrt", made.path, n_ctx=64, n_threads=1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32).eval()
    ids = [i % 500 + 3 for i in range(0, 400, 10)]
    wanted = model(torch.tensor([ids])).logits[0].detach().numpy()
    assert np.abs(engine.score(ids) - wanted).max() < 0.05
    assert np.abs(engine.prefill(ids[:30]) - wanted[29]).max() < 0.05
    for i in range(30, 40):
        assert np.abs(engine.decode(ids[i]) - wanted[i]).max() < 0.05
    engine.close()

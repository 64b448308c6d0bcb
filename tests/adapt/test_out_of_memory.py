"""Memory that runs out in training: fewer rows at once, as many a step, from the last step where that is whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from edgetune.adapt import sft
from edgetune.adapt.out_of_memory import fewer_rows, is_out_of_memory
from edgetune.adapt.trainer import CompletionTrainer
from edgetune.artifact import Artifact
from edgetune.data.formats import Row
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, render
from edgetune.errors import DataError, StageError
from edgetune.recipe_training import Adapt

CONFIG = Adapt(
    method="lora", r=4, batch_size=4, max_steps=6, eval_steps=2, eval_rows=4, learning_rate=1e-2, report_to=[]
)
ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.fixture(scope="module")
def rows(tiny_model: Artifact) -> list[Rendered]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    turns = [(("user", f"set the light to {n} percent"), ("assistant", f'{{"level":{n}}}')) for n in range(24)]
    return [render(Row(pair, None, n), tokenizer, [2]) for n, pair in enumerate(turns, 1)]


def train(source: Artifact, out: Path, rows: list[Rendered], config: Adapt = CONFIG, **kwargs: Any) -> Artifact:
    return sft.run(config, source, out, rows=rows, golden=Golden.read(source.path), **kwargs)


@pytest.fixture(scope="module")
def whole(
    tiny_model: Artifact, rows: list[Rendered], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Artifact]:
    """Train with enough memory, once in a test's own settings; what it gives is never written to."""
    return cache(lambda: train(tiny_model, tmp_path_factory.mktemp("whole") / "adapter", rows))


def run_out(patch: pytest.MonkeyPatch, error: BaseException, *, most: int, after: int) -> list[tuple[int, int]]:
    """Let steps with more than `most` rows at once fail from step `after` on; gives (step, rows) of those that ran."""
    step, ran = CompletionTrainer.training_step, list[tuple[int, int]]()

    def limited(self: CompletionTrainer, model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        rows = len(inputs["places"])
        if rows > most and self.state.global_step >= after:
            raise error
        ran.append((self.state.global_step, rows))
        return step(self, model, inputs, *args)

    patch.setattr(CompletionTrainer, "training_step", limited)
    return ran


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
def test_it_goes_on_with_half_the_rows_from_the_last_step(
    tiny_model: Artifact, rows: list[Rendered], whole: Callable[[], Artifact], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, error: BaseException,
) -> None:  # fmt: skip
    expected = whole()
    said: list[str] = []
    with monkeypatch.context() as patch:
        ran = run_out(patch, error, most=2, after=3)
        made = train(tiny_model, tmp_path / "halved", rows, progress=lambda done, total, label: said.append(label))
    assert ran == [(0, 4), (1, 4), (2, 4), *((step, 2) for step in (3, 3, 4, 4, 5, 5))]
    note = "out of memory with 4 rows at once after step 3: went on with 2 at once and 2 accumulated, still 4 a step"
    assert made.manifest.fallbacks == [note]
    assert made.manifest.notes["memory"] == note
    assert "memory" not in expected.manifest.notes
    assert [label.endswith("2 rows at once since memory ran out") for label in said] == [False] * 3 + [True] * 3
    assert made.identity == expected.identity
    weights = [load_file(one.path / "adapter_model.safetensors") for one in (expected, made)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


def test_what_the_optimizer_began_is_not_gone_on_from(
    tiny_model: Artifact, rows: list[Rendered], whole: Callable[[], Artifact], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = whole()
    make, left = sft.methods.make_optimizer, [3]

    def failing(*args: Any) -> torch.optim.Optimizer:
        optimizer = make(*args)
        step = optimizer.step

        def limited(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                next(p for group in optimizer.param_groups for p in group["params"]).data.fill_(9)  # half done
                raise ERRORS[0]
            return step(*given, **named)

        optimizer.step = limited  # type: ignore[method-assign]
        return optimizer

    with monkeypatch.context() as patch:
        patch.setattr(sft.methods, "make_optimizer", failing)
        made = train(tiny_model, tmp_path / "halved", rows)
    (note,) = made.manifest.fallbacks
    assert note.startswith("out of memory with 4 rows at once after step 2: went on with 2 at once")
    weights = [load_file(one.path / "adapter_model.safetensors") for one in (expected, made)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


def test_a_step_that_cannot_be_saved_is_taken_again(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = CompletionTrainer._save_checkpoint

    def full(self: CompletionTrainer, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        if self.state.global_step == 3:
            raise ERRORS[1]

    monkeypatch.setattr(CompletionTrainer, "_save_checkpoint", full)
    ran = run_out(monkeypatch, ERRORS[0], most=2, after=3)
    made = train(tiny_model, tmp_path / "halved", rows)
    assert [step for step, n_rows in ran if n_rows == 2] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert "after step 3: went on from step 2 with 2 at once" in made.manifest.fallbacks[0]


def test_a_kill_does_not_let_it_run_out_once_more(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, total: int, label: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    ran = run_out(monkeypatch, ERRORS[0], most=1, after=1)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path / "cut", rows, progress=killed)
    ran.clear()
    made = train(tiny_model, tmp_path / "cut", rows)
    assert ran == [(step, 1) for step in (4, 5) for _ in range(4)]
    assert [line.split(":")[0] for line in made.manifest.fallbacks] == [
        "out of memory with 4 rows at once after step 1", "out of memory with 2 rows at once after step 1",
    ]  # fmt: skip


def test_below_one_row_it_ends_with_one_line(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, ERRORS[2], most=0, after=0)
    with pytest.raises(StageError, match=r"^out of memory with one row at once after step 0 \(.*\); shorten") as caught:
        train(tiny_model, tmp_path / "adapter", rows)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_other_errors_are_not_taken_for_it(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, RuntimeError("shapes cannot be multiplied"), most=0, after=0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(tiny_model, tmp_path / "adapter", rows)


def test_what_torchs_own_allocator_says_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN under a limit of memory
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(("rows", "batch", "fewer"), [(16, 16, 8), (3, 12, 1), (10, 20, 5), (5, 20, 2), (1, 8, 0)])
def test_fewer_rows_divide_the_batch(rows: int, batch: int, fewer: int) -> None:
    assert fewer_rows(rows, batch) == fewer


def test_rows_that_are_all_copies_of_those_set_aside_are_refused(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"^all 8 training rows are copies of the 2 rows that are set aside"):
        train(tiny_model, tmp_path / "adapter", rows[:1] * 10)
    assert DataError.exit_code == 2
    assert list(tmp_path.iterdir()) == []

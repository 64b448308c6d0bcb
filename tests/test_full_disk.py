"""A full disk, in the words of everyone who writes here: one line and exit code 2, and no candidate's fault."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from safetensors import SafetensorError

from edgetune import artifact, measure, pipeline, sources
from edgetune.adapt import merge, merge_choice, sft
from edgetune.artifact import Artifact, draft
from edgetune.compress import finished, quantize
from edgetune.data.calibration import CalibrationSet
from edgetune.data.formats import Row
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, render
from edgetune.errors import DiskSpaceError, EngineError, StageError
from edgetune.recipe import Gptq
from edgetune.recipe_training import Adapt
from edgetune.runtime.accuracy import ScoredRow
from tests.fakes import fake_job
from tests.test_pipeline import make_recipe, run

SMALL: dict[str, Any] = {"batch_size": 4, "max_steps": 2, "eval_steps": 1, "eval_rows": 4, "r": 4, "report_to": []}


def out_of_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def safetensors_says() -> SafetensorError:
    """What safetensors raises on a full disk, as it was seen on a tmpfs of 256 KiB; the others were seen there too."""
    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full(*_: object, **__: object) -> NoReturn:
    raise safetensors_says()


def from_cause() -> NoReturn:
    raise StageError("the builder failed") from out_of_space()


def from_context() -> NoReturn:
    try:
        raise out_of_space()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672]")  # noqa: B904


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail


def make(out: Path, fail: Callable[[], object]) -> None:
    with draft(out, kind="model", stage="test/1", config={}) as pending:
        (pending.path / "weights").write_text("half")
        fail()


@pytest.mark.parametrize(
    "fail",
    [
        raising(out_of_space()),
        raising(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
        raising(safetensors_says()),
        raising(Exception("No space left on device (os error 28)")),  # tokenizers
        raising(RuntimeError("basic_ios::clear: iostream error")),  # torch
        raising(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")),
        raising(OSError("90000 requested and 65504 written")),  # numpy
        raising(StageError("llama_model_quantize gave 1: failed to quantize: basic_ios::clear: iostream error")),
        raising(EngineError("torch failed while scoring: OSError: [Errno 28] No space left on device")),
        from_cause,
        from_context,
    ],
)
def test_a_full_disk_is_known_by_its_number_and_in_words(tmp_path: Path, fail: Callable[[], object]) -> None:
    with pytest.raises(DiskSpaceError) as caught:
        make(tmp_path / "out", fail)
    assert str(caught.value) == f"no space left on the disk of {tmp_path} while writing out"
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.draft").exists()


@pytest.mark.parametrize(
    "error", [SafetensorError("header too large"), RuntimeError("shapes differ"), OSError(errno.EACCES, "denied")]
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        make(tmp_path / "out", raising(error))
    assert caught.value is error


def test_who_stops_a_run_on_a_full_disk_stops_it(tmp_path: Path) -> None:
    stopped = KeyboardInterrupt()
    stopped.__context__ = out_of_space()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", raising(stopped))


def rows(model: Artifact) -> list[Rendered]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.path)
    turns = [(("user", f"set the light to {n}"), ("assistant", f'{{"level":{n}}}')) for n in range(24)]
    return [render(Row(pair, None, n), tokenizer, [2]) for n, pair in enumerate(turns, 1)]


def adapt(model: Artifact, out: Path) -> Artifact:
    return sft.run(Adapt(**SMALL), model, out, rows=rows(model), golden=Golden.read(model.path))


def test_each_writer_of_weights_ends_in_one_line(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft.peft_model
    import transformers.modeling_utils

    adapter = adapt(tiny_model, tmp_path / "adapter")
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    monkeypatch.setattr(peft.peft_model, "safe_save_file", full)
    monkeypatch.setattr(finished, "save_file", full)
    gptq, calibration = Gptq(bits=4, group_size=32), CalibrationSet(np.arange(64).reshape(4, 16))
    for name, work in {
        "base": lambda out: sources.run(sources.find(str(tiny_model.path)), out),
        "adapt": lambda out: adapt(tiny_model, out),
        "merge": lambda out: merge.run(tiny_model, adapter, out),
        "gptq": lambda out: quantize.run(gptq, tiny_model, out, calibration=calibration, device="cpu", seed=0),
    }.items():
        with pytest.raises(DiskSpaceError, match=f"while writing {name}$"):
            work(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_base_adapt_and_merge_ask_for_room_first(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    adapter, aside = adapt(tiny_model, tmp_path / "adapter"), rows(tiny_model)[:3]
    usage, limit = shutil.disk_usage(tmp_path), 0
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda _: usage._replace(free=limit))
    source = sources.find(str(tiny_model.path))
    n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model.path).parameters())
    kept = merge_choice.kept_bytes(tiny_model.path, aside)
    assert kept == 4 * 512 * sum(sum(row.labels) for row in aside)
    trained = adapter.manifest.notes["trained_parameters"]
    for name, n_bytes, work in (
        ("base", 2 * n_parameters, lambda out: sources.run(source, out)),
        ("adapt", 36 * trained, lambda out: adapt(tiny_model, out)),
        ("merge", tiny_model.size_bytes, lambda out: merge.run(tiny_model, adapter, out)),
        ("auto", tiny_model.size_bytes + kept, lambda out: merge.run(tiny_model, adapter, out, "auto", aside)),
    ):
        limit = n_bytes - 1
        with pytest.raises(DiskSpaceError, match="MiB are needed below"):
            work(tmp_path / name)
        limit = n_bytes
        work(tmp_path / name).verify()


def test_checkpoints_that_are_there_count(tmp_path: Path) -> None:
    from torch import nn

    from edgetune.adapt.callbacks import require_checkpoints

    class Trainer:
        model = nn.Linear(8, 8)

    usage = shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(DiskSpaceError):
            require_checkpoints(Trainer(), tmp_path)  # type: ignore[arg-type]
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(bytes(36 * 72 - 1000))
        require_checkpoints(Trainer(), tmp_path)  # type: ignore[arg-type]


def test_a_full_disk_in_the_scoring_child(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with pytest.raises(DiskSpaceError, match=r"while writing evidence$"):
        measure.accuracy(
            fake_job(fail="full", at="score_rows"), [], tmp_path / "evidence", rows=[ScoredRow((1, 3, 2), 1, "a")],
            text_rows=[], tokenizer=tiny_model.path, stop_ids=[2], max_new_tokens=4, generate_rows=0, reference=None,
        )  # fmt: skip


@pytest.mark.usefixtures("scored_store")
@pytest.mark.parametrize("inside", [True, False])
def test_a_full_disk_in_a_candidate_ends_the_run(
    tiny_model_wide: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    monkeypatch.setattr(*((finished, "save_file") if inside else (pipeline.Pipeline, "_export")), full)
    candidates = {
        "first": {"compress": [{"gptq": {"group_size": 32, "calibration": {"n_samples": 2, "n_tokens": 16}}}]}
        if inside
        else {"export": {"gguf": {"type": "Q8_0"}}},
        "second": {"compress": [{"rtn": {"group_size": 32}}]},
    }
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates=candidates)
    with pytest.raises(DiskSpaceError, match="no space left"):
        run(recipe, tmp_path)
    assert "second: rtn" not in (tmp_path / "run" / "log.jsonl").read_text()

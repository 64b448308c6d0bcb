"""QLoRA on the tiny Llama: the loss, the masks, resume after a kill with identical bytes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from edgetune.adapt import methods, sft
from edgetune.adapt.callbacks import SEAL, last_sealed_checkpoint
from edgetune.adapt.fused_decoder import FusedDecoder
from edgetune.adapt.lora_linear import FusedLora
from edgetune.adapt.trainer import IGNORE, CompletionTrainer, Rows, Split, make_trainer, pack, pad
from edgetune.artifact import Artifact
from edgetune.data.formats import Row
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, render
from edgetune.errors import DataError, StageError
from edgetune.packed import TOKENS
from edgetune.recipe_training import Adapt

CONFIG = Adapt(r=4, alpha=8, batch_size=4, max_steps=6, eval_steps=2, eval_rows=4, learning_rate=1e-2, report_to=[])


@pytest.fixture(scope="module")
def rows(tiny_model: Artifact) -> list[Rendered]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    made = []
    for n in range(24):
        turns = (("user", f"set the light to {n} percent"), ("assistant", f'{{"level":{n}}}'))
        made.append(render(Row(turns, None, n + 1), tokenizer, [2]))
    return made


def train(source: Artifact, out: Path, rows: list[Rendered], config: Adapt = CONFIG, **kwargs: object) -> Artifact:
    golden = Golden.read(source.path)
    return sft.run(config, source, out, rows=rows, golden=golden, **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_model: Artifact, rows: list[Rendered], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Artifact]:
    """Train to the end, once in a test's own settings; what it gives is never written to."""
    return cache(lambda: train(tiny_model, tmp_path_factory.mktemp("whole") / "adapter", rows))


def test_loss_falls_and_the_adapter_names_no_path(
    tiny_model: Artifact, rows: list[Rendered], uninterrupted: Callable[[], Artifact]
) -> None:
    made = uninterrupted()
    losses = [loss for _, loss in made.manifest.notes["heldout_loss"]]
    assert losses[-1] < losses[0]
    golden = Golden.read(tiny_model.path)
    assert made.identity == sft.planned_identity(CONFIG, tiny_model.identity, rows, 0, golden=golden)
    text = (made.path / "adapter_config.json").read_text()
    assert str(made.path.parent) not in text
    assert str(tiny_model.path) not in text
    assert tiny_model.identity in text


def test_plain_texts_are_learned_as_a_whole(tiny_model: Artifact, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    texts = [f"turn the light in the kitchen to {n} percent at {n}" for n in range(24)]
    rows = [render(Row((), text, n), tokenizer, [2]) for n, text in enumerate(texts, 1)]
    assert all(row.n_labels == len(row.ids) - 1 for row in rows)
    made = train(tiny_model, tmp_path / "adapter", rows)
    losses = [loss for _, loss in made.manifest.notes["heldout_loss"]]
    assert losses[-1] < losses[0] - 0.1, losses


def scalars(folder: Path) -> dict[str, list[int]]:
    """Read the steps of each curve that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_is_on_by_default(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    config = Adapt.model_validate(CONFIG.model_dump(exclude={"report_to"}))
    train(tiny_model, tmp_path / "adapter", rows, config, log_folder=tmp_path / "tensorboard")
    shown = scalars(tmp_path / "tensorboard")
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/exact_match"):
        assert shown[name] == [2, 4, 6], name


def test_other_loggers_get_the_curves_by_a_key(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = {}
    for name in ("wandb", "mlflow"):
        fakes[name] = MagicMock(__spec__=ModuleSpec(name, None), __version__="3.0")
        monkeypatch.setitem(sys.modules, name, fakes[name])
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name, MagicMock(ConfigError=ValueError))
    validation = fakes["mlflow"].utils.validation
    validation.MAX_PARAM_VAL_LENGTH, validation.MAX_PARAMS_TAGS_PER_BATCH = 250, 100
    train(tiny_model, tmp_path / "adapter", rows, CONFIG.model_copy(update={"report_to": ["wandb", "mlflow"]}))
    logged = [call.args[0] for call in fakes["wandb"].log.call_args_list]
    assert [one["train/global_step"] for one in logged if "train/loss" in one] == [2, 4, 6]
    assert [one["train/global_step"] for one in logged if "eval/loss" in one] == [2, 4, 6]
    noted = [call.kwargs for call in fakes["mlflow"].log_metrics.call_args_list]
    assert [one["step"] for one in noted if "loss" in one["metrics"]] == [2, 4, 6]


def test_loss_is_cross_entropy_of_labelled_positions(tiny_model: Artifact, rows: list[Rendered]) -> None:
    model, head = sft.attach(CONFIG.model_copy(update={"method": "lora"}), tiny_model.path, "cpu")
    batch = pad([Rows(rows)[i] for i in (0, 13)])
    with torch.no_grad():
        every = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        keep = batch["labels"][:, 1:] != IGNORE
        with head.only(keep):
            few = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = functional.cross_entropy(every[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="mean")
    found = functional.cross_entropy(few, batch["labels"][:, 1:][keep])
    assert few.shape[0] == sum(rows[i].n_labels for i in (0, 13))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_packed_and_fused_give_the_loss_and_gradient_of_padded_rows(
    tiny_model: Artifact, rows: list[Rendered], method: str, keep_dense: bool
) -> None:
    config = CONFIG.model_copy(update={"method": method, "keep_dense": keep_dense})
    found = []
    for collate, fused in ((pad, False), (partial(pack, share_prefix=False), False), (pack, False),
                           (pack, True), (partial(pack, share_prefix=False), True)):  # fmt: skip
        torch.manual_seed(0)
        model, head = sft.attach(config, tiny_model.path, "cpu")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # zero at first, which would hide the gradient of A
        trainer = make_trainer(
            CompletionTrainer, config, model, head, Split.of(config, rows, 0), methods.make_optimizer(config, model),
            work=Path("unused"), device="cpu", seed=0, progress=lambda *_: None, log_folder=None,
        )  # fmt: skip
        assert trainer._fused is not None
        if not fused:
            trainer._fused = None
        batch = collate([Rows(rows)[i] for i in (0, 13, 5)])
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach(), gradients, batch))
    (padded, padded_gradient, _), *packed = found
    assert [batch["lengths"][0] > 5 for *_, batch in packed] == [False, True, True, False]
    assert all(batch["input_ids"].numel() % TOKENS == 0 for *_, batch in packed)
    assert int(packed[1][2]["lengths"].sum()) < int(packed[0][2]["lengths"].sum())  # what is shared is read once
    for loss, gradient, _ in packed:
        torch.testing.assert_close(loss, padded)
        torch.testing.assert_close(gradient, padded_gradient, rtol=1e-3, atol=1e-5)


def test_what_is_more_than_a_plain_adapter_runs_module_by_module(tiny_model: Artifact) -> None:
    model, _ = sft.attach(CONFIG.model_copy(update={"dropout": 0.1}), tiny_model.path, "cpu")
    assert FusedDecoder.of(model.get_base_model()) is None


class Dies(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [6, 9], ids=["in the first epoch", "in the second"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Five steps are an epoch; the kill comes a step before the end, and the last checkpoint a step before that."""
    config = CONFIG.model_copy(update={"max_steps": steps, "eval_steps": steps - 2})
    whole = train(tiny_model, tmp_path / "whole", rows, config)
    make = sft.make_trainer
    with monkeypatch.context() as patch:

        def dying(*args: object, **kwargs: object) -> object:
            trainer = make(*args, **kwargs)  # type: ignore[arg-type]
            trainer.add_callback(Dies(steps - 1))
            return trainer

        patch.setattr(sft, "make_trainer", dying)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_model, tmp_path / "cut", rows, config)
    assert not (tmp_path / "cut").exists()
    work = tmp_path / ".cut.work"
    assert (work / f"checkpoint-{steps - 2}" / "complete").exists()
    (work / f"checkpoint-{steps - 1}").mkdir()  # a checkpoint that a kill cut short
    ran: list[int] = []
    resumed = train(tiny_model, tmp_path / "cut", rows, config, progress=lambda done, *_: ran.append(done))
    assert ran == [steps - 1, steps]
    assert resumed.manifest.files == whole.manifest.files
    assert not work.exists()


@pytest.mark.parametrize("changes", [{}, {"learning_rate": 10.0, "patience": 1, "max_steps": 8}], ids=["end", "early"])
def test_a_run_killed_after_its_last_step_takes_no_other(
    tiny_model: Artifact, rows: list[Rendered], uninterrupted: Callable[[], Artifact], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
) -> None:  # fmt: skip
    config = CONFIG.model_copy(update=changes)
    whole = train(tiny_model, tmp_path / "whole", rows, config) if changes else uninterrupted()
    assert (whole.manifest.notes["steps"] < config.max_steps) == bool(changes)
    with monkeypatch.context() as patch:
        patch.setattr(methods, "save_adapter", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_model, tmp_path / "cut", rows, config)
    steps: list[int] = []
    resumed = train(tiny_model, tmp_path / "cut", rows, config, progress=lambda done, total, label: steps.append(done))
    assert steps == []
    assert resumed.manifest == whole.manifest


def test_a_checkpoint_that_lost_a_file_is_not_gone_on_from(tmp_path: Path) -> None:
    for step, files in ((2, ("a", "b")), (4, ("a",))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).touch()
        (folder / SEAL).write_text("a\nb\n")
    assert last_sealed_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def test_the_best_checkpoint_is_found_where_the_store_was_moved(
    tiny_model: Artifact, rows: list[Rendered], uninterrupted: Callable[[], Artifact], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = uninterrupted()
    with monkeypatch.context() as patch:
        patch.setattr(methods, "save_adapter", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_model, tmp_path / "cut", rows)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    work = (tmp_path / ".cut.work").rename(moved / ".cut.work")
    shutil.copytree(moved, tmp_path / "copy")
    assert train(tiny_model, moved / "cut", rows).manifest == whole.manifest
    state = tmp_path / "copy" / work.name / "checkpoint-6" / TRAINER_STATE_NAME
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_global_step": 2}))
    with pytest.raises(StageError, match="checkpoint-2, the best checkpoint, is gone; remove"):
        train(tiny_model, tmp_path / "copy" / "cut", rows)


def test_a_training_that_diverged_leaves_no_adapter(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^training diverged at step \d: its loss is no number; lower learning_rate$"):
        train(tiny_model, tmp_path / "adapter", rows, CONFIG.model_copy(update={"learning_rate": 1e30}))
    assert not (tmp_path / "adapter").exists()


def test_rows_at_once_change_neither_the_watched_loss_nor_the_pull(
    tiny_model: Artifact, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"eval_rows": 10, "l2": 0.1, "batch_size": 8, "micro_batch_size": 2})
    torch.manual_seed(0)
    model, head = sft.attach(config, tiny_model.path, "cpu")
    split = Split.of(config.model_copy(update={"eval_rows": 4}), rows, 0)
    pull = torch.tensor(8.0)
    trainer = make_trainer(
        CompletionTrainer, config, model, head, split, methods.make_optimizer(config, model), work=Path("unused"),
        device="cpu", seed=0, progress=lambda *_: None, log_folder=None, pull=lambda: pull,
    )  # fmt: skip
    watched = []
    for at_once in (4, 3, 1):
        trainer.args.per_device_eval_batch_size = at_once
        watched.append(trainer.evaluate()["eval_loss"])
    assert watched == pytest.approx([watched[0]] * 3, rel=1e-5)
    batch = trainer.data_collator([split.train[0], split.train[1]])
    model.train()
    plain, n_labels = trainer.compute_loss(model, batch).item() - 8.0, int((batch["labels"][:, 1:] != IGNORE).sum())
    trainer.current_gradient_accumulation_steps = 2  # the last step of an epoch may have fewer than the others
    pulled = trainer.compute_loss(model, batch, num_items_in_batch=n_labels).item()
    assert pulled - plain == pytest.approx(4.0, rel=1e-4)


def test_rows_without_labels_are_refused(tiny_model: Artifact, tmp_path: Path) -> None:
    empty = Rendered((1, 2, 3), (False, False, False), 1, "", 1)
    with pytest.raises(DataError, match=r"^line \d+ has no labelled token"):
        train(tiny_model, tmp_path / "adapter", [empty] * 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fused_layer_equals_pefts(tiny_model: Artifact, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(3, 43).view(2, 20)
    found = []
    for fused, dense in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(methods, "use_fused_layers", lambda *_, **__: None)
            config = CONFIG.model_copy(update={"method": method, "keep_dense": dense})
            model, _ = sft.attach(config, tiny_model.path, "cpu")
        assert any(isinstance(m, FusedLora) for m in model.modules()) == fused
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        loss = functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach(), gradients))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-3, atol=1e-5)

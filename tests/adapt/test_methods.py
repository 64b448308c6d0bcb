"""Each method on the tiny Llama: trains, resumes, and its result goes on to a merged model or stays apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from edgetune.adapt import fused_decoder, merge, methods, sft
from edgetune.adapt.base import load_base
from edgetune.adapt.fused_decoder import FusedDecoder
from edgetune.adapt.lora_linear import FusedLora
from edgetune.adapt.pull import Pull
from edgetune.adapt.trainer import (
    IGNORE,
    CompletionTrainer,
    LabelledHead,
    Rows,
    Split,
    exact_rows,
    make_trainer,
    pack,
    pad,
    set_aside,
)
from edgetune.artifact import Artifact
from edgetune.data.formats import Row
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, render
from edgetune.errors import RecipeError, UnsupportedError
from edgetune.recipe_training import Adapt
from edgetune.runtime.engine import TokenRow, greedy
from edgetune.runtime.engines.torch_engine import TorchEngine

SMALL: dict[str, Any] = {
    "batch_size": 4, "max_steps": 6, "eval_steps": 2, "eval_rows": 4, "learning_rate": 1e-2, "report_to": [],
}  # fmt: skip
CONFIGS = {
    "dora": Adapt(method="dora", r=4, **SMALL),
    "dora on nf4": Adapt(method="dora", r=4, base_bits=4, **SMALL),
    "rslora": Adapt(method="rslora", r=4, **SMALL),
    "ia3": Adapt(method="ia3", **SMALL),
    "prefix": Adapt(method="prefix", virtual_tokens=4, **SMALL),
    "full": Adapt(method="full", **SMALL | {"learning_rate": 1e-3}),
    "full, block by block": Adapt(method="full", unfreeze_steps=2, **SMALL | {"learning_rate": 1e-3}),
}


@pytest.fixture(scope="module")
def rows(tiny_model: Artifact) -> list[Rendered]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    turns = [(("user", f"set the light to {n} percent"), ("assistant", f'{{"level":{n}}}')) for n in range(24)]
    return [render(Row(pair, None, n), tokenizer, [2]) for n, pair in enumerate(turns, 1)]


def train(source: Artifact, out: Path, rows: list[Rendered], config: Adapt, **kwargs: Any) -> Artifact:
    return sft.run(config, source, out, rows=rows, golden=Golden.read(source.path), **kwargs)


@pytest.fixture(scope="module")
def trained(
    tiny_model: Artifact, rows: list[Rendered], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Artifact]:
    """Train one of CONFIGS, once in a test's own settings; what it gives is never written to."""
    folder = tmp_path_factory.mktemp("trained")
    return cache(lambda name: train(tiny_model, folder / name, rows, CONFIGS[name]))


def make_plain(config: Adapt, model: nn.Module, head: LabelledHead, rows: list[Rendered]) -> CompletionTrainer:
    return make_trainer(
        CompletionTrainer, config, model, head, Split.of(config, rows, 0), methods.make_optimizer(config, model),
        work=Path("unused"), device="cpu", seed=0, progress=lambda *_: None, log_folder=None,
    )  # fmt: skip


class Dies(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", CONFIGS)
def test_a_method_learns_and_a_killed_run_goes_on_to_the_same_bytes(
    tiny_model: Artifact, rows: list[Rendered], trained: Callable[[str], Artifact], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    config, whole = CONFIGS[name], trained(name)
    losses = [loss for _, loss in whole.manifest.notes["heldout_loss"]]
    assert losses[-1] < losses[0]
    assert whole.manifest.kind == ("model" if config.method == "full" else "adapter")
    make = sft.make_trainer

    def dying(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        trainer.add_callback(Dies())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_trainer", dying)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_model, tmp_path / "cut", rows, config)
    steps: list[int] = []
    resumed = train(tiny_model, tmp_path / "cut", rows, config, progress=lambda done, *_: steps.append(done))
    assert steps == [5, 6]
    assert resumed.manifest.files == whole.manifest.files


@pytest.mark.parametrize("name", ["dora", "rslora", "ia3"])
def test_what_is_merged_gives_the_logits_of_the_adapter_on_its_base(
    tiny_model: Artifact, rows: list[Rendered], trained: Callable[[str], Artifact], tmp_path: Path, name: str
) -> None:
    adapter = trained(name)
    merged = merge.run(tiny_model, adapter, tmp_path / "merged")
    ids = list(rows[0].ids)
    apart = TorchEngine.load(tiny_model.path, n_ctx=64, n_threads=1, adapter=str(adapter.path)).score(ids)
    together = TorchEngine.load(merged.path, n_ctx=64, n_threads=1).score(ids)
    base = TorchEngine.load(tiny_model.path, n_ctx=64, n_threads=1).score(ids)
    assert np.abs(apart - base).max() > 0.1
    np.testing.assert_allclose(together, apart, atol=0.15 * float(np.abs(apart - base).max()) + 0.02)  # 16 bits


def test_our_layer_takes_32_bits_under_autocast(tiny_model: Artifact) -> None:
    """As trl's ORPO gives it on a GPU: its norms are in 32 bits, its products in 16."""
    model, _ = sft.attach(Adapt(method="lora", r=4, **SMALL), tiny_model.path, "cpu")
    layer = next(module for module in model.modules() if isinstance(module, FusedLora))
    torch.nn.init.normal_(layer.lora_B["default"].weight)  # type: ignore[index, union-attr]
    x, found = torch.randn(5, 64), []
    for autocast in (False, True):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(own).float().square().sum().backward()
        assert own.grad is not None
        found.append(own.grad)
    torch.testing.assert_close(found[1], found[0], atol=0.03 * float(found[0].abs().max()), rtol=0)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_our_layers_give_pefts_loss_and_gradient_or_step_aside(
    tiny_model: Artifact, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = Adapt(method=method, r=4, alpha=4, **SMALL)
    found = []
    for ours in (False, True):
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(methods, "use_fused_layers", lambda *_, **__: None)
            model, head = sft.attach(config, tiny_model.path, "cpu")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        fused = ours and method != "dora"
        assert any(isinstance(module, FusedLora) for module in model.modules()) == fused
        assert (FusedDecoder.of(methods.causal_of(model)) is not None) == fused
        trainer = make_plain(config, model, head, rows)
        loss = trainer.compute_loss(model, pack([Rows(rows)[i] for i in (0, 13, 5)]))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["prefix", "full", "ia3"])
def test_loss_is_cross_entropy_of_the_labelled_positions_whatever_is_trained(
    tiny_model: Artifact, rows: list[Rendered], method: str
) -> None:
    model, head = sft.attach(Adapt(method=method, **SMALL), tiny_model.path, "cpu")
    config = Adapt(method=method, **SMALL)
    trainer = make_plain(config, model, head, rows)
    batch = trainer.data_collator([Rows(rows)[i] for i in (0, 13, 5)])
    assert ("lengths" in batch) == (method != "prefix")
    logits, gold = [], []
    for i in (0, 13, 5):
        ids, labels = torch.tensor([rows[i].ids]), torch.tensor(rows[i].labels)
        logits.append(model(input_ids=ids).logits[0, :-1][labels[1:]])
        gold.append(ids[0, 1:][labels[1:]])
    expected = functional.cross_entropy(torch.cat(logits), torch.cat(gold))
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


def test_a_prefix_begins_as_text_that_was_read_before(tiny_model: Artifact, rows: list[Rendered]) -> None:
    model, _ = sft.attach(CONFIGS["prefix"], tiny_model.path, "cpu")
    drawn = model.prompt_encoder["default"].embedding.weight.clone()
    shown = sft.first_tokens(Rows(rows), 4)
    assert shown == list(rows[0].ids[:4])
    methods.begin_with(model, shown)
    assert not torch.equal(model.prompt_encoder["default"].embedding.weight, drawn)
    asked = torch.tensor([rows[1].ids])
    with torch.no_grad():
        behind = model.float()(input_ids=asked).logits[0]
        whole = model.get_base_model()(input_ids=torch.cat([torch.tensor([shown]), asked], 1)).logits[0]
    torch.testing.assert_close(behind, whole[4:], atol=0.1, rtol=0.05)  # keys and values were bfloat16
    assert sft.first_tokens(Rows(rows[:1]), 2 * len(rows[0].ids)) == 2 * list(rows[0].ids)


def test_a_prefix_runs_apart_in_the_torch_engine(
    tiny_model: Artifact, rows: list[Rendered], trained: Callable[[str], Artifact]
) -> None:
    from peft import PeftModel

    adapter = trained("prefix")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32), str(adapter.path)
    ).eval()
    engine = TorchEngine.load(tiny_model.path, n_ctx=64, n_threads=1, adapter=str(adapter.path))
    row, other = rows[0], rows[13]
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([row.ids])).logits[0].numpy()
        answer = plain.generate(
            input_ids=torch.tensor([row.ids[: row.start]]), max_new_tokens=6, do_sample=False, eos_token_id=2
        )[0, row.start :].tolist()
    np.testing.assert_allclose(engine.score(row.ids), expected, atol=1e-4)
    scored = list(engine.score_rows([TokenRow(row.ids, row.start), TokenRow(other.ids, other.start)]))
    np.testing.assert_allclose(scored[0], expected[row.start - 1 : -1], atol=1e-4)
    stop = frozenset([2])
    assert greedy(engine, row.ids[: row.start], stop, 6) == answer
    assert engine.continue_rows([row.ids[: row.start]], stop, [6]) == [answer]


def test_blocks_are_freed_from_the_last_one_down(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.bfloat16).state_dict()
    config = CONFIGS["full, block by block"].model_copy(update={"max_steps": 2, "eval_steps": 1})
    made = train(tiny_model, tmp_path / "model", rows, config)
    after = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.bfloat16).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("model.layers.1.") for name in changed)
    assert not any(name.startswith(("model.layers.0.", "model.embed_tokens")) for name in changed)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_pull_is_the_squared_length_of_the_update_and_shortens_it(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, method: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32).state_dict()
    free = Adapt(method=method, **SMALL | {"learning_rate": 1e-2 if method == "lora" else 1e-3})
    lengths, losses = [], []
    for l2 in (0.0, 10.0):
        made = train(tiny_model, tmp_path / f"{l2}", rows, free.model_copy(update={"l2": l2}))
        model = made if method == "full" else merge.run(tiny_model, made, tmp_path / f"{l2}-merged")
        after = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).state_dict()
        lengths.append(sum(float((after[name] - base[name]).square().sum()) for name in base))
        losses.append(made.manifest.notes["heldout_loss"][-1][1])
    assert lengths[1] < 0.8 * lengths[0]
    assert losses[0] < losses[1]

    model, _ = sft.attach(free, tiny_model.path, "cpu")
    pull = Pull(model, 3.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    causal = model.merge_and_unload() if method == "lora" else model
    update = sum(float((p - base[name]).square().sum()) for name, p in causal.named_parameters())
    assert float(pull().detach()) == pytest.approx(0.5 * 3.0 * update, rel=1e-3)


def test_exact_match_of_the_rows_set_aside_is_counted_and_can_choose(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path
) -> None:
    config = Adapt(r=4, best_by="exact_match", **SMALL | {"max_steps": 20, "eval_steps": 5, "eval_rows": 4})
    made = train(tiny_model, tmp_path / "adapter", rows, config)
    curve = made.manifest.notes["heldout_exact_match"]
    aside = [rows[place] for place in set_aside(config, rows, 0)[0]]
    engine = TorchEngine.load(tiny_model.path, n_ctx=64, n_threads=1, adapter=str(made.path), quantize_base=True)
    logits = engine.score_rows([TokenRow(row.ids, row.start) for row in aside])
    exact = [bool((found.argmax(1) == row.ids[row.start :]).all()) for row, found in zip(aside, logits, strict=True)]
    assert max(score for _, score in curve) == sum(exact) / len(aside)


def test_both_batches_count_the_same_exact_rows(rows: list[Rendered]) -> None:
    few = [Rows(rows)[i] for i in (0, 13, 5)]
    for collate in (pack, pad):
        batch = collate(few)
        keep = batch["labels"][:, 1:] != IGNORE
        wrong = torch.zeros(int(keep.sum()), dtype=torch.bool)
        assert exact_rows(wrong, batch, keep) == (3, 3)
        wrong[0] = True  # the first label of the first row
        wrong[-1] = True
        assert exact_rows(wrong, batch, keep) == (1, 3)


def test_the_round_trip_gives_the_weights_that_training_saw(tiny_model: Artifact) -> None:
    import bitsandbytes as bnb

    four = load_base(tiny_model.path, "cpu", four_bit=True, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32)
    merge.round_trip(model)
    plain = dict(model.named_modules())
    for name, module in four.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            seen = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(plain[name].weight.data, seen), name


def test_the_merge_that_diverges_less_is_chosen_and_the_table_is_kept(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path
) -> None:
    config = Adapt(r=4, **SMALL)
    adapter = train(tiny_model, tmp_path / "adapter", rows, config)
    aside = [rows[place] for place in set_aside(config, rows, 0)[0]]
    made = merge.run(tiny_model, adapter, tmp_path / "auto", "auto", aside)
    assert made.identity == merge.planned_identity(tiny_model.identity, adapter.identity, "auto", aside)
    table = {entry["hop"]: entry for entry in made.manifest.notes["merge"]}
    assert list(table) == ["adapter on the nf4 base", "base16", "base4"]
    assert table["adapter on the nf4 base"]["kl_per_token"] == 0
    chosen = made.manifest.notes["merged_into"]
    assert table[chosen]["kl_per_token"] == min(table[way]["kl_per_token"] for way in ("base16", "base4"))
    assert chosen == "base4"  # here the 4-bit grid is far from the base, and a bfloat16 sum near it
    by_hand = merge.run(tiny_model, adapter, tmp_path / "base4", "base4")
    assert by_hand.manifest.files == made.manifest.files
    assert by_hand.identity != made.identity
    plain = merge.run(tiny_model, adapter, tmp_path / "plain")
    assert plain.manifest.config == {}
    assert plain.manifest.files != made.manifest.files


def test_an_evaluation_leaves_the_4_bit_weights_as_they_are(tiny_model: Artifact) -> None:
    """bitsandbytes repacks them for some CPUs, after which peft and we would read other numbers out of them."""
    import bitsandbytes as bnb

    model = load_base(tiny_model.path, "cpu", four_bit=True)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[3, 4, 5]]))
    assert layers
    assert all(torch.equal(layer.weight.data, kept) for layer, kept in zip(layers, before, strict=True))


def test_ia3_in_an_architecture_that_peft_does_not_know() -> None:
    with pytest.raises(UnsupportedError, match=r"^adapt.method ia3: peft does not know .* 'nemo'; use lora$"):
        methods.check(CONFIGS["ia3"], {"model_type": "nemo"})


@pytest.mark.parametrize("method", ["qlora", "dora", "full"])
def test_gradient_checkpointing_changes_no_gradient(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, method: str
) -> None:
    config = Adapt(method=method, **SMALL | {"max_steps": 2})
    plain, twice = (
        train(tiny_model, tmp_path / name, rows, config.model_copy(update={"gradient_checkpointing": on}))
        for name, on in (("plain", False), ("twice", True))
    )
    assert plain.identity != twice.identity
    for key in ("loss", "heldout_loss", "gradient_norm"):
        np.testing.assert_allclose(twice.manifest.notes[key], plain.manifest.notes[key], rtol=1e-4)


def test_gradient_checkpointing_computes_each_block_twice(
    tiny_model: Artifact, rows: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Adapt(method="lora", gradient_checkpointing=True, **SMALL)
    model, head = sft.attach(config, tiny_model.path, "cpu")
    calls: list[int] = []
    call = fused_decoder.Block.__call__
    monkeypatch.setattr(fused_decoder.Block, "__call__", lambda *args: calls.append(1) or call(*args))
    trainer = make_plain(config, model, head, rows)
    trainer.compute_loss(model, pack([Rows(rows)[i] for i in (0, 13, 5)])).backward()
    assert len(calls) == 2 * 2


def test_a_memory_budget_is_kept_to_and_said(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    config = Adapt(method="lora", memory_gb=1.2, **SMALL | {"max_steps": 2})
    made = train(tiny_model, tmp_path / "adapter", rows, config)
    assert made.manifest.notes["fitted"] == "4 rows at once"
    assert made.manifest.config["memory_gb"] == 1.2
    golden = Golden.read(tiny_model.path)
    assert made.identity == sft.planned_identity(config, tiny_model.identity, rows, 0, golden=golden)
    with pytest.raises(RecipeError, match=r"^adapt.memory_gb=0.5: lora needs 1.1 GB"):
        train(tiny_model, tmp_path / "none", rows, config.model_copy(update={"memory_gb": 0.5}))

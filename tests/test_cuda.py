"""What runs on a GPU gives what it gives on a CPU: training, compression, inference, a whole run.

All tests want a CUDA device: `python -m pytest -m gpu`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from edgetune.adapt import merge, methods, preference, sft
from edgetune.adapt.trainer import CompletionTrainer, Rows, Split, make_trainer, pack, pad
from edgetune.artifact import Artifact
from edgetune.compress import distill, layerwise, moments, quantize, teacher
from edgetune.compress.checkpoint import read_layers
from edgetune.compress.prune import stage as pruning
from edgetune.data.calibration import CalibrationSet
from edgetune.data.formats import Row
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, render
from edgetune.recipe import Gptq, Prune, Recipe, Rtn
from edgetune.recipe_distill import Distill
from edgetune.recipe_training import Adapt, Prefer
from edgetune.runtime.engine import TokenRow
from edgetune.runtime.engines.torch_engine import TorchEngine
from tests.conftest import make_tiny_model

pytestmark = pytest.mark.gpu
SMALL: dict[str, Any] = {
    "batch_size": 4, "max_steps": 6, "eval_steps": 2, "eval_rows": 4, "learning_rate": 1e-2, "warmup_ratio": 0,
    "report_to": [],
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name, "r": 4} for name in ("qlora", "lora", "rslora", "dora")},
    "dora on nf4": {"method": "dora", "r": 4, "base_bits": 4},
    "dropout": {"method": "lora", "r": 4, "dropout": 0.1},
    "dense": {"method": "qlora", "r": 4, "keep_dense": True},
    "checkpointing": {"method": "qlora", "r": 4, "gradient_checkpointing": True, "micro_batch_size": 2},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefix", "virtual_tokens": 4},
    "full": {"method": "full", "learning_rate": 1e-3},
    "full, block by block": {"method": "full", "learning_rate": 1e-3, "unfreeze_steps": 2},
    "l2": {"method": "lora", "r": 4, "l2": 0.01},
    "ewc": {"method": "lora", "r": 4, "ewc": 1.0},
}
CALIBRATION = CalibrationSet(np.random.default_rng(0).integers(0, 512, (12, 16)))
IDS = [i % 500 + 3 for i in range(0, 400, 10)]


@pytest.fixture(scope="module")
def rows(tiny_model: Artifact) -> list[Rendered]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    turns = [(("user", f"set the light to {n} percent"), ("assistant", f'{{"level":{n}}}')) for n in range(24)]
    return [render(Row(pair, None, n), tokenizer, [2]) for n, pair in enumerate(turns, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_as_on_the_cpu(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, name: str) -> None:
    config = Adapt(**SMALL | METHODS[name])
    curves = {}
    for device in ("cpu", "cuda"):
        made = sft.run(
            config, tiny_model, tmp_path / device, rows=rows, golden=Golden.read(tiny_model.path),
            general=np.random.default_rng(1).integers(3, 512, 5000).tolist(), device=device,
        )  # fmt: skip
        curves[device] = [loss for _, loss in made.manifest.notes["heldout_loss"]]
    assert curves["cuda"][-1] < curves["cuda"][0]
    tolerance = 0.1 if name == "dropout" else 0.03  # another generator drops other numbers
    np.testing.assert_allclose(curves["cuda"], curves["cpu"], rtol=tolerance)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_gradients_are_the_cpus(tiny_model: Artifact, rows: list[Rendered], method: str) -> None:
    """Of one batch, packed for our blocks and padded for the library's."""
    config = Adapt(**SMALL | METHODS[method])
    found: dict[tuple[str, str], torch.Tensor] = {}
    for device in ("cpu", "cuda"):
        for how in (pack, pad):
            torch.manual_seed(0)
            model, head = sft.attach(config, tiny_model.path, device)
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
                    parameter.data = (drawn * 0.02).to(device)
            trainer = make_trainer(
                CompletionTrainer, config, model, head, Split.of(config, rows, 0),
                methods.make_optimizer(config, model),
                work=Path("unused"), device=device, seed=0, progress=lambda *_: None, log_folder=None,
            )  # fmt: skip
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(model, how([Rows(rows)[i] for i in (0, 13, 5)]))
            gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
            found[device, how.__name__] = torch.cat(gradients)
    for key, gradient in found.items():
        alike = torch.nn.functional.cosine_similarity(gradient, found["cpu", "pad"], dim=0)
        assert alike > 0.995, (key, float(alike))


def test_a_merge_is_chosen_as_on_the_cpu(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    config = Adapt(**SMALL | METHODS["qlora"])
    made = sft.run(config, tiny_model, tmp_path / "adapter", rows=rows, golden=Golden.read(tiny_model.path))
    tables = {
        device: merge.run(tiny_model, made, tmp_path / device, "auto", rows[:4], device=device).manifest.notes["merge"]
        for device in ("cpu", "cuda")
    }
    hops = {device: [line["hop"] for line in table] for device, table in tables.items()}
    assert hops["cuda"] == hops["cpu"] == ["adapter on the nf4 base", "base16", "base4"]
    for one, other in zip(tables["cpu"], tables["cuda"], strict=True):
        assert other["nll_per_token"] == pytest.approx(one["nll_per_token"], rel=0.03)


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "grpo"])
def test_a_preference_is_trained(tiny_model: Artifact, tmp_path: Path, method: str) -> None:
    file, lines = tmp_path / "rows.jsonl", []
    for n in range(16):
        prompt, good, bad = f"set the light to {n} percent", f'{{"level":{n}}}', "what is the temperature"
        if method == "kto":
            lines.append({"prompt": prompt, "completion": good if n % 2 else bad, "label": bool(n % 2)})
        elif method == "grpo":
            lines.append({"instruction": prompt, "output": good})
        else:
            lines.append({"prompt": prompt, "chosen": good, "rejected": bad})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more: dict[str, Any] = {"rewards": [{"json_valid": {}}], "generations": 2, "max_new_tokens": 8}
    config = Prefer.model_validate(
        {"method": method, "train": str(file), "r": 4, "alpha": 8, "batch_size": 4, "max_steps": 4,
         "learning_rate": 1e-2, "eval_rows": 3, "eval_steps": 2, "report_to": [], **(more if method == "grpo" else {})}
    )  # fmt: skip
    losses = {}
    for device in ("cpu", "cuda"):
        made = preference.run(config, tiny_model, tmp_path / device, examples=preference.read(config), device=device)
        losses[device] = [loss for _, loss in made.manifest.notes["loss"]]
        watched = made.manifest.notes["heldout_reward" if method == "grpo" else "heldout_loss"]
        assert [step for step, _ in watched] == [2, 4]
        assert np.isfinite([value for _, value in watched]).all()
    assert np.isfinite(losses["cuda"]).all()
    if method != "grpo":  # which samples
        np.testing.assert_allclose(losses["cuda"][0], losses["cpu"][0], rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    "config",
    [
        Gptq(bits=4, group_size=32, sym=True),
        Gptq(bits=4, group_size=32, sym=False, hessian="bfloat16"),
        Gptq(bits=3, group_size=-1, desc_act=False),
        Rtn(bits=4, group_size=32),
    ],
    ids=["4 bits", "16-bit hessian", "3 bits", "rtn"],
)
def test_integers_are_the_cpus(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Gptq | Rtn
) -> None:
    monkeypatch.setattr(layerwise, "compute_dtype", lambda _: torch.float32)  # to compare with one another
    made = {
        device: quantize.run(config, tiny_model, tmp_path / device, calibration=CALIBRATION, device=device)
        for device in ("cpu", "cuda")
    }
    layers = {device: read_layers(artifact.path) for device, artifact in made.items()}
    same = [float((layers["cuda"][name].q == layer.q).float().mean()) for name, layer in layers["cpu"].items()]
    assert np.mean(same) > (0.97 if isinstance(config, Gptq) else 0.999999), same  # a tie takes its column another way
    if isinstance(config, Gptq):
        errors = [artifact.manifest.notes["relative_error"] for artifact in made.values()]
        cpu, cuda = (list(found.values()) for found in errors)
        np.testing.assert_allclose(cuda, cpu, rtol=0.03)


def test_moments_and_pruning_are_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "compute_dtype", lambda _: torch.float32)
    source = make_tiny_model(tmp_path / "model", layers=4)
    found = [
        moments.read(moments.run(source, tmp_path / f"moments {device}", calibration=CALIBRATION, device=device))
        for device in ("cpu", "cuda")
    ]
    for name, wanted in found[0].items():
        np.testing.assert_allclose(np.asarray(found[1][name]), np.asarray(wanted), rtol=1e-3)
    for config in (Prune(layers=2, intermediate_size=96, kv_heads=1, hidden_size=32),
                   Prune(layers=2, search="kl", search_samples=3)):  # fmt: skip
        made = [
            pruning.run(config, source, tmp_path / f"{config.search} {device}", calibration=CALIBRATION, device=device)
            for device in ("cpu", "cuda")
        ]
        assert made[0].manifest.notes["kept_layers"] == made[1].manifest.notes["kept_layers"]


def test_a_student_learns_as_on_the_cpu(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    student = make_tiny_model(tmp_path / "student", seed=5, layers=1, hidden=32)
    config = Distill(
        batch_size=4, max_steps=6, eval_steps=2, eval_rows=4, learning_rate=5e-3, top_k=16, hidden_weight=0.5,
        warmup_ratio=0, report_to=[],
    )  # fmt: skip
    curves = []
    for device in ("cpu", "cuda"):
        said = teacher.run(config, tiny_model, tmp_path / f"said {device}", rows=rows, device=device)
        made = distill.run(config, student, tiny_model, said, tmp_path / f"made {device}", rows=rows, device=device)
        curves.append([loss for _, loss in made.manifest.notes["heldout_loss"]])
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.03)


def test_the_torch_engine_gives_the_logits_of_the_cpu(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path
) -> None:
    asked = [TokenRow(row.ids, row.start) for row in rows[:8]]
    config = Adapt(method="qlora", r=4, **SMALL)
    adapter = sft.run(config, tiny_model, tmp_path / "a", rows=rows, golden=Golden.read(tiny_model.path), device="cuda")
    merged = merge.run(tiny_model, adapter, tmp_path / "merged")
    settings: tuple[dict[str, Any], ...] = ({}, {"adapter": str(adapter.path), "quantize_base": True})
    for path, more in ((tiny_model.path, settings[0]), (tiny_model.path, settings[1]), (merged.path, settings[0])):
        cpu, cuda = (
            TorchEngine.load(path, n_ctx=128, n_threads=2, device=device, **more) for device in ("cpu", "cuda")
        )
        for one, other in zip(cuda.score_rows(asked), cpu.score_rows(asked), strict=True):
            np.testing.assert_allclose(one, other, atol=0.02)
        np.testing.assert_allclose(cuda.score(IDS), cpu.score(IDS), atol=0.02)
        prompts, limits = [row.ids[: row.start] for row in rows[:4]], [8] * 4
        assert cuda.continue_rows(prompts, frozenset({2}), limits) == cpu.continue_rows(prompts, frozenset({2}), limits)
        cuda.close(), cpu.close()


def test_compiled_torch_gives_the_same_logits(tiny_model: Artifact) -> None:
    plain, compiled = (
        TorchEngine.load(tiny_model.path, n_ctx=64, n_threads=2, device="cuda", compiled=compiled)
        for compiled in (False, True)
    )
    np.testing.assert_allclose(compiled.prefill(IDS[:9]), plain.prefill(IDS[:9]), atol=1e-2)
    for token in IDS[9:12]:
        np.testing.assert_allclose(compiled.decode(token), plain.decode(token), atol=1e-2)


def test_a_whole_run(tiny_model: Artifact, tmp_path: Path) -> None:
    """Train, merge, quantize, score and time on the GPU; the report says where each was."""
    from rich.console import Console

    from edgetune.artifact import Store
    from edgetune.pipeline import Pipeline
    from edgetune.plan import preflight
    from edgetune.stages import Stages

    for name, numbers in (("train", range(0, 40, 2)), ("heldout", range(1, 20, 2))):
        lines = [{"instruction": f"set the light to {n} percent", "output": f'{{"level":{n}}}'} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe.model_validate(
        {
            "name": "gpu", "base": str(tiny_model.path), "device": "cuda",
            "data": {"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")},
            "adapt": {**SMALL, "r": 4},
            "candidates": {
                "gptq": {"compress": [{"gptq": {"group_size": 32, "calibration": {"n_samples": 4, "n_tokens": 16}}}],
                         "runtime": {"torch": {"dtype": "float16", "device": "cuda"}}},
            },
            "bench": {"prompt_tokens": [8], "new_tokens": 4, "repeats": 3, "runs": 1, "warmup": 1,
                      "probes": ["energy"]},
        }
    )  # fmt: skip
    stages = Stages(Store(tmp_path / "store"), tmp_path / "run", Console())
    report = Pipeline(recipe, preflight(recipe), stages).run()
    assert not report.failures
    assert {found.subject.settings.get("device") for found in report.accuracy} == {"cuda"}
    where = {found.subject.name: found.subject.settings.get("device") for found in report.latency}
    assert where == {"reference": None, "gptq": "cuda"}
    assert report.machine.gpu is not None
    probes = next(found.probes for found in report.latency if found.subject.name == "gptq")
    assert probes is not None
    assert probes.energy is not None
    assert probes.energy.gpu_reason is None
    assert probes.energy.gpu_joules is not None
    assert probes.energy.gpu_joules > 0

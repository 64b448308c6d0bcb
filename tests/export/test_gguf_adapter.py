"""A LoRA adapter as a GGUF file: llama.cpp with it is peft with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifact import Artifact, Store, draft, identity
from edgetune.commands import run_commands
from edgetune.data.golden import FILE as GOLDEN_FILE
from edgetune.errors import ContractError, UnsupportedError
from edgetune.export import gguf_adapter
from edgetune.export.gguf_adapter import planned_identity, run
from edgetune.export.gguf_child import run_child
from tests.conftest import Call

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Artifact, out: Path, **settings: Any) -> Artifact:
    """Write a random adapter of peft's, both of its factors far from zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | settings))
    with draft(out, kind="adapter", stage="test/1", config={"method": "lora"} | settings, parents=[base]) as pending:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config)
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(pending.path)
        (pending.path / "README.md").unlink(missing_ok=True)
        (pending.path / GOLDEN_FILE).write_bytes((base.path / GOLDEN_FILE).read_bytes())
    return pending.artifact


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_llama_cpp_with_it_is_peft_with_it(tiny_model: Artifact, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **settings)
    made = run(adapter, tiny_model, tmp_path / "out")
    assert made.manifest.kind == "gguf-adapter"
    assert made.manifest.notes["parity"]["max_abs"] < 1e-3
    assert made.manifest.notes["matrices"] == 2 * len(settings.get("target_modules", LINEAR))
    assert made.identity == planned_identity(adapter.identity, tiny_model.identity)
    assert f"--lora {tmp_path / 'out' / 'adapter.gguf'}" in run_commands(made, tmp_path / "out")[0]
    assert "--lora 'my run/adapter.gguf' --jinja" in run_commands(made, Path("my run"))[0]


def test_another_scale_is_refused(tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    lora = gguf_adapter.read_lora(adapter)
    monkeypatch.setattr(gguf_adapter, "read_lora", lambda _: replace(lora, alpha=1.1 * lora.alpha))
    with pytest.raises(ContractError, match=r"adapter\.gguf on a base in F32"):
        run(adapter, tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "DoRA cannot be exported"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_more_than_plain_lora_is_refused(
    tiny_model: Artifact, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **settings)
    with pytest.raises(UnsupportedError, match=says):
        run(adapter, tiny_model, tmp_path / "out")


def test_the_verb_finds_the_base_in_the_adapters_store(
    call: Call, tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the child, which no other test gives an adapter."""
    monkeypatch.setattr(gguf_adapter, "run_child", run_child)
    store = Store(tmp_path / "store")
    copied = {"copy of": tiny_model.identity}
    base, _ = store.once(identity("test.base/1", copied, []), lambda out: _copy(tiny_model, out, copied))
    planned = identity("test/1", {"method": "lora"}, [base.identity])
    adapter, _ = store.once(planned, lambda out: make_adapter(base, out))
    code, said, err = call("export", str(adapter.path), "--out", str(tmp_path / "out"))
    assert code == 0, err
    assert said.strip().endswith(str(tmp_path / "out"))
    code, _, err = call("export", str(adapter.path), "--out", str(tmp_path / "b"), "--rows", "rows.jsonl")
    assert (code, "--rows is not read by gguf, of an adapter" in err) == (2, True)
    code, _, err = call(
        "export", str(adapter.path), "--out", str(tmp_path / "b"), "--format", "tensorrt", "--precision", "fp16"
    )
    assert (code, "tensorrt the merged model" in err) == (2, True)


def _copy(source: Artifact, out: Path, config: dict[str, Any]) -> Artifact:
    with draft(out, kind="model", stage="test.base/1", config=config) as pending:
        for name in source.manifest.files:
            (pending.path / name).write_bytes((source.path / name).read_bytes())
    return pending.artifact

"""What each method trains: peft's adapter on a frozen base, or the model's own weights.

LoRA arXiv:2106.09685, QLoRA 2305.14314, DoRA 2402.09353, rsLoRA 2312.03732, IA3 2205.05638, prefix tuning 2101.00190.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgetune.adapt.base import load_base
from edgetune.adapt.lora_linear import use_fused_layers
from edgetune.errors import UnsupportedError
from edgetune.recipe_training import LORA, Adapt

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


def check(config: Adapt, model_config: dict[str, Any]) -> None:
    """Raise UnsupportedError where peft does not know where a method goes in this architecture."""
    if config.method != "ia3":
        return
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    if model_config.get("model_type") not in KNOWN:
        raise UnsupportedError(
            f"adapt.method ia3: peft does not know the layers of {model_config.get('model_type')!r}; use lora"
        )


def attach(config: Adapt, folder: Path, device: str) -> nn.Module:
    """Load the base and put a fresh adapter on it; method full frees the weights instead, held in 32 bits."""
    from peft import get_peft_model

    if config.method == "full":
        whole: nn.Module = load_base(folder, device, four_bit=False, dtype=torch.float32)
        return whole.requires_grad_(True)
    base = load_base(folder, device, four_bit=config.four_bit)
    model: nn.Module = get_peft_model(base, peft_config(config))
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft leaves DoRA's magnitudes in 16 bits, where small updates are lost
            parameter.data = parameter.data.float()
    return model


@torch.no_grad()
def begin_with(model: Any, ids: Sequence[int]) -> None:
    """Let a prefix begin as the base's own keys and values of so many tokens (arXiv:2101.00190, section 7.4).

    What peft draws at random is nothing that a text could leave behind, and drowns what the base knows.
    """
    from peft import initialize_kv_prefix_from_past_key_values

    base = model.get_base_model()
    given = torch.tensor([list(ids)], device=base.get_input_embeddings().weight.device)
    with model.disable_adapter():
        past = base(input_ids=given, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=past)


def peft_config(config: Adapt) -> PeftConfig:
    """Say to peft what a recipe says."""
    from peft import IA3Config, PrefixTuningConfig

    if config.method == "ia3":
        return IA3Config(task_type="CAUSAL_LM")
    if config.method == "prefix":
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.virtual_tokens)
    return lora_config(config.method, config.r, config.alpha, config.dropout, keep_dense=config.keep_dense)


def lora_config(method: str, r: int, alpha: int, dropout: float = 0.0, *, keep_dense: bool = False) -> LoraConfig:
    """LoRA or one of its kin on all linear layers; in our layers, except DoRA, which scales each row anew."""
    from peft import LoraConfig

    lora = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM",
        use_dora=method == "dora", use_rslora=method == "rslora",
    )  # fmt: skip
    if method != "dora":
        use_fused_layers(lora, keep_dense=keep_dense)
    return lora


def causal_of(model: nn.Module) -> Any:
    """Give the causal model below an adapter; adapters that live in layers stay inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def is_prefix(model: nn.Module) -> bool:
    """Whether the adapter is a prefix, which lives before the layers and not in them."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def make_optimizer(config: Adapt, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; with LoRA, B may learn faster than A (LoRA+, arXiv:2402.12354)."""
    from peft.optimizers import create_loraplus_optimizer

    if config.method in LORA:
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=config.learning_rate, loraplus_lr_ratio=config.loraplus_lr_ratio,
            loraplus_weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        return optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},  # norms and biases
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)


def save_adapter(model: nn.Module, folder: Path, base_identity: str) -> None:
    """Write adapter weights and config; the config names the base by its identity, not by a path."""
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_identity
    for key in ("target_modules", "feedforward_modules"):  # peft writes sets: their order changes between runs
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")

"""Merges an adapter into its 16-bit base: W + alpha/r * B A, summed in float32, stored in the base's 16 bits."""

from __future__ import annotations

from pathlib import Path

from edgetune.artifact import Artifact, draft, identity
from edgetune.data.contract import hold
from edgetune.data.golden import Golden
from edgetune.sources import copy_tokenizer

STAGE = "adapt.merge/1"


def planned_identity(base_identity: str, adapter_identity: str) -> str:
    """Identity of the model that `run` would make."""
    return identity(STAGE, {}, [base_identity, adapter_identity])


def run(base: Artifact, adapter: Artifact, out: Path) -> Artifact:
    """Write the merged `model` artifact, with the adapter's golden conversations."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with draft(out, kind="model", stage=STAGE, config={}, parents=[base, adapter]) as pending:
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, local_files_only=True)
        merged = PeftModel.from_pretrained(model, str(adapter.path)).merge_and_unload()
        merged.to(torch.bfloat16).save_pretrained(pending.path)
        copy_tokenizer(base.path, pending.path)
        Golden.read(adapter.path).write(pending.path)
        hold(pending.path)
        pending.notes["parameters"] = sum(p.numel() for p in merged.parameters())
    return pending.artifact

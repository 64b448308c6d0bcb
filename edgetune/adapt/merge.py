"""Merges an adapter into its base: W + s B A, summed in float32, stored in the base's 16 bits.

QLoRA trains on a base that went through NF4, so W may be the 16-bit base or that base after its 4-bit round trip.
Which one is nearer to what was trained is measured where the recipe asks for `auto` (`merge_choice.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact, draft, identity, require_space
from edgetune.data.contract import hold
from edgetune.data.golden import Golden
from edgetune.progress import Report, silent
from edgetune.sources import copy_tokenizer

if TYPE_CHECKING:
    from edgetune.data.render import Rendered

STAGE = "adapt.merge/2"


def planned_identity(
    base_identity: str, adapter_identity: str, into: str | None = None, rows: Sequence[Rendered] = ()
) -> str:
    """Identity of the model that `run` would make; `rows` are those that `auto` measures on."""
    return identity(STAGE, _config(into), [base_identity, adapter_identity], _sources(into, rows))


def run(
    base: Artifact,
    adapter: Artifact,
    out: Path,
    into: str | None = None,
    rows: Sequence[Rendered] = (),
    *,
    device: str = "cpu",
    progress: Report = silent,
) -> Artifact:
    """Write the merged `model` artifact, with the adapter's golden conversations; `auto` measures on `device`.

    Raises DiskSpaceError where it, or what `auto` keeps meanwhile, does not fit on the disk.
    """
    import torch

    from edgetune.adapt import merge_choice

    config, sources = _config(into), _sources(into, rows)
    require_space(out.parent, base.size_bytes + (merge_choice.kept_bytes(base.path, rows) if into == "auto" else 0))
    with draft(out, kind="model", stage=STAGE, config=config, parents=[base, adapter], sources=sources) as pending:
        if into == "auto":
            choice = merge_choice.choose(base.path, adapter.path, rows, pending.work, device=device, progress=progress)
            pending.notes["merge"] = choice.table
            into = choice.into
        progress(0, 2, "adding the update")
        model = merged(base.path, adapter.path, four_bit=into == "base4")
        progress(1, 2, "writing")
        model.to(torch.bfloat16).save_pretrained(pending.path)
        copy_tokenizer(base.path, pending.path)
        Golden.read(adapter.path).write(pending.path)
        hold(pending.path)
        progress(2, 2, "writing")
        pending.notes["parameters"] = sum(p.numel() for p in model.parameters())
        if into is not None:
            pending.notes["merged_into"] = into
    return pending.artifact


def merged(base: Path, adapter: Path, *, four_bit: bool) -> Any:
    """Load the base in float32, send its linear layers through NF4 if `four_bit`, and add the adapter's update."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    if four_bit:
        round_trip(model)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def round_trip(model: Any) -> None:
    """Give each linear layer but the output head the weights that it has in NF4 with double quantization."""
    import bitsandbytes as bnb
    import torch

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed, state = bnb.functional.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data = bnb.functional.dequantize_4bit(packed, state)


def _config(into: str | None) -> dict[str, Any]:
    return {} if into is None else {"into": into}


def _sources(into: str | None, rows: Sequence[Rendered]) -> dict[str, str]:
    from edgetune.data.render import rows_digest

    return {"rows": rows_digest(rows)} if into == "auto" else {}

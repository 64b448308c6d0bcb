"""Write a LoRA adapter as a GGUF file beside a shared base, and prove in llama.cpp that it is the same adapter.

llama.cpp adds `alpha / r B (A x)` to each product, r read from the shape of A. Shapes: R out-features, C in-features.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgetune import artifact, backends
from edgetune.artifact import Artifact, draft, require_space
from edgetune.data.golden import FILE as GOLDEN_FILE
from edgetune.data.golden import Golden
from edgetune.export.gguf_child import run_child
from edgetune.export.gguf_families import change, family, gguf_name
from edgetune.export.gguf_types import choose_types
from edgetune.export.gguf_verify import tolerance
from edgetune.export.gguf_vocab import read_vocabulary
from edgetune.export.gguf_write import (
    folder_weights,
    read_config,
    write_gguf,
    written_shapes,
)
from edgetune.export.lora_pairs import Lora, Pairs, peft_model, read_lora
from edgetune.export.parity import hold, parity, torch_logits
from edgetune.progress import Report, silent

STAGE = "export.gguf-adapter/1"
FILE = "adapter.gguf"


def planned_identity(adapter_identity: str, base_identity: str) -> str:
    """Give the identity of what `run` would make."""
    return artifact.identity(STAGE, {}, [adapter_identity, base_identity])


def run(adapter: Artifact, base: Artifact, out: Path, *, progress: Report = silent) -> Artifact:
    """Write `adapter.gguf`, float32, and hold llama.cpp's logits with it to peft's on the golden conversations.

    The check writes the base as a GGUF file of its own dtype for a while. Raises UnsupportedError for an adapter that
    is more than plain LoRA, ContractError where llama.cpp's logits are others.
    """
    backends.require("llama_cpp")
    model_config = read_config(base.path)
    lora = read_lora(adapter)
    require_space(out.parent, 2 * base.size_bytes)
    with draft(
        out, kind="gguf-adapter", stage=STAGE, config={}, parents=[adapter, base],
        versions={name: backends.version(name) or "" for name in ("gguf", "llama_cpp")},
    ) as pending:  # fmt: skip
        try:
            progress(0, 2, "write")
            pairs = _placed(lora, model_config)
            write(pending.path / FILE, pairs, model_config, lora.alpha)
            progress(1, 2, "logits")
            pending.notes["parity"] = _prove(pending.path / FILE, adapter, base, model_config, pending.work)
            pending.notes["matrices"] = len(pairs)
        finally:
            shutil.rmtree(pending.work, ignore_errors=True)
        shutil.copyfile(adapter.path / GOLDEN_FILE, pending.path / GOLDEN_FILE)
    return pending.artifact


def write(path: Path, pairs: Pairs, model_config: Mapping[str, Any], alpha: float) -> None:
    """Write A [r, C] and B [R, r] of each tensor (by its GGUF name)."""
    gguf = backends.require("gguf")
    writer = gguf.GGUFWriter(None, family(model_config).name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (A, B) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", A)
        writer.add_tensor(f"{name}.lora_b", B)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _placed(lora: Lora, model_config: Mapping[str, Any]) -> Pairs:
    """Give A and B by the GGUF name of their tensor, B's rows in the order that the base's have in the file."""
    of, placed = family(model_config), {}
    for module, (A, B) in lora.pairs.items():
        moved = change(f"{module}.weight", of)
        turned = moved.there(B, model_config) if moved is not None and moved.rows_only else B
        placed[gguf_name(f"{module}.weight", of)] = (A, turned)
    return placed


def _prove(
    file: Path, adapter: Artifact, base: Artifact, model_config: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    """Compare logits: llama.cpp with the base in its own dtype and the adapter, peft with both in float32."""
    golden = Golden.read(adapter.path)
    weights = folder_weights(base.path, model_config)
    types, _ = choose_types(written_shapes(weights, model_config), weights.dtype)
    vocabulary = read_vocabulary(base.path, int(model_config["vocab_size"]))
    write_gguf(work / "base.gguf", weights, model_config, vocabulary, types, weights.dtype, silent)
    rows = [c.ids for c in golden.conversations] + [t.ids for t in golden.texts]
    job = {"file": str(work / "base.gguf"), "adapter": str(file), "texts": [], "rows": rows, "folder": str(work)}
    run_child("edgetune.export.gguf_probe", job, work / "probe.json")
    model = peft_model(base.path, adapter.path)
    reference = (torch_logits(model, row) for row in rows)
    found = parity(reference, (np.load(work / f"{index}.npy") for index in range(len(rows))))
    hold(found, tolerance(weights.dtype, family(model_config).activation), f"{file.name} on a base in {weights.dtype}")
    return found.note(tolerance(weights.dtype, family(model_config).activation))

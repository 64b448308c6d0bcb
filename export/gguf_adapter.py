"""Write a LoRA adapter as a GGUF file beside a shared base, and prove in llama.cpp that it is the same adapter.

llama.cpp adds `alpha / r B (A x)` to each product, r read from the shape of A. Shapes: R out-features, C in-features.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune import artifact, backends
from edgetune.artifact import Artifact, draft, require_space
from edgetune.data.golden import FILE as GOLDEN_FILE
from edgetune.data.golden import Golden
from edgetune.errors import ArtifactError, UnsupportedError
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
from edgetune.export.parity import hold, parity, torch_logits
from edgetune.progress import Report, silent

STAGE = "export.gguf-adapter/1"
FILE = "adapter.gguf"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


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
    settings = json.loads((adapter.path / "adapter_config.json").read_bytes())
    _refuse(adapter, settings)
    require_space(out.parent, 2 * base.size_bytes)
    with draft(
        out, kind="gguf-adapter", stage=STAGE, config={}, parents=[adapter, base],
        versions={name: backends.version(name) or "" for name in ("gguf", "llama_cpp")},
    ) as pending:  # fmt: skip
        try:
            progress(0, 2, "write")
            pairs = _pairs(adapter.path, model_config)
            write(pending.path / FILE, pairs, model_config, _alpha(settings))
            progress(1, 2, "logits")
            pending.notes["parity"] = _prove(pending.path / FILE, adapter, base, model_config, pending.work)
            pending.notes["matrices"] = len(pairs)
        finally:
            shutil.rmtree(pending.work, ignore_errors=True)
        shutil.copyfile(adapter.path / GOLDEN_FILE, pending.path / GOLDEN_FILE)
    return pending.artifact


def write(
    path: Path, pairs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], model_config: Mapping[str, Any], alpha: float
) -> None:
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


def _refuse(adapter: Artifact, settings: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's adapters cannot say."""
    found = settings.get("peft_type")
    if found != "LORA":
        raise UnsupportedError(f"{adapter.path}: {found} has no place in a GGUF adapter, LoRA has; merge it and export")
    kinds = {"use_dora": "DoRA", "alpha_pattern": "alpha_pattern", "modules_to_save": "modules_to_save"}
    for key, name in kinds.items():
        if settings.get(key):
            raise UnsupportedError(f"{adapter.path}: {name} has no place in a GGUF adapter; merge it and export")
    if settings.get("bias", "none") != "none":
        raise UnsupportedError(f"{adapter.path}: trained biases have no place in a GGUF adapter; merge it and export")


def _alpha(settings: Mapping[str, Any]) -> float:
    """What llama.cpp divides by r: rsLoRA (arXiv:2312.03732) scales by alpha / sqrt(r)."""
    alpha, r = float(settings["lora_alpha"]), int(settings["r"])
    return float(alpha * np.sqrt(r)) if settings.get("use_rslora") else alpha


def _pairs(folder: Path, model_config: Mapping[str, Any]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Read A and B of each layer, B's rows in the order that the base's rows have in a GGUF file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read: {str(error).splitlines()[0]}") from error
    of, pairs = family(model_config), {}
    for key, A in sorted(stored.items()):
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        B = stored[key.replace(".lora_A.", ".lora_B.")].astype(np.float32)
        moved = change(f"{module}.weight", of)
        if moved is not None and moved.rows_only:
            B = moved.there(B, model_config)
        pairs[gguf_name(f"{module}.weight", of)] = (np.ascontiguousarray(A, np.float32), B)
    unknown = [key for key in stored if not re.search(r"\.lora_[AB]\.weight$", key)]
    if unknown or len(stored) != 2 * len(pairs):
        raise UnsupportedError(f"{folder / WEIGHTS} holds {(unknown or ['half a pair'])[0]}, more than plain LoRA")
    return pairs


def _prove(
    file: Path, adapter: Artifact, base: Artifact, model_config: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    """Compare logits: llama.cpp with the base in its own dtype and the adapter, peft with both in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    golden = Golden.read(adapter.path)
    weights = folder_weights(base.path, model_config)
    types, _ = choose_types(written_shapes(weights, model_config), weights.dtype)
    vocabulary = read_vocabulary(base.path, int(model_config["vocab_size"]))
    write_gguf(work / "base.gguf", weights, model_config, vocabulary, types, lambda *_: None)
    rows = [c.ids for c in golden.conversations] + [t.ids for t in golden.texts]
    job = {"file": str(work / "base.gguf"), "adapter": str(file), "texts": [], "rows": rows, "folder": str(work)}
    run_child("edgetune.export.gguf_probe", job, work / "probe.json")
    model = AutoModelForCausalLM.from_pretrained(base.path, local_files_only=True).float()
    model = PeftModel.from_pretrained(model, str(adapter.path)).eval()
    reference = (torch_logits(model, row) for row in rows)
    found = parity(reference, (np.load(work / f"{index}.npy") for index in range(len(rows))))
    hold(found, tolerance(weights.dtype, family(model_config).activation), f"{file.name} on a base in {weights.dtype}")
    return found.note(tolerance(weights.dtype, family(model_config).activation))

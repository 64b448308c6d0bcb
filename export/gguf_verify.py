"""Read an exported GGUF file back: types, weights, and logits in llama.cpp against the same weights in torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from edgetune.backends import require
from edgetune.data.golden import Golden
from edgetune.errors import ContractError
from edgetune.export.contract import RuntimeFacts, check_contract
from edgetune.export.gguf_child import run_child
from edgetune.export.gguf_families import ROPE_TENSORS, family, stored, written_shape
from edgetune.export.gguf_vocab import Vocabulary
from edgetune.export.gguf_write import Weights, tensors
from edgetune.export.parity import Tolerance, hold, parity, torch_logits

# Root mean square error of a tensor, relative to the tensor: far above what rounding costs, far below a wrong tensor.
_WEIGHT_ERROR = {"F32": 1e-6, "F16": 0.001, "BF16": 0.005, "Q8_0": 0.02, "Q6_K": 0.08, "Q5_K": 0.15, "Q5_1": 0.15}
_WEIGHT_ERROR |= {"Q5_0": 0.15, "Q4_K": 0.25, "Q4_1": 0.25, "Q4_0": 0.25, "IQ4_NL": 0.25}

# llama.cpp multiplies F16 weights with float16 activations, BF16 with bfloat16, and quantized ones with int8, which
# alone costs a mean KL of 0.01 on the golden texts of SmolLM2-135M. Structure is held by the weights, tensor by tensor.
TOLERANCES: dict[str, Tolerance] = {
    "F32": Tolerance(max_abs=1e-3),
    "F16": Tolerance(mean_kl=1e-3),
    "BF16": Tolerance(mean_kl=5e-3),
}
GELU = Tolerance(mean_kl=1e-6)  # measured on models of 3 and 7 blocks: up to 8e-9
QUANTIZED = Tolerance(mean_kl=0.05)


def tolerance(target: str, activation: str = "silu") -> Tolerance:
    """Give how far llama.cpp's logits may lie from the same weights in torch.

    GELU comes from a table of float16 values there, so that no logit's distance can be promised.
    """
    return GELU if target == "F32" and "gelu" in activation else TOLERANCES.get(target, QUANTIZED)


def check_types(file: Path, types: Mapping[str, str]) -> None:
    """Raise ContractError where a tensor of the file has another type than was chosen, or is missing."""
    found = {t.name: t.tensor_type.name for t in require("gguf").GGUFReader(file).tensors}
    for name in ROPE_TENSORS:
        found.pop(name, None)
    if found != types:
        name = next(n for n in sorted({*found, *types}) if found.get(n) != types.get(n))
        raise ContractError(f"{file.name}: tensor {name} has type {found.get(name)}, {types.get(name)} was asked for")


def reference_model(file: Path, weights: Weights, model_config: Mapping[str, Any]) -> Any:
    """Give a Transformers model with the weights of the file, dequantized to float32.

    Each tensor is compared with its source on the way. Raises ContractError where one is another tensor.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    gguf = require("gguf")
    of = family(model_config)
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    state: dict[str, Any] = {}
    for name, source in tensors(weights, model_config):
        tensor = written[name]
        array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        array = array.reshape(written_shape(weights.shapes[source], source, of))
        found = torch.from_numpy(stored(array, source, model_config, of).copy())
        wanted = weights.get(source).float()
        error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error <= _WEIGHT_ERROR[tensor.tensor_type.name]:
            raise ContractError(
                f"{file.name}: {name} ({tensor.tensor_type.name}) differs from its source by {error:.3g} of its norm"
            )
        state[re.sub("^embed_out", "lm_head", source)] = found  # GPT-NeoX's name on disk and in memory
    settings = {k: v for k, v in model_config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ContractError(f"{file.name}: {', '.join(left[:3])} of the model is in no tensor of the file")
    return model.eval()


def verify(
    file: Path, target: str, types: Mapping[str, str], weights: Weights, model_config: Mapping[str, Any],
    golden: Golden, vocabulary: Vocabulary, work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Hold a written file to its contract and give the notes for the manifest. Raises ContractError."""
    check_types(file, types)
    declared_stops = vocabulary.stop_ids
    if set(declared_stops) != set(golden.stop_ids):
        raise ContractError(
            f"stop set differs: the checkpoint declares {declared_stops}, training ended answers at {golden.stop_ids}"
        )
    texts = [c.text for c in golden.conversations] + [t.text for t in golden.texts]
    rows = [c.ids for c in golden.conversations] + [t.ids for t in golden.texts]
    given = [normalize("NFC", text) for text in texts] if vocabulary.composes else texts
    job = {"file": str(file), "texts": given, "rows": rows, "folder": str(work)}
    said = run_child("edgetune.export.gguf_probe", job, work / "probe.json")
    facts = RuntimeFacts(frozenset(said["stop_ids"]), said["bos_id"], said["adds_bos"], said["chat_template"])
    tokenized = dict(zip(texts, said["ids"], strict=True))
    contract = check_contract(golden, facts, tokenized.__getitem__)
    model = reference_model(file, weights, model_config)
    reference = (torch_logits(model, row) for row in rows)
    runtime = (np.load(work / f"{index}.npy") for index in range(len(rows)))
    result = parity(reference, runtime)
    held = tolerance(target, family(model_config).activation)
    hold(result, held, f"{file.name} ({target})")
    return {"contract": contract, "parity": result.note(held)}

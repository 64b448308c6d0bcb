"""Our own ONNX graph: for shapes and precisions that the onnxruntime-genai builder does not write.

The folder is laid out as the builder's is, so that ONNX Runtime, onnxruntime-genai and our engine read either.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact, write_text
from edgetune.backends import require
from edgetune.errors import UnsupportedError
from edgetune.export.decoder_families import family
from edgetune.export.decoder_graph import FusedGraph
from edgetune.export.decoder_layers import EMBEDDING, HEAD_BITS, HEAD_BLOCK, AdaptedLayers, FloatLayers, NBitsLayers
from edgetune.export.decoder_source import Sizes, check_decoder, open_source
from edgetune.export.onnx_file import OnnxFile
from edgetune.recipe_export import OnnxExport

SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def check_own(config: OnnxExport, model_config: dict[str, Any]) -> None:
    """Refuse, before any work, what our graph cannot hold. Raises UnsupportedError."""
    sizes = check_decoder(model_config)
    if config.adapters and family(model_config).renamed:
        raise UnsupportedError(f"adapters: true is not for {model_config['architectures'][0]}, whose graph has its "
                               "matrices under other names than its adapters; merge them")  # fmt: skip
    if config.adapters and config.precision not in ("fp32", "fp16"):
        raise UnsupportedError(f"adapters: true is for precision fp32 and fp16, {config.precision} was asked for")
    if config.precision in ("int8", "int4"):
        if config.head_bits != HEAD_BITS:
            raise UnsupportedError(f"builder own writes the head at {HEAD_BITS} bits, head_bits={config.head_bits} was "
                                   "asked for; leave head_bits out or use builder genai")  # fmt: skip
        if sizes.hidden % HEAD_BLOCK:
            raise UnsupportedError(f"hidden_size={sizes.hidden} is no multiple of {HEAD_BLOCK}, the head's blocks; "
                                   "use precision fp16")  # fmt: skip


def build_own(config: OnnxExport, source: Artifact, graph: Path) -> None:
    """Write the graph, `genai_config.json` and the tokenizer's files into the graph's folder.

    Raises UnsupportedError, and StageError where a weight does not fit.
    """
    opened = open_source(source)
    with OnnxFile(graph) as file:
        if opened.quantized:
            FusedGraph(file, NBitsLayers(file, opened, "FLOAT", config.accuracy_level)).write()
        else:
            kind = AdaptedLayers if config.adapters else FloatLayers
            FusedGraph(file, kind(file, opened, "FLOAT16" if config.precision == "fp16" else "FLOAT")).write()
    _write_genai_config(source.path, opened.sizes, graph)
    copy_tokenizer(source, graph.parent)


def read_embedding(graph: Path) -> NDArray[np.float32] | None:
    """Read the 8-bit embedding [V, C] of a graph with integers, as floats; None where the head is all it has."""
    onnx = require("onnx")
    stored = {tensor.name: tensor for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer}
    parts = [f"{EMBEDDING}.{part}" for part in ("codes", "scales")]
    if parts[0] not in stored:
        return None
    codes, scales = (onnx.numpy_helper.to_array(stored[part], base_dir=str(graph.parent)) for part in parts)
    centred = codes.reshape(*scales.shape, -1).astype(np.float32) - 2 ** (HEAD_BITS - 1)  # [V, G, n]
    table: NDArray[np.float32] = (centred * scales[..., None].astype(np.float32)).reshape(len(codes), -1)
    return table


def copy_tokenizer(source: Artifact, folder: Path) -> None:
    """Copy what a tokenizer is made of, and the licences."""
    from edgetune.compress.checkpoint import CARRIED

    for name in source.manifest.files:
        if any(fnmatch.fnmatch(name, pattern) for pattern in CARRIED):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, folder / name)


def _write_genai_config(source: Path, sizes: Sizes, graph: Path) -> None:
    config = json.loads((source / "config.json").read_bytes())
    generation = source / "generation_config.json"
    chosen = json.loads(generation.read_bytes()) if generation.is_file() else {}
    past, present = "past_key_values.%d.", "present.%d."
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph.name, "head_size": sizes.head_size, "hidden_size": sizes.hidden,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
                   "past_key_names": f"{past}key", "past_value_names": f"{past}value"},
        "outputs": {"logits": "logits", "present_key_names": f"{present}key", "present_value_names": f"{present}value"},
        "num_attention_heads": sizes.n_heads, "num_hidden_layers": sizes.n_layers,
        "num_key_value_heads": sizes.n_kv_heads,
    }  # fmt: skip
    ends = config.get("eos_token_id")
    first = ends[0] if isinstance(ends, list) else ends
    model = {
        "bos_token_id": config.get("bos_token_id") or 0, "context_length": sizes.max_length, "decoder": decoder,
        "eos_token_id": ends, "pad_token_id": config.get("pad_token_id") or first or 0,
        # Its name for any decoder with these inputs and outputs; what it calls gpt2 has other ones.
        "type": "decoder" if family(config).renamed else config["model_type"], "vocab_size": sizes.n_vocab,
    }  # fmt: skip
    search = {name: chosen.get(name) or plain for name, plain in SAMPLING.items()}
    search |= {"max_length": sizes.max_length, "min_length": 0, "num_beams": 1, "num_return_sequences": 1,
               "past_present_share_buffer": False}  # fmt: skip
    write_text(graph.with_name("genai_config.json"), json.dumps({"model": model, "search": search}, indent=1) + "\n")

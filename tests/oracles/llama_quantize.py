"""llama.cpp's own way from a plain GGUF file to a quantized one."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgetune.ggml_types import named as type_named

SILENT = llama_cpp.llama_log_callback(lambda *_: None)  # llama.cpp may call it as long as the process lives


def quantize(
    plain: Path, out: Path, target: str, moments: Mapping[str, NDArray[Any]], types: Mapping[str, str] | None = None
) -> None:
    """Quantize with the types of the target's own mix, or with `types` by tensor name."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{target}")
    params.nthread = 2
    named = {name: kind for name, kind in (types or {}).items() if kind != "F32"}
    overrides = (llama_cpp.llama_model_tensor_override * (len(named) + 1))()  # the last one ends the list
    for entry, (name, kind) in zip(overrides, named.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), type_named(kind).number
    if named:
        params.tt_overrides = overrides
    kept = {name: np.ascontiguousarray(values, np.float32) for name, values in moments.items()}
    weights = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
    for entry, (name, values) in zip(weights, kept.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if kept:
        params.imatrix = weights
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
    assert llama_cpp.llama_model_quantize(str(plain).encode(), str(out).encode(), ctypes.byref(params)) == 0

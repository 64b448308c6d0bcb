"""Quantize a GGUF file with llama.cpp, each tensor in the type that was chosen for it. A child process.

The job: `file`, `out`, `types` (tensor name -> ggml type), `ftype` (what the header says), `moments` (an .npz of
mean squared inputs by tensor name, or None) and `threads`.
"""

from __future__ import annotations

import ctypes
import re
import sys
from typing import Any

import numpy as np

from edgetune.backends import require
from edgetune.errors import EdgetuneError, StageError
from edgetune.export.gguf_child import answer, read_job


def quantize(job: dict[str, Any]) -> None:
    """Write `out`. Raises StageError with llama.cpp's last words."""
    lib, gguf = require("llama_cpp"), require("gguf")
    said: list[str] = []

    def keep(level: int, text: bytes, _: Any) -> None:
        if level >= 3 and len(text.strip()) > 1:  # warnings and errors
            said.append(text.decode(errors="replace").strip())

    callback = lib.llama_log_callback(keep)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{job['ftype']}")
    params.nthread = job["threads"]
    params.pure = True  # what no pattern names takes the default type, and the check afterwards finds it
    overrides = (lib.llama_model_tensor_override * (len(job["types"]) + 1))()  # the last one ends the list
    for entry, (name, kind) in zip(overrides, job["types"].items(), strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = int(gguf.GGMLQuantizationType[kind])
    params.tt_overrides = overrides
    moments = (
        {name: np.ascontiguousarray(m, np.float32) for name, m in np.load(job["moments"]).items()}
        if job["moments"]
        else {}
    )
    if moments:
        weights = (lib.llama_model_imatrix_data * (len(moments) + 1))()
        for entry, (name, values) in zip(weights, moments.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = weights
    status = lib.llama_model_quantize(job["file"].encode(), job["out"].encode(), ctypes.byref(params))
    if status != 0:
        raise StageError(f"llama_model_quantize gave {status}: {'; '.join(said[-2:]) or 'no reason'}")


if __name__ == "__main__":
    try:
        quantize(read_job())
        answer({})
    except EdgetuneError as error:
        sys.exit(str(error))

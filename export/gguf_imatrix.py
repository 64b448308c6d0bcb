"""An importance matrix in the file that llama.cpp's own tools read: `llama-quantize --imatrix FILE ...`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.export.gguf_families import family, gguf_name


def write_imatrix(
    path: Path, moments: Mapping[str, NDArray[Any]], model_config: Mapping[str, Any], shape: tuple[int, int], rows: str
) -> None:
    """Write the mean squared inputs of linear layers (module name -> [C]), whole or not at all.

    `shape` is N x T of the token rows that they are of, `rows` says where these came from. Raises UnsupportedError
    where a layer has no place in a GGUF file.
    """
    gguf = require("gguf")
    of = family(model_config)
    n_tokens = shape[0] * shape[1]
    writer = gguf.GGUFWriter(None, of.name)
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [rows])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, shape[0])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, shape[1])
    for module, mean in sorted(moments.items()):
        name = gguf_name(f"{module}.weight", of)
        writer.add_tensor(f"{name}.in_sum2", np.asarray(mean * n_tokens, np.float32)[None])  # [1 matrix, C]
        writer.add_tensor(f"{name}.counts", np.full((1, 1), n_tokens, np.float32))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer.write_header_to_file(beside)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

"""What a checkpoint folder says about its own quantization. Reads JSON only."""

from __future__ import annotations

import json
from pathlib import Path

from edgetune.errors import UnsupportedError, UsageError

QUANTIZED = ("gptq", "compressed-tensors")


def is_quantized(folder: Path) -> bool:
    """Tell a checkpoint of integers from a plain one, whoever made it.

    Raises UsageError where config.json cannot be read and UnsupportedError where it names another method.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        method = (config.get("quantization_config") or {}).get("quant_method")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from error
    if method not in (None, *QUANTIZED):
        raise UnsupportedError(f"{folder} is quantized as {method!r}; plain and {' and '.join(QUANTIZED)} can be run")
    return method in QUANTIZED or (folder / "quantize_config.json").is_file()

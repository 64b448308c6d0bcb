"""The other side of `checkpoints.py`, run by the Python of an environment that `peers.py` made; knows no edgetune.

python checkpoint_reader.py IDS.json OUT WAY FOLDER...

Loads each checkpoint with transformers, `packed` as it is by default or `dequantized` while it is loaded, in float32,
and writes OUT/NAME.npy: logits [N, T, V] of the token rows. Prints a line of JSON for each: what refused, or null, and
the classes of linear layers that were put in.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load one folder after the other."""
    ids, out, way, *folders = sys.argv[1:]
    rows = torch.tensor(json.loads(Path(ids).read_text(encoding="utf-8")))
    settings: dict[str, Any] = {}
    if way == "dequantized":
        from transformers import CompressedTensorsConfig

        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    for folder in map(Path, folders):
        found: dict[str, Any] = {"name": folder.name, "refused": None, "layers": {}}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()
            with torch.no_grad():
                logits = torch.stack([model(row[None], use_cache=False).logits[0].float() for row in rows])
            np.save(Path(out) / f"{folder.name}.npy", logits.numpy())
            found["layers"] = Counter(type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__)
        except Exception as error:  # whatever a reader says is what is measured
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            found["refused"] = f"{type(error).__name__}: {lines[0]}"
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

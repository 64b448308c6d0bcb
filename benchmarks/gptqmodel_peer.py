"""gptqmodel's side of `gptq.py`, run by the Python of the environment that `peers.py` made for it; knows no edgetune.

python gptqmodel_peer.py MODEL IDS.json OUT BITS GROUP_SIZE SYM
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    """Quantize MODEL by the token rows in IDS.json with the library's own defaults."""
    model_path, ids, out, bits, group_size, sym = sys.argv[1:]
    rows = json.loads(Path(ids).read_text(encoding="utf-8"))
    config = QuantizeConfig(bits=int(bits), group_size=int(group_size), sym=sym == "True")
    model = GPTQModel.load(model_path, config)
    calibration = [{"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row), dtype=torch.long)}
                   for row in rows]  # fmt: skip
    model.quantize(calibration, batch_size=4)
    model.save(out)


if __name__ == "__main__":
    main()

"""Write a GGUF file with quantized tensors, one tensor in memory at a time. A child process.

The job: `source` (folder of a model or gptq artifact), `file` (to write), `types` (tensor name -> ggml type), `target`
(what the header says), `moments` (an .npz of mean squared inputs by tensor name, or None) and `threads`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.artifact import Artifact
from edgetune.errors import EdgetuneError
from edgetune.export.ggml import Quantizer
from edgetune.export.gguf_child import answer, read_job, tell
from edgetune.export.gguf_vocab import read_vocabulary
from edgetune.export.gguf_write import artifact_weights, read_config, write_gguf


def convert(job: dict[str, Any]) -> None:
    """Write the file. Raises StageError where a value is not finite."""
    source = Artifact.open(Path(job["source"]))
    config = read_config(source.path)
    moments = dict(np.load(job["moments"]).items()) if job["moments"] else {}
    write_gguf(
        Path(job["file"]), artifact_weights(source, config), config,
        read_vocabulary(source.path, int(config["vocab_size"])), job["types"], job["target"], tell,
        Quantizer(job["threads"]), moments,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        convert(read_job())
        answer({})
    except EdgetuneError as error:
        sys.exit(str(error))

"""Ask llama.cpp what it makes of an exported file: special tokens, template, ids of texts, logits. A child process.

The job: `file`, `texts`, `rows` (token ids) and `folder`, where the logits of row i go as i.npy; `adapter`, if any.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.errors import EdgetuneError
from edgetune.export.gguf_child import answer, n_cpus, read_job
from edgetune.runtime.engines.llama_engine import LlamaEngine


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """Load the file and give what it says. The cache is float32 and attention plain, so that weights alone differ."""
    engine = LlamaEngine.load(
        Path(job["file"]), n_ctx=max(len(row) for row in job["rows"]), n_threads=n_cpus(),
        flash_attention=False, kv_type="f32", adapter=job.get("adapter"),
    )  # fmt: skip
    try:
        for index, row in enumerate(job["rows"]):
            np.save(Path(job["folder"]) / f"{index}.npy", engine.score(row))
        return {
            "stop_ids": sorted(engine.stop_ids),
            "bos_id": engine.bos_id,
            "adds_bos": engine.add_bos,
            "chat_template": engine.chat_template,
            "ids": [engine.tokenize(text) for text in job["texts"]],
            "version": engine.version,
        }
    finally:
        engine.close()


if __name__ == "__main__":
    try:
        answer(probe(read_job()))
    except EdgetuneError as error:
        sys.exit(str(error))

"""Ask llama.cpp what it makes of an exported file: special tokens, template, ids of texts, logits. A child process.

The job: `file`, `texts`, `rows` (token ids) and `folder`, where the logits of row i go as i.npy; `adapter`, if any.
Where there are `windows` (token ids), the answer has their `losses`, where there are `led`, what the loop made of them.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.backends import require
from edgetune.errors import EdgetuneError
from edgetune.export.gguf_child import answer, n_cpus, read_job
from edgetune.export.perplexity import token_losses
from edgetune.runtime.engine import first_line
from edgetune.runtime.engines.llama_engine import LlamaEngine, gguf_file

LOOP_BATCH = 64  # llama-cpp-python holds the logits of a whole batch


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """Load the file and give what it says. The cache is float32 and attention plain, so that weights alone differ."""
    windows = job.get("windows", [])
    engine = LlamaEngine.load(
        Path(job["file"]), n_ctx=max(len(row) for row in [*job["rows"], *windows]), n_threads=n_cpus(),
        flash_attention=False, kv_type="f32", adapter=job.get("adapter"),
    )  # fmt: skip
    try:
        for index, row in enumerate(job["rows"]):
            np.save(Path(job["folder"]) / f"{index}.npy", engine.score(row))
        said = {
            "stop_ids": sorted(engine.stop_ids),
            "bos_id": engine.bos_id,
            "adds_bos": engine.add_bos,
            "chat_template": engine.chat_template,
            "ids": [engine.tokenize(text) for text in job["texts"]],
            "version": engine.version,
            "losses": [token_losses(engine.score(ids), ids).tolist() for ids in windows],
        }
    finally:
        engine.close()
    return said | (lead_loop(gguf_file(Path(job["file"])), job["led"]) if "led" in job else {})


def lead_loop(file: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Lead llama-cpp-python's own loop of generation through each run (`stops.Led`).

    Gives `ran`, tokens and whether it stopped by itself, or `failed`, why it does not run.
    """
    lib = require("llama_cpp")
    n_ctx = max(len(run["prompt"]) + len(run["tokens"]) for run in runs) + 2
    settings = {"n_ctx": n_ctx, "n_batch": LOOP_BATCH, "n_threads": n_cpus(), "n_threads_batch": n_cpus()}
    try:
        with closing(lib.Llama(str(file), **settings, verbose=False)) as llama:
            return {"ran": [_led(llama, run["prompt"], run["tokens"]) for run in runs]}
    except Exception as error:  # what llama-cpp-python raises shares no other base
        return {"failed": first_line(error)}


def _led(llama: Any, prompt: list[int], tokens: list[int]) -> tuple[int, bool]:
    left = iter(tokens)

    def only(_: Any, scores: Any) -> Any:
        scores[:] = -np.inf
        scores[next(left, tokens[-1])] = 0.0
        return scores

    said = llama.create_completion(prompt, max_tokens=len(tokens) + 1, temperature=0.0, logits_processor=[only])
    stopped = said["choices"][0]["finish_reason"] == "stop"
    return said["usage"]["completion_tokens"] + stopped, stopped  # it does not count the end token


if __name__ == "__main__":
    try:
        answer(probe(read_job()))
    except EdgetuneError as error:
        sys.exit(str(error))

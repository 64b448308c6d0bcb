"""Runs an ONNX folder for its contract: rows in ONNX Runtime, and the loop in which onnxruntime-genai generates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.backends import require
from edgetune.export.gguf_child import n_cpus
from edgetune.export.parity import Logits
from edgetune.export.stops import Led, Ran
from edgetune.runtime.engine import first_line

LOOP = "onnxruntime-genai"
NEVER = -1e9  # a logit


def run_rows(folder: Path, rows: Sequence[Sequence[int]]) -> Iterator[Logits]:
    """Give the logits [T, V] of each row in ONNX Runtime."""
    from edgetune.runtime.engines.onnx_engine import OnnxEngine

    engine = OnnxEngine.load(folder, n_ctx=max(map(len, rows)), n_threads=n_cpus())
    try:
        for ids in rows:
            yield engine.score(ids)
    finally:
        engine.close()


def lead_loop(folder: Path, runs: Sequence[Led]) -> list[Ran] | str:
    """Lead onnxruntime-genai's own loop through each run, with the settings of the folder; or say why it does not run.

    `is_done` answers for a token that was generated, not for one that was appended: so each is made the only choice.
    One thread: more would spin, and crawl where the machine is shared.
    """
    lib = require("onnxruntime_genai")
    threads = {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "log_severity_level": 3}
    try:
        config = lib.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        model = lib.Model(config)
        return [_led(lib, model, run) for run in runs]
    except Exception as error:  # what onnxruntime-genai raises shares no other base
        return first_line(error)


def _led(lib: Any, model: Any, run: Led) -> Ran:
    params = lib.GeneratorParams(model)
    params.set_search_options(max_length=len(run.prompt) + len(run.tokens) + 1, do_sample=False)
    generator = lib.Generator(model, params)
    generator.append_tokens(np.array(run.prompt, np.int32))
    for place, token in enumerate(run.tokens, 1):
        logits = np.full_like(np.asarray(generator.get_logits(), np.float32), NEVER)
        logits[..., token] = 0.0
        generator.set_logits(logits)
        generator.generate_next_token()
        if generator.is_done():
            return Ran(place, True)
    return Ran(len(run.tokens), False)

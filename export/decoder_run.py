"""Runs our own decoder graph in ONNX Runtime, rows and chunks as they come, to compare its logits.

Shapes: B rows, T new tokens, S all tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.export.parity import Logits

Array = NDArray[Any]
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_graph(graph: Path, n_threads: int = 0) -> Any:
    """Load a graph; int4 blocks are computed with float activations, as TensorRT does."""
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def graph_logits(session: Any, ids: Array, mask: Array, cuts: Sequence[int] = (), *, options: Any = None) -> Logits:
    """Read rows [B, S], 0 in `mask` where padded, in chunks that end at `cuts`; gives all logits [B, S, V].

    `options` are ONNX Runtime's of each run, such as the active adapter.
    """
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    cache = {
        given.name: np.zeros((len(ids), given.shape[1], 0, given.shape[3]), DTYPES[given.type])
        for given in session.get_inputs()
        if given.name.startswith("past_key_values.")
    }
    logits = []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        new = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop],
               "position_ids": positions[:, start:stop]}  # fmt: skip
        first, *present = session.run(None, new | cache, options)
        cache = dict(zip(cache, present, strict=True))
        logits.append(first)
    return np.concatenate(logits, 1)


def score_rows(graph: Path, rows: Sequence[Sequence[int]]) -> Iterator[Logits]:
    """Give the logits [T, V] of each row, read in two chunks and a last token, so that its cache is proved as well."""
    session = open_graph(graph)
    for row in rows:
        ids = np.array([row], np.int64)
        cuts = sorted({len(row) // 2, len(row) - 1} - {0})
        yield graph_logits(session, ids, np.ones_like(ids), cuts)[0]

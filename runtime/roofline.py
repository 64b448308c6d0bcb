"""The roofline of decoding (Williams et al., CACM 52(4):65, 2009): a token cannot come faster than its bytes are read.

Bytes a token = the weights, but for rows of the input embedding that it does not look up, + the cache that it attends
to. Divided by the measured memory bandwidth they give the shortest time of a token; the share is what an engine gets.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgetune.runtime.evidence import Roofline
from edgetune.runtime.worker import Job

ARRAY_BYTES = 512 * 2**20  # far beyond any cache
PASSES = 5


def memory_bandwidth(n_threads: int, *, n_bytes: int = ARRAY_BYTES) -> float:
    """Measure bytes per second that so many threads read from memory: the best of PASSES over one large array."""
    array = np.ones(n_bytes // 4, np.float32)
    parts = np.array_split(array, n_threads)
    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(PASSES):
            began = time.perf_counter()
            list(pool.map(np.add.reduce, parts))  # lets go of the interpreter lock
            best = min(best, time.perf_counter() - began)
    return array.nbytes / best


def weight_bytes(job: Job, told: int) -> int:
    """Bytes of weights that one token reads. A GGUF file is asked itself; else `told`, what the engine says."""
    if job.kind != "gguf":
        return told
    from edgetune.gguf_header import read_header, tensor_bytes
    from edgetune.runtime.engines.llama_engine import gguf_file

    sizes = {tensor.name: tensor_bytes(tensor) for tensor in read_header(gguf_file(job.path)).tensors}
    if "output.weight" in sizes:  # the input embedding is a table of its own, of which one row is read
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())


def roofline(weights: int, kv_bytes_per_token: float, n_past: int, token_ms: float, bandwidth: float) -> Roofline:
    """Hold the time of a token after `n_past` others against what its bytes would take."""
    n_bytes = weights + kv_bytes_per_token * n_past
    return Roofline(
        bytes_per_token=round(n_bytes), memory_bytes_per_s=bandwidth, share=n_bytes / (token_ms / 1e3) / bandwidth
    )

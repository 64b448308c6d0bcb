"""The engines' own prefill, with no scoring at all, in a process of its own: the peer of `scoring.py`.

    bare_prefill.py llama|onnx|genai PATH THREADS N_CTX

It reads `{"rows": [[..], ..], "shared": n}` a line and answers with `{"seconds": .., "cpu_seconds": ..}`. The first n
tokens of all rows are the same and are read once, as a good engineer would have it. llama.cpp gets as many rows as fit
512 tokens in one call, each a sequence of its own, and computes logits of each row's last position only; of one, 5 and
10 rows a call, in one cache or one each, with and without flash attention, none took less time. The graph of ONNX
Runtime gives logits of all positions, whoever asks; rows go one by one, since 2, 4 and 10 at once took as long a token.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

N_BATCH, N_ROWS = 512, 31
Rows = list[list[int]]


def llama(path: str, threads: int, n_ctx: int) -> Callable[[Rows, int], None]:
    """Prefill by llama_decode. Sequence 0 holds what rows share."""
    import llama_cpp as lib

    lib.llama_log_set(_quiet := lib.llama_log_callback(lambda *_: None), None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx + N_BATCH, N_ROWS + 1, True
    params.n_batch = params.n_ubatch = N_BATCH
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    memory = lib.llama_get_memory(context)
    batch = lib.llama_batch_init(N_BATCH, 0, 1)

    def add(ids: list[int], position: int, sequence: int) -> None:
        for n, token in enumerate(ids):
            at = batch.n_tokens
            batch.token[at], batch.pos[at], batch.logits[at] = token, position + n, n == len(ids) - 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.n_tokens += 1

    def decode() -> None:
        if lib.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        batch.n_tokens = 0

    def prefill(rows: Rows, shared: int, _quiet: Any = _quiet) -> None:
        lib.llama_memory_clear(memory, False)
        if shared:
            add(rows[0][:shared], 0, 0)
            decode()
            for sequence in range(1, N_ROWS + 1):
                lib.llama_memory_seq_cp(memory, 0, sequence, 0, shared)
        own = [row[shared:] for row in rows]
        while own:
            sequence = 0
            while own and sequence < N_ROWS and batch.n_tokens + len(own[0]) <= N_BATCH:
                sequence += 1
                add(own.pop(0), shared, sequence)
            decode()
            lib.llama_synchronize(context)
            for done in range(1, sequence + 1):
                lib.llama_memory_seq_rm(memory, done, shared, -1)

    return prefill


def onnx(path: str, threads: int, n_ctx: int) -> Callable[[Rows, int], None]:
    """Prefill by session.run, all of the session's options but the threads as they come."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(f"{path}/model.onnx", options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()
    outputs = [output.name for output in session.get_outputs()]
    has_positions = any(one.name == "position_ids" for one in given)
    width = json.loads(Path(path, "genai_config.json").read_bytes())["model"]["decoder"]["head_size"]
    empty = {
        one.name: np.zeros((1, one.shape[1], 0, width), np.float16 if "16" in one.type else np.float32)
        for one in given
        if one.name.startswith("past_key_values.")
    }

    def run(ids: list[int], past: dict[str, Any], n_past: int, wanted: list[str]) -> list[Any]:
        total = n_past + len(ids)
        feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64), **past}
        if has_positions:
            feed["position_ids"] = np.arange(n_past, total)[None]
        found: list[Any] = session.run(wanted, feed)
        return found

    def prefill(rows: Rows, shared: int) -> None:
        past = empty
        if shared:
            told = dict(zip(outputs, run(rows[0][:shared], empty, 0, outputs), strict=True))
            past = {name: told[name.replace("past_key_values.", "present.", 1)] for name in empty}
        for row in rows:
            run(row[shared:], past, shared, ["logits"])

    return prefill


def genai(path: str, threads: int, n_ctx: int) -> Callable[[Rows, int], None]:
    """Prefill by append_tokens of one generator."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=n_ctx, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)

    def prefill(rows: Rows, shared: int) -> None:
        generator.rewind_to(0)
        if shared:
            generator.append_tokens(rows[0][:shared])
        for row in rows:
            generator.rewind_to(shared)
            generator.append_tokens(row[shared:])

    return prefill


def main() -> None:
    """Serve requests for one file or folder."""
    engine, path, threads, n_ctx = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    prefill = {"llama": llama, "onnx": onnx, "genai": genai}[engine](path, threads, n_ctx)
    for line in sys.stdin:
        request = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        prefill(request["rows"], request["shared"])
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()

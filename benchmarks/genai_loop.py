"""onnxruntime-genai timed as its own benchmark does, in a process of its own: the peer of `harness.py`.

It reads `{"ids": [..], "n": ..}` a line and answers with `{"prefill_s": .., "decode_s": [..]}`: the prompt is appended
at once, then tokens are generated one by one with the library's own greedy search. The first of them only chooses from
the prompt's logits, so n + 1 are generated and the first is dropped.
"""

from __future__ import annotations

import json
import sys
import time

import onnxruntime_genai as og


def main() -> None:
    """Serve requests for one folder."""
    folder, threads, n_ctx = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    for line in sys.stdin:
        request = json.loads(line)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=n_ctx, min_length=n_ctx, do_sample=False)
        generator = og.Generator(model, params)
        began = time.perf_counter()
        generator.append_tokens(request["ids"])
        prefill_s = time.perf_counter() - began
        generator.generate_next_token()
        decode_s = []
        for _ in range(request["n"]):
            began = time.perf_counter()
            generator.generate_next_token()
            decode_s.append(time.perf_counter() - began)
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s}), flush=True)


if __name__ == "__main__":
    main()

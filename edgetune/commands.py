"""The exact commands that run an artifact, as the report prints them."""

from __future__ import annotations

from pathlib import Path

from edgetune.artifact import Artifact


def run_commands(artifact: Artifact, place: Path) -> list[str]:
    """Give the shell commands that run an artifact which lies at `place`, the shortest first."""
    ours = f'edgetune generate {place} "your prompt"'
    if artifact.manifest.kind == "gguf":
        file = place / next(name for name in artifact.manifest.files if name.endswith(".gguf"))
        ollama = f"ollama create NAME -f {place / 'Modelfile'} && ollama run NAME"
        return [
            ours,
            f"llama-server -m {file} --jinja",
            f"python -m llama_cpp.server --model {file}  # pip install 'edgetune[gguf,serve]'",
            *([ollama] if "Modelfile" in artifact.manifest.files else []),
        ]
    if artifact.manifest.kind == "tensorrt":
        return [f"edgetune bench {place}", ours]
    if artifact.manifest.kind == "onnx":
        return [
            ours,
            f"python -c \"import onnxruntime_genai as og; og.Model('{place}')\"  # loads in onnxruntime-genai",
        ]
    if artifact.manifest.kind == "gptq":
        form = artifact.manifest.config.get("checkpoint", "gptq")
        return [ours, f"vllm serve {place} --quantization {form}"]
    if artifact.manifest.kind == "gguf-adapter":
        return [f"llama-server -m BASE.gguf --lora {place / 'adapter.gguf'} --jinja"]
    if artifact.manifest.kind == "onnx-adapter":
        return [f"adapters = og.Adapters(model); adapters.load('{place / 'adapter.onnx_adapter'}', 'NAME')  # python"]
    if artifact.manifest.kind == "adapter":  # its base lies beside it in the store
        return [ours]
    return [ours, f"vllm serve {place}"]

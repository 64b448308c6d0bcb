"""The part of a recipe that says which engine runs a candidate, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgetune.closed import Closed, exactly_one


class LlamaCpp(Closed):
    """llama.cpp, which runs GGUF."""

    flash_attention: bool | None = Field(None, description="llama.cpp decides where absent")
    kv_type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = Field(
        None, description="type of the key/value cache; f16 where absent; a quantized one needs flash attention"
    )
    n_ubatch: Annotated[int, Field(gt=0, le=512)] | None = Field(
        None, description="prompt tokens computed at once; 512 where absent"
    )
    mmap: bool | None = Field(None, description="map the file instead of reading it; true where absent")

    @model_validator(mode="after")
    def _quantized_cache_needs_flash_attention(self) -> LlamaCpp:
        if (self.kv_type or "").startswith("q") and self.flash_attention is False:
            raise ValueError(f"kv_type {self.kv_type} needs flash_attention; leave flash_attention out or true")
        return self


class OnnxRuntime(Closed):
    """Plain ONNX Runtime, which runs ONNX."""

    spin: bool | None = Field(None, description="threads wait busily between nodes; false where absent")


class OnnxRuntimeGenai(Closed):
    """onnxruntime-genai, which runs the same ONNX folder."""


class Torch(Closed):
    """torch, which runs checkpoints that are not exported."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="float32 where absent")
    compiled: bool | None = Field(None, description="through torch.compile; false where absent")
    device: str | None = Field(None, description="cpu, cuda, cuda:1; cpu where absent")


class Runtime(Closed):
    """The engine that scores and times a candidate, and its settings: exactly one key."""

    llama_cpp: LlamaCpp | None = Field(None, description="llama.cpp, for GGUF")
    onnxruntime: OnnxRuntime | None = Field(None, description="plain ONNX Runtime, for ONNX")
    onnxruntime_genai: OnnxRuntimeGenai | None = Field(None, description="onnxruntime-genai, for the same ONNX folder")
    torch: Torch | None = Field(None, description="torch, for a candidate without export")

    @model_validator(mode="after")
    def _one(self) -> Runtime:
        return exactly_one(self)

    @property
    def engine(self) -> str:
        """Name of the engine, as the table of engines has it."""
        (key,) = self.model_dump(exclude_none=True)
        return {"llama_cpp": "llama.cpp", "onnxruntime_genai": "onnxruntime-genai"}.get(key, str(key))

    @property
    def settings(self) -> dict[str, Any]:
        """What the recipe sets of that engine."""
        (found,) = self.model_dump(exclude_none=True).values()
        return dict(found)

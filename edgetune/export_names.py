"""What an export is called in the report, the log and the plan."""

from __future__ import annotations

from edgetune.compress.chain import step_names
from edgetune.recipe import Candidate


def export_name(candidate: Candidate) -> str:
    """Name the export: "gguf Q4_K_M", "onnx int4"."""
    if candidate.export is None:
        return "checkpoint"
    if candidate.export.gguf is not None:
        to_gguf = candidate.export.gguf
        mixed = f" {to_gguf.allocate}" if to_gguf.allocate else ""
        return f"gguf {to_gguf.type}{mixed}{' gptq' if to_gguf.gptq else ''}"
    if candidate.export.tensorrt is not None:
        return f"tensorrt {candidate.export.tensorrt.precision}"
    assert candidate.export.onnx is not None, "an export has exactly one key"
    own = " own graph" if candidate.export.onnx.builder == "own" else ""
    return f"onnx {candidate.export.onnx.precision}{own}"


def last_hop(candidate: Candidate) -> str:
    """Name the hop from the last scored step to what ships: "onnx int4"."""
    if candidate.export is not None:
        return export_name(candidate)
    return step_names(candidate)[-1] if candidate.compress else "16-bit"

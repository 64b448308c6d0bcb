"""Build a TensorRT engine from an ONNX graph, in a child process: native code may crash, and its memory goes with it.

The job: `file`, `out`, `library` (the module: tensorrt_rtx or tensorrt), `compute_capability` (as "8.6"; empty for the
GPU that is there) and `profiles`, each a mapping of input name to its smallest, usual and largest shape.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.backends import require
from edgetune.errors import EdgetuneError, StageError
from edgetune.export.gguf_child import answer, read_job

MOST_WARNINGS = 20

# What the parser or builder says, and what avoids it.
ADVICE = {
    "plugin": "TensorRT has no contrib operators; give it the graph that export tensorrt writes",
    "one output": "Attention with a cache is not parsed; give it the graph that export tensorrt writes",
    "int4": "int4 needs compute capability 8.0 or later; use precision fp16, or leave the older capability out",
    "block size": "use group_size 32",
    "No importer registered": "this TensorRT does not know the operator; install the version that constraints.txt pins",
    "out of memory": "lower max_length",
}


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Write `out`; give the number of layers, the version and `log_summary`. Raises StageError in one line."""
    trt: Any = require(job["library"])
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["file"]):
        raise StageError(refusal(parser.get_error(0), parser.num_errors))
    config = builder.create_builder_config()
    if job["compute_capability"]:
        config.num_compute_capabilities = len(job["compute_capability"])
        for index, capability in enumerate(job["compute_capability"]):
            named = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
            config.set_compute_capability(named, index)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        said = log.errors[-1] if log.errors else "it said nothing"
        raise StageError(f"TensorRT built no engine: {_short(said)}; {advice(said)}")
    Path(job["out"]).write_bytes(plan)
    return {"layers": network.num_layers, "version": trt.__version__, "log": log_summary(log.infos, log.warnings)}


def log_summary(infos: Sequence[str], warnings: Sequence[str]) -> dict[str, Any]:
    """Give what a build's log says of the GPU's memory, in bytes, how many different warnings it has, and the first.

    Activations are those of the profile that takes most. What this version does not say is left out.
    """
    said = "\n".join(infos)
    found: dict[str, Any] = {}
    for key, what in (("weights_bytes", "Weights"), ("activation_bytes", "Activation")):
        if sizes := [int(n) for n in re.findall(rf"Total {what} Memory: (\d+) bytes", said)]:
            found[key] = max(sizes)
    different = list(dict.fromkeys(map(_short, warnings)))
    return found | {"n_warnings": len(different), "warnings": different[:MOST_WARNINGS]}


def refusal(error: Any, n_errors: int) -> str:
    """Say in one line which node the parser refused, why, and which option avoids it."""
    where = f"node {error.node()} ({error.node_name() or 'without a name'}, {error.node_operator() or 'no operator'})"
    more = f" and {n_errors - 1} more" if n_errors > 1 else ""
    why = error.desc()
    return f"TensorRT's parser refused {where}{more}: {_short(why)}; {advice(why)}"


def advice(said: str) -> str:
    """Say what avoids a refusal."""
    return next((what for sign, what in ADVICE.items() if sign in said), "use export onnx or gguf for this model")


def _short(said: str) -> str:
    return " ".join(said.split()).removeprefix("Assertion failed: ")[:300]


def _strongly_typed(trt: Any) -> int:
    """The flag of a network that keeps the graph's own types; later versions know no other and have no flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _log(trt: Any) -> Any:
    """Give a logger that keeps what is said, by severity, and shows nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.infos: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif severity == trt.ILogger.INFO:
                self.infos.append(message)

    return Log()


if __name__ == "__main__":
    try:
        answer(build(read_job()))
    except EdgetuneError as error:
        sys.exit(str(error))

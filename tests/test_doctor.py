"""The probes themselves: each uses its backend on something tiny, or says that it only imports it."""

from __future__ import annotations

import pytest

from edgetune import doctor
from edgetune.backends import is_installed

USED = {
    "onnx": "checks a graph, opset",
    "onnxruntime": "int4 MatMulNBits works",
    "onnxruntime_genai": "decodes (0.",
    "llama_cpp": "decodes, llama-cpp-python",
    "pyarrow": "reads Parquet",
    "datasets": "reads a folder",
    "sklearn": "macro F1 works",
    "sacrebleu": "BLEU works",
}
HERE = ("datasets", "sklearn", "sacrebleu")  # other tests import them anyway, so a child would only do it once more
ONLY_IMPORTED = ("fastapi", "lm_eval", "wandb", "trl", "mlflow")


@pytest.mark.parametrize("name", USED)
def test_a_backend_is_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    if name in HERE:
        exec(doctor.PROBES[name], {})
        assert capsys.readouterr().out.splitlines()[-1].startswith(USED[name])
        return
    found = doctor.probe(name, doctor.PROBES[name])
    assert found.state == "ok", found.says
    assert found.says.startswith(USED[name])


def test_what_is_only_imported_says_so() -> None:
    for name in ONLY_IMPORTED:
        assert f"print('imports', m.version('{doctor.BACKENDS[name].distribution}'))" in doctor.PROBES[name]
    found = doctor.probe("fastapi", doctor.IMPORTS.format("json", "pytest"))
    assert found.state == "ok"
    assert found.says == f"imports {pytest.__version__}"


def test_a_genai_that_answers_something_else_is_broken() -> None:
    pytest.importorskip("onnxruntime_genai")
    code = (
        "from edgetune import doctor; write = doctor.write_tiny_genai; "
        "doctor.write_tiny_genai = lambda folder, table: write(folder, table + 1); print(doctor.probe_genai())"
    )
    found = doctor.probe("onnxruntime_genai", code)
    assert found.state == "broken"

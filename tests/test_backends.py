"""Optional packages: each has a probe, an extra that brings it, and a pip command where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune import backends, doctor
from edgetune.backends import BACKENDS
from tests.conftest import Call
from tests.test_packaging import project

ROOT = Path(__file__).parents[1]


def test_every_backend_has_a_probe() -> None:
    assert BACKENDS.keys() <= doctor.PROBES.keys()


def test_doctor_tells_what_each_backend_did(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    die = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    probes = {
        "fine": "print('remark'); print('works 1.0')",
        "llama_cpp": die,
        "onnx": die,
        "raises": "raise ValueError('first\\nsecond')",
        "hangs": "import time; time.sleep(60)",
        "wandb": "print('not asked')",
    }
    monkeypatch.setattr(doctor, "PROBES", probes)
    monkeypatch.setattr(doctor, "TIMEOUT_S", 1)
    monkeypatch.setattr(doctor, "is_installed", lambda name: name != "wandb")
    found = {one.name: one for one in doctor.examine()}
    assert {name: one.state for name, one in found.items()} == {
        "fine": "ok", "llama_cpp": "broken", "onnx": "broken", "raises": "broken", "hangs": "broken",
        "wandb": "absent",
    }  # fmt: skip
    assert found["fine"].says == "works 1.0"
    assert found["llama_cpp"].says == f"died of SIGSEGV; {doctor.AMX}"
    assert found["onnx"].says == "died of SIGSEGV; install onnx again"
    assert found["raises"].says == "second; install raises again"
    assert found["hangs"].says == "gave no answer within 1 s; try on an idle machine, then install hangs again"
    assert found["wandb"].says == "logs training to Weights & Biases; pip install wandb"
    del probes["hangs"]
    _, out, err = call("doctor")
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["ok", "broken", "broken", "broken", "absent"]


def test_doctor_with_a_broken_backend_is_exit_1(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBES", {"x": "raise SystemExit(3)"})
    assert call("doctor")[0] == 1


def test_doctor_names_the_whole_pip_command(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBES", {"onnx": ""})
    monkeypatch.setattr(doctor, "is_installed", lambda _: False)
    assert "pip install 'edgetune[onnx]'" in call("doctor")[1]


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.extra])
def test_the_extra_of_a_backend_brings_it(name: str) -> None:
    backend = BACKENDS[name]
    listed = project()["optional-dependencies"][backend.extra]
    names = [requirement.split(">")[0].split("=")[0].split("[")[0] for requirement in listed]
    assert backend.distribution in names


def test_a_missing_backend_names_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.errors import MissingBackendError

    for extra, what in (("gguf", "'edgetune[gguf]'"), ("", "no-such-dist")):
        fake = backends.Backend("no_such_module_x", "no-such-dist", extra, "does nothing")
        monkeypatch.setitem(BACKENDS, "x", fake)
        with pytest.raises(MissingBackendError) as caught:
            backends.require("x")
        assert str(caught.value) == f"no-such-dist is not installed (does nothing); run: pip install {what}"
        assert caught.value.exit_code == 2
        assert not backends.is_installed("x")
        assert backends.version("x") is None

"""Every way in which a child can fail is one line, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgetune.errors import EngineError, MissingBackendError, UsageError
from edgetune.runtime.worker import Job, Worker
from tests.fakes import N_VOCAB, fake_job

pytestmark = pytest.mark.usefixtures("fakes_in_child")


def test_a_child_loads_tokenizes_generates_and_tells_its_memory() -> None:
    with Worker(fake_job()) as worker:
        loaded = worker.load(n_ctx=64, timeout_s=30)
        assert loaded["version"] == "fake 1, alone"  # neither torch nor pydantic is the engine's memory
        assert loaded["n_vocab"] == N_VOCAB
        assert loaded["load_ms"] > 0
        assert worker.call("tokenize", timeout_s=30, text="ab") == {"ids": [1, 2]}
        stamps = worker.call("generate_timed", timeout_s=30, ids=[1, 2], continuation=[3, 4, 5])["stamps"]
        assert len(stamps) == 5
        assert stamps == sorted(stamps)
        assert 5e6 < worker.call("memory", timeout_s=30)["peak_rss_bytes"] < 200e6
        pid = worker.pid
        assert "printed to stdout" in worker.stderr_tail()
        assert "file descriptor 1" in worker.stderr_tail()
    assert not psutil.pid_exists(pid)


def test_the_childs_memory_is_not_its_parents() -> None:
    ballast = np.ones(60_000_000)  # 480 MB, resident in the parent when the child is started
    with Worker(fake_job()) as worker:
        assert worker.call("memory", timeout_s=30)["peak_rss_bytes"] < ballast.nbytes / 2


@pytest.mark.parametrize(
    ("fail", "at", "said"),
    [
        ("crash", "load", "llama.cpp died of SIGSEGV while loading; built for another CPU, or with AMX?"),
        ("illegal", "decode", "llama.cpp died of SIGILL while generating; built for another CPU, or with AMX?"),
        ("killed", "prefill", "llama.cpp died of SIGKILL while generating; something killed it"),
        ("exit", "load", "llama.cpp left with exit code 7 while loading: giving up"),
        ("raise", "load", "llama.cpp failed while loading: ValueError: bad weights"),
        ("hang", "decode", "llama.cpp gave no answer in 1 s while generating and was stopped"),
        ("hang with the lock", "load", "llama.cpp gave no answer in 2 s while loading and was stopped"),
        ("nan", "decode", "fake gave logits that are not finite after 1 new tokens"),
        ("inf", "prefill", "fake gave logits that are not finite after 0 new tokens"),
    ],
)
def test_each_failure_is_one_line(fail: str, at: str, said: str) -> None:
    started = time.monotonic()
    with Worker(fake_job(engine="llama.cpp", fail=fail, at=at)) as worker:
        with pytest.raises(EngineError) as caught:  # noqa: PT012 - which of the two fails is the case
            worker.load(n_ctx=64, timeout_s=2 if at == "load" and "hang" in fail else 30)
            worker.call("generate_timed", timeout_s=1 if "hang" in fail else 30, ids=[1, 2], continuation=[3])
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)
        notes = "".join(caught.value.__notes__)
        assert "file descriptor 1" in notes  # the end of stderr is kept
        if fail == "crash":
            assert "in _maybe_fail" in notes  # with the Python stack of a native crash
        if fail not in {"raise", "nan", "inf"}:
            with pytest.raises(EngineError) as again:
                worker.call("memory", timeout_s=2)
            assert str(again.value) == str(caught.value)  # a lost child stays lost, with its first reason
            assert not worker.alive
    assert time.monotonic() - started < 30
    assert not psutil.pid_exists(worker.pid)


def test_an_error_of_the_tree_keeps_its_class() -> None:
    with (
        Worker(fake_job(fail="missing", at="load")) as worker,
        pytest.raises(MissingBackendError, match="fake is not installed"),
    ):
        worker.load(n_ctx=64, timeout_s=30)
    unknown = Job("x", "model", "abacus", Path("nowhere"), "0", 1, 1)
    with Worker(unknown) as worker, pytest.raises(UsageError, match="unknown engine 'abacus'"):
        worker.load(n_ctx=64, timeout_s=30)


def test_a_child_that_raised_goes_on() -> None:
    with Worker(fake_job(fail="raise", at="prefill", after=1)) as worker:
        worker.load(n_ctx=64, timeout_s=30)
        worker.call("generate_timed", timeout_s=30, ids=[1], continuation=[2])
        with pytest.raises(EngineError, match="fake failed while generating: ValueError: bad weights"):
            worker.call("generate_timed", timeout_s=30, ids=[1], continuation=[2])
        assert worker.call("tokenize", timeout_s=30, text="a") == {"ids": [1]}


PARENT = """
import sys, threading, time
from edgetune.runtime.worker import Worker
from tests.fakes import fake_job
def start():
    global worker
    worker = Worker(fake_job(fail=sys.argv[1], at="prefill"))
    worker.load(n_ctx=64, timeout_s=30)
    print(worker.pid, flush=True)
    worker.call("generate_timed", timeout_s=600, ids=[1], continuation=[2])
if sys.argv[2] == "thread":
    threading.Thread(target=start, daemon=True).start()
    time.sleep(600)
start()
"""


@pytest.mark.parametrize(("fail", "where"), [("hang with the lock", "main"), ("hang", "thread")])
def test_a_child_does_not_outlive_a_killed_parent(fail: str, where: str) -> None:
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, fail, where], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)  # it hangs now
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

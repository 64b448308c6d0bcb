"""An engine without a model: scripted logits, and every way to fail on purpose.

A child process finds it as `tests.fakes:FakeEngine`; `fake_job` makes the job. Settings:
`fail`: what to do, one of FAILURES; `at`: the verb that fails: load, prefill, decode, score_rows, decode_rows;
`after`: calls of that verb that go well first; `prefill_s`, `decode_s`: how long a step takes, `row_s`: how much
longer for each row of several; `ballast_mb`: memory that reading a prompt takes; `flaw`: share of positions whose
argmax is wrong, `seed` of which ones.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.errors import MissingBackendError
from edgetune.runtime.engine import Logits, OneByOne, TokenRow
from edgetune.runtime.worker import Job

N_VOCAB = 32
FAILURES = (
    "crash", "illegal", "hang", "hang with the lock", "raise", "missing", "full", "exit", "killed", "nan", "inf",
)  # fmt: skip


def fake_job(name: str = "fake", *, engine: str = "fake", n_threads: int = 1, **settings: Any) -> Job:
    """Make a job that runs the fake engine. The child needs the repository in its PYTHONPATH."""
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    return Job(name, "model", engine, Path("nowhere"), digest, 1000, n_threads, settings, "tests.fakes:FakeEngine")


class FakeEngine(OneByOne):
    """A deterministic language model: the logits after a context are drawn from a hash of it."""

    name = "fake"
    n_vocab = N_VOCAB
    weight_bytes = 10**6
    kv_bytes_per_token = 100.0

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.context: list[int] = []
        self.rows: list[list[int]] = []
        self.calls: dict[str, int] = {}

    @classmethod
    def load(cls, path: Path, *, n_ctx: int, n_threads: int, **settings: Any) -> FakeEngine:
        engine = cls(settings)
        print("printed to stdout by a library")
        os.write(1, b"and to file descriptor 1\n")
        engine._maybe_fail("load")
        return engine

    @property
    def version(self) -> str:
        heavy = [name for name in ("torch", "transformers", "pydantic", "scipy") if name in sys.modules]
        return f"fake 1, {'with ' + ' '.join(heavy) if heavy else 'alone'}"

    def prefill(self, ids: Sequence[int]) -> Logits:
        self.context = list(ids)
        np.ones(self.settings.get("ballast_mb", 0) * 10**6 // 8)  # gone again when this returns
        return self._step("prefill")

    def decode(self, token: int) -> Logits:
        self.context.append(token)
        return self._step("decode")

    def prefill_rows(self, rows: Sequence[Sequence[int]]) -> Logits:
        self.rows = [list(ids) for ids in rows]
        return self._rows_step("prefill_rows")

    def decode_rows(self, tokens: Sequence[int]) -> Logits:
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        return self._rows_step("decode_rows")

    def _rows_step(self, verb: str) -> Logits:
        """Every row costs `row_s` beside what a step of one row does."""
        self._maybe_fail(verb)
        step_s = self.settings.get(f"{verb.removesuffix('_rows')}_s", 0.0)
        time.sleep(step_s + len(self.rows) * self.settings.get("row_s", 0.0))
        return np.stack([self._logits(row) for row in self.rows])

    def score(self, ids: Sequence[int]) -> Logits:
        return np.stack([self._logits(ids[: n + 1]) for n in range(len(ids))])

    def score_rows(self, rows: Sequence[TokenRow]) -> Iterator[Logits]:
        for row in rows:
            broken = self._maybe_fail("score_rows")
            logits = self.score(row.ids)[row.start - 1 : -1]
            if broken is not None:
                logits[-1] = broken
            yield logits

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) % N_VOCAB for letter in text]

    def close(self) -> None:
        pass

    def _logits(self, ids: Sequence[int]) -> Logits:
        key = hashlib.sha256(repr(list(ids)).encode()).digest()
        logits = np.random.default_rng(list(key)).normal(0, 2, N_VOCAB).astype(np.float32)
        flaw = np.random.default_rng([*key, self.settings.get("seed", 0)])
        if flaw.random() < self.settings.get("flaw", 0.0):
            logits = np.roll(logits, 1)
        return logits

    def _step(self, verb: str) -> Logits:
        time.sleep(self.settings.get(f"{verb}_s", 0.0))
        broken = self._maybe_fail(verb)
        logits = self._logits(self.context)
        if broken is not None:
            logits[3] = broken
        return logits

    def _maybe_fail(self, verb: str) -> float | None:
        """Fail here where the settings say so; give what logits are to hold where they are to be broken."""
        self.calls[verb] = self.calls.get(verb, 0) + 1
        if self.settings.get("at") != verb or self.calls[verb] <= self.settings.get("after", 0):
            return None
        fail = self.settings["fail"]
        assert fail in FAILURES
        if fail == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fail == "illegal":
            os.kill(os.getpid(), signal.SIGILL)
        elif fail == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fail == "hang":
            time.sleep(3600)
        elif fail == "hang with the lock":
            import ctypes

            ctypes.PyDLL(None).sleep(3600)  # never lets go of the interpreter lock
        elif fail == "exit":
            print("giving up", file=sys.stderr, flush=True)
            os._exit(7)
        elif fail == "missing":
            raise MissingBackendError("fake is not installed")
        elif fail == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif fail == "raise":
            raise ValueError("bad weights\nsecond line")
        return float("nan") if fail == "nan" else float("inf")

"""One engine in one child process: a crash of native code is a result, and memory is the child's own.

`Worker` starts `edgetune.runtime.child`, asks it for one thing at a time and turns each way to fail into one line.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from edgetune import errors
from edgetune.errors import EdgetuneError, EngineError, UsageError
from edgetune.runtime.child import doing
from edgetune.runtime.engine import ENGINE_OF_KIND, runs_on_gpu

if TYPE_CHECKING:  # pydantic is not the measured engine's memory
    from edgetune.artifact import Artifact
    from edgetune.runtime.evidence import Subject

CRASHES = {signal.SIGSEGV, signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT}
E = TypeVar("E", bound=EdgetuneError)
CLOSE_S = 5.0
STDERR_TAIL = 4000  # bytes


@dataclass(frozen=True)
class Job:
    """What is measured, in which engine, and how. `settings` go to the engine's `load`."""

    name: str  # candidate, "reference" or "base"
    kind: str
    engine: str
    path: Path
    artifact_digest: str
    size_bytes: int
    n_threads: int
    settings: dict[str, Any] = field(default_factory=dict)
    engine_class: str | None = None  # "module:class" in place of the table of engines; for tests only

    @classmethod
    def of(cls, name: str, artifact: Artifact, *, n_threads: int, engine: str | None = None, **settings: Any) -> Job:
        """Make the job of an artifact, in the engine that ships its kind where no other is asked for.

        Raises UsageError where none ships it.
        """
        kind = artifact.manifest.kind
        if kind not in ENGINE_OF_KIND:
            raise UsageError(
                f"{artifact.path} is of kind {kind!r}, which no engine runs; known: {list(ENGINE_OF_KIND)}"
            )
        return cls(
            name, kind, engine or ENGINE_OF_KIND[kind], artifact.path, artifact.digest, artifact.size_bytes, n_threads,
            settings,
        )  # fmt: skip

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return runs_on_gpu(self.engine, self.settings)

    def subject(self, engine_version: str) -> Subject:
        from edgetune.runtime.evidence import Subject

        return Subject(
            name=self.name, kind=self.kind, artifact_digest=self.artifact_digest, size_bytes=self.size_bytes,
            engine=self.engine, engine_version=engine_version, n_threads=self.n_threads, settings=self.settings,
        )  # fmt: skip


class Worker:
    """A child process that holds one engine. Use it as a context manager; leaving it ends the child."""

    def __init__(self, job: Job) -> None:
        """Start the child. Nothing is loaded before `load`."""
        self.job = job
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._buffer = b""
        self._gone: str | None = None  # how it ended
        command = [sys.executable, "-P", "-m", "edgetune.runtime.child"]
        if threading.current_thread() is threading.main_thread():
            command.append("--die-with-parent")  # the kernel means the parent's thread, which must not end earlier
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0,
            start_new_session=True,  # Ctrl-C reaches the parent only, which then ends its children
            env={**os.environ, "OMP_NUM_THREADS": str(job.n_threads), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def load(self, *, n_ctx: int, timeout_s: float) -> dict[str, Any]:
        """Load the job's artifact. Gives `version`, `n_vocab` and `load_ms` (the runtime's import included)."""
        job = self.job
        return self.call(
            "load", timeout_s=timeout_s, engine=job.engine, path=str(job.path), n_ctx=n_ctx, n_threads=job.n_threads,
            settings=job.settings, engine_class=job.engine_class,
        )  # fmt: skip

    def call(
        self,
        verb: str,
        *,
        timeout_s: float,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Ask the child for one thing and wait for the answer, at most `timeout_s` seconds between two of its words.

        Raises EngineError where the child crashed, hung (it is killed then), was killed or raised; an error of the
        edgetune tree that was raised in the child keeps its class. The end of its stderr is added as a note.
        """
        if self._gone is not None:
            raise EngineError(self._gone)
        request = json.dumps({"verb": verb, "arguments": arguments}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            view = memoryview(request)
            while view:
                view = view[self._process.stdin.write(view) or 0 :]
        except (BrokenPipeError, ValueError):
            raise self._died(verb) from None
        while True:
            reply = self._read_line(verb, timeout_s)
            if "progress" in reply:
                if on_progress is not None:
                    on_progress(reply["progress"])
            elif "error" in reply:
                kind = getattr(errors, reply["error"]["type"], EngineError)
                raise self._noted(kind(reply["error"]["message"]))
            else:
                result: dict[str, Any] = reply["result"]
                return result

    def stderr_tail(self) -> str:
        """Give the end of what the child and its libraries printed."""
        if self._stderr.closed:
            return ""
        size = os.fstat(self._stderr.fileno()).st_size  # the child shares the offset: read by position
        start = max(0, size - STDERR_TAIL)
        return os.pread(self._stderr.fileno(), STDERR_TAIL, start).decode(errors="replace").strip()

    def close(self) -> None:
        """End the child, politely first."""
        if self.alive and self._process.stdin is not None:
            try:
                self._process.stdin.write(b'{"verb": "close", "arguments": {}}\n')
                self._process.wait(CLOSE_S)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                pass
        self.kill()

    def kill(self) -> None:
        """End the child and whatever it started, at once."""
        if self.alive:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _read_line(self, verb: str, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._lost(f"gave no answer in {timeout_s:g} s while {doing(verb)} and was stopped")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise self._died(verb)
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _died(self, verb: str) -> EngineError:
        """Say how the child ended. Its pipe is closed; it may need a moment more."""
        try:
            code = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            return self._lost(f"closed its pipe while {doing(verb)} and was stopped")
        if code >= 0:
            last = self.stderr_tail().splitlines()[-1:]
            return self._lost(": ".join([f"left with exit code {code} while {doing(verb)}", *last]))
        hint = ""
        if -code == signal.SIGKILL:
            hint = "; something killed it, most often the machine ran out of memory"
        elif -code in CRASHES and self.job.engine == "llama.cpp":
            hint = "; built for another CPU, or with AMX? run edgetune doctor"
        return self._lost(f"died of {signal.Signals(-code).name} while {doing(verb)}{hint}")

    def _lost(self, how: str) -> EngineError:
        """End what is left of the child and make the error that says how it was lost."""
        self._gone = f"{self.job.engine} {how}"
        error = self._noted(EngineError(self._gone))
        self.kill()
        return error

    def _noted(self, error: E) -> E:
        if tail := self.stderr_tail():
            error.add_note(f"the end of the child's stderr:\n{tail}")
        return error

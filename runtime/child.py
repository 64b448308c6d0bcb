"""The child side of `Worker`: `python -m edgetune.runtime.child` holds one engine and serves its parent.

It reads one JSON request a line and answers with JSON lines, `{"progress": ..}` any number of times and then
`{"result": ..}` or `{"error": ..}`, on a pipe of its own. It imports the engine that is asked for and nothing heavy
beside it, and it ends when its parent does.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgetune.errors import EdgetuneError, EngineError, UnsupportedError, UsageError
from edgetune.runtime.engine import Engine, Logits, RowsEngine, Traffic, load_engine

# what a verb is called in an error message
DOING = {"load": "loading", "tokenize": "tokenizing", "detokenize": "turning ids into text", "score": "scoring",
         "score_task": "scoring", "generate_timed": "generating", "generate_rows_timed": "generating several rows",
         "memory_phases": "weighing"}  # fmt: skip
PR_SET_PDEATHSIG = 1


def doing(verb: str) -> str:
    """Say what a verb does, for an error message."""
    return DOING.get(verb, f"doing {verb!r}")


class Child:
    """The verbs, over one engine."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise UsageError("nothing is loaded yet; call load first")
        return self._engine

    def load(
        self,
        engine: str,
        path: str,
        n_ctx: int,
        n_threads: int,
        settings: dict[str, Any],
        engine_class: str | None = None,
    ) -> dict[str, Any]:
        started = time.perf_counter()
        if engine_class is None:
            self._engine = load_engine(engine, Path(path), n_ctx=n_ctx, n_threads=n_threads, **settings)
        else:
            module, _, attribute = engine_class.partition(":")
            made = getattr(importlib.import_module(module), attribute)
            self._engine = made.load(Path(path), n_ctx=n_ctx, n_threads=n_threads, **settings)
        load_ms = (time.perf_counter() - started) * 1e3
        return {"version": self.engine.version, "n_vocab": self.engine.n_vocab, "load_ms": load_ms}

    def traffic(self) -> dict[str, Any]:
        """Give what a token reads from memory. Raises UnsupportedError where the engine does not know."""
        if not isinstance(self.engine, Traffic):
            raise UnsupportedError(f"{self.engine.name} does not tell what a token reads")
        return {"weight_bytes": self.engine.weight_bytes, "kv_bytes_per_token": self.engine.kv_bytes_per_token}

    def tokenize(self, text: str) -> dict[str, Any]:
        return {"ids": self.engine.tokenize(text)}

    def detokenize(self, rows: list[list[int]]) -> dict[str, Any]:
        return {"texts": [self.engine.detokenize(ids) for ids in rows]}

    def score(self, **request: Any) -> dict[str, Any]:
        from edgetune.runtime.accuracy import score_in_child

        return score_in_child(self.engine, request, self._emit)

    def score_task(self, **request: Any) -> dict[str, Any]:
        from edgetune.runtime.tasks import score_task_in_child

        return score_task_in_child(self.engine, request, self._emit)

    def generate_timed(self, ids: list[int], continuation: list[int]) -> dict[str, Any]:
        """Read a prompt, then feed fixed ids; a stamp before and one after each choice of a token, in seconds."""
        return {"stamps": timed(self.engine, ids, continuation)}

    def generate_rows_timed(self, rows: list[list[int]], continuation: list[int]) -> dict[str, Any]:
        """The same with several rows at once, each fed the same ids; a stamp for each step of all rows."""
        engine = self.engine
        if not isinstance(engine, RowsEngine):
            raise UnsupportedError(f"{engine.name} decodes one row at a time")
        return {"stamps": timed(_AllRows(engine.name, engine, rows), rows[0], continuation)}

    def memory(self) -> dict[str, Any]:
        return {"peak_rss_bytes": peak_rss_bytes()}

    def memory_phases(self, ids: list[int], continuation: list[int]) -> dict[str, Any]:
        """Give resident bytes now, and the peaks of reading a prompt and of decoding after it."""
        found = {"loaded": _forget_peak()}
        self.engine.prefill(ids)
        found["prefill_peak"] = peak_rss_bytes()
        _forget_peak()
        for token in continuation:
            self.engine.decode(token)
        return found | {"decode_peak": peak_rss_bytes()}

    def close(self) -> dict[str, Any]:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        return {}


class _AllRows:
    """Several rows of an engine, as if they were one: each step gives every row a token."""

    def __init__(self, name: str, engine: RowsEngine, rows: list[list[int]]) -> None:
        self.name, self._engine, self._rows = name, engine, rows

    def prefill(self, ids: Sequence[int]) -> Logits:
        return self._engine.prefill_rows(self._rows).ravel()

    def decode(self, token: int) -> Logits:
        return self._engine.decode_rows([token] * len(self._rows)).ravel()


class Stepwise(Protocol):
    """What `timed` asks of an engine."""

    name: str

    def prefill(self, ids: Sequence[int]) -> Logits: ...

    def decode(self, token: int) -> Logits: ...


def timed(engine: Stepwise, ids: Sequence[int], continuation: Sequence[int]) -> list[float]:
    """Stamp len(continuation) + 1 choices of a token. Each choice is made and thrown away: the next id is given, so
    that every engine does the same work on the same ids. The garbage collector rests meanwhile."""
    clock = time.perf_counter
    gc.collect()
    gc.disable()
    try:
        stamps = [clock()]
        logits = engine.prefill(ids)
        chosen = [float(logits[logits.argmax()])]
        stamps.append(clock())
        for token in continuation:
            logits = engine.decode(token)
            chosen.append(float(logits[logits.argmax()]))
            stamps.append(clock())
    finally:
        gc.enable()
    for n, value in enumerate(chosen):
        if not math.isfinite(value):
            raise EngineError(f"{engine.name} gave logits that are not finite after {n} new tokens")
    return stamps


def _forget_peak() -> int:
    """Let the kernel count the peak anew, and give the resident bytes of now. Raises EngineError where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError as error:
        raise EngineError(f"memory by phase needs /proc/self/clear_refs ({error.strerror})") from error
    return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Give this process's own peak resident memory. `ru_maxrss` would also hold the parent's, from before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Serve requests until the parent closes or goes."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # native libraries print to fd 1; that must not be the pipe
    faulthandler.enable()
    if "--die-with-parent" in sys.argv and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests, inbox), daemon=True).start()

    def emit(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    child = Child(lambda progress: emit({"progress": progress}))
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "load": child.load, "tokenize": child.tokenize, "detokenize": child.detokenize, "score": child.score,
        "memory": child.memory, "score_task": child.score_task, "memory_phases": child.memory_phases,
        "traffic": child.traffic, "generate_timed": child.generate_timed,
        "generate_rows_timed": child.generate_rows_timed, "close": child.close,
    }  # fmt: skip
    while True:
        request = inbox.get()
        verb = request["verb"]
        try:
            result = verbs[verb](**request["arguments"])
        except EdgetuneError as error:
            emit({"error": {"type": type(error).__name__, "message": str(error)}})
        except Exception as error:
            import traceback

            traceback.print_exc()
            emit({"error": {"type": "EngineError", "message": _describe(child, verb, request["arguments"], error)}})
        else:
            emit({"result": result})
        if verb == "close":
            replies.close()
            os._exit(0)  # no native destructor may crash or hang after the work is done


def _describe(child: Child, verb: str, arguments: dict[str, Any], error: Exception) -> str:
    engine = arguments.get("engine") or (child._engine.name if child._engine else "the child")
    text = str(error).strip().splitlines()
    return f"{engine} failed while {doing(verb)}: {type(error).__name__}{': ' + text[0] if text else ''}"


def _read_requests(requests: Any, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass requests on; the end of the pipe means that the parent is gone."""
    for line in requests:
        inbox.put(json.loads(line))
    os._exit(1)


if __name__ == "__main__":
    main()

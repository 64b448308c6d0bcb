"""How fast an OpenAI-compatible HTTP endpoint answers, as its clients see it: vLLM, llama-server, Ollama, TGI.

Logits do not exist there, so this is a protocol of its own: the same prompts are sent to `/completions`, streamed, and
each part that arrives is stamped. A number of clients ask at once (closed loop), or requests arrive at a rate whether
earlier ones are answered or not (open loop, Poisson, drawn from a seed). Goodput counts the requests that kept every
service level objective (SLO) a second.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from edgetune.errors import EngineError, UsageError
from edgetune.runtime.evidence import Served, ServedCase, ServedRequest
from edgetune.runtime.percentiles import percentile_bounds
from edgetune.runtime.statistics import Interval

Progress = Callable[[int, int], None]  # requests answered, requests in all
DATA = b"data:"
DONE = b"[DONE]"


@dataclass(frozen=True)
class Endpoint:
    """Where the server is, which of its models is asked, and how long an answer may take."""

    url: str  # up to and with /v1
    model: str
    timeout_s: float = 120.0
    key: str | None = None  # sent as bearer token; never kept

    @classmethod
    def find(cls, url: str, model: str | None = None, *, timeout_s: float = 120.0, key: str | None = None) -> Endpoint:
        """Ask a server for its models and take the one that is named, or its only one.

        Raises UsageError for a malformed address or an unknown model and EngineError where nothing answers.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no address of a server; give one as http://127.0.0.1:8000/v1")
        found = cls(url.rstrip("/"), model or "", timeout_s, key)
        models = found._models()
        if model is None and len(models) != 1:
            raise UsageError(f"{url} has {len(models)} models ({', '.join(models[:8])}); name one with --model")
        if model is not None and model not in models:
            raise UsageError(f"{url} has no model {model!r}; it has {', '.join(models[:8]) or 'none'}")
        return cls(found.url, model or models[0], timeout_s, key)

    def complete(self, prompt: str, n_tokens: int, sent_s: float, clock: Callable[[], float]) -> ServedRequest:
        """Send one prompt and stamp each part of the answer that carries text. A failure is in the result."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        stamps: list[float] = []
        told: int | None = None
        try:
            with self._connected() as connection:
                connection.request("POST", f"{self._path}/completions", json.dumps(body), self._headers())
                response = connection.getresponse()
                if response.status != 200:
                    said = " ".join(response.read(300).decode(errors="replace").split())
                    return ServedRequest(sent_s=sent_s, error=f"HTTP {response.status}: {said}")
                for event in _events(response):
                    if "error" in event:
                        return ServedRequest(sent_s=sent_s, error=f"the server said: {event['error']}"[:300])
                    has_text, counted = _read(event)
                    if has_text:
                        stamps.append(clock())
                    told = told if counted is None else counted
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            return ServedRequest(sent_s=sent_s, error=f"{type(error).__name__}: {error}")
        if not stamps:
            return ServedRequest(sent_s=sent_s, error="the answer held no text")
        waits = [(after - before) * 1e3 for before, after in pairwise(stamps)]
        return ServedRequest(
            sent_s=sent_s, ttft_ms=(stamps[0] - sent_s) * 1e3, itl_ms=waits, done_s=stamps[-1], n_tokens=told
        )

    def _models(self) -> list[str]:
        found = self._get("/models")
        listed = found.get("data", []) if isinstance(found, dict) else None
        if not isinstance(listed, list) or not all(isinstance(one, dict) and "id" in one for one in listed):
            raise EngineError(f"{self.url}/models names no models: {str(found)[:80]!r}; is it OpenAI-compatible?")
        return [str(one["id"]) for one in listed]

    def _get(self, path: str) -> Any:
        try:
            with self._connected() as connection:
                connection.request("GET", f"{self._path}{path}", headers=self._headers())
                response = connection.getresponse()
                body = response.read()
            if response.status != 200:
                raise EngineError(f"{self.url}{path} answered with HTTP {response.status}; is it OpenAI-compatible?")
            return json.loads(body)
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise EngineError(f"{self.url} cannot be asked for its models: {error}; is the server up?") from error

    @property
    def _path(self) -> str:
        return urlsplit(self.url).path

    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def _connected(self) -> _Connection:
        return _Connection(self.url, self.timeout_s)


class _Connection:
    """One connection for one request, closed at the end."""

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(str(parts.hostname), parts.port, timeout=timeout_s)

    def __enter__(self) -> http.client.HTTPConnection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Give the JSON object of each server-sent event, up to the one that ends the stream.

    Some servers send none of those: then one that says why the answer ends. Raises HTTPException where the stream was
    cut before either, and ValueError for what is no object.
    """
    finished = False
    for line in response:
        if line.startswith(DATA):
            data = line[len(DATA) :].strip()
            if data == DONE:
                return
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError(f"an event is no JSON object: {str(event)[:80]!r}")
            yield event
            finished = finished or any(choice.get("finish_reason") for choice in event.get("choices") or ())
    if not finished:
        raise http.client.HTTPException("the stream ended before [DONE]")


def _read(event: dict[str, Any]) -> tuple[bool, int | None]:
    """Give whether an event carries text, and the tokens that it counts. Raises ValueError for one of another form."""
    choices, usage = event.get("choices") or [], event.get("usage") or {}
    if isinstance(choices, list) and all(isinstance(one, dict) for one in choices) and isinstance(usage, dict):
        counted = usage.get("completion_tokens")
        if counted is None or isinstance(counted, int):
            return any(one.get("text") for one in choices), counted
    raise ValueError(f"an event is of another form: {str(event)[:80]!r}")


def measure(
    endpoint: Endpoint,
    prompts: Sequence[str],
    *,
    n_tokens: int,
    concurrency: Sequence[int] = (1,),
    rates: Sequence[float] = (),
    n_requests: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Served:
    """Time a server: one case for each number of clients at once, and one for each rate of requests a second.

    Every case sends the same number of requests. Prompts are taken in their order, so that a server's cache of
    prefixes helps only where they run out and go round. One request before them all warms up.
    """
    if not prompts:
        raise UsageError("a server is timed with prompts, and there are none; give at least one")
    clock = time.monotonic
    endpoint.complete(prompts[0], n_tokens, clock(), clock)
    total = (len(concurrency) + len(rates)) * n_requests
    started, answered, lock = count(1), count(1), threading.Lock()

    def one(_: int, at: float | None) -> ServedRequest:
        with lock:
            prompt = prompts[next(started) % len(prompts)]
        if at is not None:
            time.sleep(max(0.0, at - clock()))
        # under a rate the request was due at `at`: what it waited for a thread counts
        found = endpoint.complete(prompt, n_tokens, at if at is not None else clock(), clock)
        with lock:
            if progress is not None:
                progress(next(answered), total)
        return found

    cases = []
    for clients in concurrency:
        with ThreadPoolExecutor(clients) as pool:
            began = clock()
            requests = list(pool.map(lambda number: one(number, None), range(n_requests)))
        cases.append(_case(requests, began, clock(), concurrency=clients))
    for rate in rates:
        arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n_requests))
        with ThreadPoolExecutor(n_requests) as pool:
            began = clock()
            requests = list(pool.map(one, range(n_requests), [began + float(wait) for wait in arrivals]))
        cases.append(_case(requests, began, clock(), rate=rate))
    return Served(url=endpoint.url, model=endpoint.model, new_tokens=n_tokens, cases=cases)


def _case(
    requests: Sequence[ServedRequest],
    began: float,
    ended: float,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
) -> ServedCase:
    """Make the evidence of a case; stamps are counted from its beginning."""
    shifted = [
        one.model_copy(
            update={"sent_s": one.sent_s - began, "done_s": None if one.done_s is None else one.done_s - began}
        )
        for one in requests
    ]
    return ServedCase(concurrency=concurrency, rate=rate, seconds=ended - began, requests=shifted)


def figure(case: ServedCase, name: str, q: float) -> Interval:
    """Give a percentile of `ttft_ms`, `itl_ms` or `tpot_ms` of the answered requests, with its 95 % interval.

    Raises EngineError where none was.
    """
    good = [one for one in case.requests if one.error is None]
    groups = {
        "ttft_ms": [[one.ttft_ms] for one in good if one.ttft_ms is not None],
        "itl_ms": [one.itl_ms for one in good if one.itl_ms],
        "tpot_ms": [[sum(one.itl_ms) / len(one.itl_ms)] for one in good if one.itl_ms],
    }[name]
    if not groups:
        errors = [one.error for one in case.requests if one.error]
        raise EngineError(
            f"no request was answered with enough tokens for {name}: {errors[0] if errors else 'too few'}"
        )
    return percentile_bounds(groups, q, confidence=0.975)


def has_waits(case: ServedCase) -> bool:
    """Tell whether any answer had a second token, so that waits between tokens were seen."""
    return any(one.error is None and one.itl_ms for one in case.requests)


def throughput(case: ServedCase) -> float:
    """Tokens a second that all clients together got; parts of the stream where the server counts no tokens."""
    good = [one for one in case.requests if one.error is None]
    return sum(one.n_tokens if one.n_tokens is not None else len(one.itl_ms) + 1 for one in good) / case.seconds


def goodput(case: ServedCase, *, ttft_ms: float | None = None, tpot_ms: float | None = None) -> float:
    """Requests a second that were answered within every objective that is given (as in arXiv:2401.09670)."""

    def kept(one: ServedRequest) -> bool:
        if one.error is not None or one.ttft_ms is None:
            return False
        mean = sum(one.itl_ms) / len(one.itl_ms) if one.itl_ms else 0.0
        return (ttft_ms is None or one.ttft_ms <= ttft_ms) and (tpot_ms is None or mean <= tpot_ms)

    return sum(map(kept, case.requests)) / case.seconds

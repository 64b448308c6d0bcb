"""Timing a server: a real one on loopback, and every way in which one can misbehave."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgetune import bench, past
from edgetune.artifact import Artifact
from edgetune.bench_http import bench_http
from edgetune.errors import ArtifactError, EngineError, UsageError
from edgetune.found import jobs
from edgetune.runtime import history, serving
from edgetune.runtime.engines.llama_engine import LlamaEngine
from edgetune.runtime.evidence import ServedCase, ServedRequest, Timings
from edgetune.runtime.latency import make_prompts
from edgetune.runtime.report import beside
from edgetune.runtime.serving import Endpoint
from tests.conftest import make_tiny_model
from tests.report_sample import sample_report
from tests.runtime.test_history import timings

PROMPTS = ["turn the light in", "set the boiler to", "what is the temperature"]


class Scripted(BaseHTTPRequestHandler):
    """Answers as `how` of its server says: a function that writes the body of one completion."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(time.monotonic())  # type: ignore[attr-defined]
        self.server.how(self)  # type: ignore[attr-defined]

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, *parts: object, wait_s: float = 0.0, done: bool = True) -> None:
        self.send_response(200)
        self.end_headers()
        for part in parts:
            time.sleep(wait_s)
            event = {"choices": [{"text": part}]} if isinstance(part, str) else part
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if done:
            self.wfile.write(b"data: [DONE]\n\n")


Server = Callable[[Callable[[Scripted], None]], Endpoint]


@pytest.fixture
def scripted() -> Iterator[Server]:
    servers: list[ThreadingHTTPServer] = []

    def start(how: Callable[[Scripted], None]) -> Endpoint:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
        server.how, server.models, server.seen = how, ["m"], []  # type: ignore[attr-defined]
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Endpoint.find(f"http://127.0.0.1:{server.server_port}/v1", timeout_s=1)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.alone
def test_each_part_of_the_stream_is_stamped(scripted: Server) -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 4}}
    endpoint = scripted(lambda s: s.stream("a", "", "b", "c", usage, wait_s=0.02))
    (case,) = serving.measure(endpoint, PROMPTS, n_tokens=4, n_requests=3).cases
    assert [one.error for one in case.requests] == [None] * 3
    for one in case.requests:
        assert one.ttft_ms is not None
        assert one.ttft_ms >= 20
        assert len(one.itl_ms) == 2  # the part without text is no token
        assert one.itl_ms[0] >= 40
        assert one.n_tokens == 4
    assert serving.throughput(case) == pytest.approx(12 / case.seconds)
    assert serving.figure(case, "tpot_ms", 50).value >= 25


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda s: s._send(500, b"out of\nmemory"), "HTTP 500: out of memory"),
        (lambda s: s.stream({"error": "overloaded"}), "the server said: overloaded"),
        (lambda s: s.stream("a", done=False) or s.wfile.write(b"data: {cut\n"), "JSONDecodeError"),
        (lambda s: s.stream(""), "the answer held no text"),
        (lambda s: s.stream("a", "b", done=False), "HTTPException: the stream ended before [DONE]"),
        (lambda s: s.stream("a", ["b"]), "ValueError: an event is no JSON object"),
        (lambda s: s.stream("a", {"choices": [None]}), "ValueError: an event is of another form"),
        (lambda s: s.stream("a", {"usage": {"completion_tokens": "x"}}), "ValueError: an event is of another form"),
        (lambda s: time.sleep(1.5), "TimeoutError: timed out"),
    ],
)
def test_a_request_that_fails_is_counted_and_the_others_go_on(
    how: Callable[[Scripted], None], said: str, scripted: Server
) -> None:
    turns = iter([False, True, False])  # the first warms up

    def every_second(server: Scripted) -> None:
        how(server) if next(turns) else server.stream("a", "b")

    (case,) = serving.measure(scripted(every_second), PROMPTS, n_tokens=2, n_requests=2).cases
    bad, good = case.requests
    assert good.error is None
    assert bad.error is not None
    assert bad.error.startswith(said)
    assert "\n" not in bad.error


def test_a_server_may_end_with_a_reason_alone(scripted: Server) -> None:
    last = {"choices": [{"text": "", "finish_reason": "length"}]}
    (case,) = serving.measure(scripted(lambda s: s.stream("a", "b", last, done=False)), PROMPTS, n_tokens=2).cases
    assert {request.error for request in case.requests} == {None}


@pytest.mark.alone
def test_clients_ask_at_once_and_rates_do_not_wait(scripted: Server) -> None:
    endpoint = scripted(lambda s: s.stream("a", "b", wait_s=0.1))
    one, four, fast = serving.measure(
        endpoint, PROMPTS, n_tokens=2, concurrency=[1, 4], rates=[50.0], n_requests=8
    ).cases
    assert one.seconds > 1.5  # 8 times 0.2 s
    assert four.seconds < one.seconds / 2
    assert (fast.concurrency, fast.rate) == (None, 50.0)
    assert fast.seconds < one.seconds / 2
    assert [one.sent_s for one in fast.requests] == sorted(one.sent_s for one in fast.requests)


def test_goodput_counts_what_kept_every_objective() -> None:
    made = [
        ServedRequest(sent_s=0, done_s=1, ttft_ms=100, itl_ms=[10, 30]),
        ServedRequest(sent_s=0, done_s=1, ttft_ms=300, itl_ms=[10, 10]),
        ServedRequest(sent_s=0, done_s=1, ttft_ms=100, itl_ms=[10, 10]),
        ServedRequest(sent_s=0, error="HTTP 500: "),
    ]
    case = ServedCase(concurrency=1, rate=None, seconds=2.0, requests=made)
    assert serving.goodput(case) == 1.5
    assert serving.goodput(case, ttft_ms=200) == 1.0
    assert serving.goodput(case, ttft_ms=200, tpot_ms=15) == 0.5
    lost = case.model_copy(update={"requests": made[3:]})
    with pytest.raises(EngineError, match=r"no request was answered .*HTTP 500"):
        serving.figure(lost, "ttft_ms", 50)


def test_an_endpoint_is_found_or_refused_in_one_line(scripted: Server) -> None:
    endpoint = scripted(lambda s: s.stream("a"))
    assert endpoint.model == "m"
    with pytest.raises(UsageError, match="no model 'other'; it has m"):
        Endpoint.find(endpoint.url, "other")
    with pytest.raises(UsageError, match="no address of a server"):
        Endpoint.find("localhost:8000")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match="is the server up"):
        Endpoint.find(f"http://127.0.0.1:{port}/v1")


@pytest.mark.parametrize("models", [[], None, {"data": None}, {"data": [3]}, {"data": [{"name": "m"}]}])
def test_a_list_of_models_of_another_form_is_one_line(models: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "_get", lambda self, path: models)
    with pytest.raises(EngineError, match=r"/v1/models names no models: .*; is it OpenAI-compatible\?"):
        Endpoint.find("http://127.0.0.1/v1")


def test_what_was_timed_is_printed_before_a_history_that_fails(scripted: Server, tmp_path: Path) -> None:
    screen, raw = Console(file=io.StringIO(), width=120), tmp_path / "raw.json"
    asked: dict[str, Any] = {"concurrency": [1], "rates": [], "n_requests": 2, "n_tokens": 3, "prompt_words": 7}
    with pytest.raises(ArtifactError, match="cannot be used as history"):
        bench_http(scripted(lambda s: s.stream("a", "b")), screen, **asked, json=raw, history=tmp_path)
    assert "goodput/s" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert len(Timings.model_validate_json(raw.read_bytes()).served) == 1


@pytest.fixture
def real_server(tmp_path: Path) -> Iterator[str]:
    """llama-cpp-python's own server on loopback, with a tiny model that says one letter as GGUF."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette_context")
    pytest.importorskip("llama_cpp")
    from edgetune.export import gguf
    from edgetune.recipe_export import GgufExport

    model = make_tiny_model(tmp_path / "model", says="a")
    file = gguf.run(GgufExport(type="F32"), model, tmp_path / "gguf", moments=None, calibration_digest=None).path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "llama_cpp.server", "--model", str(file / "model.gguf"), "--port", str(port),
         "--n_ctx", "256", "--n_threads", "1", "--interrupt_requests", "false", "--model_alias", "tiny"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                Endpoint.find(url)
                break
            except EngineError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(10)


def test_a_server_is_asked_the_prompts_of_bench_remembered_and_merged(
    scripted: Server, tiny_gguf: Artifact, tmp_path: Path
) -> None:
    """Of a file that is named the prompts are text of the ids that `bench` gives it, and its digest is kept."""
    asked: list[str] = []

    def keep(server: Scripted) -> None:
        asked.append(server.body["prompt"])
        server.stream("a", "b", "c")

    endpoint = scripted(keep)
    screen, raw, place = Console(file=io.StringIO(), width=120), tmp_path / "raw.json", tmp_path / "history.sqlite"
    cases: dict[str, Any] = {"concurrency": [1], "rates": [50.0], "n_requests": 2, "n_tokens": 3, "prompt_words": 7}
    assert bench_http(endpoint, screen, **cases, artifact=tiny_gguf.path, prompt_tokens=8, json=raw, history=place)
    (job,) = jobs([tiny_gguf.path], [], n_threads=1)
    stream = bench.prompt_ids([job], timeout_s=60)
    engine = LlamaEngine.load(tiny_gguf.path, n_ctx=8, n_threads=1)
    assert sorted(asked) == sorted(engine.detokenize(stream[at : at + 8]) for at in range(0, 40, 8))
    assert asked[0] == engine.detokenize(make_prompts(stream, [8])[8])
    engine.close()
    (served,) = Timings.model_validate_json(raw.read_bytes()).served
    assert (served.artifact_digest, served.prompt_tokens) == (tiny_gguf.digest, 8)

    trends = history.trends(place, artifact=tiny_gguf.digest)
    port = endpoint.url.rpartition(":")[2]
    assert [(t.engine.rpartition(":")[2], t.prompt_tokens, t.new_tokens) for t in trends] == [
        (f"{port}, 1 clients", 8, 3), (f"{port}, 50/s", 8, 3),
    ]  # fmt: skip
    past.history(place, screen, artifact="", machine="", add=raw)
    assert "50/s" in screen.file.getvalue()  # type: ignore[attr-defined]

    report = sample_report(n_rows=20)
    mine = report.latency[0].subject
    with pytest.raises(UsageError, match="timed and scored none of the files"):
        past.merge_timings(report, raw)
    for digest, name in ((mine.artifact_digest, mine.name), (None, "m")):
        same = served.model_copy(update={"artifact_digest": digest})
        raw.write_text(timings(7.0).model_copy(update={"results": [], "served": [same]}).model_dump_json())
        said = [line.text for line in beside.lines(past.merge_timings(report, raw)) if line.subject == name]
        assert f"as {endpoint.url} serves it, asked from A, 2 cores: 1 at once: TTFT p50" in said[-2]
        assert "50 requests a second: TTFT p50" in said[-1]

    asked.clear()
    bench_http(endpoint, screen, **cases, history=place)
    words = bench.prompt_text().split()
    assert sorted(asked) == sorted(" ".join(words[at : at + 7]) for at in range(0, 35, 7))
    assert len(history.trends(place)) == 4  # another subject: no file was named


def test_a_real_server_is_timed(real_server: str, tmp_path: Path) -> None:
    screen, raw = Console(file=io.StringIO(), width=120), tmp_path / "raw.json"
    endpoint = Endpoint.find(real_server, "tiny", timeout_s=60)
    asked = {"concurrency": [1, 2], "rates": [20.0], "n_requests": 4, "prompt_words": 12, "n_tokens": 6}
    bench_http(endpoint, screen, **asked, ttft_slo=60_000, json=raw)  # type: ignore[arg-type]
    (served,) = Timings.model_validate_json(raw.read_bytes()).served
    assert served.model == "tiny"
    assert [(case.concurrency, case.rate) for case in served.cases] == [(1, None), (2, None), (None, 20.0)]
    for case in served.cases:
        assert [one.error for one in case.requests] == [None] * 4
        assert [len(one.itl_ms) for one in case.requests] == [5] * 4
        assert {one.n_tokens for one in case.requests} <= {None, 6}
        assert serving.goodput(case, ttft_ms=60_000) == pytest.approx(4 / case.seconds)

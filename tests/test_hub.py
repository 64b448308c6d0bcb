"""A hub on this machine: what is downloaded for which verb, and that it is told of."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from rich.console import Console

from edgetune import hub, pipeline, plan, sources
from edgetune.artifact import Artifact, Store
from edgetune.errors import DiskSpaceError, SourceError
from tests.test_pipeline import make_recipe
from tests.test_sources import shard

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves one repository, org/model, as the hub's library asks for it, and notes which files were taken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.taken = folder, set[str]()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/org/model/tree/"):
                    self.give(json.dumps(fake.tree()).encode(), body=body, kind="application/json")
                elif path.startswith("/api/models/org/model"):
                    files = [{"rfilename": file.name} for file in fake.folder.iterdir()]
                    about = {"id": "org/model", "sha": COMMIT, "siblings": files}
                    self.give(json.dumps(about).encode(), body=body, kind="application/json")
                elif path.startswith("/org/model/resolve/") and (fake.folder / Path(path).name).is_file():
                    if body:
                        fake.taken.add(Path(path).name)
                    self.give((fake.folder / Path(path).name).read_bytes(), body=body, kind="application/octet-stream")
                else:
                    self.send_error(404)

            def give(self, content: bytes, *, body: bool, kind: str) -> None:
                self.send_response(200)
                for name, value in {
                    "Content-Type": kind, "Content-Length": str(len(content)), "X-Repo-Commit": COMMIT,
                    "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                }.items():  # fmt: skip
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size,
             "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
            for file in sorted(self.folder.iterdir())
        ]  # fmt: skip


@pytest.fixture
def served(tiny_model_wide: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = Path(shutil.copytree(tiny_model_wide.path, tmp_path / "repository"))
    fake = FakeHub(folder)
    threading.Thread(target=fake.server.serve_forever, daemon=True).start()
    for module in (huggingface_hub.constants, huggingface_hub.file_download, huggingface_hub.hf_api):
        for name, value in (
            ("ENDPOINT", fake.url),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_HUB_OFFLINE", False),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    template = f"{fake.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.mark.usefixtures("known_speeds")
def test_plan_leaves_the_weights_where_they_are(served: FakeHub, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, Path("unused")).model_copy(update={"base": "org/model"})
    store = Store(tmp_path / "store")
    unmade = plan.plan(recipe, store)
    assert "config.json" in served.taken
    assert "tokenizer.json" in served.taken
    assert "model.safetensors" not in served.taken
    assert [stage.done for stage in unmade][:2] == [False, None]
    assert not (tmp_path / "store").exists()

    work = pipeline.Pipeline(recipe, plan.preflight(recipe), pipeline.Stages(store, tmp_path / "run", quiet()))
    assert "model.safetensors" in served.taken
    work.prepare()
    served.taken.clear()
    assert plan.plan(recipe, store)[0].done  # now that the weights are here, they say which base it is
    assert served.taken == set()


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_run_tells_of_the_download(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MB", 1000)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as `terminal.quiet` does
    told: list[tuple[int, int, str]] = []
    sources.find("org/model", progress=lambda *report: told.append(report))
    n_bytes = sum(f.stat().st_size for f in served.folder.iterdir() if f.name in served.taken)
    assert told[-1][0] == pytest.approx(n_bytes // 1000, abs=1)
    assert {label for *_, label in told} == {"MB"}
    assert all(done <= total for done, total, _ in told)


def test_shards_stay_where_they_are_and_licences_come(served: FakeHub) -> None:
    shard(served.folder, "a.safetensors", "b.safetensors")
    (served.folder / "LICENSE").write_text("Do as you like.")
    planned = sources.find("org/model", weights=False)
    assert {"LICENSE", sources.INDEX} <= served.taken
    assert not [name for name in served.taken if name.endswith(".safetensors")]
    whole = sources.find("org/model")
    assert whole.identity not in (planned.identity, sources.find(str(served.folder)).identity)
    assert whole.digest == sources.find("org/model", weights=False).digest == sources.find(str(served.folder)).digest


def test_pickles_on_a_hub_are_refused_by_plan(served: FakeHub) -> None:
    (served.folder / "model.safetensors").rename(served.folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"base 'org/model': .* pickle weights \(pytorch_model\.bin\) are refused"):
        sources.find("org/model", weights=False)


def test_what_the_hub_does_not_have_is_one_line(served: FakeHub) -> None:
    with pytest.raises(SourceError, match=r"^base 'org/other': no such folder, and the hub did not give it \(.+\)$"):
        sources.find("org/other")


def test_a_full_disk_while_downloading(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(DiskSpaceError, match="no space left on the disk of the hub's cache"):
        sources.find("org/model")

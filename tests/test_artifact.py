"""Artifacts are whole or absent: exceptions, full disks, kills at any moment, and two processes at once."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgetune import artifact
from edgetune.artifact import MANIFEST, Artifact, Draft, Store, draft, file_digest, identity, require_space, write_text
from edgetune.errors import ArtifactError, DiskSpaceError

STAGE = "test/1"


def make(out: Path, *, text: str = "weights", **config: Any) -> Artifact:
    with draft(out, kind="model", stage=STAGE, config=config, versions={"x": "1"}) as pending:
        (pending.path / "a.bin").write_text(text)
        (pending.path / "sub").mkdir()
        (pending.path / "sub" / "b.bin").write_text("more")
        pending.notes["n"] = 3
    return pending.artifact


def names(folder: Path) -> list[str]:
    """What lies in a folder, locks aside."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_a_draft_becomes_an_artifact_with_every_file_in_its_manifest(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent", part=1)
    with draft(tmp_path / "out", kind="gguf", stage=STAGE, config={"k": 1}, parents=[parent]) as pending:
        assert pending.path.parent == tmp_path  # the rename must not cross disks
        assert not (tmp_path / "out").exists()
        (pending.path / "a.bin").write_text("abc")
        (pending.work / "checkpoint").write_text("not part of it")
        with pytest.raises(AssertionError):
            _ = pending.artifact
    made = pending.artifact
    assert made == Artifact.open(tmp_path / "out")
    assert list(made.manifest.files) == ["a.bin"]
    assert made.manifest.files["a.bin"].sha256 == file_digest(made.path / "a.bin")
    assert made.size_bytes == 3
    assert made.manifest.parents == {parent.identity: parent.digest}
    assert made.identity == identity(STAGE, {"k": 1}, [parent.identity])
    made.verify()
    assert names(tmp_path) == ["out", "parent"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EACCES, "denied")])
def test_an_exception_leaves_only_the_work_folder(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with draft(tmp_path / "out", kind="model", stage=STAGE, config={}) as pending:
            (pending.path / "a.bin").write_text("abc")
            (pending.work / "checkpoint").write_text("12")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == [".out.work"]
    with draft(tmp_path / "out", kind="model", stage=STAGE, config={}) as pending:
        assert (pending.work / "checkpoint").read_text() == "12"
    assert names(tmp_path) == ["out"]


def test_what_a_kill_left_in_a_draft_is_never_taken(tmp_path: Path) -> None:
    half = tmp_path / ".out.draft"
    half.mkdir()
    (half / "stale.bin").write_text("half")
    with pytest.raises(ArtifactError, match=r"\.out\.draft is not an artifact: manifest.json cannot be read"):
        Artifact.open(half)
    made = make(tmp_path / "out")
    assert sorted(made.manifest.files) == ["a.bin", "sub/b.bin"]
    assert not (made.path / "stale.bin").exists()
    assert not half.exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / "a.bin").write_text("wei"), r"a\.bin has 3 bytes, its manifest says 7; make it again"),
        (lambda p: (p / "sub" / "b.bin").unlink(), r"b\.bin has None bytes, its manifest says 4"),
        (lambda p: (p / MANIFEST).unlink(), r"is not an artifact: manifest\.json cannot be read \(No such file"),
        (lambda p: (p / MANIFEST).write_bytes((p / MANIFEST).read_bytes()[:50]), r"manifest\.json is damaged at"),
        (lambda p: (p / MANIFEST).write_bytes(b""), r"manifest\.json is damaged at its start"),
        (lambda p: (p / MANIFEST).write_bytes(b"\xff\xfe"), r"manifest\.json is damaged at its start"),
        (lambda p: (p / MANIFEST).write_text("[]"), r"manifest\.json is damaged at its start"),
        (
            lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace('"schema_version": 1', '"x": 1')),
            r"manifest\.json is damaged at x",
        ),
    ],
)
def test_a_damaged_artifact_is_refused_and_made_again(tmp_path: Path, damage: Any, says: str) -> None:
    store = Store(tmp_path)
    made = identity(STAGE, {})
    whole, _ = store.once(made, make)
    before = whole.digest
    damage(whole.path)
    with pytest.raises(ArtifactError, match=says):
        Artifact.open(whole.path)
    assert store.get(made) is None
    again, made_now = store.once(made, make)
    assert made_now
    assert again.digest == before
    again.verify()


@pytest.mark.parametrize(
    "name", ["../stranger.bin", "{folder}/stranger.bin", "sub/../../stranger.bin", "linked/../stranger.bin"]
)
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    made = make(tmp_path / "out")
    (tmp_path / "stranger.bin").write_text("weights")
    (tmp_path / "far").mkdir()
    (made.path / "linked").symlink_to(tmp_path / "far")
    text = (made.path / MANIFEST).read_text()
    (made.path / MANIFEST).write_text(text.replace('"a.bin"', f'"{name.format(folder=tmp_path)}"'))
    with pytest.raises(ArtifactError, match=r"manifest\.json names '.*', which lies outside of its folder$"):
        Artifact.open(made.path)


def test_a_file_may_lie_elsewhere_and_be_linked(tmp_path: Path) -> None:
    made = make(tmp_path / "out")
    (made.path / "a.bin").rename(tmp_path / "blob")
    (made.path / "a.bin").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (tmp_path / "beside").symlink_to(made.path)
    assert Artifact.open(tmp_path / "beside").digest == made.digest


def test_verify_finds_a_flipped_byte(tmp_path: Path) -> None:
    made = make(tmp_path / "out")
    (made.path / "a.bin").write_text("weightS")
    Artifact.open(made.path)  # sizes alone do not tell
    with pytest.raises(ArtifactError, match=r"a\.bin is not the file that was made: its sha256 differs"):
        made.verify()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_text", full)
        with pytest.raises(DiskSpaceError) as caught:
            make(tmp_path / "out")
    assert str(caught.value) == f"no space left on the disk of {tmp_path} while writing out"
    assert caught.value.exit_code == 2
    assert names(tmp_path) == [".out.work"]
    make(tmp_path / "out")


def test_require_space_tells_what_is_needed_and_what_is_there(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(DiskSpaceError, match=r"1099511627776 MiB are needed below .*missing, \d+ MiB are free"):
        require_space(tmp_path / "missing", 2**60)


def test_the_same_identity_twice_wins_and_another_is_refused(tmp_path: Path) -> None:
    first = make(tmp_path / "out", k=1)
    again = make(tmp_path / "out", text="other bytes", k=1)
    assert again == first
    assert (first.path / "a.bin").read_text() == "weights"
    with pytest.raises(ArtifactError, match="already holds another artifact; choose another folder or remove it"):
        make(tmp_path / "out", k=2)
    assert names(tmp_path) == [".out.work", "out"]
    Artifact.open(tmp_path / "out").verify()


def test_a_folder_that_is_no_artifact_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_two_makings_give_the_same_bytes(tmp_path: Path) -> None:
    one = make(tmp_path / "one" / "out", k=1)
    time.sleep(0.01)
    two = make(tmp_path / "two" / "elsewhere", k=1)
    assert (one.path / MANIFEST).read_bytes() == (two.path / MANIFEST).read_bytes()
    assert one.digest == two.digest
    text = (one.path / MANIFEST).read_text()
    assert str(tmp_path) not in text
    assert time.strftime("%Y-") not in text


def test_every_part_of_what_makes_an_artifact_changes_its_identity() -> None:
    plain = identity("a/1", {"k": 1}, ["p"], {"s": "d"})
    others = [
        identity("a/2", {"k": 1}, ["p"], {"s": "d"}),
        identity("a/1", {"k": 2}, ["p"], {"s": "d"}),
        identity("a/1", {"k": 1}, ["q"], {"s": "d"}),
        identity("a/1", {"k": 1}, ["p"], {"s": "e"}),
        identity("a/1", {"k": 1}, ["p"]),
    ]
    assert len({plain, *others}) == 6
    assert identity("a/1", {"x": 1, "y": 2}) == identity("a/1", {"y": 2, "x": 1})


def test_a_store_refuses_a_stage_that_makes_something_else(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="planned identity 000000000000, made"):
        Store(tmp_path).once("0" * 64, make)
    assert Store(tmp_path).get("0" * 64) is None


def test_a_store_gives_what_is_there(tmp_path: Path) -> None:
    store, made = Store(tmp_path / "deep" / "store"), identity(STAGE, {})
    assert store.get(made) is None
    first, made_now = store.once(made, make)
    again, made_again = store.once(made, make)
    assert (made_now, made_again) == (True, False)
    assert first == again == store.get(made)


def _once(root: Path, barrier: Any, told: Any) -> None:
    def slow(out: Path) -> Artifact:
        time.sleep(0.3)
        return make(out)

    barrier.wait(30)
    found, made_now = Store(root).once(identity(STAGE, {}), slow)
    found.verify()
    told.put(made_now)


def test_two_processes_make_one_artifact_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_once, args=(tmp_path, barrier, told)) for _ in range(2)]
    for worker in workers:
        worker.start()
    flags = [told.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert sorted(flags) == [False, True]
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_write_text_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    write_text(file, "first")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="full"):
            write_text(file, "second")
    assert file.read_text() == "first"
    assert names(tmp_path) == ["report.json"]
    write_text(file, "zweite ü")
    assert file.read_bytes() == "zweite ü".encode()


KILLED = """
import sys, time
from pathlib import Path
from edgetune.artifact import Artifact, Store, draft, identity

def make(out):
    with draft(out, kind="model", stage="test/1", config={}, versions={"x": "1"}) as pending:
        (pending.work / "checkpoint").write_text("42")
        (pending.path / "a.bin").write_text("wei")
        print("in the middle", flush=True)
        time.sleep(60)
    return pending.artifact

Store(Path(sys.argv[1])).once(identity("test/1", {}), make)
"""


def test_sigkill_in_the_middle_leaves_no_artifact_and_the_next_run_succeeds(tmp_path: Path) -> None:
    made = identity(STAGE, {})
    store = Store(tmp_path)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in the middle\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(30) == -signal.SIGKILL
    place = store.place(made)
    assert (tmp_path / f".{place.name}.draft" / "a.bin").read_text() == "wei"
    assert not place.exists()
    assert store.get(made) is None
    seen: list[str] = []

    def resume(out: Path) -> Artifact:
        with draft(out, kind="model", stage=STAGE, config={}, versions={"x": "1"}) as pending:
            seen.append((pending.work / "checkpoint").read_text())
            assert list(pending.path.iterdir()) == []
            (pending.path / "a.bin").write_text("weights")
        return pending.artifact

    again, made_now = store.once(made, resume)
    assert made_now
    assert seen == ["42"]  # the work of the killed run is there
    again.verify()
    assert names(tmp_path) == [place.name]


def test_a_full_disk_at_the_first_folder_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == ".out.draft":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskSpaceError, match="no space left"):
        make(tmp_path / "out")


def test_a_draft_holds_no_artifact_before_its_end(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="before its block ends"):
        _ = Draft(tmp_path, tmp_path).artifact

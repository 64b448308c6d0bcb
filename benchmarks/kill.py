"""Kill a run at random moments and around every rename, run it again, and compare every byte that ships.

    python benchmarks/kill.py            # 50 kills at random moments, and one before and one after each rename
    python benchmarks/kill.py --one-side # the same with one side of each rename, drawn: half of them is left out
    python benchmarks/kill.py --quick    # 6 kills

A random moment that comes after the run's end kills nothing and is drawn again until there are as many kills as asked.
Each run is forked from a process that has imported torch, so that kills are spent on work and not on imports. Each kill
has a store of its own. SIGKILL goes to the whole process group; engines run in sessions of their own and must end by
themselves. Then the same command runs to its end with the same store. `lost` counts artifacts that were whole at the
kill and are not the same afterwards, folders that are there but not whole, artifacts missing at the end, and second
runs that fail; `different_bytes` counts shipped files that are not those of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
from tiny import PACKAGES, make_recipe

from edgetune import measure
from edgetune.artifact import MANIFEST, Artifact, Store, file_digest, write_text
from edgetune.errors import ArtifactError

RESULT = Path(__file__).resolve().parent / "results" / "kill.json"
SHIPS = ("model", "adapter", "gptq", "gguf", "onnx")
RUN_TIMEOUT_S, ORPHAN_TIMEOUT_S = 600, 20
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["edgetune.pipeline", "edgetune.export.gguf", "edgetune.export.onnx"])
LIVE: set[ForkServerProcess] = set()  # runs that a stopped benchmark takes with it


@dataclass(frozen=True)
class Moment:
    """When to kill: seconds after the start, or before or after the k-th rename (counted from 0)."""

    seconds: float | None = None
    rename: int | None = None
    side: str = ""

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s" if self.seconds is not None else f"{self.side} rename {self.rename}"


@dataclass
class Kill:
    """One kill and what came of it."""

    moment: Moment
    killed: bool = False  # else the run had ended before its moment came
    where: str = ""  # the stage, or what was renamed
    whole_at_kill: int = 0
    orphans: int = 0  # engine processes that were alive after ORPHAN_TIMEOUT_S
    lost: list[str] = field(default_factory=list)
    different_bytes: list[str] = field(default_factory=list)
    second_run_s: float = 0.0

    @property
    def outcome(self) -> str:
        if not self.killed:
            return "ended before"
        return "lost" if self.lost else "different bytes" if self.different_bytes else "same bytes"


def child(recipe: Path, home: Path, rename: int | None, side: str) -> None:
    """Be the run, in a process group of its own: wrap every rename, note it, and die at the one that is asked for."""
    os.setsid()
    output = os.open(home / "output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    made = 0

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any, **kwargs: Any) -> Any:
            nonlocal made
            k, made = made, made + 1
            with (home / "renames.log").open("a", encoding="utf-8") as stream:
                stream.write(_told(target, home) + "\n")
            if k == rename and side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            original(source, target, **kwargs)
            if k == rename:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    # Path.rename, Path.replace and shutil.move look these up in `os` when they are called
    os.rename, os.replace = wrap(os.rename), wrap(os.replace)

    from rich.console import Console

    from edgetune import pipeline
    from edgetune.recipe import load_recipe

    pipeline.run(load_recipe(recipe), home / "run", Store(home / "store"), Console(width=200))


def _told(target: Any, home: Path) -> str:
    """Name a renamed file without the names that change from run to run."""
    path = Path(os.fsdecode(target))
    return str(path.relative_to(home)) if path.is_relative_to(home) else path.name


def start(recipe: Path, home: Path, moment: Moment) -> ForkServerProcess:
    """Start a run."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "renames.log").unlink(missing_ok=True)
    process = FORKS.Process(target=child, args=(recipe, home, moment.rename, moment.side))
    process.start()
    LIVE.add(process)
    return process


def finish(recipe: Path, home: Path) -> tuple[bool, float]:
    """Run to the end; gives whether it came there, and the seconds."""
    began = time.monotonic()
    process = start(recipe, home, Moment())
    process.join(RUN_TIMEOUT_S)
    if process.exitcode is None:
        _kill_group(process)
    LIVE.discard(process)
    return process.exitcode == 0, round(time.monotonic() - began, 2)


def _kill_group(process: ForkServerProcess) -> int:
    """SIGKILL the process group; gives how many descendants outlive it."""
    below = _below(process)
    try:
        os.killpg(_pid(process), signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet, or is gone
        process.kill()
    process.join()
    return _outlive(below)


def _pid(process: ForkServerProcess) -> int:
    assert process.pid is not None, "it was started"
    return process.pid


def _below(process: ForkServerProcess) -> list[psutil.Process]:
    try:
        return psutil.Process(_pid(process)).children(recursive=True)
    except psutil.Error:
        return []


def _outlive(below: list[psutil.Process]) -> int:
    _, alive = psutil.wait_procs(below, timeout=ORPHAN_TIMEOUT_S)
    for orphan in alive:
        orphan.kill()
    return len(alive)


def run_until(recipe: Path, home: Path, moment: Moment, kill: Kill) -> None:
    """Start a run and let it die at its moment."""
    process = start(recipe, home, moment)
    if moment.seconds is not None:
        process.join(moment.seconds)
        if process.exitcode is None:
            kill.orphans = _kill_group(process)
    else:
        below: list[psutil.Process] = []
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while process.exitcode is None:  # it kills itself, so who is below it must be asked before
            if time.monotonic() > deadline:
                _kill_group(process)
                kill.lost.append(f"no end within {RUN_TIMEOUT_S} s")
                break
            below = _below(process) or below
            process.join(0.05)
        process.join()
        kill.orphans = _outlive(below)
    LIVE.discard(process)
    kill.killed = process.exitcode == -signal.SIGKILL
    if not kill.killed and process.exitcode != 0:
        kill.lost.append(f"first run ended with {process.exitcode}: {_last_line(home)}")
    renamed = (home / "renames.log").read_text().splitlines() if (home / "renames.log").exists() else []
    kill.where = renamed[-1] if moment.rename is not None and renamed else _stage(home / "run" / "log.jsonl")


def _stage(log: Path) -> str:
    """Name the stage that a run was in, by its log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if not lines:
        return "before the first stage"
    last = json.loads(lines[-1])
    return str(last["stage"]) if last["event"] == "start" else f"after {last['stage']}"


def _last_line(home: Path) -> str:
    return ((home / "output.log").read_text(errors="replace").strip().splitlines() or [""])[-1][:300]


def in_store(store: Path) -> tuple[dict[str, Artifact], list[str]]:
    """Give every whole artifact of a store by its folder's name, and the folders that are not whole."""
    whole, torn = {}, []
    for path in sorted(store.iterdir()) if store.exists() else []:
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            found = Artifact.open(path)
            found.verify()
            whole[path.name] = found
        except (ArtifactError, OSError) as error:
            torn.append(f"{path.name} is there and not whole: {error}")
    return whole, torn


def _stays(artifact: Artifact) -> bool:
    """Tell whether a second run must find it: what was timed on a busy machine is timed again on purpose."""
    if artifact.manifest.stage != measure.LATENCY_STAGE:
        return True
    return measure.is_clean(measure.read_latency(artifact))


def shipped(store: Path) -> dict[str, str]:
    """Give the digest of every file that ships, manifests with them: "kind folder/file" -> sha256."""
    found = {}
    for name, artifact in in_store(store)[0].items():
        if artifact.manifest.kind in SHIPS:
            for file in (MANIFEST, *artifact.manifest.files):
                found[f"{artifact.manifest.kind} {name}/{file}"] = file_digest(artifact.path / file)
    return found


def attempt(recipe: Path, home: Path, moment: Moment, expected: dict[str, str]) -> Kill:
    """Kill one run at its moment, run again, and compare."""
    kill = Kill(moment)
    run_until(recipe, home, moment, kill)
    before, torn = in_store(home / "store")
    digests = {name: artifact.digest for name, artifact in before.items() if _stays(artifact)}
    kill.whole_at_kill = len(before)
    kill.lost += torn
    ended, kill.second_run_s = finish(recipe, home)
    if not ended:
        kill.lost.append(f"the second run failed: {_last_line(home)}")
    after, torn = in_store(home / "store")
    kill.lost += torn
    for name, digest in digests.items():
        if name not in after or after[name].digest != digest:
            kill.lost.append(f"{name} ({before[name].manifest.stage}) was whole and was made again")
    found = shipped(home / "store")
    kill.lost += [f"{name} is missing" for name in expected if name not in found]
    kill.different_bytes = [name for name, digest in found.items() if expected.get(name) != digest]
    return kill


def benchmark(n_kills: int, n_renames: int | None, seed: int, jobs: int, out: Path, *, one_side: bool) -> int:
    """Do all kills and write the result after each; gives the exit code."""
    began, load_before = time.monotonic(), os.getloadavg()
    busy_before = psutil.cpu_percent(1) / 100
    with tempfile.TemporaryDirectory(prefix="edgetune-kill-") as temporary:
        folder = Path(temporary)
        recipe = make_recipe(folder)
        ended, duration = finish(recipe, folder / "whole")
        if not ended:
            print(f"the uninterrupted run failed: {_last_line(folder / 'whole')}", file=sys.stderr)
            return 1
        expected = shipped(folder / "whole" / "store")
        kinds = {name.split()[0] for name in expected}
        assert kinds == set(SHIPS), f"the recipe ships {kinds}"
        renames = (folder / "whole" / "renames.log").read_text().splitlines()
        print(f"uninterrupted: {duration:.1f} s, {len(renames)} renames, {len(expected)} files", flush=True)
        kills: list[Kill] = []
        rng = random.Random(seed)
        pending = _moments(rng, n_kills, n_renames, len(renames), duration, one_side=one_side)

        def one(numbered: tuple[int, Moment]) -> Kill:
            home = folder / f"kill-{numbered[0]}"
            kill = attempt(recipe, home, numbered[1], expected)
            shutil.rmtree(home)
            return kill

        with ThreadPoolExecutor(jobs) as pool:
            try:
                while pending:
                    planned = len(kills) + len(pending)
                    for kill in pool.map(one, enumerate(pending, len(kills) + 1)):
                        kills.append(kill)
                        print(f"{len(kills)}/{planned} {kill.moment}: {kill.where}: {kill.outcome}", flush=True)
                        for line in kill.lost + kill.different_bytes:
                            print(f"    {line}", flush=True)
                        load = {"before": load_before, "after": os.getloadavg(), "busy_share_before": busy_before}
                        asked = {"seed": seed, "jobs": jobs, "one_side": one_side}
                        seconds = time.monotonic() - began
                        write_text(out, _result(kills, duration, renames, expected, asked, load, seconds))
                    pending = _drawn(rng, _missed(kills[-len(pending) :]), duration)
            except SystemExit:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(LIVE):
                    _kill_group(process)
                raise
    totals = _totals(kills)
    print(f"kills={totals['kills']} lost={totals['lost']} different_bytes={totals['different_bytes']}")
    return 1 if totals["lost"] or totals["different_bytes"] else 0


def _drawn(rng: random.Random, n: int, duration: float) -> list[Moment]:
    return [Moment(seconds=round(rng.uniform(0, duration), 3)) for _ in range(n)]


def _missed(kills: list[Kill]) -> int:
    """Count random moments that came after a run had ended well."""
    return sum(kill.moment.seconds is not None and kill.outcome == "ended before" and not kill.lost for kill in kills)


def _moments(
    rng: random.Random, n_kills: int, n_renames: int | None, found: int, duration: float, *, one_side: bool
) -> list[Moment]:
    """Draw random moments, and sides of each of the renames that were found; before and after it, or one of both."""
    moments = _drawn(rng, n_kills, duration)
    sides = ("before", "after")
    around = [Moment(rename=k, side=s) for k in range(found) for s in ([rng.choice(sides)] if one_side else sides)]
    if n_renames is not None and n_renames < len(around):
        around = sorted(rng.sample(around, n_renames), key=lambda m: (m.rename or 0, m.side))
    return moments + around


def _totals(kills: list[Kill]) -> dict[str, int]:
    return {
        "kills": sum(kill.killed for kill in kills),
        "at_random_moments": sum(kill.killed and kill.moment.seconds is not None for kill in kills),
        "ended_before": sum(not kill.killed for kill in kills),
        "lost": sum(len(kill.lost) for kill in kills),
        "different_bytes": sum(len(kill.different_bytes) for kill in kills),
        "orphans": sum(kill.orphans for kill in kills),
    }


def _result(
    kills: list[Kill], duration: float, renames: list[str], expected: dict[str, str],
    asked: dict[str, Any], load: dict[str, Any], seconds: float,
) -> str:  # fmt: skip
    from edgetune.runtime.machine import describe

    found = {
        "benchmark": "kill",
        "totals": _totals(kills),
        **asked,
        "seconds": round(seconds, 1),
        "uninterrupted_s": duration,
        "renames": renames,
        "shipped_files": len(expected),
        "machine": describe().model_dump(mode="json"),
        "versions": {name: _version(name) for name in PACKAGES},
        "load_average": load,
        "kills": [asdict(kill) | {"outcome": kill.outcome} for kill in kills],
    }
    return json.dumps(found, indent=1) + "\n"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills at random moments")
    parser.add_argument("--renames", type=int, help="kills around renames; all where absent")
    parser.add_argument("--one-side", action="store_true", help="one side of each rename, drawn; half is left out")
    parser.add_argument("--quick", action="store_true", help="3 random moments and 3 renames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="kills at the same time, each with a store of its own")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that runs and temporary folders go too
    given.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        counts = (3, 3) if given.quick else (given.kills, given.renames)
        return benchmark(*counts, given.seed, given.jobs, given.out, one_side=given.one_side)
    finally:
        for process in list(LIVE):  # of a benchmark that is told to stop
            _kill_group(process)


if __name__ == "__main__":
    sys.exit(main())

"""Kill a run at random moments and around every rename, run it again, and compare every byte that ships.

    python benchmarks/kill.py            # 50 kills at random moments, and one before and one after each rename
    python benchmarks/kill.py --one-side # the same with one side of each rename, drawn: half of them is left out
    python benchmarks/kill.py --quick    # 6 kills
    python benchmarks/kill.py --add      # only the kills that the result of an earlier, stopped call lacks

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
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
from killed_run import LIVE, Kill, Moment, finish, kill_group, last_line, run_until
from tiny import PACKAGES, make_recipe

from edgetune import measure
from edgetune.artifact import MANIFEST, Artifact, file_digest, write_text
from edgetune.errors import ArtifactError

RESULT = Path(__file__).resolve().parent / "results" / "kill.json"
SHIPS = ("model", "adapter", "gptq", "gguf", "onnx")


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
        kill.lost.append(f"the second run failed: {last_line(home)}")
    after, torn = in_store(home / "store")
    kill.lost += torn
    for name, digest in digests.items():
        if name not in after or after[name].digest != digest:
            kill.lost.append(f"{name} ({before[name].manifest.stage}) was whole and was made again")
    found = shipped(home / "store")
    kill.lost += [f"{name} is missing" for name in expected if name not in found]
    kill.different_bytes = [name for name, digest in found.items() if expected.get(name) != digest]
    return kill


def benchmark(
    n_kills: int, n_renames: int | None, seed: int, jobs: int, out: Path, *, one_side: bool, add: bool
) -> int:
    """Do all kills and write the result after each; gives the exit code."""
    earlier = json.loads(out.read_text(encoding="utf-8")) if add else {}
    began, load_before = time.monotonic(), os.getloadavg()
    busy_before = psutil.cpu_percent(1) / 100
    with tempfile.TemporaryDirectory(prefix="edgetune-kill-") as temporary:
        folder = Path(temporary)
        recipe = make_recipe(folder)
        ended, duration = finish(recipe, folder / "whole")
        if not ended:
            print(f"the uninterrupted run failed: {last_line(folder / 'whole')}", file=sys.stderr)
            return 1
        expected = shipped(folder / "whole" / "store")
        kinds = {name.split()[0] for name in expected}
        assert kinds == set(SHIPS), f"the recipe ships {kinds}"
        renames = (folder / "whole" / "renames.log").read_text().splitlines()
        print(f"uninterrupted: {duration:.1f} s, {len(renames)} renames, {len(expected)} files", flush=True)
        if add and (other := _other_rename(earlier["renames"], renames)):
            print(f"{other}: do the kills of {out} again without --add", file=sys.stderr)
            return 1
        kills = [_read_kill(kill) for kill in earlier.get("kills", ())]
        rng = random.Random(seed + len(kills))
        pending = _moments(rng, n_kills, n_renames, len(renames), duration, one_side=one_side)
        pending = _lacking(pending, kills, one_side=one_side)

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
                        result = _result(kills, duration, renames, expected, asked, load, seconds)
                        write_text(out, json.dumps(result | _parts(earlier), indent=1) + "\n")
                    pending = _drawn(rng, _missed(kills[-len(pending) :]), duration)
            except SystemExit:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(LIVE):
                    kill_group(process)
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


def _other_rename(earlier: list[str], renames: list[str]) -> str | None:
    """Say where two runs rename other things, whatever the identities in the names."""
    for k, pair in enumerate(zip_longest(earlier, renames)):
        was, now = (re.sub(r"[0-9a-f]{16,}", "...", name or "nothing") for name in pair)
        if was != now:
            return f"rename {k} was {was}, and is {now}"
    return None


def _read_kill(kill: dict[str, Any]) -> Kill:
    moment = Moment(**kill["moment"])
    return Kill(**{key: value for key, value in kill.items() if key not in ("moment", "outcome")} | {"moment": moment})


def _lacking(moments: list[Moment], kills: list[Kill], *, one_side: bool) -> list[Moment]:
    """Leave out the moments that earlier kills have met: as many random ones, and a rename's side or either side."""
    met = {kill.moment for kill in kills if kill.killed}
    sides = {(moment.rename, "" if one_side else moment.side) for moment in met}
    at_random = [moment for moment in moments if moment.seconds is not None]
    left = max(0, len(at_random) - sum(moment.seconds is not None for moment in met))
    around = [m for m in moments if m.seconds is None and (m.rename, "" if one_side else m.side) not in sides]
    return at_random[:left] + around


def _parts(earlier: dict[str, Any]) -> dict[str, Any]:
    """Keep what an earlier call said of itself, beside its kills."""
    if not earlier:
        return {}
    kept = ("seed", "jobs", "one_side", "seconds", "uninterrupted_s", "machine", "versions", "load_average")
    part = {key: earlier[key] for key in kept} | {"kills": len(earlier["kills"])}
    return {"earlier_calls": [*earlier.get("earlier_calls", ()), part]}


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
) -> dict[str, Any]:  # fmt: skip
    from edgetune.runtime.machine import describe

    return {
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
    parser.add_argument("--add", action="store_true", help="keep the kills of the result there is, do what it lacks")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that runs and temporary folders go too
    given.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        n_kills, n_renames = (3, 3) if given.quick else (given.kills, given.renames)
        return benchmark(n_kills, n_renames, given.seed, given.jobs, given.out, one_side=given.one_side, add=given.add)
    finally:
        for process in list(LIVE):  # of a benchmark that is told to stop
            kill_group(process)


if __name__ == "__main__":
    sys.exit(main())

"""A child process of the tests: train some steps, and print the peak of its resident memory in MiB.

python -m tests.peak_child BASE ADAPT_JSON LENGTHS_JSON   rows of random tokens; tokens and labels of each
python -m tests.peak_child BASE PREFER_JSON               the rows that the config names
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgetune.adapt import preference, sft
from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered
from edgetune.progress import Report, silent
from edgetune.recipe_training import Adapt, Prefer

REPO = Path(__file__).resolve().parents[1]
TIMES = 3
GENERAL = tuple(range(300, 500)) * 32  # tokens that ewc guards


def highest(predicted: float, *arguments: str) -> float:
    """Give the highest peak in MiB of such children; one that comes within 15 % of the prediction is enough.

    Pages of libraries and of the model's file count while they are mapped, and a kernel that reclaims cold pages early
    (DAMON) takes some away: the peak of one small training was 994 MiB at the lowest, 1,336 at the highest.
    """
    found = 0.0
    for _ in range(TIMES):
        child = subprocess.run(
            [sys.executable, "-m", "tests.peak_child", *arguments], capture_output=True, text=True, cwd=REPO,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
        )  # fmt: skip
        found = max(found, float(child.stdout.splitlines()[-1]))
        if found * 1.15 >= predicted:
            break
    print(f"predicted {predicted:.0f}, measured {found:.0f} MiB")
    return found


def main() -> None:
    """Read the command line, train, tell."""
    base, config, *lengths = sys.argv[1:]
    source = Artifact.open(Path(base))
    if lengths:
        train(source, Adapt.model_validate_json(config), json.loads(lengths[0]))
    else:
        prefer(source, Prefer.model_validate_json(config))
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024)


def train(
    base: Artifact, config: Adapt, lengths: Sequence[Sequence[int]], device: str = "cpu", progress: Report = silent
) -> None:
    """Train on rows of random tokens; `lengths` gives tokens and labels of each, which are the last ones."""
    golden, draw = Golden.read(base.path), random.Random(0)
    rows = []
    for line, (n_tokens, n_labels) in enumerate(lengths, 1):
        ids = (*(draw.randrange(300, 500) for _ in range(n_tokens - 1)), golden.stop_ids[0])
        labels = tuple(place >= n_tokens - n_labels for place in range(n_tokens))
        rows.append(Rendered(ids, labels, n_tokens - n_labels, "", line))
    with tempfile.TemporaryDirectory() as scratch:
        sft.run(
            config, base, Path(scratch) / "made", rows=rows, golden=golden, general=GENERAL if config.ewc else (),
            device=device, progress=progress,
        )  # fmt: skip


def prefer(base: Artifact, config: Prefer) -> None:
    """Train on preferences or rewards."""
    with tempfile.TemporaryDirectory() as scratch:
        preference.run(config, base, Path(scratch) / "made", examples=preference.read(config))


if __name__ == "__main__":
    main()

"""A child process of the tests: train some steps on rows of one length, and print the peak of its resident memory.

python -m tests.peak_child BASE ADAPT_JSON ROWS TOKENS LABELS
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from edgetune.adapt import sft
from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered
from edgetune.recipe_training import Adapt


def main() -> None:
    """Read the command line, train, tell."""
    base, config = Artifact.open(Path(sys.argv[1])), Adapt.model_validate_json(sys.argv[2])
    train(base, config, *map(int, sys.argv[3:]))
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024)


def train(base: Artifact, config: Adapt, n_rows: int, n_tokens: int, n_labels: int, device: str = "cpu") -> None:
    """Train on rows of random tokens, the last `n_labels` of which are learned."""
    golden, draw = Golden.read(base.path), random.Random(0)
    labels = tuple(place >= n_tokens - n_labels for place in range(n_tokens))
    rows = []
    for line in range(n_rows):
        ids = (*(draw.randrange(300, 500) for _ in range(n_tokens - 1)), golden.stop_ids[0])
        rows.append(Rendered(ids, labels, n_tokens - n_labels, "", line + 1))
    with tempfile.TemporaryDirectory() as scratch:
        sft.run(config, base, Path(scratch) / "made", rows=rows, golden=golden, device=device)


if __name__ == "__main__":
    main()

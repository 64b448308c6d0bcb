"""A child process of the tests: predict a training's step before and after it, and time it, in CPU-seconds.

python -m tests.step_child BASE ADAPT_JSON LENGTHS_JSON

Prints both predictions and what a step took. CPU-seconds are those of the process, so that others do not count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from edgetune.adapt import step_time
from edgetune.artifact import Artifact
from edgetune.compress.checkpoint import read_config
from edgetune.recipe_training import Adapt
from edgetune.training_memory import Lengths
from tests.peak_child import train


def main() -> None:
    """Read the command line, predict, train, predict again, tell."""
    base, config = Artifact.open(Path(sys.argv[1])), Adapt.model_validate_json(sys.argv[2])
    lengths = json.loads(sys.argv[3])
    time.perf_counter = time.process_time
    predicted = [predict(base, config, lengths)]
    ends: list[float] = []
    train(base, config, lengths, progress=lambda *_: ends.append(time.process_time()))
    predicted.append(predict(base, config, lengths))
    print(json.dumps([*predicted, (ends[-1] - ends[0]) / (len(ends) - 1)]))


def predict(base: Artifact, config: Adapt, lengths: list[list[int]]) -> float:
    """Seconds of a step as `plan` predicts them."""
    rows = Lengths.of([(tokens, labels) for tokens, labels in lengths])
    return step_time.measure(config, read_config(base.path), rows, "cpu").step_s(config)


if __name__ == "__main__":
    main()

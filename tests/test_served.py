"""What `plan` says of vLLM's rules, from the recipe and the model's shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune import terminal
from edgetune.artifact import Artifact
from edgetune.cli_plan import _plan_recipe
from edgetune.compress.checkpoint import read_config
from edgetune.plan import served
from edgetune.recipe import Candidate, parse_as
from tests.test_pipeline import make_recipe

FITTING = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
           "head_dim": 64, "num_hidden_layers": 2, "model_type": "llama"}  # fmt: skip
MIXED = {"budget": 5, "choices": [4, 5, {"bits": 4, "group_size": 16}]}
PRUNED = {"prune": {"intermediate_size": 960}}


@pytest.mark.parametrize(
    ("compress", "says"),
    [
        ([{"rtn": {}}], "vLLM loads it, and Marlin, its fast kernel, runs it, by their rules"),
        (
            [{"rtn": {"sym": False}}],
            "Marlin, vLLM's fast kernel, would not run it: zero points; of GPTQ it takes sym: true",
        ),
        ([{"rtn": {"sym": False, "checkpoint": "compressed-tensors"}}], "vLLM loads it, and Marlin, its"),
        (
            [{"rtn": {"group_size": 64, "checkpoint": "compressed-tensors", "allocate": MIXED}}],
            "vLLM would not load it: compressed-tensors of 5 bits; vLLM reads 4, 8. Marlin, vLLM's fast kernel, would "
            "not run it: 5 bits; it takes 4 and 8; group_size 16; it takes -1, 32, 64 and 128; of bits and groups, "
            "where a layer gets them",
        ),
        ([PRUNED, {"rtn": {}}], "down_proj is 512 x 960; it takes rows in multiples of 64, columns of 128"),
        ([], None),
    ],
)
def test_rules_are_told_from_the_planned_shapes(compress: list[Any], says: str | None) -> None:
    found = served(parse_as(Candidate, {"compress": compress}, "recipe"), FITTING)
    assert found is None if says is None else found is not None and says in found
    exported = parse_as(Candidate, {"compress": compress, "export": {"onnx": {"precision": "int4"}}}, "recipe")
    assert served(exported, FITTING) is None


@pytest.mark.usefixtures("known_speeds")
def test_plan_has_a_line_for_each_checkpoint(
    tiny_model: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    candidates = {"packed": {"compress": [{"rtn": {"group_size": 32}}]}, "file": {"export": {"gguf": {"type": "Q8_0"}}}}
    recipe = make_recipe(tmp_path, tiny_model.path, adapt=None, candidates=candidates)
    terminal.quiet()
    _plan_recipe(recipe, tmp_path / "store")
    told = [line for line in capsys.readouterr().out.splitlines() if "vLLM" in line]
    (line,) = told
    assert line.startswith("packed: Marlin, vLLM's fast kernel, would not run it: model.layers.0.self_attn.q_proj is")
    assert read_config(tiny_model.path)["hidden_size"] == 64

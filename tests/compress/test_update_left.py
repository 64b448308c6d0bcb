"""What training changed, beside the steps of the integers that are shipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from edgetune.artifact import Artifact, draft
from edgetune.compress import quantize, update_left
from edgetune.compress.checkpoint import read_layers
from edgetune.errors import ArtifactError
from edgetune.recipe import Rtn


def test_a_change_is_small_where_it_is_below_half_a_step(tiny_model: Artifact, tmp_path: Path) -> None:
    with draft(tmp_path / "trained", kind="model", stage="test/1", config={}, parents=[tiny_model]) as pending:
        for name in tiny_model.manifest.files:
            shutil.copyfile(tiny_model.path / name, pending.path / name)
        state = load_file(tiny_model.path / "model.safetensors")
        weight = state["model.layers.1.mlp.up_proj.weight"]
        weight[0, :10] += 1e-6
        weight[0, 10:15] += 10.0
        save_file(state, pending.path / "model.safetensors", metadata={"format": "pt"})
    trained = pending.artifact
    made = quantize.run(Rtn(group_size=32), trained, tmp_path / "integers")
    step = read_layers(made.path)["model.layers.1.mlp.up_proj"].scales[0, 0]
    assert 1e-6 < step / 2 < 10
    evidence = update_left.run(tiny_model, trained, made, tmp_path / "evidence")
    assert evidence.identity == update_left.planned_identity(tiny_model.identity, trained.identity, made.identity)
    n_small = sum(float(weight[0, i]) != 0 for i in range(10))
    assert update_left.read(evidence) == {
        "model.layers.1.mlp.up_proj": pytest.approx(n_small / (n_small + 5), abs=1e-4)
    }
    (evidence.path / update_left.FILE).write_text("[]")
    with pytest.raises(ArtifactError, match=r"update_left\.json is damaged"):
        update_left.read(evidence)

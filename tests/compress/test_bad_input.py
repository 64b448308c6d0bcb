"""What a quantizer may be given that is not as it should be: handled, or refused in one line.

Elsewhere: activations that are not finite, groups that do not divide, dead columns (test_layerwise.py), zero rows and
Hessians in need of damping (test_kernels.py), tied embeddings (test_checkpoint.py), too little general text
(data/test_calibration.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgetune.artifact import Artifact
from edgetune.compress import layerwise, moments, quantize, scale, teacher
from edgetune.compress.architectures import linear_shapes
from edgetune.compress.checkpoint import load_dequantized, read_config, read_layers
from edgetune.compress.layerwise import load_model, quantize_blocks
from edgetune.compress.scheme import Scheme
from edgetune.compress.streamed import open_model
from edgetune.compress.teacher_pack import TeacherPack
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ArtifactError, StageError, UnsupportedError
from edgetune.recipe import Awq, Gptq, Rtn
from tests.conftest import make_tiny_model
from tests.export.test_gguf_families import make

ROWS = CalibrationSet(np.random.default_rng(0).integers(3, 500, (8, 16)))
GPTQ = Gptq(bits=8, group_size=32, sym=False)


def test_a_hessian_beyond_float32_names_its_layers(tiny_model: Artifact, tmp_path: Path) -> None:
    model: Any = load_model(tiny_model)
    model.model.layers[1].input_layernorm.weight.data.fill_(1e25)  # activations are finite, their squares are not
    solve = quantize.solver(
        GPTQ, dict.fromkeys(linear_shapes(read_config(tiny_model.path)), Scheme(8, GPTQ.group_size, GPTQ.sym))
    )
    names = r"model\.layers\.1\.self_attn\.q_proj \+ .*v_proj: the Hessian is not finite: an activation overflowed"
    with pytest.raises(StageError, match=names):
        quantize_blocks(model, ROWS.ids, solve, work=tmp_path, key="k")


@pytest.mark.parametrize("config", [GPTQ, Rtn(bits=4, group_size=32), Rtn(bits=4, group_size=-1, sym=False)])
def test_an_all_zero_layer_stays_zero(config: Gptq | Rtn, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source.path)
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "other")
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    (source.path / "model.safetensors").write_bytes(weights)
    source = Artifact(source.path, source.manifest)
    made = quantize.run(config, source, tmp_path / "out", calibration=ROWS)
    layer = read_layers(made.path)["model.layers.0.mlp.down_proj"]
    assert not layer.dequantize().any()
    assert made.manifest.notes["relative_error"]["model.layers.0.mlp.down_proj"] == 0
    with torch.no_grad():
        assert torch.isfinite(load_dequantized(made.path)(torch.from_numpy(ROWS.ids[:1])).logits).all()


@pytest.mark.parametrize("checkpoint", ["gptq", "compressed-tensors"])
def test_biases_and_shared_heads_come_along(checkpoint: Any, tmp_path: Path) -> None:
    """Qwen2: biases of queries, keys and values, two query heads for each key/value head."""
    source = make(tmp_path / "model", "qwen2")
    config = GPTQ.model_copy(update={"checkpoint": checkpoint})
    made = quantize.run(config, source, tmp_path / "out", calibration=ROWS)
    stored, before = (load_file(one.path / "model.safetensors") for one in (made, source))
    name = "model.layers.0.self_attn.q_proj.bias"
    assert before[name].any()
    assert torch.equal(stored[name], before[name].half())
    ids = torch.from_numpy(ROWS.ids[:2])
    with torch.no_grad():
        found = load_dequantized(made.path)(ids).logits
        wanted = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)(ids).logits
    assert (found - wanted).abs().mean() < 0.05 * wanted.std()


def test_every_damage_of_moments_and_packs_is_one_line(tiny_model: Artifact, tmp_path: Path) -> None:
    """Empty, cut, no npz at all, and bytes overwritten all over it; what nothing reads may be."""
    evidence, refused = Artifact(tmp_path, tiny_model.manifest), 0
    draw = np.random.default_rng(0)
    ids, log_probs, tail = draw.integers(0, 9, (60, 3)), draw.random((60, 3)), draw.random(60)
    TeacherPack("w", "s", 9, np.array([0, 60]), ids.astype(np.uint32), log_probs, tail).save(tmp_path / teacher.FILE)
    np.savez_compressed(tmp_path / moments.FILE, layer=draw.random(64))
    for name, read in ((moments.FILE, moments.read), (teacher.FILE, teacher.read)):
        whole = (tmp_path / name).read_bytes()
        over = [whole[:at] + b"\xff" * 8 + whole[at + 8 :] for at in range(0, len(whole) - 8, 8)]
        for content in [b"", whole[:20], whole[:-1], b"not an npz", *over]:
            (tmp_path / name).write_bytes(content)
            said = None
            try:
                read(evidence)
            except ArtifactError as error:
                said = str(error)
            refused += said is not None
            assert said is None or "\n" not in said
            if name == teacher.FILE:  # an unfinished chunk is made again
                assert (teacher._finished(tmp_path / name, "s") is None) == (said is not None)
    assert refused > 100


def test_fields_of_a_wrong_type_are_one_line(tiny_model: Artifact, tmp_path: Path) -> None:
    made = quantize.run(Rtn(bits=4, group_size=32), tiny_model, tmp_path / "out")
    for source, opens in ((tiny_model, (load_model, open_model)), (made, (lambda of: load_dequantized(of.path),))):
        folder = Path(shutil.copytree(source.path, tmp_path / source.manifest.kind))
        config = read_config(folder)
        for damage in ({"hidden_size": "wide"}, {"rope_parameters": 5}, {"num_attention_heads": 7}):
            (folder / "config.json").write_text(json.dumps(config | damage))
            for open_ in opens:
                with pytest.raises(ArtifactError, match="cannot be loaded: ") as caught:
                    open_(Artifact(folder, source.manifest))
                assert "\n" not in str(caught.value)
    for damage in ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"head_dim": [1]}, {"model_type": ["llama"]}):
        with pytest.raises(UnsupportedError, match=r"names no sizes of a model|cannot be compressed"):
            linear_shapes(config | damage)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_refused_before_any_work(family: str) -> None:
    config = {"model_type": family, "architectures": [f"{family}ForCausalLM"], "hidden_size": 64}
    for check, asked in ((quantize.check, GPTQ), (quantize.check, Rtn()), (scale.check, Awq())):
        with pytest.raises(UnsupportedError, match=f"{family}ForCausalLM cannot be compressed here; supported: Llama"):
            check(asked, config)  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(1, 1), (1, 2)])
def test_one_short_row_is_enough_to_solve_and_its_damping_is_said(
    shape: tuple[int, int], tiny_model: Artifact, tmp_path: Path
) -> None:
    rows = CalibrationSet(np.full(shape, 7))
    made = quantize.run(GPTQ, tiny_model, tmp_path / "out", calibration=rows)
    assert all(error < 0.1 for error in made.manifest.notes["relative_error"].values())
    assert rows.ids.size < layerwise.BATCH_TOKENS

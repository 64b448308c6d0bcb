"""Models off the disk: a skeleton walks as a whole model does, wherever weights, activations and results lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetune.artifact import Artifact
from edgetune.compress import checkpoint, layerwise, quantize, scale, sparsify, spill, streamed
from edgetune.compress.checkpoint import load_dequantized
from edgetune.compress.layerwise import load_model, quantize_blocks, second_moments
from edgetune.compress.quantize import run
from edgetune.compress.streamed import Stored, open_model
from edgetune.compress.tensor_file import DTYPES, TensorFile
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ArtifactError, StageError
from edgetune.recipe import Awq, Gptq
from edgetune.recipe_quantize import Recover
from edgetune.recipe_sparsify import Sparsify
from tests.compress.test_layerwise import rounding
from tests.conftest import make_tiny_model

ROWS = CalibrationSet(np.random.default_rng(0).integers(0, 512, (12, 16)))
BOTH = Gptq(bits=4, group_size=32, sym=False, correction=0.5)


def sharded(source: Artifact, out: Path) -> Artifact:
    """The same model in two files and an index."""
    shutil.copytree(source.path, out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    places = {name: f"model-{number % 2 + 1}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return Artifact(out, source.manifest)


@pytest.mark.parametrize("rows", [ROWS.ids, None])
def test_a_skeleton_is_quantized_as_the_whole_model_is(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 64)
    source = make_tiny_model(tmp_path / "model", tie=False)
    whole = quantize_blocks(load_model(source), rows, rounding, work=tmp_path, key="whole", both=rows is not None)
    expected = {name: result.quantized.q.clone() for name, result in whole.items()}
    for name, found in (("one", source), ("two", sharded(source, tmp_path / "sharded"))):
        model: Any = open_model(found)
        left: list[int] = []
        results = quantize_blocks(
            model, rows, rounding, work=tmp_path, key=name, both=rows is not None,
            progress=lambda *_, of=model, to=left: to.append(sum(not p.is_meta for p in of.parameters())),
        )  # fmt: skip
        assert left == [0, 0]  # no weight is in memory after a block
        assert list(results) == list(expected)
        assert all(torch.equal(results[layer].quantized.q, q) for layer, q in expected.items())
        with pytest.raises(KeyError):
            results["lm_head"]


def test_a_skeleton_is_observed_as_the_whole_model_is(tiny_model: Artifact, tmp_path: Path) -> None:
    expected = second_moments(load_model(tiny_model), ROWS.ids)
    model = open_model(sharded(tiny_model, tmp_path / "sharded"))
    found = second_moments(model, ROWS.ids)
    assert all(torch.equal(found[name], moment) for name, moment in expected.items())
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("config", [Awq(bits=3, group_size=32), Sparsify(sparsity=0.5)])
def test_steps_that_change_weights_never_hold_the_model(
    config: Awq | Sparsify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of two files and its own head: the same tensors but for those of its blocks."""
    source = sharded(make_tiny_model(tmp_path / "model", layers=3, tie=False), tmp_path / "sharded")
    step = scale.run if isinstance(config, Awq) else sparsify.run
    most = 0

    def count(*_: object, of: Any) -> None:
        nonlocal most
        most = max(most, len({n.split(".")[2] for n, p in of.named_parameters() if ".layers." in n and not p.is_meta}))

    monkeypatch.setattr(layerwise, "load_whole", None)
    fill = Stored.fill
    model: list[Any] = []
    monkeypatch.setattr(streamed, "open_model", lambda *args: model.append(open_model(*args)) or model[-1])
    monkeypatch.setattr(Stored, "fill", lambda *args: (fill(*args), count(of=model[-1])))
    made = step(config, source, tmp_path / "made", calibration=ROWS)  # type: ignore[operator, arg-type]
    assert 1 <= most <= 2  # a block, and where its successor's rows tell that it is done, that one
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(made.path / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert all(torch.equal(after[n], t) for n, t in before.items() if ".layers." not in n)
    assert not all(torch.equal(after[n], t) for n, t in before.items() if ".layers.2." in n)
    monkeypatch.undo()
    load_model(made)


def test_a_skeleton_takes_the_dtype_of_the_file_where_the_config_names_none(
    tiny_model: Artifact, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model.path, folder)
    save_file(
        {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(config))
    source = Artifact(folder, tiny_model.manifest)
    assert {p.dtype for p in open_model(source).parameters()} == {p.dtype for p in load_model(source).parameters()}


def test_a_damaged_folder_is_refused_before_any_work(tiny_model: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model.path, folder)
    source, file = Artifact(folder, tiny_model.manifest), folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: torch.zeros(8, 8)}, file)
    with pytest.raises(ArtifactError, match=r"up_proj\.weight is \[8, 8\], its config\.json says \[192, 64\]"):
        open_model(source)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    with pytest.raises(ArtifactError, match=rf"lacks the tensor {name}; make it again"):
        open_model(source)
    file.write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="is damaged or missing"):
        open_model(source)


def test_activations_on_disk_do_not_change_a_byte(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 64)
    held = run(BOTH, tiny_model, tmp_path / "held", calibration=ROWS)
    files: list[int] = []

    def count(*_: object) -> None:
        files.append(len(list((tmp_path / ".spilt.work" / "activations").iterdir())))

    for bound in (0, 20_000):  # all of it, some of it
        monkeypatch.setattr(spill, "HELD_BYTES", bound)
        spilt = run(BOTH, tiny_model, tmp_path / "spilt", calibration=ROWS, progress=count)
        assert spilt.digest == held.digest
        shutil.rmtree(tmp_path / "spilt")
    assert files[:2] == [6, 6]  # between two blocks both streams of three batches
    assert 0 < files[2] < 6
    assert not list(tmp_path.glob(".*.work"))


@pytest.mark.parametrize("config", [BOTH, Gptq(bits=8, group_size=-1, recover=Recover(rank=8))])
def test_the_room_that_is_asked_for_is_what_is_written(
    config: Gptq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = make_tiny_model(tmp_path / "model", hidden=128, tie=config is BOTH), tmp_path / "made"
    asked, written = list[int](), list[int]()
    write = TensorFile._write

    def watched(self: TensorFile) -> None:
        write(self)
        written.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorFile, "_write", watched)
    monkeypatch.setattr(quantize, "require_space", lambda _, n_bytes: asked.append(n_bytes))
    with pytest.raises(KeyboardInterrupt):
        run(config, source, folder / "out", calibration=ROWS, progress=stop)
    (block,) = (folder / ".out.work").glob("*.safetensors")
    there = block.stat().st_size
    run(config, source, folder / "out", calibration=ROWS)
    assert asked[0] == pytest.approx(written[0], rel=0.05)
    assert asked == [asked[0], asked[0] - there]


def test_what_a_shelf_holds_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "HELD_BYTES", 100)
    shared = spill.Spill(tmp_path)
    shelf = spill.Shelf(shared, "0.seen")
    shelf["a"], shelf["b"] = torch.ones(20), torch.arange(24, dtype=torch.bfloat16).view(4, 6)[:, ::2]
    assert shared.held == 80 + 24 - 24  # b does not fit
    assert torch.equal(shelf["b"], torch.arange(24).view(4, 6)[:, ::2].bfloat16())
    before = shelf["b"]
    shelf["b"] = torch.zeros(4, 3)
    assert before[3, 2] == 22  # who has it mapped keeps it
    del shelf["a"]
    shelf["b"] = torch.ones(25)
    assert (shared.held, sorted(shelf), len(shelf)) == (100, ["b"], 1)
    assert not list((tmp_path / "activations").iterdir())
    shared.close()
    assert not (tmp_path / "activations").exists()


def test_tensors_that_come_one_by_one_make_the_same_file(tmp_path: Path) -> None:
    tensors = {f"{name}{rank}": (torch.rand(5, 3) * 9).to(dtype) for rank, dtype in enumerate(DTYPES)
               for name in ("b", "a.é", "z.10", "z.9")}  # fmt: skip
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(3.0), "turned": torch.rand(3, 5).T.contiguous()}
    save_file(tensors, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    with TensorFile(tmp_path / "parts.safetensors", {"format": "pt"}) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor.split(2) if tensor.ndim else [tensor])
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

    def fail() -> Iterator[torch.Tensor]:
        yield torch.ones(2)
        raise StageError("no")

    with pytest.raises(StageError), TensorFile(tmp_path / "failed.safetensors", {}) as out:
        out.add("a", fail())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]


def test_large_tensors_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny_model(tmp_path / "model", tie=False)
    whole = run(BOTH, source, tmp_path / "whole", calibration=ROWS)
    monkeypatch.setattr(checkpoint, "PART_VALUES", 1000)
    parts = run(BOTH, source, tmp_path / "parts", calibration=ROWS)
    assert parts.digest == whole.digest
    assert load_dequantized(parts.path).lm_head.weight.shape == (512, 64)

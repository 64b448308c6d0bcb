"""The ONNX export: its integers, its logits, its bytes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact, draft
from edgetune.compress import quantize
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, StageError, UnsupportedError
from edgetune.export import onnx as onnx_export
from edgetune.export.onnx_graph import head_of, prove_integers, read_packed
from edgetune.recipe import Gptq, Rtn
from edgetune.recipe_export import OnnxExport
from edgetune.recipe_quantize import Allocate
from tests.conftest import make_tiny_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}
MIXED = Allocate(budget=5)
FP32, INT4 = OnnxExport(precision="fp32"), OnnxExport()
_made: dict[str, Artifact] = {}  # the builder takes 12 s of CPU: one build of each kind for all tests


def exported(kind: str, model: Artifact, factory: pytest.TempPathFactory) -> Artifact:
    """Give the tiny model as `gptq` (group 32, asymmetric), `fp32` or `int4`, made once."""
    if kind not in _made:
        out = factory.mktemp(kind) / "artifact"
        if kind == "gptq":
            _made[kind] = quantize.run(Rtn(bits=4, group_size=32, sym=False), model, out)
        elif kind == "fp32":
            _made[kind] = onnx_export.run(FP32, model, out)
        else:
            _made[kind] = onnx_export.run(INT4, exported("gptq", model, factory), out)
    return _made[kind]


def test_text_that_training_composed_is_composed_for_the_runtime() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    assert onnx_export.encoder(Letters(), composed=True)("e\u0301") == [0xE9]
    assert onnx_export.encoder(Letters(), composed=False)("e\u0301") == [0x65, 0x301]


@pytest.fixture(scope="module")
def make(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    return lambda kind: exported(kind, tiny_model, tmp_path_factory)


def test_float_export_gives_the_logits_of_transformers(make: Callable[[str], Artifact], tiny_model: Artifact) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from edgetune.runtime.engines.onnx_engine import OnnxEngine

    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32).eval()
    engine = OnnxEngine.load(make("fp32").path, n_ctx=256, n_threads=1)
    for conversation in Golden.read(tiny_model.path).conversations:
        wanted = model(torch.tensor([conversation.ids])).logits[0].detach().numpy()
        assert np.abs(engine.score(conversation.ids) - wanted).max() < 1e-3


def test_int4_export_holds_the_checkpoint_bit_for_bit(make: Callable[[str], Artifact]) -> None:
    from edgetune.compress.checkpoint import read_layers

    layers = read_layers(make("gptq").path)
    packed = read_packed(make("int4").path / "model.onnx")
    assert prove_integers(packed, layers) == 14
    fused = packed["/model/layers.1/attn/qkv_proj/MatMulNBits"]  # the oracle is the checkpoint's own dequantizer
    parts = [layers[f"model.layers.1.self_attn.{p}_proj"].dequantize().numpy() for p in "qkv"]
    assert np.array_equal(fused.dequantize(), np.concatenate(parts))
    assert head_of(packed).bits == 8


def test_int4_manifest_says_what_was_proved(make: Callable[[str], Artifact]) -> None:
    manifest = make("int4").manifest
    assert manifest.kind == "onnx"
    assert manifest.identity == onnx_export.planned_identity(INT4, make("gptq").identity)
    assert manifest.scheme is not None
    assert (manifest.scheme["bits"], manifest.scheme["head_bits"], manifest.scheme["accuracy_level"]) == (4, 8, 4)
    parity = manifest.notes["parity"]
    assert parity["float_activations"]["max_abs"] < 1e-4
    assert 0 < parity["shipped"]["mean_kl"] < 1e-3
    assert {"golden.json", "genai_config.json", "tokenizer.json", "model.onnx.data"} <= set(manifest.files)


def test_a_second_build_gives_the_same_bytes_and_no_path_of_this_machine(
    make: Callable[[str], Artifact], tmp_path: Path
) -> None:
    shutil.copytree(make("gptq").path, tmp_path / "moved")
    again = onnx_export.run(INT4, Artifact.open(tmp_path / "moved"), tmp_path / "again")
    assert again.manifest.files == make("int4").manifest.files
    for name in again.manifest.files:
        content = (again.path / name).read_bytes()
        assert str(tmp_path).encode() not in content
        assert b"/home/" not in content
        assert b"/work/" not in content
    assert "+" not in onnx.load(again.path / "model.onnx", load_external_data=False).producer_version


def damage(kind: str) -> Callable[[Path], None]:
    """Give what spoils a built folder: the bytes of one tensor, or one of its text files."""

    def spoil(folder: Path) -> None:
        if kind == "template":
            (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
        elif kind == "merges":
            tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
            tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        else:
            graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
            tensor = next(t for t in graph.initializer if t.name.endswith(kind))
            offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
            with (folder / "model.onnx.data").open("r+b") as data:
                data.seek(offset + 2)  # of a float32: where a flip halves or doubles it, and more
                byte = data.read(1)[0]
                data.seek(offset + 2)
                data.write(bytes([byte ^ 0x80]))

    return spoil


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("down_proj.MatMulNBits.qweight", "codes of model.layers.0.mlp.down_proj"),
        ("o_proj.MatMulNBits.scales", "scales of model.layers.0.self_attn.o_proj"),
        ("qkv_proj.MatMulNBits.qzeros", "zero points of model.layers.0.self_attn.q_proj"),
        ("final_norm_layernorm.weight", "logits of"),
        ("template", "chat template differs"),
        ("merges", "token ids of golden"),
    ],
)
def test_a_breach_of_contract_is_refused_and_leaves_nothing(
    kind: str, says: str, make: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay(monkeypatch, make("int4"), damage(kind))
    with pytest.raises(ContractError, match=says):
        onnx_export.run(INT4, make("gptq"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith((".lock", ".work"))] == []


def test_a_lost_stop_token_is_refused(
    make: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = onnx_export._finish_files

    def lose(source: Artifact, golden: Golden, folder: Path) -> None:
        finish(source, golden, folder)
        genai = json.loads((folder / "genai_config.json").read_bytes())
        genai["model"]["eos_token_id"] = 7
        (folder / "genai_config.json").write_text(json.dumps(genai), encoding="utf-8")

    replay(monkeypatch, make("int4"), lambda _folder: None)
    monkeypatch.setattr(onnx_export, "_finish_files", lose)
    with pytest.raises(ContractError, match="stop set differs"):
        onnx_export.run(INT4, make("gptq"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_stop_tokens_of_training_are_named(
    make: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("gptq")
    with draft(tmp_path / "two", kind="gptq", stage="compress.rtn/1", config={"two": True}) as pending:
        for name in source.manifest.files:
            shutil.copyfile(source.path / name, pending.path / name)
        Golden.read(source.path).model_copy(update={"stop_ids": [0, 2]}).write(pending.path)
        pending.scheme = source.manifest.scheme
    replay(monkeypatch, make("int4"), lambda _folder: None)
    out = onnx_export.run(INT4, pending.artifact, tmp_path / "out")
    assert json.loads((out.path / "genai_config.json").read_bytes())["model"]["eos_token_id"] == [0, 2]
    assert out.manifest.notes["contract"]["stop_ids"] == [0, 2]


def test_a_builder_that_fails_or_hangs_is_one_line(
    make: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(StageError, match=r"builder failed on .* \(exit 1\)") as failed:
        onnx_export.run(INT4, make("gptq"), tmp_path / "out")
    assert "\n" not in str(failed.value)
    monkeypatch.undo()
    monkeypatch.setattr(onnx_export, "TIMEOUT_S", 0.05)
    with pytest.raises(StageError, match="more than 0 s"):
        onnx_export.run(INT4, make("gptq"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "model_config", "quantized", "says"),
    [
        (INT4, LLAMA, None, "add a gptq step"),
        (FP32, LLAMA, Rtn(), "use precision int4"),
        (INT4, LLAMA, Rtn(bits=8), "use bits: 4"),
        (INT4, LLAMA, Gptq(group_size=96), "use 64"),
        (INT4, LLAMA, Gptq(group_size=-1), "use 64"),
        (INT4, LLAMA, Gptq(static_groups=False), "static_groups: true"),
        (INT4, LLAMA, Gptq(allocate=MIXED), r"2, 3, 4, 8 bits; use precision int4 and allocate.choices: \[4, 8\]"),
        (INT4, LLAMA | {"architectures": ["FalconForCausalLM"]}, Gptq(), "FalconForCausalLM is not written as.*Llama"),
        (FP32, MISTRAL, None, "sliding_window=4096 of a Mistral model is left out by .*; use builder: own"),
        (FP32, MISTRAL | {"sliding_window": 64}, None, "sliding_window=64 .*; use builder: own"),
        (INT4, LLAMA | {"hidden_size": 32}, Gptq(), "head size 8"),
        (FP32, {}, None, "without architectures"),
    ],
)
def test_check_refuses_before_any_work(
    config: OnnxExport, model_config: dict[str, Any], quantized: Rtn | Gptq | None, says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        onnx_export.check(config, model_config, quantized)


def test_check_lets_pass_what_can_be_done() -> None:
    onnx_export.check(FP32, LLAMA, None)
    onnx_export.check(FP32, LLAMA | {"sliding_window": 64, "max_position_embeddings": 512}, None)
    for window in (None, 8192):
        onnx_export.check(FP32, MISTRAL | {"sliding_window": window}, None)
    own = OnnxExport(precision="fp32", builder="own")
    onnx_export.check(own, MISTRAL | {"num_hidden_layers": 2, "vocab_size": 9}, None)
    for size in (32, 64):
        for sym in (True, False):
            onnx_export.check(INT4, LLAMA, Gptq(group_size=size, sym=sym))


def test_run_refuses_int4_of_a_model_that_is_not_quantized(tiny_model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="add a gptq step"):
        onnx_export.run(INT4, tiny_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def replay(monkeypatch: pytest.MonkeyPatch, made: Artifact, spoil: Callable[[Path], None]) -> None:
    """Put an earlier build in the builder's place, and spoil it."""

    def build(_config: OnnxExport, _source: Path, out: Path, _work: Path) -> None:
        for name in made.manifest.files:
            shutil.copyfile(made.path / name, out / name)
        spoil(out)

    monkeypatch.setattr(onnx_export, "build", build)


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("group_size", "sym", "head_bits"), [(64, True, 8), (32, True, 4), (64, False, 4)])
def test_every_grid_and_head(tie: bool, group_size: int, sym: bool, head_bits: int, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", tie=tie)
    source = quantize.run(Rtn(bits=4, group_size=group_size, sym=sym), model, tmp_path / "gptq")
    out = onnx_export.run(OnnxExport.model_validate({"head_bits": head_bits}), source, tmp_path / "out")
    assert out.manifest.notes["integers"] == {"layers": 14, "differences": 0}
    assert out.manifest.notes["head"]["bits"] == head_bits


@pytest.mark.slow
@pytest.mark.parametrize("architecture", onnx_export.ARCHITECTURES[1:])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_every_architecture(
    architecture: str, precision: str, tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    family = architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32 if family == "Qwen3" else 16, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, sliding_window=None, tie_word_embeddings=family == "Qwen2",
    )  # fmt: skip
    with draft(tmp_path / "model", kind="model", stage="source/1", config={"family": family}) as pending:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = getattr(transformers, architecture)(config)
            for name, parameter in model.named_parameters():  # biases too, which are born zero
                parameter.data.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.02))
        model.save_pretrained(pending.path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "golden.json"):
            shutil.copyfile(tiny_model.path / name, pending.path / name)
    source = pending.artifact
    if precision == "int4":
        # Transformers reads any qwen2 folder with Qwen2's own pre-tokenizer, which this vocabulary was not made with
        monkeypatch.setattr(quantize, "hold", lambda folder: None)
        source = quantize.run(Rtn(bits=4, group_size=32, sym=False), source, tmp_path / "gptq")
    out = onnx_export.run(OnnxExport.model_validate({"precision": precision}), source, tmp_path / "out")
    assert min(entry["max_abs"] for entry in out.manifest.notes["parity"].values()) < 1e-4

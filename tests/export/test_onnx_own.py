"""The ONNX export by our own graph: whole artifacts, read by our engine and by onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact, identity
from edgetune.compress import quantize
from edgetune.data.calibration import CalibrationSet
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, EngineError, UnsupportedError
from edgetune.export import onnx as onnx_export
from edgetune.export.onnx_file import OnnxFile
from edgetune.recipe import Gptq, Rtn
from edgetune.recipe_export import OnnxExport
from edgetune.recipe_quantize import Recover
from edgetune.runtime.engine import TokenRow, greedy
from tests.conftest import make_tiny_model
from tests.export.support import without_template
from tests.export.test_gguf_families import make

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
genai = pytest.importorskip("onnxruntime_genai")

from edgetune.runtime.engines.onnx_engine import CHUNK, OnnxEngine  # noqa: E402

IDS = [int(i) for i in np.random.default_rng(0).integers(3, 500, 300)]
NARROW = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1,
          "vocab_size": 512}  # fmt: skip


def own(precision: Any, **more: Any) -> OnnxExport:
    return OnnxExport(precision=precision, builder="own", **more)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model with heads of 12 and an odd number of layers, which the genai builder refuses."""
    return make_tiny_model(tmp_path_factory.mktemp("narrow") / "model", hidden=48, layers=3, tie=False)


@pytest.fixture(scope="module")
def exported(narrow: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return onnx_export.run(own("fp32"), narrow, tmp_path_factory.mktemp("own") / "fp32")


def test_the_first_builder_keeps_its_identities() -> None:
    settings = {"precision": "int4", "accuracy_level": 4, "head_bits": 8}  # all there was before there were two
    assert onnx_export.planned_identity(OnnxExport(), "source") == identity(onnx_export.STAGE, settings, ["source"])
    assert onnx_export.planned_identity(own("int4"), "source") != identity(onnx_export.STAGE, settings, ["source"])


def test_a_base_without_a_chat_template_is_held_on_the_texts(tiny_model: Artifact, tmp_path: Path) -> None:
    source = without_template(tiny_model, tmp_path / "model")
    made = onnx_export.run(own("fp32"), source, tmp_path / "out")
    n_tokens = sum(len(text.ids) for text in Golden.read(source.path).texts)
    assert made.manifest.notes["parity"]["fp32"]["n_positions"] == n_tokens > 100
    assert (made.path / "LICENSE").read_text() == "Do as you like."


def test_our_engine_reads_it_in_steps_and_rows(exported: Artifact, narrow: Artifact) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(narrow.path, dtype=torch.float32).eval()
    engine = OnnxEngine.load(exported.path, n_ctx=512, n_threads=1)
    whole = engine.score(IDS)  # three chunks
    assert np.abs(whole - model(torch.tensor([IDS])).logits[0].detach().numpy()).max() < 1e-3
    for n in (1, CHUNK, 290):
        assert np.abs(engine.prefill(IDS[:n]) - whole[n - 1]).max() < 1e-4
        for i in range(n, n + 5):
            assert np.abs(engine.decode(IDS[i]) - whole[i]).max() < 1e-4
    for n_shared in (0, 40):
        rows = [TokenRow((*IDS[:n_shared], *IDS[200 + 7 * i : 220 + 9 * i]), n_shared + 3 + i) for i in range(5)]
        rows.append(TokenRow((*IDS[:n_shared], *IDS[:160]), n_shared + 2))  # longer than a chunk
        wanted = [engine.score(row.ids)[row.start - 1 : -1] for row in rows]
        for row, logits, known in zip(rows, engine.score_rows(rows), wanted, strict=True):
            assert np.abs(logits - known).max() < 1e-4
            engine.prefill(IDS[:9] if row is rows[2] else row.ids)  # another use in between
    engine.close()


def test_onnxruntime_genai_reads_it(exported: Artifact) -> None:
    engine = OnnxEngine.load(exported.path, n_ctx=64, n_threads=1)
    wanted = greedy(engine, IDS[:10], frozenset(), 12)
    model = genai.Model(str(exported.path))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=22, min_length=22, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(IDS[:10])
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0))[10:] == wanted


@pytest.mark.parametrize(
    ("name", "precision"), [("phi3", "fp16"), ("granite", "fp32"), ("gemma2", "fp32"), ("gemma3", "fp32")]
)
def test_other_families_run_in_both_runtimes(name: str, precision: Any, tmp_path: Path) -> None:
    made = onnx_export.run(own(precision), make(tmp_path / "model", name), tmp_path / "out")
    assert made.manifest.notes["parity"][precision]["mean_kl"] < 1e-4
    assert made.manifest.fallbacks == []
    test_onnxruntime_genai_reads_it(made)


def test_a_longrope_model_ends_where_its_rotation_would_change(tmp_path: Path) -> None:
    source = make(tmp_path / "model", "phi3 longrope", original_max_position_embeddings=128)
    made = onnx_export.run(own("fp32"), source, tmp_path / "out")
    assert made.manifest.fallbacks[0].startswith("the graph holds 128 of the model's 512 positions")
    OnnxEngine.load(made.path, n_ctx=128, n_threads=1).close()
    with pytest.raises(EngineError, match="n_ctx=129 is longer than the 128 positions"):
        OnnxEngine.load(made.path, n_ctx=129, n_threads=1)


@pytest.mark.parametrize(
    ("precision", "scheme", "tie"),
    [("int4", Rtn(group_size=32, sym=False), True), ("int8", Rtn(bits=8, group_size=32), False), ("fp16", None, True)],
)
def test_integers_and_halves_are_proved(precision: Any, scheme: Rtn | None, tie: bool, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model", tie=tie)
    if scheme is not None:
        source = quantize.run(scheme, source, tmp_path / "checkpoint")
    made = onnx_export.run(own(precision), source, tmp_path / "out")
    notes = made.manifest.notes
    if scheme is not None:
        assert notes["integers"] == {"layers": 14, "differences": 0}
        assert notes["head"]["bits"] == 8
        assert 0 < notes["head"]["relative_error"] < 0.02
        assert notes["parity"]["float_activations"]["max_abs"] < 1e-4
    else:
        assert notes["parity"]["fp16"]["mean_kl"] < 1e-4
        assert notes["graph"]["operators"]["Attention"] == 2
    engine = OnnxEngine.load(made.path, n_ctx=64, n_threads=1)
    whole = engine.score(IDS[:40])
    assert np.abs(engine.prefill(IDS[:39]) - whole[38]).max() < 0.1
    golden = Golden.read(made.path)
    assert engine.tokenize(golden.texts[1].text) == golden.texts[1].ids
    assert engine.stop_ids == {2}


def test_a_second_build_gives_the_same_bytes(exported: Artifact, narrow: Artifact, tmp_path: Path) -> None:
    again = onnx_export.run(own("fp32"), narrow, tmp_path / "again")
    assert again.manifest.files == exported.manifest.files


@pytest.mark.parametrize(
    ("name", "says"),
    [("model.layers.1.mlp.down_proj.qweight", "codes of model.layers.1.mlp.down_proj"),
     ("model.layers.0.self_attn.q_proj.scales", "scales of model.layers.0.self_attn.q_proj"),
     ("model.layers.0.self_attn.v_proj.qzeros", "zero points of model.layers.0.self_attn.v_proj"),
     ("model.norm.weight", "logits of")],
)  # fmt: skip
def test_a_breach_is_refused_and_leaves_nothing(
    name: str, says: str, tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantize.run(Rtn(group_size=32, sym=False), tiny_model, tmp_path / "checkpoint")
    write = OnnxFile.weight

    def spoil(self: OnnxFile, given: str, array: Any, *more: Any) -> str:
        changed = array.copy()
        if given == name:
            changed.reshape(-1).view("uint8")[3] ^= 0x40
        return write(self, given, changed, *more)

    monkeypatch.setattr(OnnxFile, "weight", spoil)
    with pytest.raises(ContractError, match=says):
        onnx_export.run(own("int4"), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "model_config", "quantized", "says"),
    [
        (OnnxExport(precision="fp32"), NARROW, None, "head size 8 .*use builder: own"),
        (OnnxExport(precision="fp16"), NARROW | {"num_attention_heads": 4}, None, "use builder: own"),
        (OnnxExport(precision="fp32"), NARROW | {"architectures": ["Phi3ForCausalLM"]}, None, "builder: own takes it"),
        (own("int4"), NARROW, None, "add a gptq step .bits 4"),
        (own("int8"), NARROW, Rtn(bits=4), "use bits: 8"),
        (own("fp16"), NARROW, Rtn(), "fp16 holds no quantized weights"),
        (own("int4", head_bits=4), NARROW, Gptq(), "head_bits=4 was asked for"),
        (OnnxExport(), NARROW | {"hidden_size": 128}, Gptq(recover=Recover()), "writes no correction beside integers"),
        (own("int4"), NARROW | {"hidden_size": 80}, Gptq(), "hidden_size=80 is no multiple of 32"),
    ],
)
def test_check_refuses_before_any_work(
    config: OnnxExport, model_config: dict[str, Any], quantized: Rtn | Gptq | None, says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        onnx_export.check(config, model_config, quantized)


def test_a_correction_beside_integers_is_in_the_graph(tiny_model: Artifact, tmp_path: Path) -> None:
    scheme = Rtn(group_size=32, recover=Recover(rank=4))
    rows = CalibrationSet(np.random.default_rng(2).integers(0, 512, (8, 16)))
    source = quantize.run(scheme, tiny_model, tmp_path / "checkpoint", calibration=rows)
    made = onnx_export.run(own("int4"), source, tmp_path / "out")  # holds the logits to the corrected weights'
    assert made.manifest.notes["parity"]["float_activations"]["max_abs"] < 1e-4
    assert made.manifest.notes["integers"] == {"layers": 14, "differences": 0}
    assert made.manifest.notes["graph"]["operators"]["MatMul"] == 2 * 14
    with pytest.raises(UnsupportedError, match="genai builder writes no correction"):
        onnx_export.run(OnnxExport(precision="int4"), source, tmp_path / "genai")

"""The perplexity of an export against torch's: the figures, the rule, and exports that only it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.errors import ContractError
from edgetune.export import gguf, gguf_families, gguf_verify
from edgetune.export.parity import Logits
from edgetune.export.perplexity import (
    EIGHT_BITS,
    LIMIT,
    N_TOKENS,
    WINDOW,
    Perplexity,
    compare,
    hold_perplexity,
    text_windows,
    token_losses,
)
from edgetune.recipe_export import GgufExport
from tests.export.test_gguf_families import make


def found(mean: float, error: float) -> Perplexity:
    return Perplexity(10.0, 10.0 * float(np.exp(mean)), mean, error, n_windows=12, n_tokens=1524)


def test_losses_are_those_of_the_logits() -> None:
    logits = np.random.default_rng(0).normal(scale=9, size=(6, 11)).astype(np.float32)
    ids = [3, 0, 10, 5, 5, 1]
    p = np.exp(logits.astype(np.float64))
    wanted = [-np.log(p[t, ids[t + 1]] / p[t].sum()) for t in range(5)]
    assert token_losses(logits, ids) == pytest.approx(wanted, rel=1e-5)
    logits[2, 4] = np.nan
    with pytest.raises(ContractError, match="not finite"):
        token_losses(logits, ids)


def test_windows_are_what_is_drawn() -> None:
    rng = np.random.default_rng(1)
    ours = rng.normal(3.0, 1.0, (12, 40))
    shift = rng.normal(0.004, 0.01, (12, 1))  # tokens of a window hang together
    theirs = ours + shift + rng.normal(0.0, 0.001, (12, 40))
    result = compare(list(ours), list(theirs))
    means = (theirs - ours).mean(1)
    assert result.mean == pytest.approx(means.mean())
    assert result.error == pytest.approx(means.std(ddof=1) / 12**0.5)
    assert result.reference == pytest.approx(np.exp(ours.mean()))
    assert result.runtime == pytest.approx(np.exp(theirs.mean()))
    assert result.difference == pytest.approx(result.runtime / result.reference - 1)
    assert (result.n_windows, result.n_tokens) == (12, 480)


def test_what_chance_can_do_is_not_refused() -> None:
    for sign in (1, -1):
        hold_perplexity(found(sign * 0.004, 0.0), "a file")
        hold_perplexity(found(sign * 0.04, 0.01), "a file")  # 4 standard errors reach it
        with pytest.raises(ContractError, match=r"perplexity of a file on 1524 tokens .*standard error 0\.10%"):
            hold_perplexity(found(sign * 0.0095, 0.001), "a file")
        hold_perplexity(found(sign * 0.0088, 0.001), "a file")
    with pytest.raises(ContractError):
        hold_perplexity(found(float("nan"), 0.0), "a file")
    assert found(0.04, 0.01).least == 0.0
    assert found(-0.0075, 0.001).note(LIMIT)["difference"] == -0.007472


def test_windows_lie_over_the_text_and_fit_the_model(tiny_model: Artifact, tmp_path: Path) -> None:
    windows = text_windows(tiny_model.path)
    assert [len(window) for window in windows] == [WINDOW] * (N_TOKENS // WINDOW)
    assert len({tuple(window[1:]) for window in windows}) == len(windows)
    assert {window[0] for window in windows} == {1}  # conversations begin with a BOS here
    folder = Path(shutil.copytree(tiny_model.path, tmp_path / "short"))
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 50}))
    assert [len(window) for window in text_windows(folder)] == [50] * 30


def test_logits_that_are_too_sharp(children_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key by which llama.cpp scales Granite's logits, wrong by 2: weights, ids and logits hold."""
    pytest.importorskip("llama_cpp")
    granite = gguf_families.FAMILIES["GraniteForCausalLM"]
    write = granite.write

    def sharper(writer: Any, config: dict[str, Any]) -> None:
        write(writer, config | {"logits_scaling": config["logits_scaling"] / 2})

    monkeypatch.setattr(gguf_verify, "EIGHT_BITS", LIMIT)  # nothing of this model is lost in 8 bits
    source = make(tmp_path / "model", "granite")
    made = gguf.run(GgufExport(type="Q8_0"), source, tmp_path / "right", moments=None)
    note = made.manifest.notes["perplexity"]
    assert abs(note["difference"]) < LIMIT
    assert (note["n_tokens"], note["n_windows"], note["limit"]) == (1524, 12, LIMIT)
    monkeypatch.setitem(gguf_families.FAMILIES, "GraniteForCausalLM", replace(granite, write=sharper))
    with pytest.raises(ContractError, match=r"^perplexity of model\.gguf"):
        gguf.run(GgufExport(type="Q8_0"), source, tmp_path / "sharp", moments=None)
    assert not (tmp_path / "sharp").exists()


def test_an_onnx_graph_that_favours_a_token_of_no_text(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_genai")
    from edgetune.compress import quantize
    from edgetune.export import onnx
    from edgetune.recipe import Rtn
    from edgetune.recipe_export import OnnxExport

    source = quantize.run(Rtn(group_size=32, sym=False), tiny_model, tmp_path / "checkpoint")
    run = onnx.run_rows

    def biased(folder: Path, rows: Sequence[Sequence[int]]) -> Iterator[Logits]:
        bias = np.zeros(512, np.float32)
        bias[0] = 0.0 if folder.name.endswith(".float") else 2.5
        return (logits + bias for logits in run(folder, rows))

    config = OnnxExport(precision="int4", builder="own")
    made = onnx.run(config, source, tmp_path / "right")
    note = made.manifest.notes["perplexity"]
    assert (note["n_tokens"], note["limit"]) == (1524, EIGHT_BITS)
    assert abs(note["float_activations"]["difference"]) < 1e-5
    monkeypatch.setattr(onnx, "run_rows", biased)
    monkeypatch.setattr(onnx, "EIGHT_BITS", LIMIT)
    with pytest.raises(ContractError, match=r"^perplexity of the export"):
        onnx.run(config, source, tmp_path / "biased")
    assert not (tmp_path / "biased").exists()

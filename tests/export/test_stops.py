"""The end of generation: runtimes' own loops led to an end token, and where torch would end an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.errors import ContractError
from edgetune.export.check import check
from edgetune.export.stops import FORCED, Ends, Led, Ran, answer_end, hold_loop, lead
from tests.conftest import make_tiny_model
from tests.export.test_contract import GOLDEN

RUN = Led([1, 5], [7, 8, 2])


def test_a_golden_answer_is_led_to_each_end_token(tiny_model: Artifact) -> None:
    golden = Golden.read(tiny_model.path)
    shortest = min(golden.conversations, key=lambda one: len(one.ids))
    end = answer_end(shortest, golden.stop_ids)
    (run,) = lead(golden)
    assert run.prompt + run.tokens == shortest.ids[: end + 1]
    assert (len(run.tokens), run.tokens[-1]) == (FORCED + 1, 2)
    two = lead(golden.model_copy(update={"stop_ids": [0, 2]}))
    assert [led.tokens[-1] for led in two] == [0, 2]
    assert two[0].tokens[:-1] == run.tokens[:-1]
    (of_a_text,) = lead(golden.model_copy(update={"conversations": []}))
    assert of_a_text.prompt
    assert of_a_text.tokens[-1] == 2


def test_a_loop_must_end_where_it_was_led() -> None:
    hold_loop([RUN], [Ran(3, True)], "a loop")
    with pytest.raises(ContractError, match="does not stop: a loop goes on behind the end token 2"):
        hold_loop([RUN], [Ran(4, False)], "a loop")
    with pytest.raises(ContractError, match="too early: a loop ends at token 8 of a golden answer, which ends at 2"):
        hold_loop([RUN], [Ran(2, True)], "a loop")
    with pytest.raises(ContractError, match="fails in a loop: no memory"):
        hold_loop([RUN], "no memory", "a loop")


def logits(ends: dict[int, float]) -> Any:
    """Of the made-up conversation: token 65 leads the others by 9, and the end token 2 leads it as given."""
    (conversation,) = GOLDEN.conversations
    made = np.zeros((len(conversation.ids), 128), np.float32)
    made[:, 65] = 9.0
    for place, lead_of_end in ends.items():
        made[place, 2] = 9.0 + lead_of_end
    return made


def watched(reference: Any, runtime: Any) -> dict[str, int]:
    ends = Ends(GOLDEN, ())
    ends.see(0, reference, runtime)
    ends.see(1, logits({}), logits({3: 5.0}))  # a text ends nowhere
    return ends.hold()


def test_an_answer_ends_where_torch_ends_it() -> None:
    (conversation,) = GOLDEN.conversations
    before_end = answer_end(conversation, [2]) - 1
    right = logits({before_end: 4.0})
    n_places = len("answer") + 1
    assert watched(right, right) == {"positions": n_places, "ends": 1, "near_ties": 0}
    with pytest.raises(ContractError, match=r"after 6 tokens .* torch ends \(by 4 nats\) and the runtime goes on"):
        watched(right, logits({}))
    with pytest.raises(ContractError, match=r"after 2 tokens .* torch goes on .* the runtime ends \(by 0\.5\)"):
        watched(right, logits({before_end: 4.0, before_end - 4: 0.5}))
    assert watched(logits({before_end: 0.4}), logits({before_end: -0.4}))["near_ties"] == 1
    elsewhere = logits({0: 5.0, before_end: 4.0, before_end + 1: 5.0})  # in the prompt, and behind the end
    assert watched(right, elsewhere)["near_ties"] == 0


@pytest.fixture(scope="module")
def folder(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime_genai")
    from tests.export.test_onnx import exported

    return exported("fp32", tiny_model, tmp_path_factory).path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"search": {"min_length": 400}}, "onnxruntime-genai goes on behind the end token 2"),
        ({"model": {"eos_token_id": 5}}, "onnxruntime-genai goes on behind the end token 2"),
    ],
)
def test_genai_settings_that_keep_generation_going(
    folder: Path, tiny_model: Artifact, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    """With a `min_length` the stop set is right, and no answer stops."""
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    config = json.loads((broken / "genai_config.json").read_bytes())
    for part, keys in change.items():
        config[part] |= keys
    (broken / "genai_config.json").write_text(json.dumps(config))
    found = {one.name: one.found for one in check(broken, tiny_model, max_kl=1e-6) if not one.holds}
    assert found.pop("end of generation").endswith(says)
    assert list(found) == ([] if "search" in change else ["stop set"])


def test_genai_stops_at_a_token_inside_an_answer(folder: Path, tiny_model: Artifact, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (run,) = lead(Golden.read(tiny_model.path))
    config = json.loads((broken / "genai_config.json").read_bytes())
    config["model"]["eos_token_id"] = [2, run.tokens[3]]
    (broken / "genai_config.json").write_text(json.dumps(config))
    found = {one.name: one.found for one in check(broken, tiny_model, max_kl=1e-6) if not one.holds}
    assert list(found) == ["stop set", "end of generation"]
    assert f"too early: onnxruntime-genai ends at token {run.tokens[3]} " in found["end of generation"]


def test_an_export_whose_generation_does_not_stop_leaves_nothing(
    folder: Path, tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.export.test_onnx import FP32, onnx_export, replay

    def endless(out: Path) -> None:
        config = json.loads((out / "genai_config.json").read_bytes())
        config["search"]["min_length"] = 400
        (out / "genai_config.json").write_text(json.dumps(config))

    replay(monkeypatch, Artifact.open(folder), endless)
    with pytest.raises(ContractError, match="does not stop"):
        onnx_export.run(FP32, tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_that_lost_its_end_token(
    children_here: None, tiny_gguf: Artifact, tiny_model: Artifact, tmp_path: Path
) -> None:
    """llama.cpp also knows an end token by its name: the name goes, and the key that names its id."""
    from gguf import GGUFReader

    file = Path(shutil.copyfile(tiny_gguf.path / "model.gguf", tmp_path / "broken.gguf"))
    reader = GGUFReader(file, "r+")
    reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = 5
    tokens = reader.fields["tokenizer.ggml.tokens"]
    tokens.parts[tokens.data[2]][:] = np.frombuffer(b"<|im_emd|>", np.uint8)
    del reader, tokens  # writes it
    found = {one.name: one.found for one in check(file, tiny_model, max_kl=1e-6) if not one.holds}
    assert list(found) == ["stop set", "token ids", "end of generation"]
    assert found["end of generation"].endswith("llama-cpp-python goes on behind the end token 2")


def test_answers_of_a_model_that_only_ends_are_counted(children_here: None, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from edgetune.export import gguf
    from edgetune.recipe_export import GgufExport

    source = make_tiny_model(tmp_path / "model", says="<|im_end|>")
    made = gguf.run(GgufExport(type="F32"), source, tmp_path / "out", moments=None)
    note = made.manifest.notes["generation"]
    assert note["loop"] == "llama-cpp-python"
    assert note["ends"] == note["positions"] > 20

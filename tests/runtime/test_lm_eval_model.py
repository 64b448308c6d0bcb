"""lm-eval over our engines: likelihoods and generations by hand, and a local task from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.errors import UsageError
from edgetune.export import gguf
from tests.export.test_onnx import exported
from tests.test_found import bare

pytest.importorskip("lm_eval")
from edgetune.runtime.lm_eval_model import LmEvalModel

ENGINES = ("torch", "llama.cpp", "onnxruntime", "onnxruntime-genai")


def made_by_others(engine: str, model: Artifact, as_gguf: Artifact, factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a file or folder without a manifest that an engine runs."""
    folder = factory.mktemp("bare")
    if engine == "torch":
        return bare(model, folder / "model")
    if engine == "llama.cpp":
        return as_gguf.path / gguf.FILE
    pytest.importorskip("onnxruntime_genai")
    return bare(exported("fp32", model, factory), folder / "onnx")


@pytest.fixture(scope="module", params=ENGINES)
def model(
    request: pytest.FixtureRequest, tiny_model: Artifact, tiny_gguf: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> LmEvalModel:
    path = made_by_others(request.param, tiny_model, tiny_gguf, tmp_path_factory)
    made = LmEvalModel(path, engine=request.param, n_ctx=32, n_threads=1)
    assert made.engine.name == request.param
    return made


def test_an_artifact_gives_what_its_bare_files_give(model: LmEvalModel, tiny_model: Artifact) -> None:
    whole = LmEvalModel(tiny_model.path, n_ctx=32, n_threads=1)
    assert whole.engine.name == "torch"
    assert model.eot_token_id == whole.eot_token_id
    assert model.chat_template(True) == whole.chat_template(True)
    pairs = asked(("set the light", " to 30 percent"), ("", "what is the temperature"))
    for (log, greedy), (same, also) in zip(model.loglikelihood(pairs), whole.loglikelihood(pairs), strict=True):
        assert log == pytest.approx(same, rel=1e-3)
        assert greedy == also


def test_what_an_engine_does_not_run_is_refused(tiny_model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is of kind 'model', which runs in torch"):
        LmEvalModel(tiny_model.path, engine="llama.cpp")
    with pytest.raises(UsageError, match="is not there"):
        LmEvalModel(tmp_path / "nowhere")


def asked(*requests: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=request) for request in requests]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def test_likelihoods_are_the_engines(model: LmEvalModel) -> None:
    pairs = [("set the light", " to 30"), ("set the light", " to 30 percent"), ("what", " is"), ("", "the boiler")]
    found = model.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, text), (log, greedy) in zip(pairs, found, strict=True):
        given = model.tok_encode(context) if context else [model.eot_token_id]
        ids = [*given, *model.tok_encode(text)]
        logits = model.engine.score(ids)[len(given) - 1 : -1]
        rows = log_softmax(logits)
        assert log == pytest.approx(rows[np.arange(len(rows)), ids[len(given) :]].sum(), rel=1e-4)
        assert greedy == (logits.argmax(1).tolist() == ids[len(given) :])


def test_a_long_text_is_scored_in_windows_each_token_once(model: LmEvalModel) -> None:
    text = "set the kitchen light to 30 percent at what temperature " * 6
    (found,) = model.loglikelihood_rolling(asked((text,)))
    ids = model.tok_encode(text)
    assert len(ids) > 64
    expected = 0.0
    n = 31  # tokens of a window
    for at in range(0, len(ids), n):
        wanted = ids[at : at + n]
        given = [model.eot_token_id] if at == 0 else ids[at - 1 - (n - len(wanted)) : at]
        logits = model.engine.score([*given, *wanted])[len(given) - 1 : -1]
        expected += log_softmax(logits)[np.arange(len(wanted)), wanted].sum()
    assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="does not fit n_ctx=32; raise it"):
        model._loglikelihood_tokens([(None, [1], ids)])


def test_generation_stops_at_a_text_or_its_limit(model: LmEvalModel) -> None:
    prompts = ("set the", "light", "open a door", "7", "what is it")  # a random model may end an answer at once
    answers = model.generate_until(asked(*((prompt, {"until": [], "max_gen_toks": 8}) for prompt in prompts)))
    prompt, whole = next((prompt, one) for prompt, one in zip(prompts, answers, strict=True) if len(one) > 2)
    part = whole[2:4]
    (cut,) = model.generate_until(asked((prompt, {"until": [part], "max_gen_toks": 8})))
    assert cut == whole[: whole.index(part)]
    with pytest.raises(UsageError, match="our engines are greedy"):
        model.generate_until(asked(("set", {"do_sample": True})))
    with pytest.raises(UsageError, match="max_gen_toks=32 leaves no room for a prompt in n_ctx=32; raise n_ctx or"):
        model.generate_until(asked(("set", {"max_gen_toks": 32})))
    (one,) = model.generate_until(asked(("set the light " * 20, {"until": [], "max_gen_toks": 31})))
    assert isinstance(one, str)  # of the context its last token is left
    said = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert said == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert model.chat_template(True)
    assert model.chat_template(False) is None


TASK = """
task: lights
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
def test_a_local_task_from_end_to_end(model: LmEvalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"light {i}", "choices": [" on", " off"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lights.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=["lights"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for row in rows:
        logs = [log for log, _ in model.loglikelihood(asked(*((row["question"], c) for c in row["choices"])))]
        right += int(np.argmax(logs)) == row["answer"]
    assert found["results"]["lights"]["acc,none"] == pytest.approx(right / 6)

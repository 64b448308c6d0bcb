"""Shared fixtures: a tiny random Llama with a tokenizer of its own, as a whole `model` artifact."""

from __future__ import annotations

import gc
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgetune.artifact import Artifact, Store, draft
from edgetune.counts import Speeds
from edgetune.data.golden import make_golden
from edgetune.runtime.machine import LoadMeter

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Call = Callable[..., tuple[int, str, str]]
LONGEST = ("test_quickstart.py", "test_pipeline.py", "test_resume.py")
WORDS = ["turn", "the", "light", "in", "kitchen", "set", "to", "percent", "at", "what", "temperature", "of", "boiler"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files first that take minutes, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what is imported by now out of the garbage collections, each of which would walk over torch and trl."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _short_look_at_others() -> Iterator[None]:
    """Look only 0.02 s at how busy the machine is before each measurement, which no test reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadMeter.__init__, "__defaults__", (0.02,))
        yield


def tiny_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE with SmolLM2's pre-tokenizer on a few words, and save it with its template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(t, special=True) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        [" ".join(WORDS), *WORDS, '{"intent":"set_light","room":"kitchen","level":30}'] * 4, trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(folder)


def make_tiny_model(
    out: Path, *, seed: int = 0, tie: bool = True, layers: int = 2, hidden: int = 64, heads: tuple[int, int] = (4, 2),
    vocabulary: int = 512, says: str = "",
) -> Artifact:  # fmt: skip
    """Write a random Llama (2 layers, hidden 64, 4 heads, 2 key/value heads) as a `model` artifact.

    With `says` its likeliest next token is always that one.
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], max_position_embeddings=512,
        tie_word_embeddings=tie and not says,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    made_from = {"tiny": seed, "tie": tie, "layers": layers, "hidden": hidden, "vocabulary": vocabulary} | (
        {"says": says} if says else {}
    )
    with draft(out, kind="model", stage="source/1", config=made_from) as pending:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).float()
            for parameter in model.parameters():
                parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)  # logits far enough apart to compare
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
        model.save_pretrained(pending.path)
        tiny_tokenizer(pending.path)
        tokenizer = AutoTokenizer.from_pretrained(pending.path)
        if says:
            model.model.embed_tokens.weight.data[:, 0] = 100.0  # more than what the blocks add
            model.lm_head.weight.data.zero_()[tokenizer.convert_tokens_to_ids(says), 0] = 1.0
            model.save_pretrained(pending.path)
        make_golden(
            tokenizer,
            [
                [
                    {"role": "system", "content": "Turn the command into JSON."},
                    {"role": "user", "content": "set the kitchen light to 30 percent"},
                    {"role": "assistant", "content": '{"intent":"set_light","room":"kitchen","level":30}'},
                ],
                [{"role": "user", "content": "what is 7 × 6?"}, {"role": "assistant", "content": "42 — naturally"}],
            ],
            stop_ids=[2],
        ).write(pending.path)
    return pending.artifact


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny random Llama artifact with tied embeddings; shared, so never written to."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_model_wide(tiny_model: Artifact) -> Artifact:
    """The tiny Llama for exporters, all of which take its heads of 16; shared, so never written to."""
    return tiny_model


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny Llama as a GGUF file of 32 bits; shared, so never written to."""
    pytest.importorskip("llama_cpp")
    from edgetune.export import gguf
    from edgetune.recipe_export import GgufExport

    out = tmp_path_factory.mktemp("tiny-gguf") / "model"
    return gguf.run(GgufExport(type="F32"), tiny_model, out, moments=None, calibration_digest=None)


@pytest.fixture
def known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans take the machine's speeds as known, which they would else measure for seconds each."""
    from edgetune.adapt import step_time

    monkeypatch.setattr(Speeds, "measure", lambda device: Speeds(float32=100.0, training=100.0))
    monkeypatch.setattr(step_time, "measure", lambda *_: step_time.StepTime(pass_s=0.1, update_s=0.01))


@pytest.fixture(scope="session")
def scored_base(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the base of `test_pipeline.make_recipe` without `adapt`, and its score as the reference."""
    from edgetune import pipeline, plan
    from edgetune.stages import Stages
    from tests.test_pipeline import make_recipe

    folder = tmp_path_factory.mktemp("scored")
    recipe = make_recipe(folder, tiny_model.path, adapt=None, candidates={"plain": {}})
    stages = Stages(Store(folder / "store"), folder / "run", Console(file=io.StringIO()))
    line = pipeline.Pipeline(recipe, plan.preflight(recipe), stages)
    line.prepare()
    model = line.adapt()
    line.score(line._job("reference", model), [model], generate=True, reference=None)
    return folder / "store"


@pytest.fixture
def scored_store(scored_base: Path, tmp_path: Path) -> None:
    """Let a run of such a recipe find its base and reference in `tmp_path / "store"`."""
    shutil.copytree(scored_base, tmp_path / "store")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command line in this process; gives exit code, stdout and stderr."""

    from edgetune import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgetune", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        code: Any = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run

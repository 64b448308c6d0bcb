"""The recipe: closed pydantic models that say what to do. Imports nothing heavy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from edgetune.closed import Closed, Count, M, Seed, Share, exactly_one
from edgetune.errors import RecipeError
from edgetune.recipe_data import Data
from edgetune.recipe_distill import Distill
from edgetune.recipe_export import Calibration, Export
from edgetune.recipe_order import check_order, check_vocabulary
from edgetune.recipe_prune import Prune
from edgetune.recipe_quantize import BitOptions, GptqOptions, Recover, check_kept
from edgetune.recipe_runtime import Runtime
from edgetune.recipe_sparsify import Sparsify
from edgetune.recipe_tasks import MetricName, Task, check_budgeted
from edgetune.recipe_training import Adapt, Prefer

NewTokens = Annotated[int, Field(ge=2)]
SUBJECTS = ("reference", "base", "adapter", "adapted")  # what a run scores beside its candidates


class Rtn(BitOptions):
    """Round to nearest."""

    group_size: int = Field(64, description="columns that share a scale; -1 for the whole row")
    sym: bool = True
    calibration: Calibration | None = Field(
        None, exclude_if=lambda value: value is None, description="rows that recover is fitted on; not read without it"
    )

    @model_validator(mode="before")
    @classmethod
    def _rows_to_recover_on(cls, given: Any) -> Any:
        if not isinstance(given, dict) or issubclass(cls, Gptq):
            return given
        if given.get("recover") is None and given.get("calibration") is not None:
            raise ValueError("calibration is not read by rtn without recover; remove it")
        unsaid = given.get("recover") is not None and given.get("calibration") is None
        return given | {"calibration": {}} if unsaid else given

    @model_validator(mode="after")
    def _each_choice_once(self) -> Self:
        chosen = self.allocate.choices if self.allocate is not None else []
        for grid in self.allocate.grids if self.allocate is not None else []:
            if grid.group_size == self.group_size and grid.bits in chosen:
                raise ValueError(f"allocate.choices: {grid.bits} is in groups of {self.group_size} already; drop one")
        return self


class Gptq(GptqOptions, Rtn):
    """GPTQ (arXiv:2210.17323)."""

    desc_act: bool = Field(True, description="quantize columns in the order of falling activation")
    static_groups: bool = Field(True, description="keep each column's group in place, so that g_idx is plain")
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.01
    block_size: Count = 128
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> Self:
        if self.damping == "held-out" and "damp_percent" in self.model_fields_set:
            raise ValueError("damping: held-out chooses the damping of each layer; leave damp_percent out")
        if self.tune is not None and self.tune.zeros and self.sym:
            raise ValueError("tune.zeros: symmetric groups have one zero point for all; set sym: false")
        return self

    @property
    def unread(self) -> set[str]:
        return super().unread | ({"damp_percent"} if self.damping == "held-out" else set())


class Awq(Closed):
    """Scale columns that meet large inputs, so that rounding costs less (AWQ, arXiv:2306.00978); the same function."""

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(
        4, description="grid it is scaled for: that of the rtn or gptq step after it"
    )
    group_size: int = Field(64, description="as that step's")
    sym: bool = Field(True, description="as that step's")
    calibration: Calibration = Calibration()


class CompressStep(Closed):
    """One step of a candidate's chain: exactly one key."""

    prune: Prune | None = None
    distill: Distill | None = None
    sparsify: Sparsify | None = Field(None, exclude_if=lambda value: value is None)
    awq: Awq | None = Field(None, exclude_if=lambda value: value is None)
    rtn: Rtn | None = None
    gptq: Gptq | None = None

    @model_validator(mode="after")
    def _one(self) -> CompressStep:
        return exactly_one(self)

    @property
    def method(self) -> Prune | Distill | Sparsify | Awq | Rtn | Gptq:
        return getattr(self, self.key)  # type: ignore[no-any-return]

    @property
    def key(self) -> str:
        return next(name for name in CompressStep.model_fields if getattr(self, name) is not None)

    @property
    def quantizer(self) -> Rtn | Gptq | None:
        """The method where it makes integers, which no other step can read."""
        return None if isinstance(self.method, Prune | Distill | Sparsify | Awq) else self.method

    @property
    def keeps_update(self) -> bool:
        """Whether bits are chosen by what they keep of the training."""
        return self.quantizer is not None and self.quantizer.keeps_update

    @property
    def keeps_integers(self) -> bool:
        """Whether it trains what an earlier step made integers of, and leaves these as they are."""
        return self.distill is not None and self.distill.into is not None


class Candidate(Closed):
    """A chain of compress steps and an export target; without export the checkpoint itself is judged in torch."""

    compress: list[CompressStep] = []
    export: Export | None = None
    runtime: Runtime | None = Field(None, description="engine and settings; those of the format where absent")

    @model_validator(mode="after")
    def _runtime_runs_the_format(self) -> Candidate:
        if self.runtime is None:
            return self
        export = self.export or Export.model_construct()
        runs = {
            "llama.cpp": export.gguf is not None,
            "onnxruntime": export.onnx is not None,
            "onnxruntime-genai": export.onnx is not None,
            "torch": self.export is None,
        }
        if not runs[self.runtime.engine]:
            known = [engine for engine, fits in runs.items() if fits]
            raise ValueError(f"{self.runtime.engine} does not run this format; known to: {', '.join(known) or 'none'}")
        return self

    @model_validator(mode="after")
    def _order(self) -> Candidate:
        check_order(self.compress)
        check_vocabulary(self.compress)
        return self

    @property
    def distilled(self) -> list[Distill]:
        """The steps that distill."""
        return [step.distill for step in self.compress if step.distill is not None]

    @property
    def quantizer(self) -> Rtn | Gptq | None:
        """The method that makes integers, with what is written beside them in the end."""
        made = next((step.quantizer for step in self.compress if step.quantizer is not None), None)
        last = self.compress[-1].distill if self.compress else None
        if made is None or last is None or last.into != "adapter":
            return made
        return made.model_copy(update={"recover": Recover(rank=last.adapter_rank)})

    @property
    def n_float_steps(self) -> int:
        """How many steps are done before there are integers."""
        return next((i for i, step in enumerate(self.compress) if step.quantizer is not None), len(self.compress))


class Bench(Closed):
    """How latency is measured."""

    prompt_tokens: Annotated[list[Count], Field(min_length=1)] = [32, 256]
    new_tokens: NewTokens | Annotated[list[NewTokens], Field(min_length=1)] = 64
    threads: Count = 2
    repeats: Count = Field(5, description="measured generations of each case in each run, candidates interleaved")
    warmup: Count = Field(2, description="generations of each case that are named, kept apart and not counted")
    case_timeout_s: Annotated[float, Field(gt=0)] = 300
    runs: Count = Field(
        2,
        description="do it all so many times in fresh processes; their spread is the noise floor, and with 1 no "
        "latency is judged",
    )
    sweep_threads: Annotated[list[Count], Field(min_length=1)] | None = Field(
        None, description="also time the first case with each of these numbers of threads"
    )
    sweep_rows: Annotated[list[Count], Field(min_length=1)] | None = Field(
        None, description="also decode so many rows at once, and say from how many on int4 is no faster than 16-bit"
    )
    probes: (
        Annotated[list[Literal["cold_start", "memory", "energy", "frequency", "roofline"]], Field(min_length=1)] | None
    ) = Field(None, description="what else is measured of each candidate")

    @property
    def output_lengths(self) -> list[int]:
        return self.new_tokens if isinstance(self.new_tokens, list) else [self.new_tokens]

    def as_config(self) -> dict[str, Any]:
        """What an identity is made of: a key that is left out stands for what edgetune did before it had the key."""
        return self.model_dump(mode="json", exclude_none=True)


class AccuracyBudget(Closed):
    """Non-inferiority: the loss against the adapted model stays below `max_loss` at this confidence."""

    task: str | None = Field(None, description="name of a task; the held-out rows where absent")
    metric: MetricName = "exact_match"
    max_loss: Share = 0.02
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95


class Budgets(Closed):
    """What "ship" means. A budget that is absent is not judged."""

    accuracy: AccuracyBudget | None = None
    itl_ms_p95: Annotated[float, Field(gt=0)] | None = None
    ttft_ms_p95: Annotated[float, Field(gt=0)] | None = None
    itl_ms_p50: Annotated[float, Field(gt=0)] | None = Field(None, exclude_if=lambda value: value is None)
    ttft_ms_p50: Annotated[float, Field(gt=0)] | None = Field(None, exclude_if=lambda value: value is None)
    size_mb: Annotated[float, Field(gt=0)] | None = Field(None, description="10^6 bytes")
    peak_memory_mb: Annotated[float, Field(gt=0)] | None = Field(None, description="10^6 bytes, resident")


class Recipe(Closed):
    """A whole pipeline."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    base: str = Field(description="pkg:NAME, org/model, ./folder or ./file.gguf")
    revision: str | None = Field(None, description="commit or tag of a hub model")
    seed: Seed = 0
    device: str = Field(
        "cpu", description="torch device that trains, quantizes and scores what torch runs: cpu, cuda, cuda:1"
    )
    data: Data
    adapt: Adapt | None = Adapt()
    prefer: Prefer | None = Field(None, exclude_if=lambda value: value is None)
    candidates: Annotated[dict[str, Candidate], Field(min_length=1)]
    tasks: list[Task] = []
    bench: Bench = Bench()
    budgets: Budgets = Budgets()

    @property
    def probe(self) -> str | None:
        """The general probe that is asked; None where the recipe trains nothing."""
        return self.data.general_probe if self.adapt is not None or self.prefer is not None else None

    @model_validator(mode="after")
    def _slots_need_all_rows(self) -> Recipe:
        budget = self.budgets.accuracy
        if budget is None or budget.task is not None:
            return self
        if budget.metric == "slot_f1" and self.data.generated_rows is not None:
            raise ValueError(
                "budgets.accuracy.metric slot_f1 needs the answers of all rows; leave data.generated_rows out"
            )
        return self

    @model_validator(mode="after")
    def _separate_adapters_are_not_converted(self) -> Recipe:
        if self.adapt is None or not self.adapt.separate:
            return self
        why = "method prefix changes no weights" if self.adapt.method == "prefix" else "merge is separate"
        for name, candidate in self.candidates.items():
            if candidate.compress or candidate.export is not None:
                raise ValueError(f"candidates.{name}: adapt: {why}, so there is no model to compress or export; "
                                 f"write {name}: {{}}, which runs base and adapter in torch")  # fmt: skip
        if self.prefer is not None:
            raise ValueError(f"prefer: adapt: {why}, so there is no model to start from; merge it or leave prefer out")
        return self

    @model_validator(mode="after")
    def _budget_names_what_is_measured(self) -> Recipe:
        budget = self.budgets.accuracy
        check_budgeted(self.tasks, budget.task if budget else None, budget.metric if budget else None)
        return self

    @model_validator(mode="after")
    def _teachers_are_adapted(self) -> Recipe:
        for name, candidate in self.candidates.items():
            if (
                self.adapt is None
                and self.prefer is None
                and any(step.distill and step.distill.student == "base" for step in candidate.compress)
            ):
                raise ValueError(
                    f"candidates.{name}: without adapt or prefer the base is the teacher; name another student"
                )
        return self

    @model_validator(mode="after")
    def _updates_are_of_the_base(self) -> Recipe:
        for name, candidate in self.candidates.items():
            if candidate.compress and candidate.compress[-1].keeps_update:
                trained = self.adapt is not None or self.prefer is not None
                check_kept(name, [step.key for step in candidate.compress], trained=trained)
        return self

    @model_validator(mode="after")
    def _perplexity_counts_tokens(self) -> Recipe:
        asked = [task.name for task in self.tasks if task.kind == "perplexity"]
        for name, candidate in self.candidates.items():
            if asked and any(step.prune and step.prune.vocabulary for step in candidate.compress):
                raise ValueError(
                    f"candidates.{name}: prune.vocabulary makes other tokens of a text, and task {asked[0]} measures "
                    "perplexity, which is of a token; leave one out"
                )
        return self

    @field_validator("candidates")
    @classmethod
    def _names(cls, candidates: dict[str, Candidate]) -> dict[str, Candidate]:
        for name in candidates:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name in {".", ".."}:
                raise ValueError(f"candidate name {name!r} may hold letters, digits, '-', '_' and '.' only")
            if name in SUBJECTS:
                raise ValueError(f"candidate name {name!r} is what a run calls its own {name}; choose another name")
        return candidates


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises RecipeError with the key, what was found and what to do."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise RecipeError(f"{path}{line}: not valid YAML ({reason})") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, found {type(raw).__name__}")
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe that was already read. Raises RecipeError."""
    return parse_as(Recipe, raw, where)


def parse_as(model: type[M], raw: dict[str, Any], where: str) -> M:
    """Check a part of a recipe. Raises RecipeError with the key, what was found and what to do."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(model, error.errors()[0])}") from error


def _explain(model: type[BaseModel], error: Any) -> str:
    loc = [part for part in map(str, error["loc"]) if " " not in part]  # a union's branch has a name with spaces
    key = ".".join(loc) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        return f"unknown key {key!r}{hint}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (found {error['input']!r})" if error["type"] != "value_error" else f"{key}: {message}"


def _keys_at(model: type[BaseModel], loc: list[str]) -> list[str]:
    """Known keys of the part of a model that a location leads to, found by walking the JSON Schema."""
    schema = model.model_json_schema()
    node: dict[str, Any] = schema
    for part in loc:
        node = _resolve(schema, node)
        if "properties" in node and part in node["properties"]:
            node = node["properties"][part]
        elif "items" in node:
            node = node["items"]
        elif isinstance(node.get("additionalProperties"), dict):
            node = node["additionalProperties"]
    return sorted(_resolve(schema, node).get("properties", {}))


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    for option in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        if option.get("type") not in ("null", "string"):
            node = option
            break
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node

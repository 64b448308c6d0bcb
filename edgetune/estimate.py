"""What a recipe will cost, before it runs: seconds and resident memory of each stage.

Seconds are arithmetic divided by the speed of this machine's matrix products, which is measured, and by the share of
that speed which each kind of stage reached in runs of the quickstart, the committed one among them
(`benchmarks/results`). They are good to a factor of two and a half on a machine of the same kind;
`tests/test_estimate.py` holds them to that. Those of a step of `adapt` are better where they were measured
(`adapt.step_time`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from edgetune.compress.answers import CHUNK_ROWS
from edgetune.compress.chain import configs, so_far, step_names
from edgetune.compress.damping import DAMPINGS
from edgetune.counts import NOTHING, UNKNOWN, Counts, Sizes, Speeds
from edgetune.export.gguf_allocation import offered
from edgetune.export.perplexity import N_TOKENS
from edgetune.graph import (
    ANSWERS,
    IMPORTANCE,
    SENSITIVITY,
    STUDENT,
    TEACHER,
    TIMES,
    UPDATE_KEPT,
    UPDATE_LEFT,
    merges,
    scored_steps,
    weighed_export,
    why_not_run,
)
from edgetune.preference_memory import preference_bytes
from edgetune.recipe import Awq, Bench, Candidate, Gptq, Recipe, Rtn
from edgetune.recipe_distill import Distill
from edgetune.recipe_export import Calibration
from edgetune.recipe_prune import Prune
from edgetune.recipe_sparsify import Sparsify
from edgetune.recipe_training import PAIRED, Adapt, Prefer
from edgetune.training_memory import Lengths, Shape, fitted, number_bytes, peak_bytes
from edgetune.training_time import BLOCK_S, SHARE, preference_step_seconds, step_seconds, steps_of

# Share of the machine's matrix product speed that a stage reaches on its own arithmetic: of the speed in the dtype that
# training computes in where it walks, else of float32's.
TORCH, CALIBRATING, SOLVING = 0.3, 0.5, 0.9
# What a solver does one element after the other, of one thread, and one column after the other, which threads hardly
# share: no matrix product speed tells of it. Of four shapes (hidden 576 to 3,072) on an EPYC: 0.99 to 1.3 of the time.
WEIGHT_S, COLUMN_S = 9e-8, 3e-5
MADE_S = 4e-9  # a weight of trained scales beside its products: 3.2 to 4.6 on one thread, layers of 1536 x 576
HELD_MIB = 512  # of activations between two blocks; what is more is on disk
# Of integers, between what two machines showed: 0.22 and 0.3 where float32 is fast (a Xeon with AMX), 0.7 and 0.9 where
# it is not (an EPYC). TensorRT runs on a GPU, whose speed nobody here knows: taken for torch's.
SCORING = {"gguf": 0.43, "onnx": 0.52}
# Times the bytes of the weights that pass for each token.
DECODING = {"torch": 1.5, "gguf": 0.6, "onnx": 0.5, "tensorrt": 1.5}
MEMORY_BYTES_PER_S = 8e9
PROBE = "general probe"  # stage: what training forgot
START_S, BASE_S_PER_GB, EXPORT_S_PER_GB, MIB = 8.0, 90.0, 70.0, 1 << 20
SWEPT, PROBE_PROCESSES = 4, 2  # generations of each point of a sweep; processes that a probe starts at most
RUNTIME_MIB, TRAINER_MIB = 450.0, 1400.0  # Python with torch and transformers; with what training imports
TUNED_TOKENS = 2048  # in a step of learning scales: those of one forward


@dataclass(frozen=True)
class Cost:
    """A prediction: wall-clock seconds, and peak resident memory of the process that works, in MiB."""

    seconds: float
    memory_mib: float


class Estimator:
    """Predicts the stages of one recipe on a machine of these speeds."""

    def __init__(
        self, recipe: Recipe, config: dict[str, Any], train: Counts, heldout: Counts, speeds: Speeds,
        tasks: Counts = NOTHING, probe: Counts = NOTHING, asked: Lengths = UNKNOWN,
    ) -> None:  # fmt: skip
        self.recipe, self.sizes, self.speeds = recipe, Sizes.of(config), speeds
        self.shape, self._number_bytes = Shape.of(config), number_bytes(recipe.device)
        self.train, self.heldout, self.tasks, self.probe = train, heldout, tasks, probe
        self.asked = asked  # the sequences of `prefer`
        self.step_s: float | None = None  # of `adapt`, where it was measured
        self._along = {  # a candidate's model before its first step and after each
            name: [Sizes.of(one) for one in configs(candidate, config)] for name, candidate in recipe.candidates.items()
        }

    def cost(self, stage: str) -> Cost:
        """Predict one stage by the name that `Graph.stages` and `measured_stages` give it."""
        subject, _, what = stage.partition(": ")
        recipe, sizes = self.recipe, self.sizes
        if stage == "base":
            return Cost(START_S + BASE_S_PER_GB * sizes.bytes_16 / 1e9, RUNTIME_MIB + 4 * sizes.bytes_16 / MIB)
        if stage == "adapt":
            assert recipe.adapt is not None, "a recipe without adapt has no such stage"
            return self._training(recipe.adapt)
        if stage == "prefer":
            assert recipe.prefer is not None, "a recipe without prefer has no such stage"
            return self._preference(recipe.prefer)
        if stage in ("merge", "merge preferred"):
            return Cost(10 * sizes.bytes_16 / 1e9, RUNTIME_MIB + 2 * sizes.bytes_16 / MIB)
        if stage == "latency":
            return self._latency(recipe.bench)
        along = self._along.get(subject, [sizes])
        if what == "accuracy" and subject in ("base", "adapter", "adapted", "preferred adapter"):
            return self._scoring(None, sizes, self.heldout, gflops=self.speeds.training)
        if what == "accuracy":
            return self._scoring(recipe.candidates.get(subject), along[-1], self.heldout)
        if what == PROBE:
            return self._scoring(None, sizes, self.probe, gflops=self.speeds.training)
        if what == "tasks":
            return self._scoring(recipe.candidates.get(subject), along[-1], self.tasks)
        candidate = recipe.candidates[subject]
        names = step_names(candidate)
        if what.endswith(": accuracy"):
            return self._scoring(None, along[1 + names.index(what.removesuffix(": accuracy"))], self.heldout)
        if what == ANSWERS:
            return self._writing(next(d for d in candidate.distilled if d.answers == "teacher"))
        if what == TEACHER:
            return self._teaching()
        if what == STUDENT:
            return Cost(START_S + BASE_S_PER_GB * along[1].bytes_16 / 1e9, RUNTIME_MIB + 4 * along[1].bytes_16 / MIB)
        gguf = weighed_export(candidate)
        if what == IMPORTANCE and gguf is not None:
            return self._calibrating(gguf.calibration, along[-1], solves=False)
        if what.startswith(("gguf", "onnx", "tensorrt")):
            n_bytes = along[-1].bytes_16
            seconds = START_S + EXPORT_S_PER_GB * n_bytes / 1e9 + self._reading(_kind(candidate), along[-1])
            asked = candidate.export.gguf if candidate.export else None
            if asked is not None and asked.gptq:
                seconds += self._calibrating(asked.calibration, along[-1], solves=True).seconds
            return Cost(seconds, RUNTIME_MIB + 4 * n_bytes / MIB)
        if what == UPDATE_LEFT:
            return Cost(10 * along[-1].bytes_16 / 1e9, RUNTIME_MIB + along[-1].bytes_16 / MIB)
        if what == UPDATE_KEPT and (grid := candidate.quantizer) is not None and grid.allocate is not None:
            seconds = 10 * len(grid.allocate.choices) * along[-1].bytes_16 / 1e9
            return Cost(seconds, RUNTIME_MIB + along[-1].bytes_16 / MIB)
        if what == SENSITIVITY and candidate.quantizer is not None:
            return self._measuring(candidate.quantizer, along[-1])
        if what == SENSITIVITY and gguf is not None and gguf.allocate is not None:
            widths = 3 * [along[-1].hidden] + [along[-1].intermediate]  # of a block's four groups of layers
            tried = sum(offered(kind, width) for kind in gguf.allocate.choices for width in widths) / len(widths)
            found, n = self._comparing(gguf.allocate.rows, tried, along[-1]), len(gguf.allocate.choices)
            return Cost(found.seconds + n * EXPORT_S_PER_GB / 2 * along[-1].bytes_16 / 1e9, found.memory_mib)
        if what == TIMES and gguf is not None and gguf.allocate is not None:
            return self._timing(len(gguf.allocate.choices), along[-1])
        place = names.index(what)
        return self._step(candidate.compress[place].method, along[place], along[place + 1])

    def _step(self, method: Prune | Distill | Sparsify | Awq | Rtn | Gptq, before: Sizes, after: Sizes) -> Cost:
        """Predict one compress step of a model."""
        if isinstance(method, Distill):
            return self._distilling(method, after) if method.into is None else self._recovering(method, after)
        if isinstance(method, Prune) and not method.cuts_blocks:
            return Cost(START_S, RUNTIME_MIB + 2 * before.head / MIB)
        if isinstance(method, Prune):
            once = self._calibrating(method.calibration, before, solves=False)
            whole = 4 * before.bytes_16 / MIB if method.search == "kl" else 0.0
            return Cost(once.seconds + self._searching(method, before), once.memory_mib + whole)
        if isinstance(method, Awq):
            found = self._calibrating(method.calibration, before, solves=True)
            moments = 4 * (3 * before.hidden**2 + before.intermediate**2)  # of the whole block at once
            return Cost(found.seconds, found.memory_mib + moments / MIB)
        if isinstance(method, Gptq):
            found = self._calibrating(method.calibration, before, solves=True, followed=method.correction > 0)
            choosing = self._choosing(before) if method.damping == "held-out" else Cost(0.0, 0.0)
            seconds = found.seconds + self._tuning(method, before) + choosing.seconds
            return Cost(seconds, found.memory_mib + choosing.memory_mib)
        if method.calibration is None:
            return Cost(START_S, RUNTIME_MIB + before.solving_bytes(0) / MIB)
        return self._calibrating(method.calibration, before, solves=True)

    def _choosing(self, sizes: Sizes) -> Cost:
        """Predict the solves by which a damping is chosen, and the moments of the rows held out."""
        seconds = len(DAMPINGS) * sizes.n_layers * self._solving(sizes, 0)
        return Cost(seconds, 4 * sizes.intermediate**2 / MIB)

    def _tuning(self, config: Gptq, sizes: Sizes) -> float:
        """Seconds of learning grids: three forwards a step, three looks at all batches, and the float model's pass.

        With zero points a quarter of the batches is looked at five times.
        """
        if config.tune is None:
            return 0.0
        n_tokens = config.calibration.n_samples * config.calibration.n_tokens
        seen = 3 * config.tune.steps * min(n_tokens, TUNED_TOKENS) + (2.25 if config.tune.zeros else 4) * n_tokens
        return 2.0 * seen * sizes.linear / (self.speeds.training * 1e9 * CALIBRATING)

    def _measuring(self, method: Rtn | Gptq, sizes: Sizes) -> Cost:
        """Predict a sensitivity: half of the blocks, and the head, for each choice of each group of layers."""
        assert method.allocate is not None, "only allocate measures"
        n = len(method.allocate.choices)
        looking = self._comparing(method.allocate.rows, n, sizes)
        if not isinstance(method, Gptq):
            return looking
        solving = self._calibrating(method.calibration, sizes, solves=True)
        memory = looking.memory_mib - RUNTIME_MIB + solving.memory_mib
        return Cost(looking.seconds + n * solving.seconds, memory)

    def _comparing(self, rows: Calibration, n_choices: float, sizes: Sizes) -> Cost:
        """Predict how long `n_choices` of each group of layers are looked at."""
        once = 2.0 * rows.n_samples * rows.n_tokens * (sizes.linear / 2 + sizes.head)
        seconds = START_S + self._seconds(4 * sizes.n_layers * n_choices * once, CALIBRATING)
        return Cost(seconds, RUNTIME_MIB + 4 * sizes.bytes_16 / MIB)

    def _timing(self, n_types: int, sizes: Sizes) -> Cost:
        """Predict how long files of so many types are written and decoded."""
        bench = self.recipe.bench
        n_new = (bench.repeats + bench.warmup) * bench.output_lengths[0]
        read = DECODING["gguf"] * sizes.bytes_16 * n_new / MEMORY_BYTES_PER_S
        one = EXPORT_S_PER_GB / 2 * sizes.bytes_16 / 1e9 + START_S / 2 + read
        return Cost(START_S + n_types * one, RUNTIME_MIB + n_types * DECODING["gguf"] * sizes.bytes_16 / MIB)

    def _seconds(self, flop: float, share: float) -> float:
        return flop / (self.speeds.float32 * 1e9 * share)

    def _training(self, config: Adapt) -> Cost:
        config, n_rows, device = self.fitted(config), self.train.n_rows, self.recipe.device
        aside = min(config.eval_rows, n_rows // 5)
        steps = steps_of(config, max(n_rows - aside, 1))
        one = self.step_s or step_seconds(config, self.shape, self.train.lengths, self.speeds.training, device)
        forward = 1 / 3 if config.method == "full" else 1 / 2  # of a step: all that rows set aside take
        watching = steps // min(config.eval_steps, steps) * aside / config.batch_size * forward
        memory = peak_bytes(config, self.shape, self.train.lengths, device, self._number_bytes)
        return Cost(START_S + (steps + watching) * one, memory / MIB)

    def fitted(self, config: Adapt) -> Adapt:
        """Give the way of training that is chosen for a memory budget. Raises RecipeError where none fits."""
        return fitted(config, self.shape, self.train.lengths, self.recipe.device, self._number_bytes)

    def _preference(self, config: Prefer) -> Cost:
        shape, lengths, device = self.shape, self.asked, self.recipe.device
        answers = len(lengths.rows) / (2 if config.method in PAIRED else 1)
        answers *= config.generations if config.method == "grpo" else 1
        steps = config.max_steps or ceil(config.epochs * ceil(answers / config.batch_size))
        one = preference_step_seconds(config, shape, lengths, self.speeds.training, device)
        if config.method == "grpo":  # all answers of a step are sampled together
            one += config.max_new_tokens * DECODING["torch"] * self.sizes.bytes_16 / MEMORY_BYTES_PER_S
        memory = preference_bytes(config, shape, lengths, device, self._number_bytes)
        return Cost(START_S + steps * one, memory / MIB)

    def _searching(self, config: Prune, sizes: Sizes) -> float:
        """Seconds of a greedy search: half of the blocks that are left, and the head, for each one that may go."""
        if config.search != "kl" or config.layers is None:
            return 0.0
        tokens = config.search_samples * config.calibration.n_tokens
        rounds = range(config.layers + 1, sizes.n_layers + 1)
        blocks = sum(left * (left + 1) / 2 for left in rounds) / sizes.n_layers * sizes.linear
        return self._seconds(2.0 * tokens * (blocks + sum(rounds) * sizes.head), CALIBRATING)

    def _writing(self, config: Distill) -> Cost:
        """Let the adapted model answer the training rows, chunk by chunk."""
        n_rows = self.train.n_rows
        seconds = self._answering(config, self.sizes, n_rows, ceil(n_rows / CHUNK_ROWS))
        return Cost(START_S + seconds, RUNTIME_MIB + 2 * self.sizes.bytes_16 / MIB)

    def _answering(self, config: Distill, sizes: Sizes, n_rows: float, n_batches: float) -> float:
        """Seconds in which a model answers prompts: it reads them, and its weights pass once a batch for each token."""
        train = self.train
        n_new = config.max_new_tokens or max(n_labels for _, n_labels in train.lengths.rows)
        prompt = (train.n_tokens - train.n_labels) / max(train.n_rows, 1)
        flop = 2.0 * n_rows * (prompt * sizes.linear + n_new * (sizes.linear + sizes.head))
        passing = n_batches * n_new * DECODING["torch"] * sizes.bytes_16 / MEMORY_BYTES_PER_S
        return passing + self._seconds(flop, TORCH)

    def _teaching(self) -> Cost:
        """Score the training rows with the adapted model."""
        flop = 2 * (self.train.n_tokens * self.sizes.linear + self.train.n_labels * self.sizes.head)
        return Cost(START_S + self._seconds(flop, TORCH), RUNTIME_MIB + 2 * self.sizes.bytes_16 / MIB)

    def _distilling(self, config: Distill, sizes: Sizes) -> Cost:
        """Train all weights: six operations a weight and token; float32 with gradient and two moments, and a copy."""
        n_rows, n_tokens, n_labels = max(self.train.n_rows, 1), self.train.n_tokens, self.train.n_labels
        passes = config.epochs if config.max_steps is None else config.max_steps * config.batch_size / n_rows
        flop = passes * 6 * (n_tokens * sizes.linear + n_labels * sizes.head)
        steps = passes * n_rows / config.batch_size
        flop += steps * 12 * (sizes.linear + sizes.head)  # AdamW
        judged = passes * config.on_policy
        flop += 2 * (passes if config.compares else judged) * n_tokens * self.sizes.linear
        flop += 2 * judged * n_labels * self.sizes.head
        sampling = 0.0
        if config.on_policy:
            batches = steps * config.on_policy * config.batch_size / (config.micro_batch_size or config.batch_size)
            sampling = self._answering(config, sizes, judged * n_rows, batches)
        beside = 2.0 * self.sizes.bytes_16 if config.compares or config.on_policy else 0.0
        rows = config.micro_batch_size or config.batch_size
        width = (4 + self._number_bytes) / 2  # sums stay float32, what products read need not
        activations = rows * n_tokens / n_rows * sizes.n_layers * (14 * sizes.hidden + 6 * sizes.intermediate) * width
        logits = 5 * 4 * sizes.vocabulary * rows * n_labels / n_rows
        weights = 18 * (sizes.linear + sizes.head)
        memory = TRAINER_MIB + (weights + beside + activations + logits) / MIB
        small = steps * sizes.n_layers * BLOCK_S["cpu"]
        return Cost(START_S + small + sampling + flop / (self.speeds.training * 1e9 * SHARE), memory)

    def _recovering(self, config: Distill, sizes: Sizes) -> Cost:
        """Train what is beside the integers of a checkpoint, in the dtype that training computes in."""
        n_rows, n_tokens, n_labels = max(self.train.n_rows, 1), self.train.n_tokens, self.train.n_labels
        passes = config.epochs if config.max_steps is None else config.max_steps * config.batch_size / n_rows
        steps, scales = passes * n_rows / config.batch_size, config.into == "scales"
        products = 6 if scales else 4  # scales want the gradient of each weight
        flop = passes * (products * n_tokens * sizes.linear + 4 * n_labels * sizes.head)
        rows = config.micro_batch_size or config.batch_size
        made = scales * steps * config.batch_size / rows * sizes.linear * MADE_S  # weights, anew for each product
        beside, sampling = 0.0, 0.0
        if config.on_policy:
            judged, beside = passes * config.on_policy, 2.0 * self.sizes.bytes_16
            flop += 2 * judged * (n_tokens * self.sizes.linear + n_labels * self.sizes.head)
            batches = steps * config.on_policy * config.batch_size / rows
            sampling = self._answering(config, sizes, judged * n_rows, batches)
        width = self._number_bytes
        activations = rows * n_tokens / n_rows * sizes.n_layers * (14 * sizes.hidden + 6 * sizes.intermediate) * width
        logits = 5 * 4 * sizes.vocabulary * rows * n_labels / n_rows
        memory = TRAINER_MIB + (4 * sizes.linear + width * sizes.head + beside + activations + logits) / MIB
        small = steps * sizes.n_layers * BLOCK_S["cpu"]
        seconds = START_S + small + made + sampling + flop / (self.speeds.training * 1e9 * SHARE)
        return Cost(seconds, memory)

    def _scoring(self, candidate: Candidate | None, sizes: Sizes, rows: Counts, *, gflops: float | None = None) -> Cost:
        """Score rows once, in float32 without `gflops`; a subject that is no candidate runs in torch."""
        kind = _kind(candidate)
        flop = 2 * (rows.n_tokens * sizes.linear + rows.n_labels * sizes.head)
        weights = {"torch": 2.0, "gguf": 0.5, "onnx": 1.0, "tensorrt": 1.0}[kind] * sizes.bytes_16
        seconds = flop / ((gflops or self.speeds.float32) * 1e9 * SCORING.get(kind, TORCH))
        return Cost(START_S + seconds, RUNTIME_MIB + weights / MIB)

    def _reading(self, kind: str, sizes: Sizes) -> float:
        """Seconds of the general text whose perplexity an export is held to: in torch, and in its runtime."""
        if kind == "tensorrt":
            return 0.0
        flop = 2.0 * N_TOKENS * (sizes.linear + sizes.head)
        return flop / (self.speeds.float32 * 1e9) * (1 / TORCH + 1 / SCORING[kind])

    def _calibrating(self, config: Calibration, sizes: Sizes, *, solves: bool, followed: bool = False) -> Cost:
        """Predict a pass of all blocks, one in memory at a time; with `followed` the float model takes one as well."""
        n_tokens, times = config.n_samples * config.n_tokens, 2 if followed else 1
        flop = 2.0 * times * n_tokens * sizes.linear
        seconds = START_S + flop / (self.speeds.training * 1e9 * CALIBRATING)
        if solves:
            seconds += sizes.n_layers * self._solving(sizes, times * n_tokens)
        hidden = min(2.0 * n_tokens * (sizes.hidden * 2 + sizes.intermediate) / MIB, HELD_MIB)
        return Cost(seconds, RUNTIME_MIB + sizes.solving_bytes(1 if solves else 0) / MIB + hidden)

    def _solving(self, sizes: Sizes, n_tokens: int) -> float:
        """Seconds of one block's second moments, of four widths, and of its columns in turn."""
        h, i, weights = sizes.hidden, sizes.intermediate, sizes.linear / sizes.n_layers
        moments = 1.2 * n_tokens * (3 * h**2 + i**2)  # by panels of half of a symmetric product
        updates = 3.0 * (h * (weights - h * i) + i * h * i)  # of later columns, and two errors weighed by the moments
        factors = 0.6 * (3 * h**3 + i**3)  # a third as many, at somewhat more than half of the speed
        by_one = weights * WEIGHT_S / self.speeds.threads + (3 * h + i) * COLUMN_S
        return self._seconds(moments + updates + factors, SOLVING) + by_one

    def _latency(self, bench: Bench) -> Cost:
        subjects = [("torch", self.sizes)]
        subjects += [
            (_kind(found), self._along[name][-1])
            for name, found in self.recipe.candidates.items()
            if why_not_run(found) is None
        ]
        rounds = (bench.repeats + bench.warmup) * bench.runs
        swept = SWEPT * (len(bench.sweep_threads or ()) + sum(bench.sweep_rows or ()))
        n_new = rounds * sum(bench.output_lengths) * len(bench.prompt_tokens) + swept * bench.output_lengths[0]
        read = sum(DECODING[kind] * sizes.bytes_16 for kind, sizes in subjects) * n_new / MEMORY_BYTES_PER_S
        n_read = rounds * sum(bench.prompt_tokens) * len(bench.output_lengths) + swept * min(bench.prompt_tokens)
        prefill = sum(self._seconds(n_read * 2 * sizes.linear, SCORING.get(kind, TORCH)) for kind, sizes in subjects)
        processes = bench.runs + len(bench.sweep_threads or ()) + bool(bench.sweep_rows)
        processes += PROBE_PROCESSES * len(bench.probes or ())
        starting = len(subjects) * processes * START_S / 2
        return Cost(starting + read + prefill, RUNTIME_MIB + self.sizes.bytes_16 / MIB)


def measured_stages(recipe: Recipe) -> list[str]:
    """Name the measurements of a recipe, in the order in which they are made."""
    hops = ["reference"]
    if recipe.adapt is not None or recipe.prefer is not None:
        hops.append("base")
    if recipe.adapt is not None:
        hops += ["adapter"] if merges(recipe.adapt) else []
        hops += ["adapted"] if recipe.prefer is not None else []
    hops += ["preferred adapter"] if recipe.prefer is not None else []
    run_here = [name for name, candidate in recipe.candidates.items() if why_not_run(candidate) is None]
    seen: set[str] = set()
    for name, candidate in recipe.candidates.items():
        for place, step in enumerate(scored_steps(candidate)):
            if (chain := so_far(candidate, place + 1)) not in seen:  # candidates that share a step share its score
                seen.add(chain)
                hops.append(f"{name}: {step}")
        hops += [name] if name in run_here else []
    tasked = ["reference", *run_here] if recipe.tasks else []
    probed = ["base", "reference"] if recipe.probe is not None else []
    named = [(hops, "accuracy"), (probed, PROBE), (tasked, "tasks")]
    return [*(f"{name}: {what}" for names, what in named for name in names), "latency"]


def _kind(candidate: Candidate | None) -> str:
    if candidate is None or candidate.export is None:
        return "torch"
    return next(name for name, given in candidate.export if given is not None)

"""The one schema of everything that was measured. Raw samples are kept."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from edgetune.runtime.engine import runs_on_gpu

SCHEMA_VERSION = 1


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Machine(Record):
    """The box that measured."""

    cpu: str
    cpu_flags: list[str]  # those that matter to engines: avx2, avx512f, avx512_vnni, amx_int8 ...
    cores: int
    memory_mib: int
    gpu: str | None
    platform: str
    python: str


class Load(Record):
    """How busy the machine was beside us: other processes' share of all cores, 0 to 1."""

    others_before: float
    others_during: float
    busy: bool  # others_during above 0.1: figures are marked


class Subject(Record):
    """What was measured, by what."""

    name: str  # candidate, "reference" or "base"
    kind: str
    artifact_digest: str
    size_bytes: int
    engine: str
    engine_version: str
    n_threads: int
    settings: dict[str, Any] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on a GPU."""
        return runs_on_gpu(self.engine, self.settings)


class RowScore(Record):
    """One held-out row. Exact match is teacher-forced: argmax equals gold at every target position."""

    exact: bool
    n_tokens: int  # target positions
    n_correct: int  # positions where argmax is gold
    nll: float  # natural log, summed over the target
    kl: float | None = None  # to the reference, nats, summed over the target
    kl_tokens: list[float] | None = None  # the same at each target position, four digits
    n_agree: int | None = None  # positions where argmax equals the reference's argmax
    first_divergence: int | None = None  # first target position where it does not; None where there is none
    output: str | None = None  # greedy continuation, where it was made because the row is not exact
    slot_true_positives: int | None = None
    slot_predicted: int | None = None
    slot_gold: int | None = None


class TextScore(Record):
    """Perplexity of general text: summed negative log-likelihood (nats) of each probe text."""

    nll: list[float]
    n_tokens: list[int]


class Accuracy(Record):
    subject: Subject
    workload: str  # digest of rows: ids and starts; of a pruned vocabulary, of the rows that it says the same as
    rows: list[RowScore]
    text: TextScore | None
    seconds: float
    load: Load


class TaskRow(Record):
    """One row of a task. The mean of `scores` over rows is the figure, and of differences between them its loss.

    Where a figure is no mean of rows (F1, BLEU, AUC), a row's share is its jackknife pseudo-value, moved so
    that the mean of all is the figure.
    """

    gold: str
    output: str  # the answer, or the label or choice that is likeliest; empty for perplexity
    scores: dict[str, float]  # metric -> this row's share
    likelihoods: list[float] | None = None  # log, nats, of each label or choice


class TaskScore(Record):
    """One task of the recipe, scored in the subject's own runtime."""

    subject: Subject
    task: str
    kind: str
    workload: str  # digest of rows, answers and settings
    figures: dict[str, float]  # metric -> as its library computes it; a share, or a perplexity
    rows: list[TaskRow]
    seconds: float
    load: Load


class Generation(Record):
    """One timed generation: stamps from the same monotonic clock, milliseconds."""

    ttft_ms: float  # prefill call to first token chosen
    itl_ms: list[float]  # one for each further token
    warmup: bool
    run: int = 0  # which repeated run, each in processes of its own


class LatencyCase(Record):
    prompt_tokens: int
    new_tokens: int
    generations: list[Generation]
    steady: bool | None = None  # medians of the last two warm-ups within 5%; None where that was not looked at


class SweepPoint(Record):
    """One artifact with another number of threads, or with several rows at once; `reason` where that failed."""

    n_threads: int
    n_rows: int
    prompt_tokens: int
    generations: list[Generation]  # itl_ms: one for each step, which gives every row a token
    reason: str | None = None


class ColdStart(Record):
    """Load and first token in a fresh process, its files dropped from the page cache, and in one after it."""

    resident: float | None  # share of the files that the kernel kept in memory; None where it cannot tell
    load_ms: float
    ttft_ms: float
    warm_load_ms: float
    warm_ttft_ms: float


class MemoryPhases(Record):
    """Resident bytes of a fresh child: after loading, and the highest while reading a prompt and while decoding."""

    loaded: int
    prefill_peak: int
    decode_peak: int


class CpuState(Record):
    """What the kernel tells of the processor; None where it does not."""

    mhz: float | None
    throttled: int | None  # events since the machine started


class Energy(Record):
    """Joules over one generation, of the processor packages and, of an engine on a GPU, of all GPUs; the machine's
    rest included."""

    joules: float | None
    seconds: float
    n_tokens: int
    reason: str | None = None  # why there is no reading
    gpu_joules: float | None = None
    gpu_reason: str | None = None  # why there is none of the GPU that ran it


class Roofline(Record):
    """Bytes that a token must read, the memory bandwidth that was measured, and the share of it that was reached."""

    bytes_per_token: int
    memory_bytes_per_s: float
    share: float


class Probes(Record):
    """What `bench` keys ask for beside the timing itself, each measured in fresh processes."""

    sweep: list[SweepPoint] = []
    cold_start: ColdStart | None = None
    memory: MemoryPhases | None = None
    energy: Energy | None = None
    cpu_before: CpuState | None = None
    cpu_after: CpuState | None = None
    roofline: Roofline | None = None
    failures: dict[str, str] = {}  # probe -> why it did not come to its end


class Latency(Record):
    subject: Subject
    workload: str
    load_ms: float
    first_run_ms: float  # the very first generation's TTFT, apart from the samples
    cases: list[LatencyCase]
    peak_rss_bytes: int
    load: Load
    probes: Probes | None = None


class Failure(Record):
    """A measurement or stage that did not come to its end."""

    subject: str
    stage: str
    reason: str  # one line
    artifact_digest: str | None = None  # of what was to be measured, where that was made


class ServedRequest(Record):
    """One request to a server, stamped by its client in seconds from the beginning of its case."""

    sent_s: float
    done_s: float | None = None
    ttft_ms: float | None = None
    itl_ms: list[float] = []  # waits between parts of the stream; most servers send one for each token
    n_tokens: int | None = None  # as the server counts them
    error: str | None = None


class ServedCase(Record):
    """Requests of so many clients at once, or arriving at a rate."""

    concurrency: int | None
    rate: float | None  # requests a second
    seconds: float
    requests: list[ServedRequest]


class Served(Record):
    """What one HTTP endpoint was measured to do."""

    url: str
    model: str
    new_tokens: int
    cases: list[ServedCase]
    artifact_digest: str | None = None  # of the file that it serves, where the caller named that
    prompt_tokens: int | None = None  # of each prompt, by that file's tokenizer


class CaseFigures(Record):
    """What was computed from the samples of one case: percentiles in milliseconds, rates in tokens a second."""

    subject: str
    prompt_tokens: int
    new_tokens: int
    figures: dict[str, tuple[float, float | None, float | None]]  # "itl_p95" -> value, and its 95 % interval


class Timings(Record):
    """What one `bench` or `score` measured, with the machine; what a history keeps and `report --merge` reads."""

    schema_version: Literal[1] = 1
    edgetune: str
    time: str  # ISO 8601, UTC
    machine: Machine
    results: list[Latency | Failure]
    figures: list[CaseFigures] = []  # of the results, as they were printed
    served: list[Served] = []
    scored: list[Accuracy] = []  # against a reference pack


class Seam(Record):
    """One hop of the pipeline on the same probe rows."""

    hop: str  # "base", "adapter on nf4", "merged", "gptq int4 g32", "onnx"
    engine: str
    n_rows: int
    exact_match: float
    token_accuracy: float
    nll_per_token: float
    kl_per_token: float | None
    aside: bool = False  # measured on other rows, and against another reference: not a step of the way
    exact_rows: str | None = None  # "1" for each row that is exact and "0" for the others, in their order
    subject: str | None = None  # whose rows in the report's `accuracy` these are; None where it has them not
    evidence: str | None = None  # the file of the store that has them


class Check(Record):
    """One budget of one candidate."""

    budget: str  # "exact_match loss", "itl_ms p95", "size_mb"
    limit: float
    value: float | None
    low: float | None = None
    high: float | None = None
    verdict: Literal["ship", "do not ship", "inconclusive"]
    reason: str


class Verdict(Record):
    candidate: str
    verdict: Literal["ship", "do not ship", "inconclusive", "failed", "built, not run"]
    checks: list[Check]
    reason: str


class RowText(Record):
    """Prompt and gold answer of one held-out row, which accuracy evidence knows by digest only."""

    prompt: str
    gold: str


class UpdateLeft(Record):
    """A candidate's integers beside what training changed."""

    candidate: str
    layers: dict[str, float]  # share of a layer's changed weights whose change is below half a quantization step


class Report(Record):
    """Everything that the report page shows; written as report.json."""

    schema_version: Literal[1] = 1
    name: str
    edgetune: str
    recipe: dict[str, Any]
    machine: Machine
    reference: str  # subject name of the accuracy reference
    accuracy: list[Accuracy]
    latency: list[Latency]
    seams: list[Seam]
    verdicts: list[Verdict]
    failures: list[Failure]
    artifacts: dict[str, dict[str, Any]]  # candidate -> manifest
    commands: dict[str, list[str]]  # candidate -> exact commands that run it
    warnings: list[str]
    stages: list[dict[str, Any]]  # name, seconds (null where not known), done_before, identity
    training: dict[str, Any] | None
    texts: list[RowText] = []  # of the held-out rows, in their order
    tasks: list[TaskScore] = []
    probe: list[TaskScore] = []  # general questions, of "base" and of the reference, which was trained
    updates: list[UpdateLeft] = []
    elsewhere: list[Timings] = []  # the same files, timed on other machines

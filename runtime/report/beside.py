"""What was measured beside the timing of this machine, as sentences: probes, sweeps, and the same files elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from edgetune.runtime import serving
from edgetune.runtime.evidence import Accuracy, Energy, Failure, Latency, Report, Served, SweepPoint
from edgetune.runtime.latency import case_interval, noise_floor
from edgetune.runtime.probes import crossover
from edgetune.runtime.report.held import held

MB = 1e6


class Said(NamedTuple):
    """A sentence, and the field of the evidence that it was read from."""

    text: str
    field: str


class Line(NamedTuple):
    """A sentence on one subject, and its place in report.json."""

    subject: str
    text: str
    source: str


def lines(report: Report) -> Iterator[Line]:
    """Give what was measured beside, subject by subject; at the end what other machines timed."""
    for name, manifest in report.artifacts.items():
        found = manifest.get("notes", {})
        if (text := built(found.get("build"))) is not None:
            yield Line(name, text, f"artifacts.{name}.notes.build")
        for proof in held(found):
            yield Line(name, proof.text, f"artifacts.{name}.notes.{proof.note}")
    base = next(((i, one) for i, one in enumerate(report.latency) if one.subject.name == report.reference), None)
    for i, one in enumerate(report.latency):
        for said in probed(one):
            yield Line(one.subject.name, said.text, f"latency[{i}].{said.field}")
        if base is not None and one is not base[1]:
            for said in crossed(one, base[1]):
                yield Line(one.subject.name, said.text, f"latency[{i}].{said.field}, latency[{base[0]}].{said.field}")
    subjects = [*(one.subject for one in report.latency), *(one.subject for one in report.accuracy)]
    for i, timings in enumerate(report.elsewhere):
        place = f"{timings.machine.cpu}, {timings.machine.cores} cores"
        for j, found in enumerate(timings.results):
            name = found.subject.name if isinstance(found, Latency) else found.subject
            for said in _timed(found) if isinstance(found, Latency) else _failed(found):
                yield Line(name, f"on {place}: {said.text}", f"elsewhere[{i}].results[{j}].{said.field}")
        for j, scored in enumerate(timings.scored):
            yield Line(scored.subject.name, f"on {place}: {_scored(scored)}", f"elsewhere[{i}].scored[{j}].rows[]")
        for j, served in enumerate(timings.served):
            name = next((s.name for s in subjects if s.artifact_digest == served.artifact_digest), served.model)
            for said in _served(served):
                text = f"as {served.url} serves it, asked from {place}: {said.text}"
                yield Line(name, text, f"elsewhere[{i}].served[{j}].{said.field}")


def built(log: dict[str, Any] | None) -> str | None:
    """Say what the build of a TensorRT engine told of it, None where it told nothing."""
    if log is None:
        return None
    sizes = [
        f"{log[key] / MB:,.0f} MB of {what}"
        for key, what in (("weights_bytes", "weights"), ("activation_bytes", "activations"))
        if key in log
    ]
    said = [f"on the GPU {' and '.join(sizes)}, and its cache beside them"] if sizes else []
    if (n := log["n_warnings"]) > 0:
        said.append(f"{n} {'warnings' if n > 1 else 'warning'}, the first: {log['warnings'][0]}")
    return f"TensorRT's build log: {'; '.join(said)}" if said else None


def probed(one: Latency) -> Iterator[Said]:
    """Say what a longer context costs one artifact, and what its probes found."""
    yield from _growth(one)
    found = one.probes
    if found is None:
        return
    yield from _swept(one, found.sweep)
    if (cold := found.cold_start) is not None:
        kept = "" if cold.resident is None else f" ({cold.resident:.0%} of the files stayed in memory)"
        yield Said(
            f"cold start{kept}: load {cold.load_ms:.0f} ms and first token {cold.ttft_ms:.0f} ms; "
            f"warm {cold.warm_load_ms:.0f} ms and {cold.warm_ttft_ms:.0f} ms",
            "probes.cold_start",
        )
    if (memory := found.memory) is not None:
        yield Said(
            f"resident memory: {memory.loaded / MB:.0f} MB loaded, at most {memory.prefill_peak / MB:.0f} MB while "
            f"reading the prompt and {memory.decode_peak / MB:.0f} MB while decoding",
            "probes.memory",
        )
    if (energy := found.energy) is not None:
        yield Said(f"energy: {_energy(energy, energy.joules, energy.reason)}", "probes.energy")
        if energy.gpu_joules is not None or energy.gpu_reason is not None:
            yield Said(f"energy of the GPU: {_energy(energy, energy.gpu_joules, energy.gpu_reason)}", "probes.energy")
    if (roof := found.roofline) is not None:
        yield Said(
            f"roofline: a token reads {roof.bytes_per_token / MB:.1f} MB, memory gives "
            f"{roof.memory_bytes_per_s / 1e9:.1f} GB/s, {roof.share:.0%} of it is reached",
            "probes.roofline",
        )
    before, after = found.cpu_before, found.cpu_after
    if before is not None and after is not None:
        clock = "not told"
        if before.mhz is not None and after.mhz is not None:
            clock = f"{before.mhz:.0f} MHz before, {after.mhz:.0f} MHz after"
        times = "not told how often"
        if before.throttled is not None and after.throttled is not None:
            times = f"{after.throttled - before.throttled} times"
        yield Said(f"clock: {clock}; throttled {times} meanwhile", "probes.cpu_before, .cpu_after")
    for probe, reason in found.failures.items():
        yield Said(f"{probe.replace('_', ' ')} failed: {reason}", f"probes.failures.{probe}")


def crossed(small: Latency, large: Latency) -> Iterator[Said]:
    """Say how the speed of smaller weights over larger ones changes with the rows that share a read of them.

    Faster is what lies beyond the interval of the ratio and beyond the noise floor; without repeated runs there is
    none, and nothing is called faster. Of two that ran on different devices there is no such ratio: the devices would
    make it, not the weights.
    """
    points = list(crossover(small, large))
    if not points:
        return
    if small.subject.on_gpu != large.subject.on_gpu:
        ours, theirs = ("a GPU" if one.subject.on_gpu else "the CPU" for one in (small, large))
        yield Said(f"no speed over {large.subject.name}: it ran on {theirs} and this one on {ours}", "subject")
        return
    floors = [noise_floor(case, "itl_ms") for one in (small, large) for case in one.cases]
    known = [floor for floor in floors if floor is not None]
    faster = [n for n, _, low, _ in points if low > 1 + max(known, default=0.0)]
    shown = ", ".join(f"{n}: {value:.2f} ({low:.2f} to {high:.2f})" for n, value, low, high in points)
    ends = next((n for n, *_ in points if n > max(faster, default=0)), None)  # and at all larger numbers
    if len(known) < len(floors):
        said = "without repeated runs (bench.runs) that may be chance"
    elif ends is None:
        said = f"still faster at {points[-1][0]}"
    elif faster:
        said = f"no longer faster from {ends} rows on"
    else:
        said = "faster at none of them"
    yield Said(f"speed over {large.subject.name} by rows at once: {shown}; {said}", "probes.sweep[]")


def _energy(found: Energy, joules: float | None, reason: str | None) -> str:
    if joules is None:
        return f"not measured, {reason}"
    return f"{joules / found.n_tokens:.3f} J a token ({joules / found.seconds:.1f} W)"


def _swept(one: Latency, sweep: list[SweepPoint]) -> Iterator[Said]:
    """Say the rate at each number of threads and of rows; the point of the timing's own threads and one row is both."""
    own = one.subject.n_threads
    by_threads = {point.n_threads: _rate(point) for point in sweep if point.n_rows == 1}
    by_rows = {point.n_rows: _rate(point) for point in sweep if point.n_threads == own}
    has_rows = bool(by_rows.keys() - {1})
    if by_threads.keys() - {own} or (by_threads and not has_rows):
        said = ", ".join(f"{n}: {rate}" for n, rate in sorted(by_threads.items()))
        yield Said(f"threads: {said} tokens/s", "probes.sweep[]")
    if has_rows:
        said = ", ".join(f"{n}: {rate}" for n, rate in sorted(by_rows.items()))
        yield Said(f"rows at once: {said} tokens/s in all", "probes.sweep[]")


def _growth(one: Latency) -> Iterator[Said]:
    """Say what a longer context costs each further token."""
    if not one.cases:
        return
    short, long = (pick(one.cases, key=lambda case: case.prompt_tokens) for pick in (min, max))
    if long.prompt_tokens > short.prompt_tokens:
        waits = [case_interval(case, "itl_ms", 50).value for case in (short, long)]
        yield Said(
            f"context: ITL p50 {waits[0]:.2f} ms after {short.prompt_tokens} tokens, {waits[1]:.2f} ms after "
            f"{long.prompt_tokens}: {(waits[1] / waits[0] - 1):+.0%}",
            "cases[].generations[].itl_ms",
        )


def _rate(point: SweepPoint) -> str:
    if point.reason is not None:
        return f"failed ({point.reason})"
    waits = [wait for g in point.generations if not g.warmup for wait in g.itl_ms]
    return f"{point.n_rows * len(waits) / sum(waits) * 1e3:.1f}"


def _failed(one: Failure) -> Iterator[Said]:
    yield Said(f"{one.stage} failed: {one.reason}", "reason")


def _timed(one: Latency) -> Iterator[Said]:
    for i, case in enumerate(one.cases):
        p50, p95 = (case_interval(case, "itl_ms", q).value for q in (50, 95))
        first = case_interval(case, "ttft_ms", 50).value
        yield Said(
            f"in {one.subject.engine}, prompts of {case.prompt_tokens}: TTFT p50 {first:.1f} ms, ITL p50 {p50:.2f} ms, "
            f"p95 {p95:.2f} ms, {one.peak_rss_bytes / MB:.0f} MB at the peak",
            f"cases[{i}].generations[]",
        )


def _scored(one: Accuracy) -> str:
    rows, n_tokens = one.rows, sum(row.n_tokens for row in one.rows)
    kl, agree = sum(row.kl or 0.0 for row in rows) / n_tokens, sum(row.n_agree or 0 for row in rows) / n_tokens
    return (
        f"scored in {one.subject.engine} on {len(rows)} rows: KL mean {kl:.3g} nats from the reference, the same first "
        f"token at {agree:.2%} of {n_tokens}, exact match {sum(row.exact for row in rows) / len(rows):.1%}"
    )


def _served(one: Served) -> Iterator[Said]:
    for i, case in enumerate(one.cases):
        who = f"{case.concurrency} at once" if case.concurrency is not None else f"{case.rate:g} requests a second"
        failed = sum(request.error is not None for request in case.requests)
        if failed == len(case.requests):
            yield Said(f"{who}: every request failed ({case.requests[0].error})", f"cases[{i}].requests[]")
            continue
        first = serving.figure(case, "ttft_ms", 50).value
        waits = [serving.figure(case, "itl_ms", q).value for q in (50, 95)] if serving.has_waits(case) else []
        itl = f", ITL p50 {waits[0]:.2f} ms, p95 {waits[1]:.2f} ms" if waits else ""
        text = f"{who}: TTFT p50 {first:.1f} ms{itl}, {serving.throughput(case):.1f} tokens/s, {failed} failed"
        yield Said(text, f"cases[{i}].requests[]")

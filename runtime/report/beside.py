"""What was measured beside the timing of this machine, as sentences: probes, sweeps, and the same files elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from edgetune.runtime import serving
from edgetune.runtime.evidence import Accuracy, Energy, Latency, Report, Served, SweepPoint
from edgetune.runtime.latency import case_interval, noise_floor
from edgetune.runtime.probes import crossover

MB = 1e6


def lines(report: Report) -> Iterator[tuple[str, str]]:
    """Give (subject, sentence), subject by subject."""
    reference = next((one for one in report.latency if one.subject.name == report.reference), None)
    for one in report.latency:
        for sentence in probed(one):
            yield one.subject.name, sentence
        if reference is not None and one is not reference:
            yield from ((one.subject.name, sentence) for sentence in crossed(one, reference))
    subjects = [*(one.subject for one in report.latency), *(one.subject for one in report.accuracy)]
    for timings in report.elsewhere:
        place = f"{timings.machine.cpu}, {timings.machine.cores} cores"
        for found in timings.results:
            if isinstance(found, Latency):
                yield from ((found.subject.name, f"on {place}: {sentence}") for sentence in _timed(found))
        yield from ((scored.subject.name, f"on {place}: {_scored(scored)}") for scored in timings.scored)
        for served in timings.served:
            name = next((s.name for s in subjects if s.artifact_digest == served.artifact_digest), served.model)
            yield from ((name, f"as {served.url} serves it, asked from {place}: {said}") for said in _served(served))


def probed(one: Latency) -> Iterator[str]:
    """Say what the probes of one artifact found."""
    found = one.probes
    if found is None:
        return
    by_threads = {point.n_threads: _rate(point) for point in found.sweep if point.n_rows == 1}
    if len(by_threads) > 1:
        yield "threads: " + ", ".join(f"{n}: {rate}" for n, rate in sorted(by_threads.items())) + " tokens/s"
    by_rows = {p.n_rows: _rate(p) for p in found.sweep if p.n_threads == one.subject.n_threads}
    if len(by_rows) > 1:
        yield "rows at once: " + ", ".join(f"{n}: {rate}" for n, rate in sorted(by_rows.items())) + " tokens/s in all"
    yield from _growth(one)
    if (cold := found.cold_start) is not None:
        kept = "" if cold.resident is None else f" ({cold.resident:.0%} of the files stayed in memory)"
        yield (
            f"cold start{kept}: load {cold.load_ms:.0f} ms and first token {cold.ttft_ms:.0f} ms; "
            f"warm {cold.warm_load_ms:.0f} ms and {cold.warm_ttft_ms:.0f} ms"
        )
    if (memory := found.memory) is not None:
        yield (
            f"resident memory: {memory.loaded / MB:.0f} MB loaded, at most {memory.prefill_peak / MB:.0f} MB while "
            f"reading the prompt and {memory.decode_peak / MB:.0f} MB while decoding"
        )
    if (energy := found.energy) is not None:
        yield f"energy: {_energy(energy, energy.joules, energy.reason)}"
        if energy.gpu_joules is not None or energy.gpu_reason is not None:
            yield f"energy of the GPU: {_energy(energy, energy.gpu_joules, energy.gpu_reason)}"
    if (roof := found.roofline) is not None:
        yield (
            f"roofline: a token reads {roof.bytes_per_token / MB:.1f} MB, memory gives "
            f"{roof.memory_bytes_per_s / 1e9:.1f} GB/s, {roof.share:.0%} of it is reached"
        )
    before, after = found.cpu_before, found.cpu_after
    if before is not None and after is not None:
        clock = "not told" if after.mhz is None else f"{before.mhz:.0f} MHz before, {after.mhz:.0f} MHz after"
        times = "not told how often"
        if before.throttled is not None and after.throttled is not None:
            times = f"{after.throttled - before.throttled} times"
        yield f"clock: {clock}; throttled {times} meanwhile"
    for probe, reason in found.failures.items():
        yield f"{probe.replace('_', ' ')} failed: {reason}"


def crossed(small: Latency, large: Latency) -> Iterator[str]:
    """Say how the speed of smaller weights over larger ones changes with the rows that share a read of them.

    Faster is what lies beyond the interval of the ratio and, where runs were repeated, beyond their noise floor.
    """
    points = list(crossover(small, large))
    if not points:
        return
    floors = [floor for one in (small, large) for case in one.cases if (floor := noise_floor(case, "itl_ms"))]
    faster = [n for n, _, low, _ in points if low > 1 + max(floors, default=0.0)]
    shown = ", ".join(f"{n}: {value:.2f} ({low:.2f} to {high:.2f})" for n, value, low, high in points)
    ends = next((n for n, *_ in points if n > max(faster, default=0)), None)  # and at all larger numbers
    if ends is None:
        said = f"still faster at {points[-1][0]}"
    elif faster:
        said = f"no longer faster from {ends} rows on"
    else:
        said = "faster at none of them"
    yield f"speed over {large.subject.name} by rows at once: {shown}; {said}"


def _energy(found: Energy, joules: float | None, reason: str | None) -> str:
    if joules is None:
        return f"not measured, {reason}"
    return f"{joules / found.n_tokens:.3f} J a token ({joules / found.seconds:.1f} W)"


def _growth(one: Latency) -> Iterator[str]:
    """Say what a longer context costs each further token."""
    short, long = (pick(one.cases, key=lambda case: case.prompt_tokens) for pick in (min, max))
    if long.prompt_tokens > short.prompt_tokens:
        waits = [case_interval(case, "itl_ms", 50).value for case in (short, long)]
        yield (
            f"context: ITL p50 {waits[0]:.2f} ms after {short.prompt_tokens} tokens, {waits[1]:.2f} ms after "
            f"{long.prompt_tokens}: {(waits[1] / waits[0] - 1):+.0%}"
        )


def _rate(point: SweepPoint) -> str:
    if point.reason is not None:
        return f"failed ({point.reason})"
    waits = [wait for g in point.generations if not g.warmup for wait in g.itl_ms]
    return f"{point.n_rows * len(waits) / sum(waits) * 1e3:.1f}"


def _timed(one: Latency) -> Iterator[str]:
    for case in one.cases:
        p50, p95 = (case_interval(case, "itl_ms", q).value for q in (50, 95))
        first = case_interval(case, "ttft_ms", 50).value
        yield (
            f"prompts of {case.prompt_tokens}: TTFT p50 {first:.1f} ms, ITL p50 {p50:.2f} ms, p95 {p95:.2f} ms, "
            f"{one.peak_rss_bytes / MB:.0f} MB at the peak"
        )


def _scored(one: Accuracy) -> str:
    rows, n_tokens = one.rows, sum(row.n_tokens for row in one.rows)
    kl, agree = sum(row.kl or 0.0 for row in rows) / n_tokens, sum(row.n_agree or 0 for row in rows) / n_tokens
    return (
        f"scored in {one.subject.engine} on {len(rows)} rows: KL mean {kl:.3g} nats from the reference, the same first "
        f"token at {agree:.2%} of {n_tokens}, exact match {sum(row.exact for row in rows) / len(rows):.1%}"
    )


def _served(one: Served) -> Iterator[str]:
    for case in one.cases:
        who = f"{case.concurrency} at once" if case.concurrency is not None else f"{case.rate:g} requests a second"
        failed = sum(request.error is not None for request in case.requests)
        if failed == len(case.requests):
            yield f"{who}: every request failed ({case.requests[0].error})"
            continue
        first = serving.figure(case, "ttft_ms", 50).value
        waits = [serving.figure(case, "itl_ms", q).value for q in (50, 95)] if serving.has_waits(case) else []
        itl = f", ITL p50 {waits[0]:.2f} ms, p95 {waits[1]:.2f} ms" if waits else ""
        yield f"{who}: TTFT p50 {first:.1f} ms{itl}, {serving.throughput(case):.1f} tokens/s, {failed} failed"

"""`penstock bench`: load on a running broker, and where the time goes.

A closed loop: so many tasks are always under way, and each that ends makes room for the next. Knows the SDK; measures
with it as any program would. Not the benchmark of the product: that is scripts/bench, with floors of its own.
"""

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from penstock.client import Client, Task

TIMES: Final = ("queue_ms", "batch_wait_ms", "load_ms", "h2d_ms", "compute_ms", "d2h_ms")
NUM_INPUTS: Final = 64
NUM_COLUMNS: Final = 1024
WARM_UP_TASKS: Final = 64
SAMPLE_EVERY: Final = 16
"""Timings are taken from every so-manieth task: the generator shall not be what is measured."""


@dataclass(slots=True)
class Report:
    """What came out. Times are milliseconds; `split` has the means of `TIMES`."""

    kernel: str
    in_flight: int
    seconds: float = 0.0
    num_tasks: int = 0
    num_failed: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    split: dict[str, float] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)
    workers: Counter[str] = field(default_factory=Counter)
    first_error: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel, "in_flight": self.in_flight, "seconds": round(self.seconds, 3),
            "tasks": self.num_tasks, "failed": self.num_failed, "tasks_per_s": round(self.tasks_per_s, 1),
            "p50_ms": self.percentile(50), "p99_ms": self.percentile(99), "mean_batch_size": self.mean_batch_size,
            "split_ms": self.split, "workers": dict(self.workers), "first_error": self.first_error,
        }  # fmt: skip

    @property
    def tasks_per_s(self) -> float:
        return self.num_tasks / self.seconds if self.seconds else 0.0

    @property
    def mean_batch_size(self) -> float | None:
        return round(float(np.mean(self.batch_sizes)), 1) if self.batch_sizes else None

    def percentile(self, q: float) -> float | None:
        return round(float(np.percentile(self.latencies_ms, q)), 3) if self.latencies_ms else None


def softmax_inputs(num_rows: int) -> list[dict[str, Any]]:
    """Different inputs of the default load: so many rows of 1,024 float32 per task."""
    shape = (NUM_INPUTS, NUM_COLUMNS) if num_rows == 1 else (NUM_INPUTS, num_rows, NUM_COLUMNS)
    return [{"x": x} for x in np.random.default_rng(0).standard_normal(shape, np.float32)]


def run_with_bar(client: Client, kernel: str, inputs: Sequence[Mapping[str, Any]], in_flight: int, seconds: float) -> Report:
    """`run` with a progress bar on stderr, if that is a terminal."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[num]:,} tasks"),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        line = bar.add_task(f"{kernel}, {in_flight} in flight", total=1.0, num=0)
        return run(client, kernel, inputs, in_flight, seconds, lambda share, num: bar.update(line, completed=share, num=num))


def show(report: Report) -> str:
    """The report for people."""
    split = ", ".join(f"{name.removesuffix('_ms')} {ms:.3f}" for name, ms in report.split.items())
    workers = ", ".join(report.workers) or "-"
    return (
        f"{report.kernel}, {report.in_flight} in flight, {report.seconds:.1f} s\n"
        f"  {report.tasks_per_s:,.0f} tasks/s ({report.num_tasks:,} tasks, {report.num_failed} failed)\n"
        f"  latency p50 {report.percentile(50)} ms, p99 {report.percentile(99)} ms\n"
        f"  mean ms of a task: {split or 'none told'}\n"
        f"  mean batch of {report.mean_batch_size or '-'} tasks; workers: {workers}"
    )


def run(
    client: Client, kernel: str, inputs: Sequence[Mapping[str, Any]], in_flight: int, seconds: float,
    progress: Callable[[float, int], object],
) -> Report:  # fmt: skip
    """Keep `in_flight` tasks under way for `seconds`. `progress` gets the share of the time and the tasks ended.

    Raises:
        PenstockError: the first tasks, which warm up, already fail.
    """
    for task in [client.submit(kernel, **inputs[i % len(inputs)]) for i in range(min(WARM_UP_TASKS, in_flight))]:
        task.result()
    report = Report(kernel, in_flight)
    samples: list[Mapping[str, Any]] = []
    under_way: deque[tuple[float, Task]] = deque()
    num_sent = 0
    began = time.perf_counter()
    until, shown_at = began + seconds, -math.inf
    while under_way or num_sent == 0 or time.perf_counter() < until:
        while len(under_way) < in_flight and (now := time.perf_counter()) < until:
            under_way.append((now, client.submit(kernel, **inputs[num_sent % len(inputs)])))
            num_sent += 1
        if under_way:
            _take(report, samples, *under_way.popleft())
        now = time.perf_counter()
        if now - shown_at > 0.1:
            progress(min(1.0, (now - began) / seconds), report.num_tasks)
            shown_at = now
    report.seconds = time.perf_counter() - began
    _split(report, samples)
    return report


def _take(report: Report, samples: list[Mapping[str, Any]], sent_at: float, task: Task) -> None:
    """Wait for the oldest task; what ended before it is taken without waiting."""
    error = task.exception()
    report.num_tasks += 1
    report.latencies_ms.append((time.perf_counter() - sent_at) * 1000)
    if error is not None:
        report.num_failed += 1
        report.first_error = report.first_error or f"{type(error).__name__}: {error}"
    elif report.num_tasks % SAMPLE_EVERY == 0:
        samples.append(task.timings)


def _split(report: Report, samples: Sequence[Mapping[str, Any]]) -> None:
    for name in TIMES:
        values = [float(s[name]) for s in samples if name in s]
        if values:
            report.split[name] = round(float(np.mean(values)), 3)
    report.batch_sizes = [int(s["batch_size"]) for s in samples if "batch_size" in s]
    report.workers.update(str(s["worker"]) for s in samples if "worker" in s)

"""Offers load to a broker from one event loop, and keeps what became of every task. Knows no kernels and no goals."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from penstock.client import AsyncClient, PenstockError
from penstock.client.aio import AsyncVerbs
from penstock.client.aio_task import AsyncTask

YIELD_EVERY = 16
"""Submissions after which the loop hears what has come back, however late it is."""
SETTLE_S = 120.0
LIMIT_S = 600.0
"""Time limit of tasks that should have none: a benchmark ends, even if its broker has."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to submit, and when: seconds after the start."""

    at_s: float
    kernel: str
    inputs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """A task that has ended. Times are seconds after the start; `at_s` is when it was due to be submitted."""

    at_s: float
    sent_s: float
    ended_s: float
    error: PenstockError | None

    @property
    def latency_s(self) -> float:
        """From when it was due: what a late driver adds counts too."""
        return self.ended_s - self.at_s


class Meter:
    """Tasks under way and those that have ended."""

    def __init__(self, started: float | None = None) -> None:
        self.started = time.perf_counter() if started is None else started
        self.num_open = 0
        self.ended: list[Ended] = []
        self.num_failed = 0
        self._news: deque[tuple[float, float, float, AsyncTask]] = deque()
        self._changed = asyncio.Event()

    def now(self) -> float:
        return time.perf_counter() - self.started

    async def submit(self, ps: AsyncVerbs, task: Task) -> None:
        sent_s = self.now()
        handle = await ps.submit(task.kernel, **task.inputs)
        self.num_open += 1
        at_s = task.at_s if task.at_s > 0.0 else sent_s
        handle.add_done_callback(lambda done: self._on_end(at_s, sent_s, done))

    def _on_end(self, at_s: float, sent_s: float, handle: AsyncTask) -> None:
        self.num_open -= 1
        self._news.append((at_s, sent_s, self.now(), handle))
        self._changed.set()

    async def collect(self) -> None:
        """Sort what has ended; never waits."""
        while self._news:
            at_s, sent_s, ended_s, handle = self._news.popleft()
            error = await handle.exception()
            self.num_failed += error is not None
            self.ended.append(Ended(at_s, sent_s, ended_s, error))

    async def wait(self, timeout_s: float) -> None:
        """Until something ends."""
        self._changed.clear()
        if not self._news:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        await self.collect()

    async def settle(self, limit_s: float = SETTLE_S) -> None:
        """Until all have ended.

        Raises:
            SystemExit: some have not within the limit.
        """
        until = self.now() + limit_s
        while self.num_open:
            if self.now() > until:
                raise SystemExit(f"{self.num_open} tasks have not ended after {limit_s:.0f} s")
            await self.wait(1.0)
        await self.collect()


async def open_loop(ps: AsyncVerbs, tasks: Sequence[Task]) -> list[Ended]:
    """Submit every task when it is due, whatever has come back; all of them have ended when this returns."""
    meter = Meter()
    for i, task in enumerate(tasks):
        ahead = task.at_s - meter.now()
        if ahead > 0.0:
            await asyncio.sleep(ahead)
            await meter.collect()
        elif i % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        await meter.submit(ps, task)
    await meter.settle()
    return meter.ended


async def closed_loop(ps: AsyncVerbs, tasks: Iterator[Task], in_flight: int, seconds: float) -> list[Ended]:
    """Keep so many tasks under way for so long; those that end within that time."""
    meter = Meter()
    while meter.now() < seconds:
        for i in range(in_flight - meter.num_open):
            await meter.submit(ps, next(tasks))
            if i % YIELD_EVERY == YIELD_EVERY - 1:
                await asyncio.sleep(0)
        await meter.wait(seconds)
    within = [task for task in meter.ended if task.ended_s <= seconds]
    await meter.settle()
    return within


async def burst(ps: AsyncVerbs, tasks: Iterable[Task]) -> list[Ended]:
    """Submit all at once; all of them have ended when this returns."""
    meter = Meter()
    for i, task in enumerate(tasks):
        await meter.submit(ps, task)
        if i % YIELD_EVERY == 0:
            await asyncio.sleep(0)
    await meter.settle()
    return meter.ended


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which so large a share lies (nearest rank); nan of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def p95_ms(ended: Iterable[Ended]) -> float:
    return 1e3 * percentile([task.latency_s for task in ended], 0.95)


def lateness_ms(ended: Iterable[Ended]) -> float:
    """How late the driver submitted, 99th percentile: past a few ms it is the driver that was measured."""
    return 1e3 * percentile([task.sent_s - task.at_s for task in ended], 0.99)


class Cpu:
    """The share of a core that a process uses over a `with`: this one, or that of a process id."""

    share = 0.0

    def __init__(self, pid: int | None = None) -> None:
        self._process = psutil.Process(pid)

    def __enter__(self) -> "Cpu":
        self._wall, self._cpu = time.perf_counter(), self._used_s()
        return self

    def __exit__(self, *_: object) -> None:
        self.share = (self._used_s() - self._cpu) / (time.perf_counter() - self._wall)

    def _used_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def connect(url: str, **options: Any) -> AsyncClient:
    return AsyncClient(url, **({"connect_timeout": 60.0} if "config" not in options else {}), **options)

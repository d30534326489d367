"""A real mixed load, heavy-tailed: short, medium and long naps and matrix products, with bins and with one bin only.

Both kinds of stack stand side by side and are measured in turn, with the same tasks at the same times.
"""

import asyncio
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from load import LIMIT_S, Cpu, Ended, Task, burst, closed_loop, connect, lateness_ms, open_loop, p95_ms
from stack import HERE, Stack

KERNELS = ("--kernels", str(HERE / "nap_kernels.py"), "--threads", "1")
ROOM = ("--window-rows", "100000")
SHARES = (0.80, 0.17, 0.03)
NAPS_MS = ((1.0, 5.0), (15.0, 40.0), (100.0, 250.0))
PRODUCTS = (64, 256, 640)
"""Side lengths of short, medium and long matrix products."""
PRODUCT_SHARE = 1 / 8
IN_FLIGHT = 512
BURST = 2000
VARIANTS = {"bins": "[scheduling]\nmax_bins = 8\n", "one bin": "[scheduling]\nmax_bins = 1\n"}


class Mix:
    """An endless stream of tasks; equal seeds give equal streams."""

    def __init__(self, seed: int, has_products: bool) -> None:
        self._draw = random.Random(seed)
        self._product_share = PRODUCT_SHARE if has_products else 0.0
        self._squares = [np.random.default_rng(0).standard_normal((n, n)).astype(np.float32) for n in PRODUCTS]

    def __iter__(self) -> Iterator[Task]:
        while True:
            yield self.task(0.0)

    def task(self, at_s: float) -> Task:
        draw = self._draw
        size = draw.choices(range(len(SHARES)), SHARES)[0]
        if draw.random() < self._product_share:
            square = self._squares[size]
            return Task(at_s, "matmul", {"a": square, "b": square})
        return Task(at_s, "nap.32", {"seconds": draw.uniform(*NAPS_MS[size]) / 1e3})

    def poisson(self, rate: float, seconds: float) -> list[Task]:
        at, made = 0.0, list[Task]()
        while (at := at + self._draw.expovariate(rate)) < seconds:
            made.append(self.task(at))
        return made


def saturation(url: str, has_products: bool, seconds: float) -> dict[str, float]:
    """Tasks/s with 512 under way, and of 2,000 at once."""

    async def run() -> dict[str, float]:
        async with connect(url, timeout=LIMIT_S) as ps:
            done = await closed_loop(ps, iter(Mix(1, has_products)), IN_FLIGHT, seconds)
            mix = iter(Mix(2, has_products))
            ended = await burst(ps, [next(mix) for _ in range(BURST)])
            return {"closed loop": len(done) / seconds, "burst": BURST / max(task.ended_s for task in ended)}

    return asyncio.run(run())


def latencies(url: str, tasks: Sequence[Task]) -> list[Ended]:
    async def run() -> list[Ended]:
        async with connect(url, timeout=LIMIT_S) as ps:
            return await open_loop(ps, tasks)

    return asyncio.run(run())


def compare(num_pairs: int, seconds: float, slowness: Sequence[float] = (1.0,)) -> dict[str, Any]:
    """Bins against one bin on as many workers as there are values of `slowness`."""
    has_products = len(slowness) == 1  # a product takes no notice of how slow its worker is meant to be
    env: list[Mapping[str, str]] = [{"PENSTOCK_BENCH_SLOWNESS": str(value)} for value in slowness]
    with ExitStack() as stacks, Cpu() as cpu:
        folder = Path(stacks.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-")))
        urls = {
            name: stacks.enter_context(Stack(folder / str(i), len(env), ROOM, KERNELS, settings, env)).url
            for i, (name, settings) in enumerate(VARIANTS.items())
        }
        for url in urls.values():  # learn
            saturation(url, has_products, seconds)
        rates = {name: saturation(url, has_products, seconds) for name, url in urls.items()}
        capacity = rates["one bin"]["closed loop"]
        loads = {"90 %": 0.9 * capacity, "30 %": 0.3 * capacity}
        pairs = {
            load: [_pair(urls, Mix(100 + i, has_products).poisson(rate, seconds), i) for i in range(num_pairs)]
            for load, rate in loads.items()
        }
    return {
        "tasks/s": rates,
        "p95 ms": {load: _medians(rows) for load, rows in pairs.items()},
        "pairs": pairs,
        "driver": cpu.share,
    }


def _pair(urls: Mapping[str, str], tasks: Sequence[Task], turn: int) -> dict[str, float]:
    """p95 latencies in ms of both variants, which go first in turn."""
    order = list(urls) if turn % 2 == 0 else list(urls)[::-1]
    ended = {name: latencies(urls[name], tasks) for name in order}
    row = {name: p95_ms(ended[name]) for name in urls}
    late = max(lateness_ms(some) for some in ended.values())
    return {**row, "bins / one bin": row["bins"] / row["one bin"], "driver late ms": late}


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}

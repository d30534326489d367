"""Multi-bin batching with real processes and naps: throughput against the paper's formula, and against sealed batches.

Multi-Bin Batching (arXiv 2412.04504), theorem 4.2: a batch of B rows with times U(l, u) in one of k equal-mass bins takes
m + A/k on average, m = (l + u)/2, A = (B - 1)(u - l) / (2 (B + 1)).
"""

import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from load import LIMIT_S, Cpu, Ended, Meter, Task, connect, lateness_ms
from stack import HERE, Stack

from penstock.client import Client

KERNELS = ("--kernels", str(HERE / "nap_kernels.py"))
ROOM = ("--window-rows", "1000000", "--max-queue-rows", "1000000")
PLUG_S = 1.5
"""How long the worker is kept busy while the load is queued."""
NUM_LEARN = 30
"""Batches, of one and full ones, from which the broker learns that times come as they are declared."""
STEADY = 0.9


def batch_ms(low_ms: float, high_ms: float, batch_size: int, num_bins: int) -> float:
    """Mean time of a full batch."""
    spread_ms = (batch_size - 1) * (high_ms - low_ms) / (2 * (batch_size + 1))
    return (low_ms + high_ms) / 2 + spread_ms / num_bins


def equal_mass(low_ms: float, high_ms: float, num_bins: int) -> list[float]:
    return [low_ms + (high_ms - low_ms) * i / num_bins for i in range(1, num_bins)]


def even_times(low_ms: float, high_ms: float, count: int, seed: int) -> list[float]:
    """`count` times of U(low, high), one from each of as many equal parts, shuffled: every bin gets its exact share."""
    draw = random.Random(seed)
    width = (high_ms - low_ms) / count
    times = [low_ms + width * (i + draw.random()) for i in range(count)]
    draw.shuffle(times)
    return times


def toml(boundaries_ms: list[float], max_bins: int, batch_size: int) -> str:
    """Fixed boundaries and batch sizes, so that nothing is left to be learned."""
    return (
        f"[scheduling]\nmax_bins = {max_bins}\nboundaries_ms = {[round(b, 6) for b in boundaries_ms]}\n"
        f"first_batch_sizes = [{batch_size}, {batch_size}, {batch_size}]\n"
    )


def drain(url: str, kernel: str, times_ms: list[float]) -> tuple[float, dict[str, np.ndarray]]:
    """Queue all of it behind a task that keeps the worker busy: when that was over, and when each of these began and ended."""
    with Client(url, timeout=LIMIT_S, connect_timeout=60.0) as ps:
        for ms in times_ms[:NUM_LEARN]:
            ps.call(kernel, seconds=ms / 1e3)
        ps.map_rows(kernel, seconds=[0.01] * (NUM_LEARN * 128))
        plug = ps.submit("nap.1", seconds=PLUG_S)
        done = ps.map_rows(kernel, seconds=[ms / 1e3 for ms in times_ms])
        return float(plug.result()["ended"]), done


def steady(start: float, done: dict[str, np.ndarray], times_ms: list[float]) -> dict[str, float]:
    """Of the batches up to the one with which nine of ten rows are done: at the end bins run empty and merge."""
    ends, batch_of, sizes = np.unique(done["ended"], return_inverse=True, return_counts=True)
    longest_ms, slept_ms = np.zeros(len(ends)), np.zeros(len(ends))
    np.maximum.at(longest_ms, batch_of, np.asarray(times_ms))
    np.maximum.at(slept_ms, batch_of, 1e3 * (done["ended"] - done["began"]))
    num = int(np.searchsorted(np.cumsum(sizes), STEADY * len(times_ms))) + 1
    num_rows, total_ms = int(sizes[:num].sum()), 1e3 * float(ends[num - 1] - start)
    return {
        "tasks/s": 1e3 * num_rows / total_ms,
        "rows per batch": num_rows / num,
        "longest row ms": float(longest_ms[:num].mean()),
        "overslept ms per batch": float((slept_ms - longest_ms)[:num].mean()),
        "gap ms per batch": (total_ms - float(slept_ms[:num].sum())) / num,
    }


def throughput(num_bins: int, num_batches: int, low_ms: float = 4.0, high_ms: float = 80.0) -> dict[str, float]:
    """B = 128, the paper's U(1, 20) with 4 ms per unit: measured, by the formula, and their ratio."""
    size = 128
    times = even_times(low_ms, high_ms, size * num_batches, seed=num_bins)
    settings = toml(equal_mass(low_ms, high_ms, num_bins), num_bins, size)
    with (
        tempfile.TemporaryDirectory(prefix="ps-bench-") as folder,
        Stack(Path(folder), broker_args=ROOM, worker_args=KERNELS, toml=settings) as stack,
        Cpu() as cpu,
    ):
        measured = steady(*drain(stack.url, "nap.128", times), times)
    theory = 1e3 * size / batch_ms(low_ms, high_ms, size, num_bins)
    return {
        "bins": num_bins, **measured, "theory": theory, "measured / theory": measured["tasks/s"] / theory, "driver": cpu.share,
    }  # fmt: skip


# --- late binding against sealing ----------------------------------------------------------------------------------------

SCALE = 0.5
LOW_MS, HIGH_MS, RATE = 10.0 * SCALE, 100.0 * SCALE, 800.0 / SCALE
SIZE, BINS, SEAL_S = 32, 3, 0.050 * SCALE


def arrivals(seconds: float, seed: int = 3) -> list[tuple[float, float]]:
    """(seconds after the start, time in ms) of a Poisson stream."""
    draw, at, made = random.Random(seed), 0.0, list[tuple[float, float]]()
    while (at := at + draw.expovariate(RATE)) < seconds:
        made.append((at, draw.uniform(LOW_MS, HIGH_MS)))
    return made


def sealed(stream: list[tuple[float, float]]) -> list[tuple[float, int, float]]:
    """(when, rows, longest time) of the batches that a front seals: full ones, and others 50 ms after their first row.

    In order of time. A batch is what it was when it was sealed: it is submitted as one task that takes as long as its
    longest row, to a kernel whose batches are of one.
    """
    bounds = [*equal_mass(LOW_MS, HIGH_MS, BINS), HIGH_MS]
    open_: list[list[tuple[float, float]]] = [[] for _ in bounds]
    made = list[tuple[float, int, float]]()

    def seal(rows: list[tuple[float, float]], at: float) -> None:
        made.append((at, len(rows), max(ms for _, ms in rows)))
        rows.clear()

    for at, ms in stream:
        for rows in open_:
            if rows and at - rows[0][0] > SEAL_S:
                seal(rows, rows[0][0] + SEAL_S)
        rows = open_[next(i for i, bound in enumerate(bounds) if ms <= bound)]
        rows.append((at, ms))
        if len(rows) == SIZE:
            seal(rows, at)
    return sorted(made)


async def offer(url: str, tasks: list[Task], seconds: float) -> list[Ended]:
    """The tasks that ended in time; what is left then is dropped with the session."""
    meter = Meter()
    async with connect(url, timeout=LIMIT_S) as ps:
        for _ in range(NUM_LEARN):
            await ps.call(tasks[0].kernel, seconds=0.005)
        meter.started = time.perf_counter()
        for i, task in enumerate(tasks):
            ahead = task.at_s - meter.now()
            if ahead > 0.0:
                await asyncio.sleep(ahead)
            elif i % 16 == 0:
                await asyncio.sleep(0)
            await meter.submit(ps, task)
        await asyncio.sleep(max(0.0, seconds - meter.now()))
        await meter.collect()
        return [task for task in meter.ended if task.ended_s <= seconds and task.error is None]


def late_binding(seconds: float) -> dict[str, float]:
    """B = 32, k = 3, U(10, 100) ms, 800 tasks/s, all of it twice as fast: rows/s of this broker and of sealed batches."""
    stream = arrivals(seconds)
    batches = sealed(stream)
    settings = toml(equal_mass(LOW_MS, HIGH_MS, BINS), BINS, SIZE)
    single = [Task(at, "nap.32", {"seconds": ms / 1e3}) for at, ms in stream]
    front = [Task(at, "nap.1", {"seconds": ms / 1e3}) for at, _, ms in batches]
    sizes = {at: num_rows for at, num_rows, _ in batches}
    with tempfile.TemporaryDirectory(prefix="ps-bench-") as folder:
        with Stack(Path(folder, "a"), broker_args=ROOM, worker_args=KERNELS, toml=settings) as stack, Cpu() as cpu:
            late = asyncio.run(offer(stack.url, single, seconds))
        with Stack(Path(folder, "b"), broker_args=ROOM, worker_args=KERNELS) as stack:
            early = asyncio.run(offer(stack.url, front, seconds))
    num_early = sum(sizes[task.at_s] for task in early)
    return {
        "late tasks/s": len(late) / seconds, "sealed tasks/s": num_early / seconds, "late / sealed": len(late) / num_early,
        "sealed rows per batch": sum(sizes.values()) / len(sizes), "driver": cpu.share, "driver late ms": lateness_ms(late),
    }  # fmt: skip


def measure_multibin(num_batches: int, num_rounds: int, seconds: float) -> dict[str, Any]:
    """The formula's row per number of bins: the best of the rounds, since what else runs here only ever slows naps down."""
    rounds = [[throughput(k, num_batches) for k in range(1, 6)] for _ in range(num_rounds)]
    best = [max(rows, key=lambda row: row["measured / theory"]) for rows in zip(*rounds, strict=True)]
    return {"theorem 4.2": best, "theorem 4.2, all rounds": rounds, "late binding": late_binding(seconds)}

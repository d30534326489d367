"""Throughput and latency of the whole stack against the floor, in interleaved pairs."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from floors import IN_FLIGHT, Floor
from rich.progress import track
from stack import Stack

from penstock.client import Client

GOALS = {"map / floor": 1.5, "submit / floor": 0.5, "call p50 / round trip p50": 1.5}
CALLS_PER_ROUND = 1500


def map_rate(client: Client, x: np.ndarray, seconds: float) -> float:
    """Tasks/s of `map` at 1,024 in flight; every result is looked at."""
    end = [float("inf")]

    def inputs() -> Iterator[dict[str, Any]]:
        while time.perf_counter() < end[0]:
            for _ in range(32):
                yield {"x": x}

    started = time.perf_counter()
    end[0] = started + seconds
    done = 0
    for y in client.map("affine", inputs(), window=IN_FLIGHT):
        done += y.shape[0] == 1024
    return done / (time.perf_counter() - started)


def submit_rate(client: Client, x: np.ndarray, seconds: float) -> float:
    """Tasks/s of one `submit` per task, 1,024 in flight, results taken in order."""
    tasks, done, started = list[Any](), 0, time.perf_counter()
    waiting = iter(())
    while time.perf_counter() - started < seconds:
        for _ in range(IN_FLIGHT // 2):
            tasks.append(client.submit("affine", x=x))
        while len(tasks) > IN_FLIGHT // 2:
            waiting, tasks = iter(tasks[: IN_FLIGHT // 2]), tasks[IN_FLIGHT // 2 :]
            for task in waiting:
                done += task.result().shape[0] == 1024
    for task in tasks:
        done += task.result().shape[0] == 1024
    return done / (time.perf_counter() - started)


def rows_rate(client: Client, x: np.ndarray, seconds: float) -> float:
    """Tasks/s of `map_rows` with 8,192 rows at a time."""
    rows = np.tile(x, (8192, 1))
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += len(client.map_rows("affine", x=rows))
    return done / (time.perf_counter() - started)


def call_times(client: Client, x: np.ndarray, count: int) -> list[float]:
    """Seconds of single calls, one in flight."""
    times = list[float]()
    for _ in range(count):
        started = time.perf_counter()
        client.call("affine", x=x)
        times.append(time.perf_counter() - started)
    return times


def measure(num_pairs: int = 7, seconds: float = 2.0) -> dict[str, Any]:
    """Run the pairs; every figure is the median over them, ratios pair by pair."""
    x = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    pairs = list[dict[str, float]]()
    with (
        tempfile.TemporaryDirectory(prefix="ps-bench-") as folder,
        Floor(Path(folder, "floor")) as floor,
        Stack(Path(folder, "s")) as stack,
        Client(stack.url) as client,
    ):
        _pair(floor, client, x, 0.5)
        for _ in track(range(num_pairs), description="pairs", transient=True):
            pairs.append(_pair(floor, client, x, seconds))
    figures = {key: statistics.median(p[key] for p in pairs) for key in pairs[0]}
    return {"pairs": pairs, "median": figures, "goals": GOALS}


def _pair(floor: Floor, client: Client, x: np.ndarray, seconds: float) -> dict[str, float]:
    base = floor.tasks_per_s(seconds)
    mapped = map_rate(client, x, seconds)
    submitted = submit_rate(client, x, seconds)
    rows = rows_rate(client, x, seconds)
    trips = sorted(floor.round_trips_s(CALLS_PER_ROUND))
    calls = sorted(call_times(client, x, CALLS_PER_ROUND))
    half, most = CALLS_PER_ROUND // 2, int(CALLS_PER_ROUND * 0.99)
    return {
        "floor tasks/s": base, "map tasks/s": mapped, "submit tasks/s": submitted, "map_rows tasks/s": rows,
        "map / floor": mapped / base, "submit / floor": submitted / base, "map_rows / floor": rows / base,
        "round trip p50 us": 1e6 * trips[half], "call p50 us": 1e6 * calls[half],
        "round trip p99 us": 1e6 * trips[most], "call p99 us": 1e6 * calls[most],
        "call p50 / round trip p50": calls[half] / trips[half],
    }  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people, goals beside them."""
    made = list[str]()
    for key, value in result["median"].items():
        spread = sorted(p[key] for p in result["pairs"])
        goal = GOALS.get(key)
        text = f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
        note = ""
        if goal is not None:
            is_met = value <= goal if "p50" in key else value >= goal
            note = f"   goal {'at most' if 'p50' in key else 'at least'} {goal}: {'met' if is_met else 'NOT MET'}"
        made.append(f"{key:28s} {text:>12s}   ({spread[0]:,.2f} to {spread[-1]:,.2f}){note}")
    return made

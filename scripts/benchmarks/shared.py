"""Large arrays through shared memory against the socket, in pairs, with the time of a bare copy beside them."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from stack import Stack

from penstock.client import Client
from penstock.client.config import ClientConfig

SIZES_KIB = (64, 128, 256, 512, 1024, 4096, 16 << 10, 64 << 10, 256 << 10)
GOAL_KIB, GOAL = 64 << 10, 3.0
MIN_CALLS, BUDGET_S = 3, 0.3
"""Of one measurement: so many calls, and more while it lasts."""


def measure(num_pairs: int = 7) -> dict[str, Any]:
    """Milliseconds per call of a kernel that returns its input, per size: the median over pairs; ratios pair by pair."""
    with (
        tempfile.TemporaryDirectory(prefix="ps-bench-") as folder,
        Stack(Path(folder, "s"), toml="[broker]\nshared_min_bytes = 65536\nshared_bytes = 536870912\n") as stack,
        Client(stack.url, config=ClientConfig(name="shared", timeout=None)) as shared,
        Client(stack.url, config=ClientConfig(name="socket", timeout=None, shared_bytes=0)) as socket,
    ):
        rows = [_row(shared, socket, kib, num_pairs) for kib in track(SIZES_KIB, description="sizes", transient=True)]
        report = shared.status()["shared"]
    return {"sizes": rows, "status": report, "goal": GOAL}


def _row(shared: Client, socket: Client, kib: int, num_pairs: int) -> dict[str, Any]:
    x = np.random.default_rng(0).integers(0, 256, kib << 10, np.uint8)
    pairs = list[tuple[float, float]]()
    for client in (shared, socket):
        _call_s(client, x)  # first use: memory is made, pages are touched
    for i in range(num_pairs):
        both = (shared, socket) if i % 2 == 0 else (socket, shared)
        taken = {client: _call_s(client, x) for client in both}
        pairs.append((taken[shared], taken[socket]))
    return {
        "kib": kib, "copy_ms": 1e3 * _copy_s(x), "shared_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "socket_ms": 1e3 * statistics.median(b for _, b in pairs), "ratios": sorted(b / a for a, b in pairs),
    }  # fmt: skip


def _call_s(client: Client, x: np.ndarray) -> float:
    """Median seconds of a call; the answer is looked at."""
    times, end = list[float](), time.perf_counter() + BUDGET_S
    while len(times) < MIN_CALLS or time.perf_counter() < end:
        started = time.perf_counter()
        y = client.call("same", x=x)
        times.append(time.perf_counter() - started)
        if y[0] != x[0] or y[-1] != x[-1] or y.shape != x.shape:
            raise SystemExit("the answer is not the input")
    return statistics.median(times)


def _copy_s(x: np.ndarray) -> float:
    """Seconds of one copy into memory that is there."""
    y, times = np.zeros_like(x), list[float]()
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(y, x)
        times.append(time.perf_counter() - started)
    return min(times)


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people, the goal beside them."""
    made = [f"{'size':>9s} {'copy ms':>9s} {'shared ms':>10s} {'socket ms':>10s} {'times faster':>13s}   (pairs)"]
    for row in result["sizes"]:
        kib, ratios = row["kib"], row["ratios"]
        ratio = statistics.median(ratios)
        note = "" if kib != GOAL_KIB else f"   goal at least {GOAL}: {'met' if ratio >= GOAL else 'NOT MET'}"
        size = f"{kib} KiB" if kib < 1024 else f"{kib >> 10} MiB"
        made.append(
            f"{size:>9s} {row['copy_ms']:9.2f} {row['shared_ms']:10.2f} {row['socket_ms']:10.2f} {ratio:13.2f}"
            f"   ({ratios[0]:.2f} to {ratios[-1]:.2f}){note}"
        )
    return made

"""What durability costs: the same load with tasks in memory and on disk, in pairs; and how soon a broker is back with many
queued durable tasks."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from stack import Stack

from penstock.broker.columns import pack
from penstock.broker.files import broker_folder
from penstock.broker.kept import TAKEN
from penstock.broker.layout import Column
from penstock.broker.protocol import Submit
from penstock.broker.storage.records import Put
from penstock.broker.storage.sqlite import SqliteStore
from penstock.broker.wire import encode
from penstock.client import Client

IN_FLIGHT = 512
GOALS = {"durable / memory": 0.3, "durable / memory, 1 ms tasks": 1.0}
RESTART_GOALS_S = {100_000: 2.0, 1_000_000: 15.0}


def _rate(ps: Any, kernel: str, inputs: dict[str, Any], seconds: float) -> float:
    """Tasks/s of `map`, every task different as far as the broker knows."""
    started = time.perf_counter()

    def some() -> Iterator[dict[str, Any]]:
        while time.perf_counter() < started + seconds:
            yield from [inputs] * 32

    done = sum(1 for _ in ps.map(kernel, some(), window=IN_FLIGHT))
    return done / (time.perf_counter() - started)


def measure(num_pairs: int = 5, seconds: float = 2.0, max_tasks: int = 100_000) -> dict[str, Any]:
    """Pairs of rates, then restarts with up to `max_tasks` queued."""
    x = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    nap = {"seconds": 0.001}
    loads = {"": ("affine", {"x": x}), ", 1 ms tasks": ("nap.1", nap), ", 32 tasks in 1 ms": ("nap.32", nap)}
    ratios: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    naps = ("--kernels", str(Path(__file__).with_name("nap_kernels.py")))
    with (
        tempfile.TemporaryDirectory(prefix="ps-bench-") as folder,
        Stack(Path(folder, "s"), worker_args=naps) as stack,
        Client(stack.url) as memory,
    ):
        disk = memory.options(durable=True)
        for _ in range(num_pairs):
            for name, (kernel, inputs) in loads.items():
                pair = [_rate(ps, kernel, inputs, seconds) for ps in (memory, disk)]
                rates.setdefault(f"memory{name}", []).append(pair[0])
                rates.setdefault(f"durable{name}", []).append(pair[1])
                ratios.setdefault(f"durable / memory{name}", []).append(pair[1] / pair[0])
    medians = {name: statistics.median(values) for name, values in {**rates, **ratios}.items()}
    restarts = {}
    for num in (num for num in RESTART_GOALS_S if num <= max_tasks):
        for rows_per_run in (32, 1):
            with tempfile.TemporaryDirectory(prefix="ps-bench-") as folder:
                restarts[f"{num} tasks, runs of {rows_per_run}"] = _restart(num, rows_per_run, Path(folder))
    return {"median": medians, "ratios": ratios, "goals": GOALS, "restart_s": restarts}


def _restart(num_tasks: int, rows_per_run: int, folder: Path) -> float:
    """Seconds from a broker's start to its first answer, with so many durable tasks in the journal that it finds."""
    state = folder / "state"
    url = f"ipc://{folder}/b"
    store = SqliteStore(broker_folder(state, url) / "journal")
    list(store.load())
    meta = msgpack.packb(["uid:0", "bench", time.time(), None])
    block = pack([(Column("x", "float32", (16,)), None, [bytes(64 * rows_per_run)])], rows_per_run)
    for number in range(1, num_tasks // rows_per_run + 1):
        submit = Submit(id=os.urandom(16), kernel="affine", block=block, is_durable=True)
        ticket = store.append([Put(number, TAKEN, [meta, *encode(submit)])])
    while store.committed < ticket:
        time.sleep(0.01)
    store.close()
    limits = ("--max-queue-rows", str(2 * num_tasks), "--max-queue-bytes", str(16 << 30))
    began = time.perf_counter()
    command = [sys.executable, "-P", "-m", "penstock.broker", "--url", url, "--state-dir", str(state), *limits]
    broker = subprocess.Popen(command)
    try:
        with Client(url, connect_timeout=120.0) as ps:
            status = ps.status(timeout=120.0)
        took = time.perf_counter() - began
        assert status["tasks"]["open"] == num_tasks, status["tasks"]
        return took
    finally:
        broker.kill()
        broker.wait()


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people, goals beside them."""
    made = []
    for name, value in result["median"].items():
        goal = GOALS.get(name)
        note = "" if goal is None else f"   goal at least {goal}: {'met' if value >= goal else 'NOT MET'}"
        made.append(f"{name:39s} {value:12,.2f}{note}")
    for name, seconds in result["restart_s"].items():
        goal = RESTART_GOALS_S[int(name.split()[0])]
        made.append(f"ready with {name:23s} {seconds:12.2f} s   goal {goal:g} s: {'met' if seconds <= goal else 'NOT MET'}")
    return made

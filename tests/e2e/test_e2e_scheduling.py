"""Scheduling with real processes: throughput as the theory says, fair shares, priorities, batches of every awkward kind."""

import itertools
import json
import random
import signal
import statistics
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port
from running import Running, running, until

from penstock.client import Cancelled, Client, PenstockError, Task

KERNELS = ("--kernels", str(Path(__file__).with_name("scheduling_kernels.py")))
ROOM = ("--window-rows", "50000", "--max-queue-rows", "100000")
NUM_TRIES = 3
"""What else runs on this machine only ever slows things down: the best of so many counts."""


@pytest.fixture(scope="module")
def stack(module_folder: Path) -> Iterator[Running]:
    with running(module_folder, "w", broker=ROOM, worker=KERNELS) as run:
        yield run


def plug(ps: Client, seconds: float) -> Task:
    """Keeps the only worker busy; it has begun when this returns."""
    before = ps.status()["workers"][0]["done"]
    task = ps.submit("nap.1", seconds=seconds)
    until(lambda: ps.status()["workers"][0]["leases"] > 0 or ps.status()["workers"][0]["done"] > before, "the plug runs")
    return task


def p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


# --- multi-bin batching ------------------------------------------------------------------------------------------------

LOW_MS, HIGH_MS, SIZE, NUM_BATCHES = 6.0, 120.0, 128, 30


def even_times(num_bins: int) -> list[float]:
    """Seconds of U(low, high), equally many in every bin, shuffled."""
    count, draw = SIZE * NUM_BATCHES, random.Random(num_bins)
    times = [LOW_MS + (HIGH_MS - LOW_MS) * (i + draw.random()) / count for i in range(count)]
    draw.shuffle(times)
    return [ms / 1e3 for ms in times]


def steady_rate(start: float, done: Mapping[str, np.ndarray], times: Sequence[float]) -> float:
    """Tasks/s up to the batch with which nine of ten tasks are done: at the end bins run empty and merge.

    What the system made the naps longer than they were asked to be is not counted: it is nobody's here.
    """
    ends, batch_of, sizes = np.unique(done["ended"], return_inverse=True, return_counts=True)
    asked = np.zeros(len(ends))
    np.maximum.at(asked, batch_of, times)
    slept = np.zeros(len(ends))
    np.maximum.at(slept, batch_of, done["ended"] - done["began"])
    num = int(np.searchsorted(np.cumsum(sizes), 0.9 * len(times))) + 1
    seconds = ends[num - 1] - start - (slept - asked)[:num].sum()
    return float(sizes[:num].sum() / seconds)


@pytest.mark.parametrize("num_bins", [1, 3])
def test_throughput_is_that_of_multi_bin_batching(folder: Path, num_bins: int) -> None:
    """Theorem 4.2: a batch of B rows of U(l, u) in one of k equal bins takes (l + u)/2 + (B - 1)(u - l)/(2 (B + 1) k)."""
    edges = [LOW_MS + (HIGH_MS - LOW_MS) * i / num_bins for i in range(1, num_bins)]
    settings = f"[scheduling]\nmax_bins = {num_bins}\nboundaries_ms = {edges}\nfirst_batch_sizes = [{SIZE}, {SIZE}, {SIZE}]\n"
    (folder / "penstock.toml").write_text(settings)
    batch_ms = (LOW_MS + HIGH_MS) / 2 + (SIZE - 1) * (HIGH_MS - LOW_MS) / (2 * (SIZE + 1) * num_bins)
    times, ratios = even_times(num_bins), list[float]()
    with running(folder, "w", broker=ROOM, worker=KERNELS) as run, run.client() as ps:
        ps.map_rows("nap.128", seconds=[0.01] * (30 * SIZE))  # the broker learns that times come as they are declared
        while len(ratios) < NUM_TRIES and not (ratios and 0.96 < max(ratios) < 1.05):
            busy = plug(ps, 0.5)
            done = ps.map_rows("nap.128", seconds=times)
            ratios.append(steady_rate(float(busy.result()["ended"]), done, times) * batch_ms / SIZE / 1e3)
    print(f"{num_bins} bins: measured / theory {ratios}")
    assert 0.95 < max(ratios) < 1.05


# --- who goes first ----------------------------------------------------------------------------------------------------


def test_a_greedy_client_does_not_hold_up_a_light_one(stack: Running, ps: Client) -> None:
    """The light one's p95 stays within two batch times of what it has alone."""
    nap_s = 0.03

    def latencies(count: int) -> list[float]:
        taken = list[float]()
        for _ in range(count):
            began = time.perf_counter()
            ps.call("nap.32", seconds=nap_s)
            taken.append(time.perf_counter() - began)
        return taken

    latencies(3)
    alone = p95(latencies(20))
    with stack.client(name="greedy", timeout=None) as greedy:
        tasks = [greedy.submit("nap.32", seconds=nap_s) for _ in range(10_000)]
        until(lambda: greedy.status()["tasks"]["queued"] > 9000, "all is queued")
        beside = p95(latencies(40))
        assert not tasks[-1].done(), "there was work of the other all the time"
    print(f"p95 alone {alone * 1e3:.1f} ms, beside 10,000 queued {beside * 1e3:.1f} ms")
    assert beside < alone + 2 * nap_s + 0.01
    until(lambda: ps.status()["tasks"]["open"] == 0, "the greedy one's tasks are gone with it")


def test_high_priority_overtakes_what_waits(ps: Client) -> None:
    low = [ps.options(priority="low").submit("nap.32", seconds=0.02) for _ in range(640)]
    until(lambda: ps.status()["tasks"]["queued"] > 300, "they wait")
    high = ps.options(priority="high").submit("nap.32", seconds=0.02)
    ended_at = high.result()["ended"]
    before = sum(task.result()["ended"] < ended_at for task in low)
    assert before < 640 - 5 * 32


def test_a_flood_of_high_priority_does_not_starve_the_lowest(ps: Client) -> None:
    """One batch in 16 of a client begins with its lowest class."""
    batch_s, floor_every = 0.02, 16
    flood = [ps.options(priority=0).submit("nap.32", seconds=batch_s) for _ in range(32 * 60)]
    until(lambda: ps.status()["tasks"]["queued"] > 32 * 40, "the flood waits")
    began = time.perf_counter()
    ps.options(priority=9).call("other.32", seconds=batch_s)  # another batch key: it cannot fill up a batch of the flood
    took_s = time.perf_counter() - began
    assert not flood[-1].done(), "it did not wait for the flood's end"
    assert took_s < (floor_every + 4) * batch_s * 1.5
    ps.cancel(flood)


# --- batches of every kind ---------------------------------------------------------------------------------------------


def test_two_kernels_that_alternate_both_batch(ps: Client) -> None:
    busy = plug(ps, 0.2)
    tasks = [ps.submit(("nap.32", "other.32")[i % 2], seconds=0.01) for i in range(640)]
    busy.result()
    for task in tasks:
        task.result()
    for offset in (0, 1):
        assert statistics.mean(task.timings["batch_size"] for task in tasks[offset::2]) > 24


def test_a_batch_of_one_at_most(ps: Client) -> None:
    tasks = [ps.submit("nap.1", seconds=0.001) for _ in range(100)]
    ended_at = sorted(float(task.result()["ended"]) for task in tasks)
    assert min(b - a for a, b in itertools.pairwise(ended_at)) >= 0.001, "one after the other"
    assert {task.timings["batch_size"] for task in tasks} == {1}


def test_tasks_that_are_batches_themselves(ps: Client) -> None:
    items = [np.full((32, 8), i, np.float32) for i in range(200)]
    tasks = [ps.submit("blocks", x=item) for item in items]
    for i, task in enumerate(tasks):
        np.testing.assert_array_equal(task.result(), np.full(32, 8.0 * i, np.float32))
    sizes = [task.timings["batch_size"] for task in tasks]
    assert max(sizes) > 8  # of tasks, not of their rows
    assert max(sizes) <= 16


def test_a_cost_function_that_raises_costs_only_itself(stack: Running, ps: Client) -> None:
    assert ps.call("misjudged", x=np.zeros(2, np.float32)).tolist() == [1.0, 1.0]
    log = stack.log("w")
    assert log.count("kernel 'misjudged': its cost function raised KeyError('no such term')") == 1
    assert "Traceback" not in log


def test_a_storm_of_cancels_while_batches_form(stack: Running, ps: Client) -> None:
    draw, before = random.Random(5), ps.status()["tasks"]
    tasks = [ps.submit("nap.32", seconds=draw.choice((0.001, 0.004, 0.016))) for _ in range(3000)]
    doomed = draw.sample(tasks, 1500)
    for task in doomed:
        task.ask_cancel()
    ends: list[Any] = [_end_of(task) for task in tasks]
    assert {type(end) for end in ends} == {type(None), Cancelled}
    spared = {id(task) for task in tasks} - {id(task) for task in doomed}
    assert all(end is None for task, end in zip(tasks, ends, strict=True) if id(task) in spared)
    num_cancelled = sum(end is not None for end in ends)
    assert num_cancelled > 0
    after = until(lambda: (now := ps.status()["tasks"])["open"] == 0 and now, "nothing is left")
    assert (after["queued"], after["leased"]) == (0, 0)
    assert after["cancelled"] - before.get("cancelled", 0) == num_cancelled
    assert after["done"] - before["done"] == 3000 - num_cancelled


# --- looked at and changed while it runs -------------------------------------------------------------------------------


def bins_of(ps: Client) -> set[str]:
    """The bins that short and long tasks went in, of a queue that stood before the worker began with it."""
    busy = plug(ps, 0.2)
    tasks = [ps.submit("nap.32", seconds=(0.001, 0.15)[i % 2]) for i in range(256)]
    busy.result()
    for task in tasks:
        task.result()
    return {task.timings["bin"] for task in tasks[:128]}  # at the end there is less than a batch per bin


def test_pages_and_settings_of_a_broker_that_runs(folder: Path) -> None:
    settings = folder / "penstock.toml"
    settings.write_text("[scheduling]\nmax_bins = 2\nboundaries_ms = [50.0]\n")
    port = free_port()
    with running(folder, "w", broker=("--metrics", f"127.0.0.1:{port}"), worker=KERNELS) as run, run.client() as ps:
        assert len(bins_of(ps)) == 2

        settings.write_text("[scheduling]\nmax_bins = -1\n")
        run.processes["broker"].send_signal(signal.SIGHUP)
        until(lambda: "the settings stay as they are" in run.log("broker"), "it refuses")
        assert len(bins_of(ps)) == 2

        settings.write_text("[scheduling]\nmax_bins = 1\n")
        assert run.cli("reload").returncode == 0
        assert "scheduling.max_bins: 2 -> 1" in run.log("broker")
        assert len(bins_of(ps)) == 1

        pages = {name: _page(port, name) for name in ("metrics", "healthz", "status")}
        assert pages["healthz"] == "ok\n"
        assert json.loads(pages["status"])["tasks"]["done"] == 3 * 257
        assert 'penstock_requests_total{kernel="nap.32",outcome="done"' in pages["metrics"]


def _page(port: int, name: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def _end_of(task: Task) -> PenstockError | None:
    return task.exception(60)

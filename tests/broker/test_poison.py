"""Tasks that bring down workers, in large batches: how many deaths it takes to find each, and that nobody else suffers.

The bound: a batch of 256 is halved eight times, the first death and the second one alone make ten. Each worker process here
dies when it begins a batch with a poisoned row, and another takes its place, as under a supervisor.
"""

import random
from collections import Counter
from math import ceil, log2
from typing import Any

import pytest
from broker_world import FakeClient, FakeWorker, World, X, number_per_row, spec, tag
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker import protocol as p
from penstock.broker.events import ProcessEnded
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.storage.store import MemoryStore

Row = tuple[bytes, int]
LARGE = spec(max_batch_size=256)


def max_deaths(batch_size: int) -> int:
    """Per poisoned row."""
    return 2 + ceil(log2(batch_size))


class Site:
    """Workers under supervisors, and what they went through. A process runs its batches one after another."""

    def __init__(
        self, world: World, poison: set[Row], num_workers: int = 3, batches: int = 3, made: Any = LARGE, seed: int = 0
    ) -> None:
        self.world = world
        self.poison = poison
        self.deaths = Counter[Row]()
        self.num_deaths = 0
        self.runs = Counter[Row]()
        self.suspects: set[Row] = set()
        self._draw = random.Random(seed)
        self._made, self._batches = made, batches
        self._pids = iter(range(5000, 1 << 20))
        self.workers = [self._start(slot) for slot in range(num_workers)]

    def _start(self, slot: int) -> FakeWorker:
        return self.world.worker(self._made, name=f"w{slot}", pid=next(self._pids), batches=self._batches)

    def start_all(self) -> None:
        """The broker is another one; the workers forget what they held, as it does."""
        self.workers = [self._start(slot) for slot in range(len(self.workers))]

    def step(self) -> bool:
        """One of the workers that hold something runs its first batch; False if none holds any."""
        busy = [slot for slot, worker in enumerate(self.workers) if worker.leases]
        if not busy:
            return False
        slot = self._draw.choice(busy)
        worker = self.workers[slot]
        self._check_suspects(worker)
        batch = worker.batches()[0]
        guilty = self.poison.intersection(batch)
        if guilty:
            self.num_deaths += 1
            self.deaths.update(guilty)
            for held in worker.batches():
                self.suspects.update(held)
            worker.crash()
            self.workers[slot] = self._start(slot)
        else:
            self.runs.update(batch)
            self.suspects.difference_update(batch)
            worker.finish(next(iter(worker.leases)))
        if self.world.store is not None:
            self.world.commit()
        return True

    def _check_suspects(self, worker: FakeWorker) -> None:
        """Suspects have a worker to themselves, and fresh tasks never join them."""
        for batch in worker.batches():
            num_suspect = len(self.suspects.intersection(batch))
            assert num_suspect in (0, len(batch)), "fresh tasks among suspects"
            assert not num_suspect or len(worker.leases) == 1, "a suspect in company"

    def run(self, max_steps: int = 5000) -> None:
        """To the end, or so far."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"still at work after {max_steps} batches")


def poisoned(runs: list[bytes], rows: int, per: int, seed: int) -> set[Row]:
    """One row in so many, wherever."""
    draw, every = random.Random(seed), [(run, row) for run in runs for row in range(rows)]
    return {every[at + draw.randrange(per)] for at in range(0, len(every), per)}


def check_told(client: FakeClient, runs: list[bytes], rows: int, poison: set[Row], num_lines: int = 2) -> None:
    """Every row its one outcome: the poisoned ones dead with a line of evidence per death alone, all others done."""
    for run in runs:
        for row in range(rows):
            got = client.row(run, row)
            assert got.num_finals == 1
            if (run, row) in poison:
                assert got.error is not None and got.error.code == "dead"
                assert got.error.detail.count("has ended") == num_lines
            else:
                assert got.data == tag(run, row)


@pytest.mark.parametrize(("num_workers", "batches", "seed"), [(1, 1, 1), (2, 4, 2), (4, 2, 3)])
def test_one_in_a_thousand(num_workers: int, batches: int, seed: int) -> None:
    """10,000 rows, ten of them poisoned."""
    w = World(window_rows=20_000)
    client = w.client()
    runs = [client.submit(1000) for _ in range(10)]
    poison = poisoned(runs, 1000, 1000, seed)
    site = Site(w, poison, num_workers, batches, seed=seed)
    site.run()
    check_told(client, runs, 1000, poison)
    assert max(site.deaths.values()) <= max_deaths(256)
    assert site.num_deaths <= max_deaths(256) * len(poison)
    assert all(count == 1 for count in site.runs.values()), "what is done is not run again"


def test_one_in_a_thousand_of_tasks_submitted_one_by_one() -> None:
    """Each task is a run of its own: every suspect goes alone, which takes fewer deaths and more batches."""
    w = World(window_rows=20_000)
    client = w.client()
    runs = [client.submit(is_turn=False) for _ in range(2000)]
    poison = poisoned(runs, 1, 1000, 4)
    site = Site(w, poison, 2)
    site.run()
    check_told(client, runs, 1, poison)
    assert max(site.deaths.values()) <= 3


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6), where=st.lists(st.integers(0, 10_000), min_size=1, max_size=4),
    batch_size=st.integers(2, 256), num_workers=st.integers(1, 3), batches=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40)
def test_runs_of_any_size_and_poison_anywhere(
    sizes: list[int], where: list[int], batch_size: int, num_workers: int, batches: int, seed: int
) -> None:
    w = World()
    client = w.client()
    runs = [client.submit(size) for size in sizes]
    every = [(run, row) for run, size in zip(runs, sizes, strict=True) for row in range(size)]
    poison = {every[at % len(every)] for at in where}
    site = Site(w, poison, num_workers, batches, spec(max_batch_size=batch_size), seed)
    site.run()
    for run, size in zip(runs, sizes, strict=True):
        check_told(client, [run], size, poison)
    assert max(site.deaths.values()) <= max_deaths(batch_size)


def test_two_in_one_batch() -> None:
    w = World()
    client = w.client()
    run = client.submit(256)
    poison = {(run, 3), (run, 4)}
    site = Site(w, poison, 2)
    site.run()
    check_told(client, [run], 256, poison)
    assert site.num_deaths <= 2 * max_deaths(256)
    assert max(site.deaths.values()) <= max_deaths(256)


def test_in_batches_whose_times_add_up() -> None:
    """A kernel with a sum for a cost, and a limit on it: batches are as long as that allows, and suspects no longer."""
    made = spec(
        inputs=(X, number_per_row("ms", 1.0)), combine="sum", max_batch_size=256, per={"ms": 1.0}, max_batch_cost_ms=200.0
    )
    w, draw = World(), random.Random(5)
    client = w.client()
    runs = [client.submit(500, scalars={"ms": [draw.choice([0.5, 1.0, 8.0]) for _ in range(500)]}) for _ in range(4)]
    poison = poisoned(runs, 500, 500, 6)
    site = Site(w, poison, 2, made=made)
    site.run()
    check_told(client, runs, 500, poison)
    assert max(site.deaths.values()) <= max_deaths(256)


def test_batches_that_grow_slowly_after_each_fault() -> None:
    """A worker that is back begins with batches of one row: suspects are found in even smaller parts."""
    w = World(SchedulingConfig(max_bins=1), window_rows=20_000)
    client = w.client()
    runs = [client.submit(1000) for _ in range(2)]
    poison = poisoned(runs, 1000, 1000, 7)
    site = Site(w, poison, 2)
    site.run()
    check_told(client, runs, 1000, poison)
    assert max(site.deaths.values()) <= max_deaths(256)


@pytest.mark.parametrize("at", [1, 4, 9])
def test_halves_go_on_where_they_were_after_the_broker_was_killed(at: int) -> None:
    """Durable, and the broker dies after so many deaths of workers: who was suspect is so still, and not all begins anew."""
    w = World(store=MemoryStore())
    client = w.client()
    run = client.submit(256, is_durable=True)
    w.commit()
    poison = {(run, 77)}
    site = Site(w, poison, 1, batches=2)
    while site.num_deaths < at:
        assert site.step()
    w.restart()
    client = w.client()
    client.submit(256, run_id=run, is_durable=True, is_again=True)
    w.commit()
    site.start_all()
    site.run()
    check_told(client, [run], 256, poison)
    assert site.num_deaths <= max_deaths(256)


def test_time_limits_end_suspects_and_poison_alike() -> None:
    """Nobody waits for what is over: it is not given to workers any more, and what was not over is still separated."""
    w = World()
    client = w.client()
    short, long = client.submit(128, timeout_ms=1000.0), client.submit(128)
    poison = {(short, 5), (long, 6)}
    site = Site(w, poison, 1, batches=2)
    while site.num_deaths < 3:
        assert site.step()
    w.advance(1.5)
    before = site.runs.copy()
    site.run()
    check_told(client, [long], 128, poison)
    codes = Counter(g.error.code if g.error else "done" for g in (client.row(short, row) for row in range(128)))
    assert codes["done"] + codes["deadline_exceeded"] == 128 > codes["done"]
    assert all(client.row(short, row).num_finals == 1 for row in range(128))
    assert site.runs - before == Counter({row: 1 for row in site.runs - before if row[0] == long}), "it was over"
    assert site.num_deaths <= 2 * max_deaths(256)


def test_others_go_on_while_suspects_are_separated() -> None:
    """A worker that has not died takes fresh tasks as soon as no suspect waits; nobody is kept from work for ever."""
    w = World()
    guilty, honest = w.client("guilty"), w.client("honest")
    run = guilty.submit(256)
    site = Site(w, {(run, 200)}, 2, batches=1)
    others = [honest.submit(256) for _ in range(10)]
    done_before_the_end = 0
    while site.step():
        if guilty.row(run, 200).num_finals == 0:
            done_before_the_end = sum(honest.row(other).num_finals for other in others)
    check_told(guilty, [run], 256, {(run, 200)})
    assert done_before_the_end >= 5
    assert "breaker_opened" not in w.state.events.counts


def test_a_process_that_the_kernel_reports_twice_is_one_death() -> None:
    w = World()
    client = w.client()
    run = client.submit(4)
    worker = w.worker(LARGE, pid=77)
    worker.crash()
    w.step(ProcessEnded(77))
    assert w.counters["workers_lost"] == 1
    second = w.worker(LARGE, pid=78)
    assert second.sizes() == [2]
    second.send(p.Goodbye())
    w.worker(LARGE, pid=79).finish_all()
    check_told(client, [run], 4, set())

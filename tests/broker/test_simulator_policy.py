"""The production broker in the simulator: what it must show of order, fairness, waiting and overload."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import CLIENT, check, lengths

from penstock.broker import invariants
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.simulator.clients import Client, Task
from penstock.broker.simulator.engine import Batch
from penstock.broker.simulator.experiment import Finished, Setup, run
from penstock.broker.simulator.production import Production
from penstock.broker.simulator.record import Floats, Record, service_gap_s
from penstock.broker.simulator.service import parse


def config(batch_size: int, **settings: Any) -> SchedulingConfig:
    """Batches may have their full size from the start."""
    return SchedulingConfig(first_batch_sizes=(batch_size,) * 3, **settings)


def simulate(service: str, batch_size: int, settings: dict[str, Any] | None = None, **setup: Any) -> Finished:
    """Times are in ms unless told otherwise."""
    scheduling = config(batch_size, **settings or {})
    setup = {"policy": "dynamic", "unit": "ms", **setup}
    return run(Setup(parse(service), batch_size=batch_size, config=scheduling, **setup))


# --- waiting for company: Triton's semantics, exactly --------------------------------------------------------------


class Desk:
    """A broker with one worker, driven by hand: tasks of one second that arrive when a test says so."""

    def __init__(self, batch_size: int, credit: int = 1, length_ms: float = 1000.0, **settings: Any) -> None:
        self.broker = Production([Client()], batch_size, 1, credit, config(batch_size, **settings))
        self.length_ms = length_ms

    def arrive(self, num_tasks: int, at: float) -> Sequence[Batch]:
        """Tasks arrive together; the batches that leave at this moment."""
        for _ in range(num_tasks):
            self.broker.submit([Task(0, at, math.inf, self.length_ms, self.length_ms)], at)
        return self.turn(at)

    def turn(self, at: float) -> Sequence[Batch]:
        batches = self.broker.turn(True, at)
        for batch in batches:
            batch.started = at
        return batches

    def end(self, batch: Batch, at: float) -> Sequence[Batch]:
        batch.finished = at
        self.broker.completed(batch, at)
        return self.turn(at)


def test_a_lone_task_leaves_an_idle_worker_waiting_for_exactly_max_wait() -> None:
    desk = Desk(8, max_wait_ms=50.0)
    assert desk.arrive(1, at=3.0) == []
    due = desk.broker.wake_at(3.0)
    assert due == 3.0 + 0.001 * 50.0
    assert desk.turn(math.nextafter(due, 0.0)) == []
    (batch,) = desk.turn(due)
    assert len(batch.tasks) == 1


def test_without_max_wait_a_lone_task_leaves_at_once() -> None:
    (batch,) = Desk(8).arrive(1, at=3.0)
    assert len(batch.tasks) == 1


def test_a_full_batch_leaves_at_once() -> None:
    (batch,) = Desk(8, max_wait_ms=50.0).arrive(8, at=3.0)
    assert len(batch.tasks) == 8


def test_a_batch_that_fills_up_while_it_is_held_leaves_at_once() -> None:
    desk = Desk(8, max_wait_ms=50.0)
    assert desk.arrive(1, at=3.0) == []
    assert desk.arrive(6, at=3.02) == []
    (batch,) = desk.arrive(1, at=3.03)
    assert len(batch.tasks) == 8


def test_nothing_is_sealed_while_the_worker_is_busy() -> None:
    desk = Desk(8, length_ms=100.0, max_wait_ms=50.0)
    (running,) = desk.arrive(8, at=3.0)
    for number in range(7):
        assert desk.arrive(1, at=3.01 + 0.01 * number) == []  # the last after the first one's 50 ms
    assert desk.turn(3.09) == []
    (batch,) = desk.end(running, at=3.1)
    assert len(batch.tasks) == 7


def test_a_worker_with_credit_gets_its_next_batch_just_before_the_end() -> None:
    desk = Desk(8, credit=2, length_ms=100.0)
    (running,) = desk.arrive(8, at=3.0)
    assert desk.arrive(8, at=3.02) == []
    assert desk.turn(3.0898) == []
    (batch,) = desk.turn(3.09)
    assert len(batch.tasks) == 8
    assert desk.end(running, at=3.1) == []


# --- bins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bins", "seconds"), [(1, 11.0), (2, 8.0)])
def test_four_jobs_of_the_papers_introduction(bins: int, seconds: float) -> None:
    setup = Setup(lengths(1, 5, 2, 6), policy="dynamic", batch_size=2, bins=bins, num_tasks=4, config=config(2))
    assert run(setup).summary()["elapsed"] == seconds


def test_learned_bins_reach_what_computed_ones_would() -> None:
    # Multi-bin batching with three bins: 9.40 tasks per second, with five 10.35; one bin: 6.45.
    done = simulate("uniform:1:20", 128, unit="s", num_tasks=30_000, num_warmup=10_000)
    assert done.summary()["throughput"] > 9.9
    assert "bins" in {event["kind"] for event in done.events}


@pytest.mark.parametrize(
    ("service", "at_90", "slowness"),
    [("uniform:10:100", 1.03, (1.0,)), ("lognormal:3:1", 0.85, (1.0,)), ("lognormal:3:1", 0.95, (1.0, 3.0))],
)
def test_bins_help_near_saturation_and_do_no_harm_at_low_load(service: str, at_90: float, slowness: tuple[float, ...]) -> None:
    one: dict[str, Any] = {"bins": 1, "num_tasks": 9000, "num_servers": len(slowness), "slowness": slowness}
    learned = {**one, "bins": None}
    capacity = simulate(service, 32, **one).summary()["throughput"]

    def p95(load: float, bins: dict[str, Any]) -> float:
        done = simulate(service, 32, **bins, arrival_rate=load * capacity, num_warmup=2000)
        value: float = done.summary()["latency"]["p95"]
        return value

    assert p95(0.3, learned) <= 1.03 * p95(0.3, one)
    assert p95(0.9, learned) <= at_90 * p95(0.9, one)
    assert simulate(service, 32, **learned, num_warmup=2000).summary()["throughput"] > 1.25 * capacity


def test_late_binding_against_sealing_at_50_ms() -> None:
    setup: dict[str, Any] = {"bins": 3, "arrival_rate": 0.8, "num_tasks": 16_000}
    sealed = simulate("uniform:10:100", 32, **setup, policy="static", seal_ms=50.0).summary()["throughput"]
    bound_late = simulate("uniform:10:100", 32, **setup).summary()["throughput"]
    assert bound_late > 1.8 * sealed


# --- fairness ------------------------------------------------------------------------------------------------------


def while_backlogged(done: Record, values: Floats) -> Floats:
    """Those of batches that were formed while every client still sent tasks."""
    last = min(done.arrived[done.client == client].max() for client in np.unique(done.client))
    return values[done.formed <= last]


def largest_charge_s(done: Record) -> float:
    """U: the most service that one batch adds to one client."""
    service = np.zeros((len(done.size), int(done.client.max()) + 1))
    ran = done.batch >= 0
    np.add.at(service, (done.batch[ran], done.client[ran]), done.batch_service_s()[ran])
    largest: float = service.max()
    return largest


TWO_SIZES = (Client("short", closed=100), Client("long", closed=100, size=10.0))


@pytest.mark.parametrize("bins", [1, None])
@pytest.mark.parametrize("service", ["uniform:10:10", "exponential:20"])
def test_two_backlogged_clients_never_differ_by_more_than_two_batches(service: str, bins: int | None) -> None:
    done = simulate(service, 16, clients=TWO_SIZES, num_tasks=20_000, bins=bins).record
    gap = while_backlogged(done, service_gap_s(done, 0, 1))
    assert len(gap) > 500
    assert np.ptp(np.append(gap, 0.0)) <= 2 * largest_charge_s(done)


def test_first_come_first_served_differs_without_bound() -> None:
    done = simulate("uniform:10:10", 16, clients=TWO_SIZES, num_tasks=20_000, policy="static").record
    gap = while_backlogged(done, service_gap_s(done, 1, 0))
    for part in (1, 2, 4):  # it goes on growing
        assert gap[part * len(gap) // 4 - 1] > part * 20 * largest_charge_s(done)


def test_weights_are_shares_of_the_device() -> None:
    clients = tuple(Client(f"c{w}", weight=w, closed=64, size=1.0 + w % 3) for w in (1, 2, 3, 4))
    done = simulate("exponential:20", 16, clients=clients, num_tasks=20_000).record
    service = done.batch_service_s()
    last = while_backlogged(done, done.formed)[-1]
    counts = (done.batch >= 0) & (done.formed[done.batch] <= last)
    got = np.bincount(done.client[counts], service[counts])
    assert got / got.sum() == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=0.05)


@pytest.mark.parametrize("credit", [1, 2])
def test_a_greedy_client_costs_a_light_one_two_batches(credit: int) -> None:
    light = Client("light", closed=1)
    alone = simulate("uniform:10:100", 32, clients=(light,), num_tasks=1000, credit=credit).summary()
    clients = (Client("greedy", tasks=10_000), light)
    done = simulate("uniform:10:100", 32, clients=clients, credit=credit)
    batch_ms = 1000.0 * np.mean(done.record.ended - done.record.began)
    beside = done.summary()["clients"]["light"]
    assert beside["tasks"] > 50
    num_ahead = credit - 1  # in the hands of the worker already, whoever comes
    assert beside["latency"]["p95"] <= alone["latency"]["p95"] + (2 + num_ahead) * batch_ms


def test_flooding_at_high_priority_does_not_starve_the_lowest_class() -> None:
    # Of 16 batches of an account one begins with its lowest class: it waits for the one that runs, for 15 others, and runs.
    flood = Client("flood", tasks=20_000, rate=1.5, priority=0, account="one")
    lowest = Client("lowest", closed=1, priority=9, account="one")
    done = simulate("uniform:10:100", 32, clients=(flood, lowest)).record
    taken = (done.finished - done.arrived)[done.client == 1]
    assert len(taken) > 20
    assert taken.max() <= 17 * (done.ended - done.began).max()


# --- time limits and overload --------------------------------------------------------------------------------------

CAPACITY = 0.5
"""Tasks per millisecond: 32 naps of 64 ms at once."""
WARM = Client("warm", tasks=3000, closed=64, timeout=60_000.0)
"""Until 6 s, so that the length of a nap is known."""
FLOOD_AT, FLOOD_UNTIL = 8.0, 28.0


@pytest.fixture(scope="module")
def overloaded() -> Record:
    """Ten times the capacity for 20 s."""
    flood = Client("flood", tasks=100_000, rate=10 * CAPACITY, start=1000.0 * FLOOD_AT, timeout=2000.0)
    return simulate("uniform:64:64", 32, clients=(WARM, flood)).record


def test_under_tenfold_overload_what_is_accepted_finishes_in_time(overloaded: Record) -> None:
    done = overloaded
    num_accepted = np.count_nonzero(~done.is_refused)
    assert num_accepted < 0.15 * len(done.client)
    assert np.count_nonzero(done.is_done & ~done.is_late) >= 0.99 * num_accepted


def test_under_tenfold_overload_goodput_stays_at_its_peak(overloaded: Record) -> None:
    served, _ = np.histogram(overloaded.finished[overloaded.is_done], np.arange(FLOOD_AT, FLOOD_UNTIL + 1, 4.0))
    assert served / 4.0 == pytest.approx(np.full(5, 1000.0 * CAPACITY), rel=0.05)


def test_a_refusal_says_when_the_work_ahead_will_have_drained(overloaded: Record) -> None:
    done = overloaded
    refused = np.flatnonzero(done.is_refused)[::97]
    drained = np.maximum.accumulate(np.where(done.is_refused, 0.0, done.finished))[refused] - done.arrived[refused]
    ratio = done.retry_s[refused] / drained
    assert np.mean((ratio >= 0.5) & (ratio <= 2.0)) >= 0.99


@pytest.mark.parametrize("service", ["uniform:10:100", "exponential:30", "lognormal:3:1"])
def test_under_overload_of_mixed_lengths_little_is_accepted_in_vain(service: str) -> None:
    # Not the 99 % of equal lengths: with bins the order is that of the deadlines up to one round of the bins only.
    capacity = simulate(service, 32, num_tasks=10_000).summary()["throughput"]
    start = 3100 / capacity
    flood = Client("flood", tasks=20_000, rate=5 * capacity, start=start, timeout=3000.0)
    done = simulate(service, 32, clients=(WARM, flood)).record
    is_flood = done.client == 1
    num_done = np.count_nonzero(is_flood & done.is_done)
    assert num_done >= 0.9 * np.count_nonzero(is_flood & ~done.is_refused)
    taken_ms = 1000.0 * done.arrived.max() - start
    during = done.is_done & (done.finished > start / 1000.0) & (done.finished <= done.arrived.max())
    assert np.count_nonzero(during) >= 0.7 * capacity * taken_ms


def test_a_task_that_cannot_finish_in_time_does_not_take_up_the_server() -> None:
    # A low class behind a flood of a high one: admitted in time, overtaken, and then hopeless.
    first = Client("first", tasks=4000, rate=0.4, priority=0, account="one", start=8000.0)
    second = Client("second", tasks=2000, rate=0.2, priority=9, account="one", start=8000.0, timeout=1000.0)
    done = simulate("uniform:64:64", 32, clients=(WARM, first, second)).record
    dropped = (done.client == 2) & ~done.is_done & ~done.is_refused
    assert np.count_nonzero(dropped) > 30
    assert np.count_nonzero(dropped & (done.batch >= 0)) <= 0.01 * np.count_nonzero(dropped)


# --- whatever is asked ---------------------------------------------------------------------------------------------


@given(
    clients=st.lists(CLIENT, min_size=1, max_size=3), batch_size=st.integers(1, 9), bins=st.none() | st.integers(1, 3),
    num_servers=st.integers(1, 3), credit=st.integers(1, 3), timeout=st.none() | st.sampled_from([0.5, 20.0]),
    max_wait_ms=st.sampled_from([0.0, 100.0]), mispredict=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_every_task_has_one_outcome(clients: list[Client], max_wait_ms: float, **setup: Any) -> None:
    checks = Checks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Production, "turn", checks.turn)
        done = simulate(
            "exponential:1", settings={"max_wait_ms": max_wait_ms}, unit="s", clients=tuple(clients), **setup
        ).record
    assert checks.num_turns
    check(done, setup["batch_size"])
    assert sum(done.outcomes.values()) == len(done.client)
    assert set(done.outcomes) <= {"done", "deadline", "refused"}
    assert np.all(done.finished[done.is_done] <= done.deadline[done.is_done])


class Checks:
    """Holds every invariant of the broker after every turn."""

    def __init__(self) -> None:
        self.num_turns = 0
        self._turn = Production.turn

    @property
    def turn(self) -> Any:
        def turn(broker: Production, has_more: bool, now: float) -> Sequence[Batch]:
            batches = self._turn(broker, has_more, now)
            invariants.check(broker.core, now)
            self.num_turns += 1
            return batches

        return turn

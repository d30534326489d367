"""The simulator against what theory says of sealed batches and of slots."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import CLIENT, check, lengths

from penstock.broker.simulator import record
from penstock.broker.simulator.clients import Client
from penstock.broker.simulator.experiment import Finished, Setup, run
from penstock.broker.simulator.service import parse


def simulate(service: str, **setup: Any) -> Finished:
    return run(Setup(parse(service), **setup))


def throughput(service: str, **setup: Any) -> float:
    value: float = simulate(service, **setup).summary()["throughput"]
    return value


# --- sealed batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bins", "expected"), [(1, 6.4475), (2, 8.4342), (3, 9.3996), (4, 9.9703), (5, 10.3472)])
def test_multi_bin_batching_has_the_throughput_of_its_theorem(bins: int, expected: float) -> None:
    # arXiv 2412.04504, theorem 4.2: B / (m + A / k), m = 10.5, A = 127 * 19 / 258.
    found = throughput("uniform:1:20", batch_size=128, bins=bins, boundaries="equal")
    assert found == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("bins", "seconds"), [(1, 11.0), (2, 8.0)])
@pytest.mark.parametrize("boundaries", ["equal", "dp"])
def test_four_jobs_of_the_papers_introduction(bins: int, seconds: float, boundaries: str) -> None:
    done = run(Setup(lengths(1, 5, 2, 6), batch_size=2, bins=bins, boundaries=boundaries, num_tasks=4))
    assert done.summary()["elapsed"] == seconds


def test_full_batches_are_sealed_in_order_of_arrival() -> None:
    done = run(Setup(lengths(1, 9, 2, 8, 3, 7, 4), batch_size=2, bins=2, num_tasks=7)).record
    batches = [sorted(done.service_ms[done.batch == b].tolist()) for b in range(len(done.size))]
    assert batches == [[1000, 2000], [8000, 9000], [3000, 4000], [7000]]
    assert done.bins == ["<5.5 s", ">=5.5 s", "<5.5 s", ">=5.5 s"]


def test_an_incomplete_batch_waits_while_tasks_still_arrive() -> None:
    done = simulate("uniform:1:1", batch_size=4, arrival_rate=0.1, num_tasks=10).record
    assert done.size.tolist() == [4, 4, 2]
    assert done.began[0] == done.arrived[3]  # with an idle server from the start
    assert done.began[2] == done.arrived[9]


def test_sealing_by_time_goes_on_while_the_server_is_busy() -> None:
    # 200 tasks per second, 50 ms: ten to a batch and the one that starts it, though 32 would fit, and the queue grows.
    done = simulate("uniform:50:150", unit="ms", batch_size=32, arrival_rate=0.2, seal_ms=50.0, num_tasks=4000)
    assert done.summary()["mean_batch_size"] == pytest.approx(11, rel=0.03)
    assert done.summary()["utilization"] > 0.99
    first = np.array([done.record.arrived[done.record.batch == b].min() for b in range(len(done.record.size))])
    last = np.array([done.record.arrived[done.record.batch == b].max() for b in range(len(done.record.size))])
    assert np.all(last - first <= 0.05)


def test_a_mispredicted_task_spoils_a_batch_as_computed() -> None:
    # Half of the tasks take 1 s, half 10 s; of the fast bin's members 1 % are slow: 1 - 0.99^64 of its batches are spoiled.
    done = simulate("bimodal:0.5:1:10", batch_size=64, bins=2, mispredict=0.02).summary()
    spoiled = 1 - 0.99**64
    fast, slow = done["per_bin"].values()
    assert (spoiled, slow["spoiled"]) == (pytest.approx(0.4744, abs=1e-4), 0.0)
    assert fast["spoiled"] == pytest.approx(spoiled, abs=0.03)  # 1,000 batches: a standard deviation is 0.016
    assert fast["mean_time"] == pytest.approx(1 + 9 * spoiled, rel=0.05)
    assert done["throughput"] == pytest.approx(128 / (10 + 1 + 9 * spoiled), rel=0.02)
    assert throughput("bimodal:0.5:1:10", batch_size=64, bins=2) == pytest.approx(128 / 11, rel=0.01)


LEAST_GAIN = {
    "uniform:1:20": 0.999,
    "bimodal:0.9:1:20": 1.0,
    "exponential:1": 1.15,
    "lognormal:0:1": 1.4,
    "lognormal:0:1.5": 2.0,
}
"""With four bins: equal shares are best for uniform times; of two lengths both find the gap."""


@pytest.mark.parametrize("service", LEAST_GAIN)
def test_computed_boundaries_are_never_worse_than_equal_shares(service: str) -> None:
    gains = []
    for bins in (2, 3, 4):
        both = [throughput(service, batch_size=32, bins=bins, boundaries=b, num_tasks=40_000) for b in ("dp", "equal")]
        gains.append(both[0] / both[1])
    assert min(gains) > 0.995  # a partial batch more or less at the end
    assert gains[-1] >= LEAST_GAIN[service], gains


# --- slots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "expected"), [(4, 2.083), (8, 2.718), (16, 3.381)])
def test_slots_against_batches_on_exponential_lengths(slots: int, expected: float) -> None:
    # Orca, OSDI'22: a batch waits for the longest of B, H_B times the mean; a slot is refilled at once.
    batched = simulate("exponential:1", batch_size=slots, num_tasks=64_000).summary()
    refilled = simulate("exponential:1", batch_size=slots, num_tasks=64_000, policy="continuous").summary()
    assert refilled["throughput"] / batched["throughput"] == pytest.approx(expected, rel=0.02)
    assert batched["useful_work_ratio"] == pytest.approx(1 / expected, rel=0.02)
    assert refilled["useful_work_ratio"] == pytest.approx(1.0, abs=0.001)
    assert refilled["mean_batch_size"] == pytest.approx(slots, rel=0.001)


def test_a_slot_is_refilled_as_soon_as_its_task_ends() -> None:
    done = run(Setup(lengths(1, 5, 2, 6), policy="continuous", batch_size=2, num_tasks=4)).record
    assert done.finished.tolist() == [1.0, 5.0, 3.0, 9.0]


# --- the world -----------------------------------------------------------------------------------------------------


def test_an_open_system_serves_what_arrives() -> None:
    # M/D/1 without batches: the mean wait is rho / (2 (1 - rho)) service times (Pollaczek-Khinchine).
    done = simulate("uniform:1:1", batch_size=1, arrival_rate=0.8, num_tasks=100_000).summary()
    assert done["throughput"] == pytest.approx(0.8, rel=0.02)
    assert done["utilization"] == pytest.approx(0.8, rel=0.02)
    assert done["latency"]["mean"] == pytest.approx(1 + 0.8 / (2 * 0.2), rel=0.05)


def test_several_servers_share_one_queue_and_may_differ() -> None:
    done = simulate("uniform:1:1", batch_size=4, num_tasks=4000, num_servers=2, slowness=(1.0, 3.0)).record
    per_server = np.bincount(done.group)
    assert per_server[0] / per_server[1] == pytest.approx(3.0, rel=0.02)


def test_equal_seeds_give_every_policy_the_same_tasks() -> None:
    clients = (Client("a", tasks=300, rate=2.0), Client("b", tasks=100, size=3.0))
    one, other, again, differs = (
        simulate("exponential:1", clients=clients, seed=seed, policy=policy, batch_size=8).record
        for seed, policy in ((5, "static"), (5, "continuous"), (5, "static"), (6, "static"))
    )
    for column in ("arrived", "service_ms", "client"):
        assert np.array_equal(getattr(one, column), getattr(other, column))
        assert np.array_equal(getattr(one, column), getattr(again, column))
    assert np.array_equal(one.finished, again.finished)
    assert not np.array_equal(one.service_ms, differs.service_ms)


def test_a_closed_loop_keeps_so_many_open() -> None:
    done = simulate("exponential:1", clients=(Client("loop", tasks=500, closed=7),), batch_size=4).record
    for at in done.began:
        assert np.count_nonzero((done.arrived <= at) & (done.finished > at)) <= 7
    assert len(done.client) == 500


def test_an_open_ended_client_stops_when_the_others_are_through() -> None:
    clients = (Client("greedy", tasks=64), Client("light", closed=1), Client("random", rate=1.0))
    done = simulate("uniform:1:1", clients=clients, batch_size=8).record
    assert np.count_nonzero(done.client == 0) == 64
    last = done.finished[done.client == 0].max()
    assert last == 8.0
    assert done.arrived[done.client != 0].max() <= last
    without_numbers = simulate("uniform:1:1", clients=(Client("a", closed=3), Client("b", rate=9.0)), num_tasks=50).record
    assert len(without_numbers.client) == 50


def test_bursts_without_a_number_part_all_tasks_between_them() -> None:
    done = simulate("uniform:1:1", clients=(Client("a"), Client("b"), Client("c", tasks=5)), num_tasks=45).record
    assert np.bincount(done.client).tolist() == [15, 15, 5]


def test_late_is_what_ends_after_its_time_limit() -> None:
    done = simulate("uniform:1:1", batch_size=1, num_tasks=10, timeout=4.0).summary()
    assert (done["finished"], done["late"]) == (10, 6)
    assert (done["throughput"], done["goodput"]) == (1.0, 0.4)


def test_warm_up_leaves_the_first_tasks_out() -> None:
    done = run(Setup(lengths(10, 10, 1, 1, 1, 1), batch_size=1, num_tasks=6, num_warmup=2)).summary()
    assert (done["throughput"], done["elapsed"]) == (1.0, 4.0)
    assert done["latency"]["mean"] == np.mean([21, 22, 23, 24])


def test_service_of_clients_adds_up_to_the_time_of_the_servers() -> None:
    clients = (Client("short", tasks=200), Client("long", tasks=200, size=10.0))
    done = simulate("exponential:1", clients=clients, batch_size=16)
    summary = done.summary()
    assert sum(c["service"] for c in summary["clients"].values()) == pytest.approx(done.record.busy_s())
    assert sum(c["share"] for c in summary["clients"].values()) == pytest.approx(1.0)
    assert record.service_gap_s(done.record, 1, 0)[-1] == pytest.approx(
        summary["clients"]["long"]["service"] - summary["clients"]["short"]["service"]
    )


@given(
    clients=st.lists(CLIENT, min_size=1, max_size=3), policy=st.sampled_from(["static", "continuous"]),
    batch_size=st.integers(1, 9), bins=st.integers(1, 3), num_servers=st.integers(1, 3),
    seal_ms=st.none() | st.sampled_from([1.0, 1000.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100)
def test_every_task_runs_once_in_a_batch_that_fits(clients: list[Client], seed: int, **setup: Any) -> None:
    done = simulate("exponential:1", clients=tuple(clients), seed=seed, **setup).record
    check(done, setup["batch_size"])
    assert done.is_done.all()

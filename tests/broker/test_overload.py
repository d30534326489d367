"""Refusals: by predicted work, with their texts and hints, and by queue delay; against queues in virtual time."""

import heapq
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.scheduling.overload import Backlog, CoDel, Overload, work_refusal

INF = math.inf


def ahead(
    queued_ms: float, own_ms: float | None = None, share: float = 1.0, leased_ms: float = 0.0, num_workers: int = 1
) -> Backlog:
    return Backlog(queued_ms, queued_ms if own_ms is None else own_ms, share, leased_ms, num_workers)


def refuse(
    backlog: Backlog,
    work_ms: float = 10.0,
    alone_ms: float = 10.0,
    left_s: float = INF,
    budget_s: float = INF,
    max_s: float = INF,
) -> Overload | None:
    return work_refusal(backlog, work_ms, alone_ms, left_s, budget_s, max_s)


# --- predicted work --------------------------------------------------------------------------------------------------


def test_nothing_is_refused_without_a_bound() -> None:
    assert refuse(ahead(1e9), 1e9, 1e9) is None


def test_a_task_that_would_miss_its_deadline() -> None:
    over = refuse(ahead(4000.0, leased_ms=200.0), left_s=1.0)
    assert over == Overload(
        "about 4.2 s of work is queued ahead and the task has 1.0 s: try again in 4.2 s, or give it a longer timeout",
        pytest.approx(4.2),
    )
    assert refuse(ahead(4000.0, leased_ms=200.0), left_s=4.22) is None


def test_a_class_that_would_wait_too_long() -> None:
    over = refuse(ahead(4200.0), left_s=60.0, budget_s=1.6)
    assert over is not None and over.retry_after_s == pytest.approx(4.2)
    assert over.reason.endswith("and its priority waits at most 1.6 s: try again in 4.2 s, or give it a later priority")
    assert refuse(ahead(1600.0), left_s=60.0, budget_s=1.6) is None


def test_a_long_task_is_taken_when_nothing_is_ahead() -> None:
    """The budget is for waiting: it says nothing of how long a task may run."""
    assert refuse(ahead(0.0), 10_000.0, 12_000.0, budget_s=0.05) is None
    assert refuse(ahead(0.0, leased_ms=100.0), 10_000.0, 12_000.0, budget_s=0.05) is not None


def test_what_waiting_does_not_help_has_no_hint() -> None:
    over = refuse(ahead(500.0), 3000.0, 3000.0, left_s=1.0)
    assert over == Overload("this takes about 3.0 s with nothing ahead of it and has 1.0 s: give it a longer timeout", None)
    over = refuse(ahead(0.0), 3000.0, 100.0, budget_s=1.0)
    assert over == Overload("this is about 3.0 s of work and its priority waits at most 1.0 s: submit less at a time", None)
    over = refuse(ahead(0.0), 3000.0, 100.0, max_s=2.0)
    assert over == Overload("this is about 3.0 s of work and the queue holds 2.0 s: submit less at a time", None)


def test_the_queue_holds_so_many_device_seconds_per_worker_exactly() -> None:
    assert refuse(ahead(5990.0, num_workers=2), max_s=3.0) is None
    over = refuse(ahead(5991.0, leased_ms=9.0, num_workers=2), max_s=3.0)
    assert over == Overload(
        "the queue is full: 6.0 s of work is queued, this is 10 ms more, and it holds 6.0 s: try again in 3.0 s",
        pytest.approx(3.0),
    )


def test_without_workers_nothing_is_predicted() -> None:
    assert refuse(ahead(1e9, num_workers=0), left_s=0.001, budget_s=0.001, max_s=0.001) is None
    assert ahead(0.0, num_workers=0).wait_s() == INF


def test_an_account_waits_for_its_share_or_for_all_whichever_is_less() -> None:
    assert ahead(10_000.0, 100.0, share=0.25, leased_ms=50.0).wait_s() == pytest.approx(0.45)
    assert ahead(200.0, 100.0, share=0.25, leased_ms=50.0).wait_s() == pytest.approx(0.25)
    assert ahead(200.0, 100.0, share=0.25, leased_ms=50.0, num_workers=4).wait_s() == pytest.approx(0.0625)


def test_a_small_client_is_not_refused_for_a_greedy_one() -> None:
    assert refuse(ahead(100_000.0, 0.0, share=0.5), left_s=0.1) is None
    assert refuse(ahead(100_000.0, 100_000.0, share=0.5), left_s=0.1) is not None


@pytest.mark.parametrize(("queued_s", "retry_s"), [(0.001, 0.02), (25.0, 25.0), (300.0, 300.0), (10_000.0, 3600.0)])
def test_the_hint_is_true_up_to_an_hour(queued_s: float, retry_s: float) -> None:
    over = refuse(ahead(1000.0 * queued_s), left_s=0.0105)
    assert over is not None and over.retry_after_s == pytest.approx(retry_s)


@given(
    count=st.integers(1, 200),
    marginal=st.floats(0.1, 50),
    queued=st.floats(0, 5000),
    budget=st.floats(0.01, 5),
    left=st.floats(0.01, 5),
)
def test_a_run_is_judged_like_its_tasks_one_by_one(
    count: int, marginal: float, queued: float, budget: float, left: float
) -> None:
    """On one worker and without batching, where a task's marginal time is what it takes alone."""
    ones = 0
    while ones < count and refuse(ahead(queued + ones * marginal), marginal, marginal, left, budget) is None:
        ones += 1
    run = refuse(ahead(queued), count * marginal, marginal, left, budget)
    tight = [queued + count * marginal - 1000 * left, queued + (count - 1) * marginal - 1000 * budget]
    if all(abs(t) > 1e-6 for t in tight):  # else rounding decides
        assert (run is None) == (ones == count)


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
def test_the_hint_is_within_a_factor_of_two_of_the_drain(num_workers: int, sigma: float) -> None:
    """A queue in virtual time: predicted is the mean of each task, the time that it takes is drawn around it."""
    rng = random.Random(f"{num_workers} {sigma}")
    for _ in range(100):
        means = [rng.uniform(5.0, 50.0) for _ in range(rng.randint(15 * num_workers, 200))]
        free_at = [rng.uniform(0.0, 30.0) for _ in range(num_workers)]
        over = refuse(ahead(sum(means), leased_ms=sum(free_at), num_workers=num_workers), left_s=0.02, alone_ms=20.0)
        assert over is not None and over.retry_after_s is not None
        for mean in means:
            begin = heapq.heappop(free_at)
            heapq.heappush(free_at, begin + mean * rng.lognormvariate(-(sigma**2) / 2, sigma))
        drained_s = max(free_at) / 1000.0
        assert drained_s / 2 <= over.retry_after_s <= 2 * drained_s


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (4.0, 1.0, 2.0)])
def test_the_hint_under_fair_sharing(weights: tuple[float, ...]) -> None:
    """Accounts served in the order of their counters, all of them backlogged: the first one's work ends as it was told."""
    rng = random.Random(str(weights))
    for _ in range(20):
        tasks = [[rng.uniform(5.0, 50.0) for _ in range(rng.randint(40, 120))] for _ in weights]
        queued = [sum(own) for own in tasks]
        told = ahead(sum(queued), queued[0], weights[0] / sum(weights)).wait_s()
        now, counters = 0.0, [0.0] * len(weights)
        while tasks[0]:
            account = min((i for i, own in enumerate(tasks) if own), key=counters.__getitem__)
            time_ms = tasks[account].pop()
            now += time_ms
            counters[account] += time_ms / weights[account]
        assert now / 1000.0 / 2 <= told <= 2 * now / 1000.0


# --- queue delay -----------------------------------------------------------------------------------------------------


def run_queue(codel: CoDel, arrivals: list[float], service_s: float) -> tuple[list[tuple[float, bool]], list[float]]:
    """A first-come queue of one class and one worker: (arrival, was it taken) and the delays of what was taken."""
    free_at, waiting, taken, delays = 0.0, list[float](), list[tuple[float, bool]](), list[float]()

    def serve(until: float) -> None:
        nonlocal free_at
        while waiting and max(free_at, waiting[0]) <= until:
            begin = max(free_at, waiting[0])
            delays.append(begin - waiting.pop(0))
            codel.dispatched(0, delays[-1], begin)
            free_at = begin + service_s

    for at in arrivals:
        serve(at)
        is_open = not codel.is_closed(0, at)
        taken.append((at, is_open))
        if is_open:
            waiting.append(at)
    serve(INF)
    return taken, delays


def poisson(rate: float, until: float, seed: int) -> list[float]:
    rng, now, arrivals = random.Random(seed), 0.0, list[float]()
    while (now := now + rng.expovariate(rate)) < until:
        arrivals.append(now)
    return arrivals


@pytest.mark.parametrize("seed", range(3))
def test_ten_times_too_much_closes_the_door(seed: int) -> None:
    """Capacity 100 per s, target 100 ms, interval 2 s: open for about an interval, then what comes in is near the capacity."""
    taken, _ = run_queue(CoDel([0.1]), poisson(1000.0, 60.0, seed), 0.01)
    first_closed = next(at for at, is_open in taken if not is_open)
    assert 2.0 < first_closed < 2.5
    late = [is_open for at, is_open in taken if at > 30.0]
    assert sum(late) < 0.25 * len(late)
    assert any(late), "it opens again as the queue drains"


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_underload_never_closes_it(load: float) -> None:
    taken, delays = run_queue(CoDel([0.1]), poisson(100.0 * load, 600.0, 1), 0.01)
    assert all(is_open for _, is_open in taken)
    assert max(delays) > 0.05  # there was a queue at times


def test_a_burst_does_not_close_it() -> None:
    """150 tasks at once: the last waits fifteen targets, but within an interval it is over."""
    codel = CoDel([0.1])
    bursts = [start + 1e-6 * n for start in (1.0, 11.0, 21.0) for n in range(150)]
    taken, delays = run_queue(codel, sorted(bursts + poisson(10.0, 30.0, 1)), 0.01)
    assert all(is_open for _, is_open in taken) and max(delays) > 1.4


def test_it_opens_with_the_first_task_below_the_target() -> None:
    codel = CoDel([0.05, 0.1])
    for tick in range(201):
        codel.dispatched(1, 0.11, tick * 0.01)
    assert codel.is_closed(1, 2.0) and not codel.is_closed(0, 2.0)
    assert codel.delay_s(1) == 0.11 and codel.delay_s(0) == 0.0
    codel.dispatched(1, 0.1, 2.01)
    assert not codel.is_closed(1, 2.01)
    codel.dispatched(1, 0.2, 2.02)
    assert not codel.is_closed(1, 2.02)  # and closes only after another whole interval


def test_it_closes_after_the_interval_and_not_before() -> None:
    codel = CoDel([0.1])
    codel.dispatched(0, 5.0, 10.0)
    codel.dispatched(0, 5.0, 11.99)
    assert not codel.is_closed(0, 11.99) and codel.is_closed(0, 12.0)


def test_it_opens_when_nothing_was_dispatched_for_an_interval() -> None:
    codel = CoDel([0.1])
    for tick in range(300):
        codel.dispatched(0, 1.0, tick * 0.01)
    assert codel.is_closed(0, 2.99) and codel.is_closed(0, 4.98) and not codel.is_closed(0, 4.99)
    codel.dispatched(0, 1.0, 10.0)
    assert not codel.is_closed(0, 10.0) and not codel.is_closed(0, 11.9)  # what was long ago says nothing


def test_an_infinite_target_is_never_reached() -> None:
    codel = CoDel([INF])
    for tick in range(1000):
        codel.dispatched(0, 1e6, float(tick))
    assert not codel.is_closed(0, 1000.0)


def test_a_closed_class_says_so() -> None:
    codel = CoDel([0.1])
    assert codel.refusal(0, 4.2, 0.0) is None
    for tick in range(41):
        codel.dispatched(0, 0.5, tick * 0.1)
    assert codel.refusal(0, 4.2, 4.0) == Overload(
        "every task of priority 0 has waited longer than 100 ms for 4.0 s now: try again in 4.2 s", 4.2
    )


@given(
    steps=st.lists(st.tuples(st.sampled_from([0.01, 0.3, 0.5, 1.0, 2.5]), st.sampled_from([0.0, 0.1, 0.11, 3.0])), max_size=60)
)
def test_closed_means_that_every_delay_of_an_interval_was_above(steps: list[tuple[float, float]]) -> None:
    codel, now, seen = CoDel([0.1]), 0.0, list[tuple[float, float]]()
    for step, delay in steps:
        now += step
        codel.dispatched(0, delay, now)
        seen.append((now, delay))
        last = [d for at, d in seen if at >= now - 2.0]
        assert not codel.is_closed(0, now) or (len(last) > 1 and min(last) > 0.1)

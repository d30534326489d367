"""Holding back and trying again, as pure policy: counts, times and a random source in, decisions out."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from session_rig import PLANS

from penstock.broker.protocol import Code, Error
from penstock.client.retries import Retries
from penstock.client.run import Options, Rest, Run
from penstock.client.throttle import BUCKET_S, MIN_REFUSED, WINDOW_S, Tally, Throttle, chance

SHAPE = PLANS["hold"].row({"x": [0.0]}).shape
FULL = Error(Code.OVERLOADED, "full", 100.0)


def a_run(priority: int = 5, deadline: float = 1000.0, timeout: float = 60.0) -> Run:
    options = Options(priority=priority, timeout=None if deadline == math.inf else timeout)
    return Run(bytes(16), SHAPE, options, deadline)


# --- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_requests", "num_accepts", "wanted"),
    [(0, 0, 0.0), (100, 100, 0.0), (100, 50, 0.0), (100, 0, 100 / 101), (10, 2, 6 / 11), (1, 0, 0.5), (5, 9, 0.0)],
)
def test_the_chance_of_being_held_back(num_requests, num_accepts, wanted):
    assert chance(num_requests, num_accepts) == pytest.approx(wanted)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 3.0, 11.0, 59.0, 400.0]), st.sampled_from("sfhr")), max_size=80))
def test_a_tally_forgets_what_is_older_than_the_window(steps):
    tally, now, events = Tally(), 50.0, list[tuple[float, str]]()
    for pause, what in steps:
        now += pause
        if now >= tally.next_mark:
            tally.mark(now)
        tally.num_sent += what == "s"
        tally.num_refused += what == "f"
        tally.num_held_back += what == "h"
        tally.num_retries += what == "r"
        events.append((now, what))
        for count, kind in zip(tally.recent(now), "sfhr", strict=True):
            surely = sum(at > now - (WINDOW_S - BUCKET_S) and e == kind for at, e in events)
            at_most = sum(at >= now - (WINDOW_S + BUCKET_S) and e == kind for at, e in events)
            assert surely <= count <= at_most


def test_the_window_costs_no_more_memory_than_its_buckets():
    throttle = Throttle(True, lambda: 0.5)
    for i in range(10_000):
        throttle.leaving(a_run(), float(i))
    assert len(throttle.tally(a_run())._marks) <= WINDOW_S / BUCKET_S


# --- holding back --------------------------------------------------------------------------------------------------


def refuse(throttle: Throttle, count: int, now: float, after_s: float = 1.0, priority: int = 5) -> None:
    """So many runs have left, and are refused."""
    for _ in range(count):
        throttle.refused(a_run(priority), "full", after_s, now)
    throttle.tally(a_run(priority)).num_sent += count


def test_nothing_is_held_back_before_there_are_refusals_enough():
    throttle = Throttle(True, lambda: 0.0)
    refuse(throttle, MIN_REFUSED - 1, now=100.0)
    assert throttle.leaving(a_run(), 100.0) is None


def test_what_is_held_back_says_why_and_when_to_come_again():
    throttle = Throttle(True, lambda: 0.0)
    refuse(throttle, MIN_REFUSED, now=100.0, after_s=2.0)
    error = throttle.leaving(a_run(), 100.5)
    assert error is not None
    assert (error.code, error.retry_after_ms) == (Code.OVERLOADED, pytest.approx(1500.0))
    assert "took 0 of this client's last 10 submissions of priority 5 (full)" in error.message


def test_the_broker_is_asked_again_once_its_word_is_over():
    throttle = Throttle(True, lambda: 0.0)
    refuse(throttle, 50, now=100.0, after_s=2.0)
    assert throttle.leaving(a_run(), 101.9) is not None
    assert throttle.leaving(a_run(), 102.0) is None


def test_clients_come_again_at_different_times():
    throttle = Throttle(True, lambda: 0.9)
    refuse(throttle, 1000, now=100.0, after_s=2.0)
    assert throttle.leaving(a_run(), 102.8) is not None
    assert throttle.leaving(a_run(), 102.9) is None


def test_other_priorities_jobs_and_retries_pass():
    throttle = Throttle(True, lambda: 0.0)
    refuse(throttle, 50, now=100.0)
    assert throttle.leaving(a_run(priority=1), 100.0) is None
    assert throttle.leaving(a_run(deadline=math.inf), 100.0) is None
    again, restarted = a_run(), a_run()
    again.rest, restarted.is_again = Rest(1, 100.0, FULL), True
    assert throttle.leaving(again, 100.0) is None
    assert throttle.leaving(restarted, 100.0) is None
    assert throttle.leaving(a_run(), 100.0) is not None


def test_what_has_more_time_than_what_was_refused_passes():
    throttle = Throttle(True, lambda: 0.0)
    refuse(throttle, 50, now=100.0)
    throttle.refused(a_run(timeout=5.0), "full", 1.0, 100.0)
    assert throttle.leaving(a_run(timeout=60.0), 100.0) is not None
    assert throttle.leaving(a_run(timeout=90.0), 100.0) is None
    throttle.refused(a_run(timeout=5.0), "full", 1.0, 101.5)
    assert throttle.leaving(a_run(timeout=60.0), 101.5) is None
    assert throttle.leaving(a_run(timeout=5.0), 101.5) is not None


def test_a_throttle_that_is_off_holds_nothing_back():
    throttle = Throttle(False, lambda: 0.0)
    refuse(throttle, 500, now=100.0)
    assert throttle.leaving(a_run(), 100.0) is None


def test_what_leaves_approaches_twice_what_the_broker_takes():
    throttle = Throttle(True, random.Random(3).random)
    num_left = num_taken = 0
    for _ in range(20):
        room = 100
        for _ in range(1000):
            if throttle.leaving(a_run(), 100.0) is not None:
                continue
            num_left += 1
            if room:
                room, num_taken = room - 1, num_taken + 1
            else:
                throttle.refused(a_run(), "full", 1.0, 100.0)
    assert num_taken == 2000
    assert num_left == pytest.approx(2 * num_taken, rel=0.15)


def test_ten_times_too_much_reaches_the_broker_as_three_times_what_it_takes_and_the_end_is_noticed():
    """20 clients that want 50 runs a second each, of which the broker takes 100; then they want 4 each."""
    draws = random.Random(1)
    throttles = [Throttle(True, draws.random) for _ in range(20)]
    arrived = accepted = late_accepted = late = 0
    for tick in range(6000):  # of 10 ms
        now = 100.0 + tick / 100
        is_late = now >= 145.0
        if is_late and tick % 25:
            continue
        room = 25 if is_late else 1
        for throttle in draws.sample(throttles, 20 if is_late else 10):
            late += is_late
            if throttle.leaving(a_run(), now) is not None:
                continue
            arrived += not is_late
            if room:
                room -= 1
                accepted += not is_late
                late_accepted += is_late
            else:
                throttle.refused(a_run(), "full", 0.1, now)
    assert accepted > 0.97 * 4500
    assert arrived < 3.5 * accepted
    assert late_accepted > 0.97 * late


# --- trying again --------------------------------------------------------------------------------------------------


def retries(max_retries: int = 10, draw: float = 0.0) -> tuple[Retries, Throttle]:
    throttle = Throttle(False, lambda: draw)
    return Retries(max_retries, throttle, lambda: draw), throttle


def refused(policy: Retries, run: Run, now: float, error: Error = FULL) -> Rest | Error:
    """As a session does it: the rest is the run's."""
    answer = policy.refused(run, error, now)
    if isinstance(answer, Rest):
        run.rest = answer
    return answer


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999])
def test_a_retry_waits_at_least_as_long_as_the_broker_said(draw):
    policy, _ = retries(draw=draw)
    answer = refused(policy, a_run(), 100.0)
    assert isinstance(answer, Rest)
    assert answer.until == pytest.approx(100.0 + 0.1 * (1 + 0.5 * draw))
    assert (answer.num_refused, answer.error) == (1, FULL)


def test_the_spread_doubles_up_to_a_bound():
    policy, _ = retries(draw=1.0)
    job = a_run(deadline=math.inf)
    pauses = [refused(policy, job, 0.0).until for _ in range(14)]
    assert pauses[:4] == pytest.approx([0.15, 0.2, 0.3, 0.5])
    assert pauses[-2:] == pytest.approx([30.1, 30.1])


def test_half_of_the_time_that_is_left_stays_for_the_task():
    policy, throttle = retries(draw=1.0)
    answer = refused(policy, a_run(deadline=102.2), 100.0, Error(Code.OVERLOADED, "full", 1000.0))
    assert isinstance(answer, Rest)
    assert answer.until == pytest.approx(101.1)
    answer = refused(policy, a_run(deadline=101.9), 100.0, Error(Code.OVERLOADED, "full", 1000.0))
    assert isinstance(answer, Error)
    assert (answer.code, answer.retry_after_ms) == (Code.OVERLOADED, 1000.0)
    assert answer.message == "full; not tried again: 1.9 s of its time limit are left"
    tally = throttle.tally(a_run())
    assert (tally.num_refused, tally.num_retries) == (2, 1)


def test_a_pause_is_never_nothing():
    policy, _ = retries()
    answer = refused(policy, a_run(), 100.0, Error(Code.OVERLOADED, "full", 0.0))
    assert isinstance(answer, Rest)
    assert answer.until == pytest.approx(100.01)


def test_a_refusal_without_a_pause_is_final_and_no_sign_of_overload():
    policy, throttle = retries()
    too_much = Error(Code.OVERLOADED, "more than the queue holds: submit less at a time", None)
    assert refused(policy, a_run(), 100.0, too_much) is too_much
    assert refused(policy, a_run(deadline=math.inf), 100.0, too_much) is too_much
    assert throttle.tally(a_run()).num_refused == 0


def test_what_has_waited_too_long_ends_with_what_it_waited_for():
    policy, _ = retries()
    run = a_run(deadline=110.0)
    assert isinstance(refused(policy, run, 100.0), Rest)
    answer = refused(policy, run, 109.0, Error(Code.OVERLOADED, "it takes 2 s: give it more time", None))
    assert isinstance(answer, Error)
    assert (answer.message, answer.retry_after_ms) == (
        "full; not tried again: too little of its time limit is left", 100.0,
    )  # fmt: skip


def test_a_run_is_tried_again_so_often_and_not_more():
    policy, _ = retries(max_retries=3)
    run = a_run()
    assert [type(refused(policy, run, 100.0)) for _ in range(4)] == [Rest, Rest, Rest, Error]
    answer = refused(policy, run, 100.0)
    assert isinstance(answer, Error)
    assert answer.message.endswith("refused 4 times")


def test_retries_are_a_fifth_of_what_leaves_but_the_first_ten_are_free():
    policy, throttle = retries()
    assert sum(isinstance(refused(policy, a_run(), 100.0), Rest) for _ in range(30)) == 10
    for _ in range(200):
        throttle.leaving(a_run(), 101.0)
    answers = [refused(policy, a_run(), 101.0) for _ in range(60)]
    assert sum(isinstance(a, Rest) for a in answers) == 30
    assert "too many retries already" in answers[-1].message
    assert isinstance(refused(policy, a_run(priority=1), 101.0), Rest)
    later = 101.0 + WINDOW_S + BUCKET_S
    assert isinstance(refused(policy, a_run(deadline=math.inf), later), Rest)
    assert sum(isinstance(refused(policy, a_run(), later), Rest) for _ in range(30)) == 10


def test_a_job_waits_as_long_as_it_takes_and_costs_no_budget():
    policy, throttle = retries(max_retries=1)
    job = a_run(deadline=math.inf)
    for _ in range(100):
        assert isinstance(refused(policy, job, 100.0), Rest)
    assert job.rest is not None
    assert job.rest.num_refused == 100
    tally = throttle.tally(job)
    assert (tally.num_retries, tally.num_refused, tally.num_sent) == (0, 0, 0)


def test_without_retries_a_refusal_comes_out_as_it_came():
    policy, _ = retries(max_retries=0)
    assert refused(policy, a_run(), 100.0) is FULL
    assert refused(policy, a_run(deadline=math.inf), 100.0) is FULL

"""Circuit breakers by example and against a model that keeps every call; the log of events."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.broker.scheduling.breakers import Breakers, backoff_s
from penstock.broker.scheduling.events import MAX_EVENTS, Event, EventLog, duration_text

W, K = "w0", "embed"


def fail(breakers: Breakers, num_calls: int, now: float, worker: str = W) -> list[Event]:
    """So many failed calls, one after the other at one time."""
    events = []
    for _ in range(num_calls):
        breakers.started(worker, K, now)
        events.append(breakers.finished(worker, K, True, now, now))
    return [e for e in events if e is not None]


def opened(now: float = 0.0) -> Breakers:
    breakers = Breakers()
    fail(breakers, 5, now)
    assert not breakers.may_run(W, K, now)
    return breakers


def probe(breakers: Breakers, has_failed: bool, now: float) -> Event | None:
    assert breakers.may_run(W, K, now)
    breakers.started(W, K, now)
    assert not breakers.may_run(W, K, now)
    return breakers.finished(W, K, has_failed, now + 0.01, now)


def test_the_fifth_failure_opens_and_four_do_not() -> None:
    breakers = Breakers()
    assert fail(breakers, 4, 0.0) == [] and breakers.may_run(W, K, 0.0) and breakers.is_all_closed
    (event,) = fail(breakers, 1, 2.0)
    assert (event.at_s, event.kind, event.subject) == (2.0, "breaker_opened", "embed on w0")
    assert event.reason == "5 of the last 5 batches failed: none for 1.0 s"
    assert not breakers.may_run(W, K, 2.999) and breakers.may_run(W, K, 3.0) and not breakers.is_all_closed


def test_others_are_not_concerned() -> None:
    breakers = opened()
    assert breakers.may_run("w1", K, 0.0) and breakers.may_run(W, "other", 0.0)


@pytest.mark.parametrize(("num_failed", "is_open"), [(9, False), (10, True)])
def test_half_of_the_last_twenty_opens(num_failed: int, is_open: bool) -> None:
    breakers = Breakers()
    for _ in range(100):
        breakers.finished(W, K, False, 0.0)  # these have left the window in the end
    fail(breakers, num_failed, 0.0)
    assert breakers.may_run(W, K, 0.0) is not is_open


def test_failures_leave_the_window() -> None:
    breakers = Breakers()
    for _ in range(100):
        fail(breakers, 1, 0.0)
        for _ in range(4):
            assert breakers.finished(W, K, False, 0.0) is None
    assert breakers.report() == [{"worker": W, "kernel": K, "state": "closed", "failed": 4, "calls": 20, "retry_at_s": None}]


def test_a_probe_that_succeeds_closes_and_forgets() -> None:
    breakers = opened()
    event = probe(breakers, False, 1.0)
    assert event is not None and event.kind == "breaker_closed"
    assert breakers.may_run(W, K, 1.01) and breakers.is_all_closed and breakers.report() == []
    assert fail(breakers, 4, 1.02) == []  # what failed before counts no more
    assert len(fail(breakers, 1, 1.02)) == 1


def test_failed_probes_double_the_time_to_a_minute() -> None:
    breakers, now, waits = opened(), 0.0, []
    for _ in range(9):
        due = breakers.retry_at(K, [W], now)
        assert due is not None
        waits.append(due - now)
        event = probe(breakers, True, due)
        assert event is not None and event.kind == "breaker_opened" and event.reason.startswith("the probe failed")
        now = due + 0.01
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])


@pytest.mark.parametrize(("healthy_s", "open_s"), [(59.0, 4.0), (60.0, 1.0)])
def test_a_minute_of_health_makes_the_next_opening_short_again(healthy_s: float, open_s: float) -> None:
    breakers = opened()
    probe(breakers, True, 1.0)  # open for 2 s
    probe(breakers, False, 3.01)
    now = 3.02 + healthy_s
    fail(breakers, 5, now)
    assert breakers.retry_at(K, [W], now) == pytest.approx(now + open_s)


def test_only_the_probe_decides() -> None:
    """Batches from before the opening come back while it is open, and while the probe is out."""
    breakers = opened(now=10.0)
    assert breakers.finished(W, K, False, 10.5, 9.0) is None and not breakers.may_run(W, K, 10.5)
    breakers.started(W, K, 11.0)
    assert breakers.finished(W, K, False, 11.1, 9.0) is None and not breakers.may_run(W, K, 11.1)
    assert breakers.finished(W, K, True, 11.2, 9.5) is None
    breakers.abandoned(W, K, 9.5)
    breakers.started(W, K, 11.25)  # one that was sent all the same is no probe
    assert not breakers.may_run(W, K, 11.3)
    event = breakers.finished(W, K, False, 11.4, 11.0)
    assert event is not None and event.kind == "breaker_closed"
    for _ in range(10):
        assert breakers.finished(W, K, True, 11.5, 9.9) is None  # old ones still
    assert breakers.may_run(W, K, 11.5)


def test_an_abandoned_probe_is_free_again() -> None:
    breakers = opened()
    breakers.started(W, K, 1.0)
    assert not breakers.may_run(W, K, 5.0)
    breakers.abandoned(W, K, 1.0)
    assert breakers.may_run(W, K, 5.0)
    event = probe(breakers, True, 5.0)
    assert event is not None and event.reason.endswith("2.0 s")  # an abandoned probe says nothing


def test_when_a_barred_kernel_may_run_again() -> None:
    breakers = opened()
    fail(breakers, 5, 0.25, worker="w1")
    assert breakers.retry_at(K, ["w1", W], 0.5) == breakers.retry_at(K, [W, "w1"], 0.5) == 1.0
    assert breakers.retry_at(K, [W, "w1", "w2"], 0.5) is None  # w2 may
    assert breakers.retry_at(K, [], 0.5) is None
    assert breakers.retry_at(K, [W], 1.0) is None  # the probe is due
    breakers.started(W, K, 1.0)
    assert breakers.retry_at(K, [W], 1.1) == pytest.approx(2.1)  # never in the past: nobody spins on it
    assert breakers.retry_at(K, [W, "w1"], 1.1) == 1.25


def test_a_forgotten_worker_starts_clean() -> None:
    breakers = opened()
    fail(breakers, 5, 0.0, worker="w1")
    breakers.forget_worker(W)
    assert breakers.may_run(W, K, 0.0) and not breakers.may_run("w1", K, 0.0)
    assert fail(breakers, 4, 0.0) == []
    assert [row["worker"] for row in breakers.report()] == [W, "w1"]
    assert len(fail(breakers, 1, 0.0)) == 1
    assert breakers.report()[1] == {"worker": "w1", "kernel": K, "state": "open", "failed": 5, "calls": 5, "retry_at_s": 1.0}


def test_backoff() -> None:
    assert [backoff_s(n) for n in range(10)] == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0])
    assert backoff_s(10**6) == 10.0


class BreakerModel(RuleBasedStateMachine):
    """One breaker beside the plainest thing that could be right. Batches overlap, and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.breakers = Breakers()
        self.now = 100.0
        self.running: list[float] = []
        self.calls: list[bool] = []
        self.open_until: float | None = None
        self.probe_at: float | None = None
        self.last_probe_at = -math.inf
        self.open_s = 0.0
        self.closed_at = -math.inf

    def expected(self) -> bool:
        return self.probe_at is None and (self.open_until is None or self.now >= self.open_until)

    @rule(step=st.sampled_from([0.001, 0.1, 0.9, 1.0, 5.0, 30.0, 70.0]))
    def time_passes(self, step: float) -> None:
        self.now += step

    @precondition(lambda self: self.expected() and len(self.running) < 8)
    @rule()
    def starts(self) -> None:
        self.now += 1e-6  # no two batches at one time
        self.breakers.started(W, K, self.now)
        self.running.append(self.now)
        if self.open_until is not None:
            self.probe_at = self.last_probe_at = self.now

    @precondition(lambda self: self.running)
    @rule(data=st.data(), has_failed=st.booleans(), is_abandoned=st.sampled_from([False, False, False, True]))
    def ends(self, data: st.DataObject, has_failed: bool, is_abandoned: bool) -> None:
        started_at = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if is_abandoned:
            self.breakers.abandoned(W, K, started_at)
            if started_at == self.probe_at:
                self.probe_at = None
            return
        event = self.breakers.finished(W, K, has_failed, self.now, started_at)
        assert (event.kind if event else None) == self.outcome(started_at, has_failed)

    @rule(num_calls=st.integers(1, 12), has_failed=st.booleans())
    def many_run(self, num_calls: int, has_failed: bool) -> None:
        for _ in range(num_calls):
            if self.expected():
                self.starts()
                started_at = self.running.pop()
                event = self.breakers.finished(W, K, has_failed, self.now, started_at)
                assert (event.kind if event else None) == self.outcome(started_at, has_failed)

    def outcome(self, started_at: float, has_failed: bool) -> str | None:
        if started_at == self.probe_at:
            self.probe_at = None
            if has_failed:
                return self.open(min(2 * self.open_s, 60.0))
            self.open_until, self.closed_at, self.calls = None, self.now, []
            return "breaker_closed"
        if self.open_until is not None or started_at < self.last_probe_at:
            return None
        self.calls = [*self.calls, has_failed][-20:]
        if len(self.calls) >= 5 and 2 * sum(self.calls) >= len(self.calls):
            return self.open(1.0 if self.now - self.closed_at >= 60.0 else min(2 * self.open_s, 60.0))
        return None

    def open(self, open_s: float) -> str:
        self.open_s, self.open_until = open_s, self.now + open_s
        return "breaker_opened"

    @invariant()
    def agrees(self) -> None:
        assert self.breakers.may_run(W, K, self.now) == self.expected()
        assert self.breakers.is_all_closed == (self.open_until is None)
        due = self.breakers.retry_at(K, [W], self.now)
        assert (due is None) == self.expected() and (due is None or due > self.now)
        if due is not None and self.probe_at is None:
            assert due == self.open_until


TestBreakerModel = BreakerModel.TestCase
TestBreakerModel.settings = settings(max_examples=150, stateful_step_count=50)


def test_the_event_log_is_bounded_and_newest_first() -> None:
    log = EventLog()
    for number in range(MAX_EVENTS + 10):
        log.add(Event(float(number), "even" if number % 2 == 0 else "odd", "k", f"number {number}"))
    assert len(log.recent()) == MAX_EVENTS and log.counts["even"] == log.counts["odd"] == (MAX_EVENTS + 10) / 2
    assert log.recent(2) == [
        {"at_s": 265.0, "kind": "odd", "subject": "k", "reason": "number 265"},
        {"at_s": 264.0, "kind": "even", "subject": "k", "reason": "number 264"},
    ]
    assert log.recent(0) == []


def test_times_in_words() -> None:
    times = [0.0, 0.0351, 0.9999, 4.24, 119.0, 121.0, 7300.0]
    assert [duration_text(s) for s in times] == ["0 ms", "35 ms", "1.0 s", "4.2 s", "119.0 s", "2 min", "2.0 h"]

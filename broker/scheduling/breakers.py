"""Circuit breakers, one per (worker, kernel): a worker that keeps failing a kernel is not given it for a while.

Knows outcomes of batches. Does not know leases, nor what counts as a failure: the caller says so.
"""

import math
from collections.abc import Iterable
from typing import Any

from penstock.broker.scheduling.events import Event, duration_text

WINDOW = 20
MIN_CALLS = 5
MIN_FAILED = 0.5
"""Share of the calls in the window that must have failed."""
FIRST_OPEN_S = 1.0
MAX_OPEN_S = 60.0
HEALTHY_S = 60.0
"""Closed for this long, a breaker forgets how long it was open the last time."""
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0

CLOSED, OPEN, PROBING = "closed", "open", "half_open"
_MASK = (1 << WINDOW) - 1


class _Breaker:
    """Closed: batches run. Open: none before `retry_at`. Half-open: one batch, the probe, is out and decides."""

    __slots__ = ("closed_at", "num_calls", "open_s", "results", "retry_at", "since", "state")

    def __init__(self) -> None:
        self.state = CLOSED
        self.results = 0  # a bit per call in the window, 1 for failed
        self.num_calls = 0
        self.open_s = 0.0
        self.retry_at = 0.0
        self.since = self.closed_at = -math.inf  # start of the last probe; end of the last one that succeeded

    @property
    def num_failed(self) -> int:
        return self.results.bit_count()

    def may_run(self, now: float) -> bool:
        return self.state == CLOSED or (self.state == OPEN and now >= self.retry_at)

    def count(self, has_failed: bool) -> bool:
        """Take a call into the window; True if too many of them failed."""
        self.results = (self.results << 1 | has_failed) & _MASK
        self.num_calls = min(self.num_calls + 1, WINDOW)
        return self.num_calls >= MIN_CALLS and self.num_failed >= MIN_FAILED * self.num_calls

    def open(self, now: float) -> None:
        is_first = self.state == CLOSED and now - self.closed_at >= HEALTHY_S
        self.open_s = FIRST_OPEN_S if is_first else min(2 * self.open_s, MAX_OPEN_S)
        self.state, self.retry_at = OPEN, now + self.open_s

    def close(self, now: float) -> None:
        self.state, self.closed_at = CLOSED, now
        self.results = self.num_calls = 0


class Breakers:
    """Ask `may_run`, say `started`, and then either `finished` or `abandoned`.

    The last two take the time at which the batch was started, so that a batch from before the probe is not taken for it;
    left out, it counts as the latest.
    """

    def __init__(self) -> None:
        self._breakers: dict[tuple[str, str], _Breaker] = {}
        self._tripped: dict[tuple[str, str], _Breaker] = {}  # those that are not closed

    @property
    def is_all_closed(self) -> bool:
        """Everybody may run everything."""
        return not self._tripped

    def may_run(self, worker: str, kernel: str, now: float) -> bool:
        """Whether the worker may be given a batch of the kernel."""
        if not self._tripped:
            return True
        breaker = self._tripped.get((worker, kernel))
        return breaker is None or breaker.may_run(now)

    def started(self, worker: str, kernel: str, now: float) -> None:
        """A batch goes out; it is the probe if the breaker was open."""
        if self._tripped and (breaker := self._tripped.get((worker, kernel))) and breaker.state == OPEN:
            breaker.state, breaker.since = PROBING, now

    def finished(self, worker: str, kernel: str, has_failed: bool, now: float, started_at: float = math.inf) -> Event | None:
        """A batch is over; what changed by it, if anything did."""
        key = worker, kernel
        breaker = self._breakers.get(key)
        if breaker is None:
            breaker = self._breakers[key] = _Breaker()
        if breaker.state == OPEN or started_at < breaker.since:
            return None
        if breaker.state == PROBING:
            return self._probed(key, breaker, has_failed, now)
        if not breaker.count(has_failed):
            return None
        breaker.open(now)
        self._tripped[key] = breaker
        what = f"{breaker.num_failed} of the last {breaker.num_calls} batches failed"
        return Event(now, "breaker_opened", _subject(key), f"{what}: none for {duration_text(breaker.open_s)}")

    def _probed(self, key: tuple[str, str], breaker: _Breaker, has_failed: bool, now: float) -> Event:
        if has_failed:
            breaker.open(now)
            reason = f"the probe failed: none for {duration_text(breaker.open_s)}"
            return Event(now, "breaker_opened", _subject(key), reason)
        breaker.close(now)
        del self._tripped[key]
        return Event(now, "breaker_closed", _subject(key), "the probe succeeded")

    def abandoned(self, worker: str, kernel: str, started_at: float = math.inf) -> None:
        """A batch ended without a verdict: its lease was lost or cancelled. If it was the probe, another may go."""
        breaker = self._tripped.get((worker, kernel))
        if breaker is not None and breaker.state == PROBING and started_at >= breaker.since:
            breaker.state = OPEN

    def retry_at(self, kernel: str, workers: Iterable[str], now: float) -> float | None:
        """When the first of the workers may run the kernel again; None if one may now, or there are none.

        A probe that is out may end at any time: should it fail, the next is at least `open_s` away.
        """
        first: float | None = None
        for worker in workers:
            breaker = self._tripped.get((worker, kernel))
            if breaker is None or breaker.may_run(now):
                return None
            due = breaker.retry_at if breaker.state == OPEN else now + breaker.open_s
            first = due if first is None else min(first, due)
        return first

    def forget_worker(self, worker: str) -> None:
        """The worker is gone; one of its name starts with a clean record."""
        self._breakers = {key: b for key, b in self._breakers.items() if key[0] != worker}
        self._tripped = {key: b for key, b in self._tripped.items() if key[0] != worker}

    def report(self) -> list[dict[str, Any]]:
        """Those that are not closed or have failures in their window; `retry_at_s` is of the monotonic clock."""
        return [
            {"worker": worker, "kernel": kernel, "state": b.state, "failed": b.num_failed, "calls": b.num_calls,
             "retry_at_s": b.retry_at if b.state == OPEN else None}
            for (worker, kernel), b in sorted(self._breakers.items()) if b.state != CLOSED or b.num_failed
        ]  # fmt: skip


def backoff_s(attempt: int) -> float:
    """How long a task waits before its `attempt`-th retry (from 1): 0.1 s, doubling to 10 s."""
    return min(FIRST_BACKOFF_S * 2.0 ** min(max(attempt - 1, 0), 30), MAX_BACKOFF_S)


def _subject(key: tuple[str, str]) -> str:
    worker, kernel = key
    return f"{kernel} on {worker}"

"""How much of what leaves the broker refuses as too much, and whether a task is held back here because of it.

Knows counts of runs in the last two minutes, per priority, since the broker closes its door by priority. Does not know
queues or sockets, nor what becomes of a refused run (`retries.py`). `now` (monotonic seconds) and randomness are
arguments. Tasks without time limit are neither counted nor held back: they wait as long as it takes.

Source: Beyer et al., Site Reliability Engineering (2016), chapter 21: client-side throttling, retry budget.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Final

from penstock.broker.protocol import NUM_PRIORITIES, Code, Error
from penstock.client.run import Run

WINDOW_S: Final = 120.0
BUCKET_S: Final = 10.0
NUM_PER_ACCEPT: Final = 2.0
"""So many runs may leave for each one that the broker takes."""
MIN_REFUSED: Final = 10
"""Fewer refusals are no overload, and hold nothing back."""
RETRY_SHARE: Final = 0.2
MIN_RETRIES: Final = 10
"""So many retries are free: the share of few runs is none."""


def chance(num_requests: float, num_accepts: float) -> float:
    """The probability with which a run is held back: 0 while the broker takes half of them, towards 1 if it takes none."""
    return max(0.0, (num_requests - NUM_PER_ACCEPT * num_accepts) / (num_requests + 1))


class Tally:
    """What became of the runs of one priority: totals, and what they were at the beginning of each bucket of the window.

    A run counts as accepted from when it leaves until it is refused.
    """

    __slots__ = (
        "_marks", "next_mark", "num_held_back", "num_refused", "num_retries", "num_sent", "reason", "shut_for", "shut_until",
    )  # fmt: skip

    def __init__(self) -> None:
        self.num_sent = self.num_refused = self.num_held_back = self.num_retries = 0
        """First attempts that left, refusals, runs that did not leave, further attempts."""
        self.next_mark = -math.inf
        self.shut_until = -math.inf
        """When the broker's last word on when to try again is over."""
        self.shut_for = 0.0
        """The longest time limit that was refused since it was shut: with more time a run may be taken."""
        self.reason = ""
        self._marks: deque[tuple[float, int, int, int, int]] = deque()

    def mark(self, now: float) -> None:
        """Begin a bucket, and forget those that began before the window."""
        marks = self._marks
        marks.append((now, self.num_sent, self.num_refused, self.num_held_back, self.num_retries))
        while marks[0][0] <= now - WINDOW_S:
            marks.popleft()
        self.next_mark = now + BUCKET_S

    def recent(self, now: float) -> tuple[int, int, int, int]:
        """First attempts, refusals, held back and further attempts in the window."""
        if now >= self.next_mark:
            self.mark(now)
        _, sent, refused, held_back, retries = self._marks[0]
        return self.num_sent - sent, self.num_refused - refused, self.num_held_back - held_back, self.num_retries - retries

    def may_retry(self, now: float) -> bool:
        """Whether the retry budget allows one more."""
        num_sent, _, _, num_retries = self.recent(now)
        return num_retries < max(MIN_RETRIES, RETRY_SHARE * num_sent)

    def requests(self, now: float) -> tuple[int, int, int]:
        """Runs that wanted to leave in the window, those that the broker took, and those that it refused."""
        num_sent, num_refused, num_held_back, num_retries = self.recent(now)
        return num_sent + num_retries + num_held_back, num_sent + num_retries - num_refused, num_refused


class Throttle:
    """Counts every run on its way out, and holds back what the broker would most likely refuse.

    Args:
        is_on: whether to hold back at all.
        random: a number in [0, 1).
    """

    def __init__(self, is_on: bool, random: Callable[[], float]) -> None:
        self._is_on = is_on
        self._random = random
        self._tallies = [Tally() for _ in range(NUM_PRIORITIES)]

    def tally(self, run: Run) -> Tally:
        """The counts that a run belongs to."""
        return self._tallies[run.options.priority]

    def leaving(self, run: Run, now: float) -> Error | None:
        """Count a run that is about to leave; an error if it is held back.

        One that was refused before has passed here, and is counted already; one that an earlier broker had may be under way.
        """
        timeout = run.options.timeout
        if timeout is None or run.rest is not None or run.is_again:
            return None
        tally = self._tallies[run.options.priority]
        if now < tally.shut_until and timeout <= tally.shut_for:
            error = self._hold_back(tally, run.options.priority, now)
            if error is not None:
                return error
        elif now >= tally.next_mark:
            tally.mark(now)
        tally.num_sent += 1
        return None

    def _hold_back(self, tally: Tally, priority: int, now: float) -> Error | None:
        num_requests, num_accepts, num_refused = tally.requests(now)
        if num_refused < MIN_REFUSED or self._random() >= chance(num_requests, num_accepts):
            return None
        tally.num_held_back += 1
        message = (
            f"not sent: the broker took {num_accepts} of this client's last {num_requests} submissions "
            f"of priority {priority} ({tally.reason})"
        )
        return Error(Code.OVERLOADED, message, 1000.0 * (tally.shut_until - now))

    def refused(self, run: Run, reason: str, after_s: float, now: float) -> None:
        """The broker had no room for a run that has a time limit, and none before `after_s`.

        Once that is over it is asked again whatever the counts say, at different times by different clients: else a client
        would not notice an overload's end.
        """
        tally = self.tally(run)
        if now >= tally.next_mark:
            tally.mark(now)
        tally.num_refused += 1
        tally.reason = reason
        if self._is_on:
            longest_s = tally.shut_for if now < tally.shut_until else 0.0
            tally.shut_for = max(longest_s, run.options.timeout or 0.0)
            tally.shut_until = max(tally.shut_until, now + after_s * (1.0 + 0.5 * self._random()))

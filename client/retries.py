"""What becomes of a run that the broker had no room for: it leaves again after a pause, or the refusal is its outcome.

The pause is what the broker named and a random part of half of that, twice as much with each refusal. Knows refusals,
time limits and the retry budget. Does not know where runs wait (`backlog.py`), what is held back before it is sent
(`throttle.py`), nor sockets. `now` (monotonic seconds) and randomness are arguments.
"""

import math
from collections.abc import Callable
from typing import Final

from penstock.broker.protocol import Error
from penstock.client.run import Rest, Run
from penstock.client.throttle import Throttle

MIN_AFTER_S: Final = 0.01
MAX_SPREAD_S: Final = 30.0
MAX_DOUBLINGS: Final = 12


class Retries:
    """See the module.

    Args:
        max_retries: of a run with a time limit; 0: nothing leaves again, with or without one.
        throttle: is told of refusals, and has the retry budget.
        random: a number in [0, 1).
    """

    def __init__(self, max_retries: int, throttle: Throttle, random: Callable[[], float]) -> None:
        self._max_retries = max_retries
        self._throttle = throttle
        self._random = random

    def refused(self, run: Run, error: Error, now: float) -> Rest | Error:
        """The pause after which the run leaves again, or the error that it ends with.

        A run without time limit waits as long as it takes. Another one ends at once if the pause would take more than half
        of the time that it has left (the broker refuses what its queue leaves no time for, and later it would have less),
        if it was refused too often, or if the retry budget is used up. A refusal that names no pause is final.
        """
        if error.retry_after_ms is None:
            return error if run.rest is None else _because(run.rest.error, "too little of its time limit is left")
        after_s, left_s = max(MIN_AFTER_S, error.retry_after_ms / 1000.0), run.deadline - now
        num_refused = 1 if run.rest is None else run.rest.num_refused + 1
        if left_s < math.inf:
            self._throttle.refused(run, error.message, after_s, now)
        if self._max_retries == 0:
            return error
        if left_s < math.inf:
            tally = self._throttle.tally(run)
            if after_s > 0.5 * left_s:
                return _because(error, f"{left_s:.1f} s of its time limit are left")
            if num_refused > self._max_retries:
                return _because(error, f"refused {num_refused} times")
            if not tally.may_retry(now):
                return _because(error, "too many retries already")
            tally.num_retries += 1
        spread_s = min(0.5 * after_s * 2.0 ** min(num_refused - 1, MAX_DOUBLINGS), MAX_SPREAD_S, 0.5 * left_s - after_s)
        return Rest(num_refused, now + after_s + spread_s * self._random(), error)


def _because(error: Error, why: str) -> Error:
    return Error(error.code, f"{error.message}; not tried again: {why}", error.retry_after_ms, error.detail)

"""How long to wait before a worker that has failed is started again, and when to give up.

Knows failures in a row; does not know clocks or processes.
"""

import random
from collections.abc import Callable
from typing import Final

FIRST_S: Final = 1.0
LAST_S: Final = 60.0
STABLE_S: Final = 60.0
"""Who ran for so long has not failed in a row."""
MAX_DEATHS: Final = 16
"""Deaths in kernels that cost no pause. One task that kills is found among 4,096 after 14: in halves of halves, then twice
alone."""


class Backoff:
    """Pauses double from 1 s to a minute, each shortened by up to a half at random, so that workers do not start in step.

    Args:
        max_failures: failures in a row after which to give up; deaths in kernels count only beyond `MAX_DEATHS`.
        draw: a number from 0 to 1.
    """

    def __init__(self, max_failures: int, draw: Callable[[], float] = random.random) -> None:
        self.num_failures = 0
        self._max_failures = max_failures
        self._num_deaths = 0
        self._draw = draw

    def failed(self, ran_s: float, was_in_kernel: bool, has_worked: bool) -> float | None:
        """The pause in seconds; None: give up.

        Args:
            was_in_kernel: it was ready and ended in a kernel: perhaps a task is to blame, which the broker will find the
                sooner the more promptly this goes on.
            has_worked: it has finished something before.
        """
        if ran_s >= STABLE_S or has_worked:
            self.num_failures = self._num_deaths = 0
        if was_in_kernel and self._num_deaths < MAX_DEATHS:
            self._num_deaths += 1
            return 0.0
        self.num_failures += 1
        if self.num_failures >= self._max_failures:
            return None
        return min(FIRST_S * 2.0 ** min(self.num_failures - 1, 10), LAST_S) * (1.0 - 0.5 * self._draw())

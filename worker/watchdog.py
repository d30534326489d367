"""When is a worker hung? Decides on what it says of itself.

Knows activities and clocks; does not know processes or signals: who asks acts.
"""

import time
from collections.abc import Callable

from penstock.worker.watch import ENDING, IDLE, LOADING, RUNNING, STARTING, TURNING, Activity

PAUSE_S = 1.0
"""Who looks so much later than planned has stood still, and so may have what it looks at."""


class Watchdog:
    """One worker's.

    Args:
        is_stopped: whether the worker is stopped by a signal or a debugger: then its time stands still.
        clock_ns: that of the activities.
    """

    def __init__(self, is_stopped: Callable[[], bool], clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._is_stopped = is_stopped
        self._clock_ns = clock_ns
        self._seen: Activity | None = None
        self._looked_at = self._resumed_at = clock_ns()

    def look(self, activity: Activity, planned_s: float) -> str | None:
        """What is wrong, in one line, or None.

        Args:
            planned_s: how long after the last look this one was meant to be.
        """
        now = self._clock_ns()
        if now - self._looked_at > (planned_s + PAUSE_S) * 1e9:
            self._resumed_at = now
        self._looked_at = now
        # Twice the same: not a write half done, and not one that was about to change.
        is_same, self._seen = activity == self._seen, activity
        if activity.state == IDLE or not is_same:
            return None
        if self._is_stopped():
            self._resumed_at = now
        took_ns = now - max(activity.began_ns, self._resumed_at)
        if took_ns <= activity.limit_ns:
            return None
        return f"{what(activity)} has taken {1e-9 * took_ns:.1f} s, its limit is {1e-9 * activity.limit_ns:.1f} s"


def what(activity: Activity) -> str:
    """An activity in words."""
    return {
        STARTING: "the start",
        IDLE: "waiting for work",
        TURNING: "a turn of the worker's loop outside any kernel",
        LOADING: f"loading kernel {activity.name!r}",
        RUNNING: f"a run of kernel {activity.name!r}",
        ENDING: "the worker's end",
    }.get(activity.state, "something unknown")

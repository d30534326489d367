"""Who is to be told of what happens to runs.

Knows events as a count, and callbacks; does not know what happened. It hands callbacks out: the driver calls them, without
a lock.
"""

import logging
from collections import deque
from collections.abc import Callable

from penstock.client.run import CLOSED, Run

log = logging.getLogger("penstock.client")


class News:
    """`num_events` grows with everything that somebody may wait for; `changed` are runs whose callbacks may be due."""

    def __init__(self) -> None:
        self.num_events = 0
        self.changed: deque[Run] = deque()
        self.num_watched = 0
        """Open runs whose end will be told to a callback."""

    def tell(self, run: Run) -> None:
        """Something happened to this run."""
        self.num_events += 1
        if run.watchers is not None:
            for watcher in run.watchers:
                watcher.append(run)

    def watch(self, run: Run, row: int, callback: Callable[[], object]) -> bool:
        """Have `callback` come out of `callbacks` once the row has its outcome; False if it already has."""
        if run.slots[row] is not None:
            return False
        if run.callbacks is None:
            run.callbacks = {}
            run.watchers = [*(run.watchers or ()), self.changed]
            self.num_watched += 1
        run.callbacks.setdefault(row, []).append(callback)
        return True

    def closed(self, run: Run) -> None:
        if run.callbacks is not None:
            self.num_watched -= 1

    def callbacks(self) -> list[Callable[[], object]]:
        """Those whose rows have got their outcome since the last time."""
        ready: list[Callable[[], object]] = []
        while self.changed:
            run = self.changed.popleft()
            if run.callbacks:
                rows = [row for row in run.callbacks if run.state == CLOSED or run.slots[row] is not None]
                for row in rows:
                    ready += run.callbacks.pop(row)
        return ready


def safely(callback: Callable[[], object]) -> None:
    """Run a callback of the user's; what it raises is logged."""
    try:
        callback()
    except Exception:
        log.exception("a callback of a task failed")

"""`as_completed`: tasks in the order in which they end.

Knows runs that tell of changes; does not know how lines wait.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator

from penstock.client.line import Line
from penstock.client.run import Run
from penstock.client.task import Task


def as_completed(tasks: Iterable[Task], timeout: float | None = None) -> Iterator[Task]:
    """The tasks in the order in which they end. All must be of one client.

    Raises:
        TimeoutError: not all have ended `timeout` seconds after the first `next`.
        ValueError: tasks of several clients.
    """
    by_run: dict[Run, list[Task]] = {}
    for task in tasks:
        by_run.setdefault(task._run, []).append(task)
    lines = {task._line for group in by_run.values() for task in group}
    if len(lines) > 1:
        raise ValueError("as_completed wants tasks of one client")
    if lines:
        yield from _as_completed(lines.pop(), by_run, timeout)


def _as_completed(line: Line, by_run: dict[Run, list[Task]], timeout: float | None) -> Iterator[Task]:
    until = None if timeout is None else time.monotonic() + timeout
    news: deque[Run] = deque()
    with line.lock:
        line.session.flush()
        for run in by_run:
            run.watchers = [*(run.watchers or ()), news]
        news.extend(by_run)
    try:
        while by_run:
            while news:
                run = news.popleft()
                ended, waiting = list[Task](), list[Task]()
                for task in by_run.pop(run, ()):
                    (waiting if run.slots[task._row] is None else ended).append(task)
                if waiting:
                    by_run[run] = waiting
                yield from ended
            left = None if until is None else until - time.monotonic()
            if by_run and not line.wait_for(lambda: bool(news), left):
                raise TimeoutError(f"{sum(map(len, by_run.values()))} tasks have not ended after {timeout} s")
    finally:
        with line.lock:
            for run in by_run:
                run.watchers = [w for w in run.watchers or () if w is not news] or None

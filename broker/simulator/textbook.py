"""What the production broker is compared with: sealed batches in order of arrival, and iteration-level slots.

`Sealed` is multi-bin batching as in its paper (arXiv 2412.04504). Slots need no scheduler of their own: so many servers
that take one task each, in order of arrival, are what continuous batching does (Orca, OSDI'22).
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise

from penstock.broker.simulator.clients import Task
from penstock.broker.simulator.engine import Batch

NOWHERE = -1


class Sealed:
    """Each bin collects arrivals; a batch is sealed when it is full, and sealed batches go out first in, first out.

    Args:
        boundaries_ms: between the bins, ascending; the predicted length of a task chooses its bin.
        seal_s: an incomplete batch is sealed so long after its first member, whether or not a server is idle;
            None: only for an idle server when nobody is left to fill it, the oldest first.
    """

    def __init__(
        self, batch_size: int, num_servers: int, boundaries_ms: Sequence[float] = (), seal_s: float | None = None
    ) -> None:
        self.num_queued = 0
        self.ended: list[tuple[Task, str, float]] = []
        self._batch_size = batch_size
        self._idle = list(range(num_servers))
        self._boundaries_ms = [*boundaries_ms]
        self._ends_ms = [*boundaries_ms, math.inf]
        self._labels = _labels(self._boundaries_ms)
        self._seal_s = seal_s
        self._open: list[list[Task]] = [[] for _ in self._ends_ms]
        self._sealed: deque[Batch] = deque()

    def submit(self, tasks: Sequence[Task], now: float) -> None:
        for task in tasks:
            index = bisect_right(self._boundaries_ms, task.predicted_ms)
            members = self._open[index]
            members.append(task)
            if len(members) == self._batch_size:
                self._seal(index)
        self.num_queued += len(tasks)

    def completed(self, batch: Batch, now: float) -> None:
        heappush(self._idle, batch.server)

    def turn(self, has_more: bool, now: float) -> Sequence[Batch]:
        """Deadlines mean nothing here: a task that ends too late is late."""
        while (due := self.wake_at(now)) is not None and due <= now:
            self._seal(self._oldest())
        taken = []
        while self._idle and self.num_queued:
            if not self._sealed:
                if has_more:
                    break
                self._seal(self._oldest())
            batch = self._sealed.popleft()
            batch.server = heappop(self._idle)
            self.num_queued -= len(batch.tasks)
            taken.append(batch)
        return taken

    def wake_at(self, now: float) -> float | None:
        if self._seal_s is None or not any(self._open):
            return None
        return min(members[0].arrived for members in self._open if members) + self._seal_s

    def _oldest(self) -> int:
        return min((members[0].arrived, index) for index, members in enumerate(self._open) if members)[1]

    def _seal(self, index: int) -> None:
        self._sealed.append(Batch(NOWHERE, self._open[index], self._labels[index], self._ends_ms[index]))
        self._open[index] = []


def _labels(boundaries_ms: Sequence[float]) -> list[str]:
    """Names of the bins between boundaries."""
    if not boundaries_ms:
        return ["all"]
    texts = [f"{ms / 1000:.4g} s" if ms >= 1000 else f"{ms:.4g} ms" for ms in boundaries_ms]
    return [f"<{texts[0]}", *(f"{low}-{high}" for low, high in pairwise(texts)), f">={texts[-1]}"]

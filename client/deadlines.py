"""Runs by the time at which they end by themselves.

Knows the order of times, in monotonic seconds; does not know what happens then.
"""

import heapq
import math
from collections.abc import Iterator
from typing import Any, Final

from penstock.client.run import Run

MIN_DEAD: Final = 64
"""Entries of ended runs stay in the heap until they are more than this, and more than half."""


class Deadlines:
    """A heap of [time, number, run]; the run of a dead entry is None. A run knows its entry."""

    def __init__(self) -> None:
        self._entries: list[list[Any]] = []
        self._num_dead = self._num_added = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def next(self) -> float:
        """Nothing is due before this."""
        return self._entries[0][0] if self._entries else math.inf

    def add(self, run: Run, at: float) -> None:
        self._num_added += 1
        run.entry = [at, self._num_added, run]
        heapq.heappush(self._entries, run.entry)

    def remove(self, run: Run) -> None:
        """It has ended."""
        if run.entry is None:
            return
        run.entry[2] = None
        run.entry = None
        self._num_dead += 1
        if self._num_dead > MIN_DEAD and self._num_dead * 2 > len(self._entries):
            self._entries = [entry for entry in self._entries if entry[2] is not None]
            heapq.heapify(self._entries)
            self._num_dead = 0

    def take_due(self, now: float) -> Iterator[Run]:
        """Those whose time has come, without their entries."""
        while self._entries and self._entries[0][0] <= now:
            run: Run | None = heapq.heappop(self._entries)[2]
            if run is None:
                self._num_dead -= 1
            else:
                run.entry = None
                yield run

    def check(self) -> None:
        assert self._num_dead == sum(entry[2] is None for entry in self._entries)
        assert all(entry[2] is None or entry[2].entry is entry for entry in self._entries)

"""How much of the copying happened while something was computed, from the times at which jobs did what.

Knows spans of time in one clock; does not know streams. Jobs are told in order; each is [copy in, compute, copy out].
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

Span = tuple[float, float]
"""Begin and end, ms."""


@dataclass(frozen=True, slots=True)
class Spans:
    """When one job was copied in, computed and copied out."""

    h2d: Span
    compute: Span
    d2h: Span

    def moved(self, ms: float) -> "Spans":
        """The same on a clock that shows `ms` more."""
        h2d, compute, d2h = ((begin + ms, end + ms) for begin, end in (self.h2d, self.compute, self.d2h))
        return Spans(h2d, compute, d2h)


class Overlap:
    """Sums over all time up to which everything is known.

    Args:
        num_slots: jobs in flight at most: job n + num_slots begins after job n has ended.

    Attributes:
        copy_ms: time in which something was copied, one way or both; compute_ms: in which something was computed;
        both_ms: in which both happened.
    """

    def __init__(self, num_slots: int) -> None:
        self.copy_ms = self.compute_ms = self.both_ms = 0.0
        self._num_slots = num_slots
        self._jobs: deque[Spans] = deque()
        self._known_until = float("-inf")

    @property
    def ratio(self) -> float | None:
        """The share of the shorter of copying and computing that the other hid; None before both have happened."""
        shorter = min(self.copy_ms, self.compute_ms)
        return self.both_ms / shorter if shorter > 0 else None

    def add(self, job: Spans) -> None:
        """The next job has ended."""
        self._jobs.append(job)
        if len(self._jobs) >= self._num_slots:
            # Whatever has not ended yet began after this one.
            self._sum_until(self._jobs[-self._num_slots].d2h[1])

    def rest(self) -> None:
        """Nothing is in flight: all is known, and the clock of the next job may be another one."""
        self._sum_until(float("inf"))
        self._jobs.clear()
        self._known_until = float("-inf")

    def _sum_until(self, until: float) -> None:
        since = self._known_until
        if until <= since:
            return
        copies = _union(_clipped((span for job in self._jobs for span in (job.h2d, job.d2h)), since, until))
        computes = _union(_clipped((job.compute for job in self._jobs), since, until))
        self.copy_ms += sum(end - begin for begin, end in copies)
        self.compute_ms += sum(end - begin for begin, end in computes)
        self.both_ms += sum(max(min(a[1], b[1]) - max(a[0], b[0]), 0.0) for a in copies for b in computes)
        self._known_until = until
        while self._jobs and self._jobs[0].d2h[1] <= until and self._jobs[0].compute[1] <= until:
            self._jobs.popleft()


def _clipped(spans: Iterable[Span], since: float, until: float) -> list[Span]:
    cut = ((max(begin, since), min(end, until)) for begin, end in spans)
    return [(begin, end) for begin, end in cut if begin < end]


def _union(spans: list[Span]) -> list[Span]:
    """The same time as spans that do not touch, in order."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined

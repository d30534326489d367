"""How many rows a batch may have now, per (worker, kernel, class of time): more while it goes well, half when memory is short.

Additive increase after full batches, halved on out of memory, lowered while the device's memory is nearly full, and not
past the *knee*: the smallest batch that has 95 % of the throughput which no batch size can exceed.

Knows what was reported of batches. Does not know clocks, queues or devices: `now` is an argument.
"""

from bisect import bisect_right
from collections.abc import Sequence
from math import ceil
from typing import Any

from penstock.broker.scheduling.bins import CLASSIC_MS, CLASSIC_NAMES

MAX_ROWS = 4096
KNEE = 0.95
TRIP_MS = 0.25
"""What a batch costs beside its time on the device. Below it a small fixed part means nothing."""
MIN_BATCHES = 20
"""Batches before the fitted times are believed: at first they are the kernel's own declaration. Until then a limit at most
doubles, so as not to go far past a knee that is not known yet."""
HIGH_MEMORY = 0.95
MEMORY_PAUSE_S = 10.0
PATIENCE = 100
MAX_PATIENCE = 1600
"""Clean full batches before a size that failed is tried again, and the most that this grows to when it fails again."""
MAX_SIZES = 4096
MAX_EMERGENCIES = 1024


class _Size:
    """The limit of one (worker, kernel, class)."""

    __slots__ = ("before", "failed_at", "is_slow", "knee", "limit", "num_batches", "num_clean", "num_failures", "patience")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.knee: int | None = None
        self.failed_at: int | None = None
        self.num_batches = 0
        self.num_clean = 0
        self.num_failures = 0
        self.patience = 0
        self.before: tuple[int, int | None, int] | None = None
        self.is_slow = False

    @property
    def ceiling(self) -> int:
        """Where growth stops: an eighth, one step of growth, below the size that failed."""
        failed_at = self.failed_at
        return MAX_ROWS if failed_at is None else max(1, failed_at - max(1, failed_at // 8))

    def fail(self, num_rows: int, limit: int) -> None:
        """This many rows were too many; go on with at most `limit`."""
        is_retry = self.failed_at is None and self.patience > 0
        self.patience = min(2 * self.patience, MAX_PATIENCE) if is_retry else self.patience or PATIENCE
        self.failed_at = num_rows if self.failed_at is None else min(self.failed_at, num_rows)
        self.limit = max(1, min(self.limit, limit))
        self.num_clean = 0
        self.before = None

    def lower(self, limit: int, floor: int) -> bool:
        """Take a lower limit for the present one, but not below the floor; whether it has changed."""
        limit = max(limit, floor, 1)
        if limit >= self.limit:
            return False
        self.fail(self.limit, limit)
        return True

    def reduce(self) -> bool:
        """Halve the limit as a remedy, and keep in mind what it was before the first of them; whether it has changed."""
        before = self.before or (self.limit, self.failed_at, self.patience)
        has_changed = self.lower(self.limit // 2, 1)
        self.before = before
        return has_changed

    def restore(self) -> None:
        """Undo `reduce`, unless memory has run short since, or the limit was free to grow again."""
        if self.before is not None:
            limit, self.failed_at, self.patience = self.before
            self.limit, self.before = max(self.limit, limit), None

    def grow(self, most: int) -> None:
        """After a full batch that went well: an eighth more, up to `most`."""
        self.num_clean += 1
        if self.failed_at is not None and self.num_clean >= self.patience:
            self.failed_at, self.before, self.num_clean = None, None, 0
        self.limit = max(self.limit, min(self.limit + max(1, self.limit // 8), self.ceiling, most))


class BatchSizes:
    """Limits in rows. A class that has reported nothing yet has its first limit."""

    def __init__(self, first: Sequence[int] = (64, 32, 16)) -> None:
        """Takes the first limits for fast (below 100 ms), medium and slow (500 ms and more) rows.

        Raises:
            ValueError: not three limits from 1 to `MAX_ROWS`.
        """
        if len(first) != len(CLASSIC_NAMES) or not all(1 <= limit <= MAX_ROWS for limit in first):
            raise ValueError(f"three first limits from 1 to {MAX_ROWS} are wanted, not {list(first)}")
        self._first = tuple(first)
        self._sizes: dict[tuple[str, str], list[_Size]] = {}
        self._lowered_at: dict[str, float] = {}
        self._emergencies: dict[str, float] = {}
        self._slow: set[str] = set()

    def limit(self, worker: str, kernel: str, ms: float, most: int, now: float) -> int:
        """Rows that a batch may have: 1 to `most`.

        Args:
            ms: predicted time of a row alone.
            most: the kernel's own limit, 1 or more.
            now: seconds, for the end of an emergency.
        """
        if self._emergencies and self.is_emergency(kernel, now):
            return 1
        sizes = self._sizes.get((worker, kernel))
        place = bisect_right(CLASSIC_MS, ms)
        if sizes is None and worker in self._slow:
            sizes = self._sizes_of(worker, kernel)
        limit = self._first[place] if sizes is None else sizes[place].limit
        return limit if limit < most else most

    def completed(
        self, worker: str, kernel: str, ms: float, num_rows: int, was_full: bool, fixed_ms: float, row_ms: float
    ) -> None:
        """A batch went well. Full ones, with as many rows as the limit allowed, raise it by an eighth.

        Args:
            ms: predicted time of a row alone, as `limit` was asked with.
            was_full: nothing but its budget kept the batch from having more rows.
            fixed_ms, row_ms: the time of a batch of b rows is about fixed_ms + row_ms * b.
        """
        place = bisect_right(CLASSIC_MS, ms)
        first, size = self._first[place], self._sizes_of(worker, kernel)[place]
        size.num_batches += 1
        if size.is_slow:
            size.limit = min(2 * size.limit, first, size.ceiling)
            size.is_slow = size.limit < min(first, size.ceiling)
            return
        most = min(2 * first, MAX_ROWS)
        if size.num_batches >= MIN_BATCHES:
            size.knee = knee(fixed_ms, row_ms, max(1, first // 8))
            most = size.knee or MAX_ROWS
            if size.limit > most:
                # Fitted times waver: a step at a time, as the way up.
                size.limit = max(most, size.limit - max(1, size.limit // 8))
                return
        has_failed_before = size.failed_at is not None and num_rows >= size.failed_at  # and was saved by being split
        if was_full and num_rows >= size.limit and not has_failed_before:
            size.grow(most)

    def out_of_memory(self, worker: str, kernel: str, num_rows: int, ms: float | None = None) -> str:
        """Half of what failed is the limit now, and growth stops below it; without `ms`, in every class.

        Returns:
            What happened, for an event.
        """
        sizes = self._sizes_of(worker, kernel)
        touched = sizes if ms is None else [sizes[bisect_right(CLASSIC_MS, ms)]]
        for size in touched:
            size.num_failures += 1
            size.fail(num_rows, num_rows // 2)
        return f"out of memory with {num_rows} rows of {kernel!r} on {worker}: at most {max(s.limit for s in touched)} now"

    def memory_high(self, worker: str, fraction: float, now: float, high: float = HIGH_MEMORY) -> str | None:
        """Lower every limit of a worker by a quarter when more than `high` of its memory is used, once in 10 s.

        Not below a quarter of the first limit: what fills the memory with so few rows is something else.

        Returns:
            What happened, for an event; None if nothing did.
        """
        if not fraction > high or now - self._lowered_at.get(worker, float("-inf")) < MEMORY_PAUSE_S:
            return None
        lowered = 0
        for (owner, _), sizes in self._sizes.items():
            if owner == worker:
                for size, first in zip(sizes, self._first, strict=True):
                    lowered += size.lower(size.limit - max(1, size.limit // 4), first // 4)
        if not lowered:
            return None
        self._lowered_at[worker] = now
        return f"{100 * fraction:.0f} % of the memory of {worker} is used: {lowered} batch limits lowered by a quarter"

    def reduce(self, worker: str, kernel: str) -> str:
        """Halve the limits of a kernel on a worker, as a remedy; they grow back as after out of memory, or by `restore`."""
        sizes = self._sizes_of(worker, kernel)
        lowered = sum(size.reduce() for size in sizes)
        limits = ", ".join(f"{name} {size.limit}" for name, size in zip(CLASSIC_NAMES, sizes, strict=True))
        return f"{lowered} batch limits of {kernel!r} on {worker} halved: {limits}"

    def restore(self, kernel: str) -> None:
        """Take `reduce` back for a kernel on all workers: it has not helped."""
        for (_, name), sizes in self._sizes.items():
            if name == kernel:
                for size in sizes:
                    size.restore()

    def emergency(self, kernel: str, until: float) -> None:
        """Batches of one row until then (seconds): batching itself fails."""
        until = max(until, self._emergencies.pop(kernel, until))
        while len(self._emergencies) >= MAX_EMERGENCIES:
            del self._emergencies[next(iter(self._emergencies))]
        self._emergencies[kernel] = until

    def is_emergency(self, kernel: str, now: float) -> bool:
        """Whether a kernel is in emergency; one that has ended is forgotten."""
        until = self._emergencies.get(kernel)
        if until is not None and until <= now:
            del self._emergencies[kernel]
            until = None
        return until is not None

    def begin_slowly(self, worker: str) -> None:
        """A worker is back after a fault: batches of one row, then twice as many after each, up to the first limits."""
        self.forget_worker(worker)
        self._slow.add(worker)

    def forget_worker(self, worker: str) -> None:
        """Drop all that was learned of a worker."""
        self._slow.discard(worker)
        self._sizes = {key: sizes for key, sizes in self._sizes.items() if key[0] != worker}
        self._lowered_at.pop(worker, None)

    def report(self) -> list[dict[str, Any]]:
        """A row per (worker, kernel, class) that has run: its limit, and what holds it down."""
        return [
            {
                "worker": worker, "kernel": kernel, "class": name, "limit": size.limit, "knee": size.knee,
                "failed_at": size.failed_at, "out_of_memory": size.num_failures, "batches": size.num_batches,
            }
            for (worker, kernel), sizes in sorted(self._sizes.items(), key=lambda item: item[0])
            for name, size in zip(CLASSIC_NAMES, sizes, strict=True)
            if size.num_batches or size.num_failures
        ]  # fmt: skip

    def _sizes_of(self, worker: str, kernel: str) -> list[_Size]:
        """The three sizes of a worker and kernel; the table's oldest make room."""
        sizes = self._sizes.get((worker, kernel))
        if sizes is None:
            while len(self._sizes) >= MAX_SIZES:
                del self._sizes[next(iter(self._sizes))]
            sizes = self._sizes[worker, kernel] = [_Size(limit) for limit in self._first]
            if worker in self._slow:
                for size in sizes:
                    size.is_slow, size.limit = size.limit > 1, 1
        return sizes


def knee(fixed_ms: float, row_ms: float, least: int) -> int | None:
    """The smallest batch of b rows with b / (fixed + row * b) at 95 % of its limit 1 / row; None if time does not grow with b.

    The way to the worker and back counts as fixed time too, and it is never below `least`: a batch or two more or less of
    some rows is within the fit's noise, and a fit needs batches of more than one size.
    """
    if not row_ms > 0:
        return None
    rows = KNEE / (1 - KNEE) * (max(fixed_ms, 0.0) + TRIP_MS) / row_ms
    return max(least, ceil(rows)) if rows < MAX_ROWS else None

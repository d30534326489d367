"""Many tasks of one `map`: rows gather in runs, and a bounded number of them is under way.

Knows what goes into which run, and which run is to be waited for next; does not know lines, and never waits.
"""

import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from penstock.client.run import Options, Row, Run, Shape, deadline_of


class Bundler:
    """Puts converted rows into runs, in order: a new run where the shape changes, or one is full or `max_age_s` old.

    `draw()` gives submission ids.
    """

    __slots__ = (
        "_draw", "_limit", "_max_age_s", "_max_bytes", "_max_rows", "_nbytes", "_options", "_rows", "_shape", "_started",
    )  # fmt: skip

    def __init__(
        self, options: Options, max_rows: int, max_bytes: int, draw: Callable[[], bytes], max_age_s: float = math.inf
    ) -> None:
        self._options = options
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._draw = draw
        self._max_age_s = max_age_s
        self._rows: list[Row] = []
        self._shape: Shape | None = None
        self._limit = self._nbytes = 0
        self._started = math.inf

    def add(self, row: Row, now: float) -> Run | None:
        """Take a row; a run that is complete comes back: the one before, or the row's own if it is full now."""
        rows, done = self._rows, None
        if rows and (row.shape is not self._shape or len(rows) >= self._limit or self._nbytes + row.nbytes > self._max_bytes):
            done = self.flush()
            rows = self._rows
        rows.append(row)
        self._nbytes += row.nbytes
        num_rows = len(rows)
        if num_rows == 1:
            self._shape, self._started = row.shape, now
            self._limit = min(self._max_rows, row.shape.max_rows)
        is_over = num_rows >= self._limit or now - self._started > self._max_age_s
        return self.flush() if is_over and done is None else done

    def flush(self) -> Run | None:
        """The run that was begun, if there is one."""
        rows, shape = self._rows, self._shape
        if not rows or shape is None:
            return None
        run = Run(self._draw(), shape, self._options, deadline_of(self._options, self._started))
        run.fill(rows, self._nbytes)
        self._rows, self._nbytes, self._started = [], 0, math.inf
        return run

    def runs(self, rows: Iterator[Row]) -> Iterator[Run]:
        """All of them."""
        add, clock = self.add, time.monotonic
        for row in rows:
            run = add(row, clock())
            if run is not None:
                yield run
        run = self.flush()
        if run is not None:
            yield run

    async def runs_of(self, rows: AsyncIterator[Row]) -> AsyncIterator[Run]:
        """As `runs`, for rows that come by themselves."""
        async for row in rows:
            run = self.add(row, time.monotonic())
            if run is not None:
                yield run
        run = self.flush()
        if run is not None:
            yield run


class Window:
    """The runs that are under way: new ones are wanted while they hold fewer than `max_rows` rows and none has ended."""

    def __init__(self, max_rows: int, is_ordered: bool) -> None:
        self._runs: deque[Run] = deque()
        self._max_rows = max_rows
        self._is_ordered = is_ordered
        self._num_rows = 0

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    @property
    def wants_more(self) -> bool:
        return self._num_rows < self._max_rows and not (self._runs and not self._runs[0].num_open)

    def add(self, run: Run) -> None:
        self._runs.append(run)
        self._num_rows += run.num_rows

    def has_ended(self) -> bool:
        """Whether `pop` may be called: the first run has ended, or any if their order does not matter."""
        if self._is_ordered:
            return not self._runs[0].num_open
        return any(not run.num_open for run in self._runs)

    def pop(self) -> Run:
        """The run whose values come next."""
        run = next(run for run in self._runs if not run.num_open)
        self._runs.remove(run)
        self._num_rows -= run.num_rows
        return run

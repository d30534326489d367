"""What waits in the client: tasks for company, and whole runs for the broker.

Knows coalescing, order and limits; does not know credit, connections or outcomes. A run here is *pending* while it may
still take rows, and *waiting* once it is sealed; of these some *rest*, since the broker had no room for them. The soonest
priority leaves first, then who came first: a run that comes back from the broker has its old place again.
"""

import heapq
import math
from typing import Any, Final

from penstock.client.config import ClientConfig
from penstock.client.run import PENDING, WAITING, Options, Row, Run, Shape

MAX_TOLERANCE_S: Final = 0.005
"""Tasks whose deadlines differ by this much (and by 1 % of their time limit) may share a run."""
MAX_INTERNED: Final = 1024


class Backlog:
    """See the module. `num_rows` and `nbytes` are what waits; `flush_at` is when the pending runs have waited enough."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self.num_rows = self.nbytes = 0
        self.max_rows, self.max_bytes = config.max_rows_per_run, config.max_run_bytes
        """Of one run: as configured, but no more than the broker grants at once."""
        self.pending: dict[Any, Run] = {}
        self.flush_at = math.inf
        self.waiting: list[tuple[int, int, Run]] = []
        self.resting: list[tuple[float, int, Run]] = []
        self.wake_at = math.inf
        """When the first of those that rest may leave again."""
        self._num_put = 0
        self._options: dict[Options, Options] = {}

    def limit(self, window_rows: int, window_bytes: int) -> None:
        self.max_rows = min(self._config.max_rows_per_run, window_rows)
        self.max_bytes = min(self._config.max_run_bytes, window_bytes)

    def has_room(self, num_rows: int, nbytes: int) -> bool:
        """Whether so much more may wait here; a single submission always may if nothing else waits."""
        return self.num_rows == 0 or (
            self.num_rows + num_rows <= self._config.max_waiting and self.nbytes + nbytes <= self._config.max_waiting_bytes
        )

    def intern(self, options: Options) -> Options:
        """One object for equal options: only tasks with the same one share runs."""
        if len(self._options) >= MAX_INTERNED:
            self._options.clear()
        return self._options.setdefault(options, options)

    def is_full(self, num_rows: int, shape: Shape) -> bool:
        return num_rows >= self.max_rows or num_rows >= shape.max_rows

    def join(self, row: Row, options: Options, deadline: float, now: float) -> tuple[Run, int] | None:
        """Let a task ride with a pending run: that run and the row in it, or None if there is none that fits."""
        run = self.pending.get((row.shape, id(options)))
        if run is None:
            return None
        is_near = deadline == run.deadline or abs(deadline - run.deadline) <= min(MAX_TOLERANCE_S, 0.01 * (deadline - now))
        if not is_near or run.nbytes + row.nbytes > self.max_bytes:
            self.put(run)
            return None
        index = run.add(row)
        self.num_rows += 1
        self.nbytes += row.nbytes
        if self.is_full(run.num_rows, run.shape):
            self.put(run)
        return run, index

    def hold(self, run: Run, now: float) -> None:
        """Keep a counted run for `flush_s`, so that others may join it."""
        run.key = (run.shape, id(run.options))
        self.pending[run.key] = run
        self.flush_at = min(self.flush_at, now + self._config.flush_s)

    def count(self, run: Run) -> None:
        """One more run is here."""
        self.num_rows += run.num_rows
        self.nbytes += run.nbytes

    def put(self, run: Run) -> None:
        """A counted run is whole: it may leave when its turn comes."""
        if run.key is not None:
            del self.pending[run.key]
            run.key = None
        if run.state == PENDING:
            run.seal()
            self._num_put += 1
            run.place = self._num_put
        run.state = WAITING
        heapq.heappush(self.waiting, (run.options.priority, run.place, run))

    def rest(self, run: Run, until: float) -> None:
        """A counted run that has left before may not leave again until then."""
        run.state = WAITING
        heapq.heappush(self.resting, (until, run.place, run))
        self.wake_at = self.resting[0][0]

    def wake(self, now: float) -> None:
        """Those that have rested enough may leave."""
        while self.resting and self.resting[0][0] <= now:
            run = heapq.heappop(self.resting)[2]
            if run.state == WAITING:
                self.put(run)
        self.wake_at = self.resting[0][0] if self.resting else math.inf

    def flush(self) -> None:
        """Nothing waits for company any more."""
        if self.pending:
            for run in list(self.pending.values()):
                self.put(run)
        self.flush_at = math.inf

    def first(self) -> Run | None:
        """The next to leave."""
        while self.waiting:
            run = self.waiting[0][2]
            if run.state == WAITING:
                return run
            heapq.heappop(self.waiting)
        return None

    def pop(self) -> None:
        """The first one leaves."""
        run = heapq.heappop(self.waiting)[2]
        self.num_rows -= run.num_rows
        self.nbytes -= run.nbytes

    def remove(self, run: Run) -> None:
        """One has ended here; a waiting one's entry goes when it comes up."""
        self.num_rows -= run.num_rows
        self.nbytes -= run.nbytes
        if run.key is not None:
            del self.pending[run.key]
            run.key = None

    def clear(self) -> None:
        """Everything here has ended."""
        self.waiting.clear()
        self.resting.clear()
        self.flush_at = self.wake_at = math.inf

    def runs(self) -> list[Run]:
        return [*self.pending.values(), *(run for _, _, run in (*self.waiting, *self.resting) if run.state == WAITING)]

    def num_ahead(self, run: Run) -> int:
        """Rows that leave before those of a waiting run."""
        mine = (run.options.priority, run.place)
        return sum(other.num_rows for *place, other in self.waiting if other.state == WAITING and tuple(place) < mine)

    def check(self) -> None:
        runs = self.runs()
        assert all(run.state == PENDING and run.num_open > 0 for run in self.pending.values())
        assert all(run.num_open == run.slots.count(None) and len(run.slots) == run.num_rows for run in runs)
        assert all(run.block is None or run.block.nbytes == run.nbytes for run in runs)
        assert len(set(runs)) == len(runs)
        assert self.num_rows == sum(run.num_rows for run in runs)
        assert self.nbytes == sum(run.nbytes for run in runs)
        assert not self.pending or self.flush_at < math.inf
        assert self.wake_at == min((until for until, _, _ in self.resting), default=math.inf)

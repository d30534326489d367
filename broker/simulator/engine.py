"""The virtual world: arrivals, servers and the time. Events happen in order, and the clock jumps from one to the next.

Knows when things happen. What goes into which batch is the scheduler's decision alone: a `Scheduler` is the production
broker, or one of the textbook's to compare with.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Final, Protocol

from penstock.broker.simulator.clients import Load, Source, Task

DONE, LATE, DEADLINE, REFUSED = "done", "late", "deadline", "refused"
MAX_IDLE_TURNS: Final = 10_000
MIN_RETRY_S: Final = 0.001
TELL_EVERY: Final = 2000


@dataclass(slots=True, eq=False)
class Batch:
    """Tasks that run together on a server. `bin` names their bin; `spoils_ms`: a task that long is none of it.

    `handle` is whatever the scheduler wants back when the batch has ended.
    """

    server: int
    tasks: list[Task]
    bin: str
    spoils_ms: float = math.inf
    handle: Any = None
    formed: float = -1.0
    started: float = -1.0
    finished: float = -1.0


@dataclass(slots=True, eq=False)
class Server:
    """Runs batches one after another, `slowness` times as long as the lengths of the tasks say. `held`: here, not ended."""

    slowness: float = 1.0
    held: list[Batch] = field(default_factory=list)


class Scheduler(Protocol):
    """What decides. Times are seconds of the virtual clock."""

    ended: list[tuple[Task, str, float]]
    """Tasks that end otherwise than by having run: task, outcome, after how many seconds to try again. The world takes them."""

    @property
    def num_queued(self) -> int:
        """Tasks that wait for a batch."""

    def submit(self, tasks: Sequence[Task], now: float) -> None:
        """Tasks of one client arrive together."""

    def completed(self, batch: Batch, now: float) -> None:
        """A batch has run; the outcomes of its tasks are set."""

    def turn(self, has_more: bool, now: float) -> Sequence[Batch]:
        """Everything of this moment has happened: the batches that go to servers now.

        Args:
            has_more: tasks will arrive whatever becomes of those that are here.
        """

    def wake_at(self, now: float) -> float | None:
        """When `turn` is due if nothing happens before."""


class World:
    """See the module. `progress` is told the number of tasks that have ended, now and then."""

    def __init__(
        self, scheduler: Scheduler, load: Load, servers: Sequence[Server], progress: Callable[[int], object] = lambda num: None
    ) -> None:
        self.tasks: list[Task] = []
        self.batches: list[Batch] = []
        self.num_ended = 0
        self._scheduler = scheduler
        self._load = load
        self._servers = servers
        self._progress = progress
        self._events: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._num_events = 0
        self._num_arrivals = 0
        self._now = 0.0

    def run(self) -> None:
        """Until nothing is left to happen.

        Raises:
            RuntimeError: the scheduler keeps tasks for ever.
        """
        for source in self._load.sources:
            self._arrive_at(source.start_s + (0.0 if source.client.rate is None else source.gap_s()), source)
        num_idle = 0
        while (now := self._next_at()) is not None:
            before = self._num_events, self.num_ended
            while self._events and self._events[0][0] <= now:
                at, _, happen, to_whom = heappop(self._events)
                happen(to_whom, at)
            self._turn(now)
            num_idle = num_idle + 1 if before == (self._num_events, self.num_ended) else 0
            if num_idle > MAX_IDLE_TURNS:
                raise RuntimeError(f"{self._scheduler.num_queued} tasks wait for ever, with turns up to {now} s")
        if self._scheduler.num_queued:
            raise RuntimeError(f"{self._scheduler.num_queued} tasks wait for ever")

    def _next_at(self) -> float | None:
        """None when nothing is to happen any more: the scheduler's turns alone are no reason to go on."""
        first = self._events[0][0] if self._events else math.inf
        woken_at = self._scheduler.wake_at(self._now) if self._scheduler.num_queued or self._events else None
        if woken_at is not None and woken_at < first:
            first = max(woken_at, self._now)
        self._now = first
        return first if first < math.inf else None

    def _at(self, at: float, happen: Callable[[Any, float], None], to_whom: Any) -> None:
        self._num_events += 1
        heappush(self._events, (at, self._num_events, happen, to_whom))

    # --- arrivals --------------------------------------------------------------------------------------------------

    def _arrive_at(self, at: float, source: Source) -> None:
        self._num_arrivals += 1
        self._at(at, self._arrive, source)

    def _arrive(self, source: Source, now: float) -> None:
        """What a client sends at once: one submission at its rate, or all that it may have open."""
        client = source.client
        self._num_arrivals -= 1
        if client.rate is not None:
            if self._submit(source, client.rows, now) and self._load.has_more(source):
                self._arrive_at(now + source.gap_s(), source)
            return
        num_left = client.closed or source.left or 0
        while num_left > 0 and (num := self._submit(source, min(client.rows, num_left), now)):
            num_left -= num

    def _refill(self, source: Source, now: float) -> None:
        """A closed loop sends one task for each that has ended."""
        self._submit(source, 1, now)

    def _submit(self, source: Source, num_wanted: int, now: float) -> int:
        """Send one submission; how many tasks it has."""
        num = self._load.take(source, num_wanted)
        if num:
            tasks = [source.make(now) for _ in range(num)]
            self.tasks += tasks
            self._scheduler.submit(tasks, now)
        return num

    # --- servers ---------------------------------------------------------------------------------------------------

    def _turn(self, now: float) -> None:
        for batch in self._scheduler.turn(self._num_arrivals > 0, now):
            batch.formed = now
            number = len(self.batches)
            for task in batch.tasks:
                task.batch = number
            self.batches.append(batch)
            server = self._servers[batch.server]
            server.held.append(batch)
            if len(server.held) == 1:
                self._start(server, now)
        if self._scheduler.ended:
            ended, self._scheduler.ended = self._scheduler.ended, []
            for task, outcome, retry_s in ended:
                self._end(task, outcome, now, retry_s)

    def _start(self, server: Server, now: float) -> None:
        batch = server.held[0]
        batch.started = now
        longest_ms = 0.0
        for task in batch.tasks:
            task.started = now
            if task.service_ms > longest_ms:
                longest_ms = task.service_ms
        self._at(now + longest_ms * server.slowness / 1000.0, self._complete, server)

    def _complete(self, server: Server, now: float) -> None:
        batch = server.held.pop(0)
        batch.finished = now
        for task in batch.tasks:
            if not task.outcome:
                self._end(task, DONE if now <= task.deadline else LATE, now)
        self._scheduler.completed(batch, now)
        if server.held:
            self._start(server, now)

    def _end(self, task: Task, outcome: str, now: float, retry_s: float = 0.0) -> None:
        task.outcome = outcome
        task.finished = now
        task.retry_s = retry_s
        self._load.ended(task)
        source = self._load.sources[task.client]
        if source.client.closed is not None:
            least_s = 0.0 if now > task.arrived else MIN_RETRY_S  # else a task of no length would stop the clock
            self._at(now + max(retry_s, least_s), self._refill, source)
        self.num_ended += 1
        if self.num_ended % TELL_EVERY == 0:
            self._progress(self.num_ended)

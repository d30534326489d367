"""Handles of tasks: what `submit` returns, and the iterator over a stream.

A handle is a run and a row number. Knows how outcomes become values and errors; waiting is the line's business.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from penstock.broker import protocol
from penstock.broker.protocol import Code
from penstock.client.errors import PenstockError, from_wire
from penstock.client.line import Line
from penstock.client.outputs import decode
from penstock.client.run import CLOSED, SENT, Part, Run

_ENDS: Final = {Code.CANCELLED: "cancelled"}


class BaseTask:
    """What a task knows without waiting."""

    __slots__ = ("__weakref__", "_row", "_run")

    def __init__(self, run: Run, row: int) -> None:
        self._run = run
        self._row = row

    @property
    def id(self) -> str:
        """The submission's id and the row in it: `<32 hex digits>/<row>`."""
        return f"{self._run.id.hex()}/{self._row}"

    @property
    def timings(self) -> dict[str, Any]:
        """Of an ended task: `queue_ms, batch_wait_ms, load_ms, h2d_ms, compute_ms, d2h_ms, batch_size, bin, worker`,
        as far as the broker told; empty before."""
        part = self._run.slots[self._row]
        if part is None:
            return {}
        timings = {} if part.queue_ms is None else {"queue_ms": part.queue_ms}
        return {**timings, **(part.timings or {})}

    @property
    def state(self) -> str:
        """`waiting` (still in the client), `open` (the broker has it), `done`, `failed` or `cancelled`."""
        part = self._run.slots[self._row]
        if part is None:
            return "open" if self._run.state == SENT else "waiting"
        return "done" if part.error is None else _ENDS.get(part.error.code, "failed")

    def _value(self, part: Part) -> Any:
        if part.error is not None:
            raise from_wire(part.error)
        return decode(part, self._row, self._run.shape.is_torch)

    def _error(self, part: Part) -> PenstockError | None:
        return None if part.error is None else from_wire(part.error)

    def _was_accepted(self) -> bool:
        return self._run.accepted or self._run.slots[self._row] is not None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._run.shape.kernel} {self.id} {self.state}>"


class Task(BaseTask):
    """One task that was submitted."""

    __slots__ = ("_line",)

    def __init__(self, line: Line, run: Run, row: int) -> None:
        self._line = line
        self._run = run
        self._row = row

    def done(self) -> bool:
        """Whether it has ended; takes in what has arrived, never waits."""
        if self._run.slots[self._row] is None and not self._line.is_forked:
            self._line.glance()
        return self._run.slots[self._row] is not None

    def result(self, timeout: float | None = None) -> Any:
        """Its value: the array if the only output is called "out", else a dict.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; it goes on.
            PenstockError: how it failed.
        """
        return self._value(self._outcome(timeout))

    def exception(self, timeout: float | None = None) -> PenstockError | None:
        """How it failed, or None. Raises TimeoutError as `result` does."""
        return self._error(self._outcome(timeout))

    def _outcome(self, timeout: float | None) -> Part:
        part = self._run.slots[self._row]
        if part is None:
            self._wait(timeout)
            part = self._run.slots[self._row]
            if part is None:
                raise TimeoutError(f"{self!r} has not ended after {timeout} s; it goes on")
        return part

    def _wait(self, timeout: float | None) -> None:
        line, slots, row = self._line, self._run.slots, self._row
        if line.is_forked:
            line.check_usable()
        with line.lock:
            line.session.flush()
            line.wait(lambda: slots[row] is not None, timeout)
        line.call_back()

    def cancel(self) -> bool:
        """Ask for its end and wait for it: True if it ended as cancelled, False if something else came first."""
        self.ask_cancel()
        part = self._outcome(None)
        return part.error is not None and part.error.code == Code.CANCELLED

    def ask_cancel(self) -> None:
        """Ask for its end without waiting; asking again changes nothing."""
        line, wanted = self._line, (self._row, self._row + 1)
        if self._run.slots[self._row] is None and wanted not in self._run.cancels:
            line.check_usable()
            with line.lock:
                line.session.cancel(self._run, *wanted, time.monotonic())
                line.settle()

    def accepted(self, timeout: float | None = None) -> None:
        """Wait until the broker has taken it; for a durable task, until that is on disk.

        Raises:
            TimeoutError: as `result` does.
            PenstockError: it was refused.
        """
        line, run = self._line, self._run
        if not self._was_accepted():
            if run.options.is_durable:
                with line.lock:
                    line.session.flush()
                    line.wait(self._was_accepted, timeout)
                line.call_back()
            else:
                self._ask(timeout)
                run.accepted = True
        part = run.slots[self._row]
        if part is not None and part.error is not None:
            raise from_wire(part.error)
        if not self._was_accepted():
            raise TimeoutError(f"{self!r} has not been accepted after {timeout} s")

    def status(self, timeout: float | None = 5.0) -> dict[str, Any]:
        """The broker's word on its submission, with `state` as this client sees it; it alone once the task has ended."""
        if self._run.slots[self._row] is not None:
            return {"state": self.state}
        body = self._ask(timeout)
        return {**body, "state": body.get("state", self.state)}

    def _ask(self, timeout: float | None) -> dict[str, Any]:
        """A status request about its submission, once that is sent: answers come in order."""
        line, run = self._line, self._run
        with line.lock:
            line.session.flush()
            is_sent = line.wait(lambda: run.state in (SENT, CLOSED), timeout)
        if not is_sent:
            raise TimeoutError(f"{self!r} still waits in the client")
        try:
            return line.ask(lambda number: protocol.Status(request=number, id=run.id), timeout).body
        except PenstockError:
            if self._run.slots[self._row] is None:
                raise
            return {}

    def add_done_callback(self, callback: Callable[["Task"], object]) -> None:
        """Call `callback(task)` once it has ended: now if it has, else from whichever thread of the client learns it.

        What the callback raises is logged.
        """
        self._line.watch(self._run, self._row, lambda: callback(self))


class Stream(Iterator[Any]):
    """The partial answers of a streaming task, as they come: dicts, or the bare value if the only key is "out".

    Leaving it before the end (`close`, the end of a `with`, or dropping it) cancels the task. `result()` is the whole
    answer.
    """

    def __init__(self, line: Line, run: Run) -> None:
        self.task = Task(line, run, 0)
        self._line = line
        self._run = run
        self._next_part = 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        run = self._run
        while True:
            chunk = next_chunk(run, self._next_part)
            if chunk is not None:
                self._next_part = chunk.part + 1
                return decode(chunk, 0, run.shape.is_torch)
            if run.slots[0] is not None:
                if run.slots[0].error is not None:
                    raise from_wire(run.slots[0].error)
                raise StopIteration
            self._line.wait_for(lambda: bool(run.chunks) or run.slots[0] is not None, None)

    def result(self, timeout: float | None = None) -> Any:
        """The whole answer, once the task has ended."""
        return self.task.result(timeout)

    def close(self) -> None:
        """Cancel the task unless it has ended; does not wait."""
        if self._run.state != CLOSED:
            self._line.abandon(self._run)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self.close()


def next_chunk(run: Run, next_part: int) -> Part | None:
    """Take the next partial that has not been seen: one from a second attempt repeats the first's."""
    while run.chunks:
        chunk = run.chunks.pop(0)
        if chunk.part >= next_part:
            return chunk
    return None


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

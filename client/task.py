"""Handles for threads: the `Task` that `submit` returns, and the `Stream` of a task that answers in pieces."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from penstock.broker.protocol import Code
from penstock.client import reports
from penstock.client.errors import PenstockError
from penstock.client.handle import Chunks, Handle
from penstock.client.line import Line
from penstock.client.run import CLOSED, Part, Run
from penstock.client.verbs import ask_task


class Task(Handle):
    """One task that was submitted."""

    __slots__ = ("_line",)

    def __init__(self, line: Line, run: Run, row: int) -> None:
        self._line = line
        self._run = run
        self._row = row

    def done(self) -> bool:
        """Whether it has ended; takes in what has arrived, never waits."""
        if not self._is_ended() and not self._line.is_forked:
            self._line.glance()
        return self._is_ended()

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
            if self._line.is_forked:
                self._line.check_usable()
            self._line.flush_and_wait(self._is_ended, timeout)
            part = self._run.slots[self._row]
            if part is None:
                raise self._not_ended(timeout)
        return part

    def cancel(self) -> bool:
        """Ask for its end and wait for it: True if it ended as cancelled, False if something else came first."""
        self.ask_cancel()
        part = self._outcome(None)
        return part.error is not None and part.error.code == Code.CANCELLED

    def ask_cancel(self) -> None:
        """Ask for its end without waiting; asking again changes nothing."""
        if self._must_ask_cancel():
            self._line.cancel(self._run, self._row, self._row + 1)

    def accepted(self, timeout: float | None = None) -> None:
        """Wait until the broker has taken it; for a durable task, until that is on disk.

        Raises:
            TimeoutError: as `result` does.
            PenstockError: it was refused.
        """
        if not self._was_accepted():
            if self._run.options.is_durable:
                self._line.flush_and_wait(self._was_accepted, timeout)
            else:
                self._confirm(timeout)
        self._check_accepted(timeout)

    def _confirm(self, timeout: float | None) -> None:
        """Until the broker has taken it, or `timeout` is over; a refusal that is to be tried again does not count."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not self._was_accepted():
            left, num_refused = None if until == math.inf else until - time.monotonic(), self._num_refused()
            if not self._line.flush_and_wait(self._is_sent, left):
                return
            self._ask(left)
            self._note_answer(num_refused)

    def status(self, timeout: float | None = 5.0) -> dict[str, Any]:
        """The word on its submission: this client's own while it waits here, then the broker's (`position`, `eta_ms`,
        `why`, ... as far as it tells); once the task has ended only its `state`."""
        return self._status({} if self._is_ended() else self._report(timeout))

    def eta(self, timeout: float | None = 5.0) -> float | None:
        """Seconds until its outcome is expected, 0 once it is there; None if nobody can tell."""
        return reports.eta_s(self.status(timeout))

    def why(self, timeout: float | None = 5.0) -> str:
        """What it waits for, in one line."""
        return reports.why(self.status(timeout))

    def _report(self, timeout: float | None) -> dict[str, Any]:
        self._line.check_usable()
        self._line.flush_and_wait(lambda: True, None)
        with self._line.lock:
            if not self._is_sent():
                return reports.of_waiting(self._line.session, self._run, time.monotonic())
        return reports.of_broker(self._ask(timeout))

    def _ask(self, timeout: float | None) -> dict[str, Any]:
        """The broker's word on its submission, which was sent; nothing if it ends meanwhile."""
        try:
            return self._line.ask(ask_task(self._run.id), timeout)
        except PenstockError:
            if not self._is_ended():
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
        self._chunks = Chunks(run)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        while (chunk := self._chunks.take()) is None:
            if self._chunks.is_over():
                raise StopIteration
            self._line.wait_for(self._chunks.has_news, None)
        return self._chunks.value(chunk)

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

"""Handles for event loops: `AsyncTask` and `AsyncStream`, as `task.py` has them for threads."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from penstock.broker.protocol import Code
from penstock.client import reports
from penstock.client.aio_line import AsyncLine
from penstock.client.errors import PenstockError
from penstock.client.handle import Chunks, Handle
from penstock.client.run import Part, Run
from penstock.client.verbs import ask_task


class AsyncTask(Handle):
    """One task that was submitted; `await task` gives its value."""

    __slots__ = ("_line",)

    def __init__(self, line: AsyncLine, run: Run, row: int) -> None:
        self._line = line
        self._run = run
        self._row = row

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    def done(self) -> bool:
        return self._is_ended()

    async def result(self, timeout: float | None = None) -> Any:
        """Its value: the array if the only output is called "out", else a dict.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; it goes on.
            PenstockError: how it failed.
        """
        return self._value(await self._outcome(timeout))

    async def exception(self, timeout: float | None = None) -> PenstockError | None:
        """How it failed, or None. Raises TimeoutError as `result` does."""
        return self._error(await self._outcome(timeout))

    async def _outcome(self, timeout: float | None) -> Part:
        if not self._is_ended():
            try:
                await asyncio.wait_for(self._line.end_of(self._run, self._row), timeout)
            except TimeoutError:
                raise self._not_ended(timeout) from None
        part = self._run.slots[self._row]
        assert part is not None
        return part

    def ask_cancel(self) -> None:
        """Ask for its end without waiting; asking again changes nothing."""
        if self._must_ask_cancel():
            self._line.cancel(self._run, self._row, self._row + 1)

    async def cancel(self) -> bool:
        """Ask for its end and wait for it: True if it ended as cancelled, False if something else came first."""
        self.ask_cancel()
        part = await self._outcome(None)
        return part.error is not None and part.error.code == Code.CANCELLED

    async def accepted(self, timeout: float | None = None) -> None:
        """Wait until the broker has taken it; for a durable task, until that is on disk.

        Raises:
            TimeoutError: as `result` does.
            PenstockError: it was refused.
        """
        if not self._was_accepted():
            if self._run.options.is_durable:
                self._line.flush_soon()
                await self._line.wait(self._was_accepted, timeout)
            else:
                await self._confirm(timeout)
        self._check_accepted(timeout)

    async def _confirm(self, timeout: float | None) -> None:
        """As `Task._confirm`."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not self._was_accepted():
            left, num_refused = None if until == math.inf else until - time.monotonic(), self._num_refused()
            self._line.session.flush()
            if not await self._line.wait(self._is_sent, left):
                return
            await self._ask(left)
            self._note_answer(num_refused)

    async def status(self, timeout: float | None = 5.0) -> dict[str, Any]:
        """The word on its submission: this client's own while it waits here, then the broker's (`position`, `eta_ms`,
        `why`, ... as far as it tells); once the task has ended only its `state`."""
        return self._status({} if self._is_ended() else await self._report(timeout))

    async def eta(self, timeout: float | None = 5.0) -> float | None:
        """Seconds until its outcome is expected, 0 once it is there; None if nobody can tell."""
        return reports.eta_s(await self.status(timeout))

    async def why(self, timeout: float | None = 5.0) -> str:
        """What it waits for, in one line."""
        return reports.why(await self.status(timeout))

    async def _report(self, timeout: float | None) -> dict[str, Any]:
        self._line.check_usable()
        self._line.session.flush()
        self._line.turn()
        if not self._is_sent():
            return reports.of_waiting(self._line.session, self._run, time.monotonic())
        return reports.of_broker(await self._ask(timeout))

    async def _ask(self, timeout: float | None) -> dict[str, Any]:
        """The broker's word on its submission, which was sent; nothing if it ends meanwhile."""
        try:
            return await self._line.ask(ask_task(self._run.id), timeout)
        except PenstockError:
            if not self._is_ended():
                raise
            return {}

    def add_done_callback(self, callback: Callable[["AsyncTask"], object]) -> None:
        """Call `callback(task)` in the event loop once it has ended."""
        if not self._line.session.news.watch(self._run, self._row, lambda: callback(self)):
            asyncio.get_running_loop().call_soon(callback, self)


class AsyncStream(AsyncIterator[Any]):
    """The partial answers of a streaming task, as `Stream` gives them."""

    def __init__(self, line: AsyncLine, run: Run) -> None:
        self.task = AsyncTask(line, run, 0)
        self._line = line
        self._run = run
        self._chunks = Chunks(run)

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Any:
        while (chunk := self._chunks.take()) is None:
            if self._chunks.is_over():
                raise StopAsyncIteration
            await self._line.wait(self._chunks.has_news, None)
        return self._chunks.value(chunk)

    async def result(self, timeout: float | None = None) -> Any:
        """The whole answer, once the task has ended."""
        return await self.task.result(timeout)

    async def aclose(self) -> None:
        """Cancel the task unless it has ended; does not wait."""
        self._line.abandon(self._run)

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self._line.abandon(self._run)

"""The asyncio driver: one event loop owns session and socket, and there is no thread.

The loop watches the socket's descriptor; every change ends in `turn`, which drains the socket and sets the timer.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable
from typing import Any

from penstock.broker.ways import Ways
from penstock.broker.wire import Message
from penstock.client.link import Link
from penstock.client.news import safely
from penstock.client.questions import Request
from penstock.client.run import Run
from penstock.client.session import Session


class AsyncLine:
    """One connection to a broker for one event loop: that of its first use."""

    def __init__(self, session: Session, ways: Ways, connect_timeout: float, linger_s: float) -> None:
        self.session = session
        self.where = str(ways)
        self._connect_timeout = connect_timeout
        self._linger_s = linger_s
        self._link = Link(session, ways)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._fd, self._watched_socket = -1, -1
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._seen_events = 0
        self._will_flush = self._is_closed = False

    def check_usable(self) -> None:
        """Raises what ended the line for good, or RuntimeError in a forked child or another event loop."""
        if os.getpid() != self._pid:
            raise RuntimeError("this client belongs to the parent process; make a new AsyncClient after fork")
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this AsyncClient belongs to another event loop")
        if self.session.error is not None:
            raise self.session.error

    async def connect(self) -> None:
        """Wait until a broker has answered, at first use.

        Raises:
            Unavailable: none does within `connect_timeout`.
        """
        self.check_usable()
        session = self.session
        if session.has_met_broker:
            return
        self._loop = asyncio.get_running_loop()
        session.open(time.monotonic())
        is_up = await self.wait(lambda: session.has_met_broker, self._connect_timeout)
        self._link.look()
        self.check_usable()
        if not is_up:
            raise session.unreachable(self.where)

    async def wait(self, is_done: Callable[[], bool], timeout: float | None) -> bool:
        """Until `is_done()`; False if `timeout` (seconds) was over first."""
        self.turn()
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not is_done():
            left = until - time.monotonic()
            if left <= 0 or self._is_closed:
                return False
            assert self._loop is not None
            waiter = (is_done, self._loop.create_future())
            self._waiters.append(waiter)
            try:
                await asyncio.wait_for(waiter[1], None if left == math.inf else left)
            except TimeoutError:
                continue
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        return True

    async def end_of(self, run: Run, row: int) -> None:
        """Until the row has its outcome."""
        assert self._loop is not None
        future = self._loop.create_future()
        if self.session.news.watch(run, row, lambda: None if future.done() else future.set_result(None)):
            self.flush_soon()
            await future

    async def send(self, run: Run) -> None:
        """Put a run on the line, waiting while too much waits already."""
        backlog = self.session.backlog
        if not backlog.has_room(run.num_rows, run.nbytes):
            await self.wait(lambda: backlog.has_room(run.num_rows, run.nbytes), run.deadline - time.monotonic())
        self.session.send(run, time.monotonic())
        self.turn()

    async def ask(self, make: Callable[[int], Message], timeout: float | None) -> dict[str, Any]:
        """Put a question and wait for the reply's body.

        Raises:
            TimeoutError: none came in time.
            PenstockError: the broker could not answer it.
        """
        return (await self.request(make, timeout)).answer()

    async def request(self, make: Callable[[int], Message], timeout: float | None) -> Request:
        """Put a question and wait for its reply. Raises TimeoutError."""
        await self.connect()
        request = self.session.ask(make, time.monotonic())
        if not await self.wait(lambda: request.is_done, timeout):
            self.session.forget(request)
            raise TimeoutError("the broker did not answer in time")
        return request

    def flush_soon(self) -> None:
        """Once this turn of the loop is over, and all its tasks are in: nothing waits for company any more."""
        if not self._will_flush and self._loop is not None:
            self._will_flush = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._will_flush = False
        self.session.flush()
        self.turn()

    def cancel(self, run: Run, start: int, stop: int) -> None:
        """Ask for the end of rows [start, stop), without waiting for it."""
        self.check_usable()
        self.session.cancel(run, start, stop)
        self.turn()

    def abandon(self, run: Run) -> None:
        """Cancel a run that nobody waits for any more."""
        if not self._is_closed and run.num_open:
            self.session.cancel(run, 0, run.num_rows)
            self.turn()

    def turn(self) -> None:
        """Drain the socket both ways, tell whoever waits, and set reader and timer."""
        if self._is_closed or self._loop is None:
            return
        self._link.turn()
        news = self.session.news
        if news.changed:
            for callback in news.callbacks():
                safely(callback)
        if news.num_events != self._seen_events:
            self._seen_events = news.num_events
            for is_done, future in self._waiters:
                if not future.done() and is_done():
                    future.set_result(None)
        self._watch()

    def _watch(self) -> None:
        assert self._loop is not None
        if self._watched_socket != self._link.num_sockets:
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)
            self._fd, self._watched_socket = self._link.fileno(), self._link.num_sockets
            self._loop.add_reader(self._fd, self.turn)
            self._loop.call_soon(self.turn)  # asking for the descriptor may have swallowed an edge
        due = self._link.due
        if due < self._timer_at - 0.0005:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = due
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self.turn()

    def close(self) -> None:
        """Say goodbye, end what is open as cancelled, free the socket. May be called twice."""
        if self._is_closed or os.getpid() != self._pid:
            return
        self.session.close()
        if self._loop is not None:
            self.turn()
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for _, future in self._waiters:
            if not future.done():
                future.set_result(None)
        self._link.close(self._linger_s)

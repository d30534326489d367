"""The synchronous line: one connection to a broker for all threads of this process, and what may be asked of it.

Knows sending, asking and closing; who drives the socket is `shared_link.py`'s business. Lines end with the program, and
in a forked child.
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from penstock.broker.ways import Ways
from penstock.broker.wire import Message
from penstock.client.news import safely
from penstock.client.questions import Request
from penstock.client.run import Run
from penstock.client.session import Session
from penstock.client.shared_link import IsDone, SharedLink

_lines: "weakref.WeakSet[Line]" = weakref.WeakSet()


class Line(SharedLink):
    """See the module. These methods take the lock themselves."""

    def __init__(self, session: Session, ways: Ways, connect_timeout: float, linger_s: float) -> None:
        super().__init__(session, ways)
        self.where = str(ways)
        self._connect_timeout = connect_timeout
        self._linger_s = linger_s
        self.is_forked = False
        _lines.add(self)

    def check_usable(self) -> None:
        """Raises what ended the line for good, or RuntimeError in a forked child."""
        if self.is_forked:
            raise RuntimeError("this client belongs to the parent process; make a new Client after fork")
        if self.session.error is not None:
            raise self.session.error

    def connect(self) -> None:
        """Wait until a broker has answered, at first use.

        Raises:
            Unavailable: none does within `connect_timeout`.
        """
        self.check_usable()
        session = self.session
        if session.has_met_broker:
            return
        with self.lock:
            session.open(time.monotonic())
            is_up = self.wait(lambda: session.has_met_broker, self._connect_timeout)
            self.link.look()
        self.check_usable()
        if not is_up:
            raise session.unreachable(self.where)

    def send(self, run: Run) -> None:
        """Put a run on the line, waiting while too much waits already."""
        backlog = self.session.backlog
        with self.lock:
            if not backlog.has_room(run.num_rows, run.nbytes):
                self.wait(lambda: backlog.has_room(run.num_rows, run.nbytes), run.deadline - time.monotonic())
            self.session.send(run, time.monotonic())
            self.settle()
        self.call_back()

    def wait_for(self, is_done: IsDone, timeout: float | None) -> bool:
        """Drive or sleep until `is_done()`; False if `timeout` (seconds) was over first."""
        with self.lock:
            done = self.wait(is_done, timeout)
        self.call_back()
        return done

    def flush_and_wait(self, is_done: IsDone, timeout: float | None) -> bool:
        """As `wait_for`, for something that tasks must be sent for: they do not wait for company any more."""
        with self.lock:
            self.session.flush()
            done = self.wait(is_done, timeout)
        self.call_back()
        return done

    def ask(self, make: Callable[[int], Message], timeout: float | None) -> dict[str, Any]:
        """Put a question and wait for the reply's body.

        Raises:
            TimeoutError: none came in time.
            PenstockError: the broker could not answer it.
        """
        return self.request(make, timeout).answer()

    def request(self, make: Callable[[int], Message], timeout: float | None) -> Request:
        """Put a question and wait for its reply. Raises TimeoutError."""
        self.connect()
        with self.lock:
            request = self.session.ask(make, time.monotonic())
            is_done = self.wait(lambda: request.is_done, timeout)
            if not is_done:
                self.session.forget(request)
        self.call_back()
        if not is_done:
            raise TimeoutError("the broker did not answer in time")
        return request

    def watch(self, run: Run, row: int, callback: Callable[[], object]) -> None:
        """Call back once the row has its outcome: from whichever thread receives it, or now if it is there."""
        with self.lock:
            is_open = self.session.news.watch(run, row, callback)
            if is_open:
                self.leave()
        if not is_open:
            safely(callback)

    def cancel(self, run: Run, start: int, stop: int) -> None:
        """Ask for the end of rows [start, stop), without waiting for it."""
        self.check_usable()
        with self.lock:
            self.session.cancel(run, start, stop)
            self.settle()

    def abandon(self, run: Run) -> None:
        """Cancel a run that nobody holds any more. Safe from a finalizer: takes no lock."""
        self.orphans.append(run)
        self.pump.bell.ring()

    def glance(self) -> None:
        """Take in what has arrived if nobody else does; never waits for the broker."""
        with self.lock:
            if self.driver is None and not self.is_closed:
                self.settle()
        self.call_back()

    def forget_parent(self) -> None:
        """In a forked child: socket, lock and threads are the parent's."""
        self.is_forked = True
        self.lock = threading.Lock()
        self.link.abandon()

    def close(self) -> None:
        """Say goodbye, end what is open as cancelled, free the socket. May be called twice."""
        if self.is_forked or self.is_closed:
            return
        with self.lock:
            self.is_closed = True
            self.session.close()
            if self.link.num_sockets:
                self.link.turn()
            self.wake_all()
        self.call_back()
        self.pump.join()
        with self.lock:
            self.link.close(self._linger_s)
        _lines.discard(self)


def _after_fork() -> None:
    for line in _lines:
        line.forget_parent()


def _at_exit() -> None:
    for line in list(_lines):
        line.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

"""The synchronous driver: many threads share one session, and whoever waits drives it.

One lock guards session and socket. At most one thread at a time is the *driver*: it alone polls the socket's descriptor,
without the lock. The rules that keep wake-ups from being lost:

- Every change and every wake-up ends in `_turn`, which drains the socket; so when a driver goes to poll, nothing is left
  unread, and what a thread reads it accounts for: it wakes each sleeper that is done, and the driver if that one is done
  or has to look up earlier than it planned.
- Who leaves while others sleep wakes one of them to drive. A woken sleeper is off the list before it wakes, and looks
  again with the lock held.
- The *pump* thread stands in when nobody waits but somebody must listen: callbacks, tasks waiting for credit, heartbeats.
  A caller takes the driver's place from it without waiting. The pump is rung only if something is due before it would
  look up by itself, so a loop of calls never wakes it.
"""

import atexit
import contextlib
import logging
import math
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final

from penstock.broker.wire import Message
from penstock.client.errors import Unavailable, from_wire
from penstock.client.link import Link
from penstock.client.run import Run
from penstock.client.session import ENDED, Request, Session

log = logging.getLogger("penstock.client")

NAP_S: Final = 0.002
MAX_NAP_S: Final = 0.016
"""While others are at work the pump looks up this often at first, and at least, and stands in when they have stopped."""
MAX_POLL_S: Final = 3600.0
_lines: "weakref.WeakSet[Line]" = weakref.WeakSet()


class Bell:
    """Something to poll that any thread, and any finalizer, can ring."""

    __slots__ = ("_read", "_write")

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe is loud enough
            os.write(self._write, b"!")

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def __del__(self) -> None:
        os.close(self._read)
        os.close(self._write)


class _Waiter:
    """A thread that waits for `is_done`. Its lock is free once somebody has woken it."""

    __slots__ = ("is_done", "lock")

    def __init__(self, is_done: Callable[[], bool]) -> None:
        self.is_done = is_done
        self.lock = threading.Lock()
        self.lock.acquire()


_PUMP: Final = _Waiter(lambda: False)


class Line:
    """One connection to a broker for all threads of this process.

    Use `lock` around the session; `wait`, `leave` and what says so need it held.
    """

    def __init__(self, session: Session, endpoint: str, where: str, connect_timeout: float, linger_s: float) -> None:
        self.session = session
        self.lock = threading.Lock()
        self._where = where
        self._connect_timeout = connect_timeout
        self._linger_s = linger_s
        self._link = Link(session, endpoint)
        self._driver: _Waiter | None = None
        self._sleepers: list[_Waiter] = []
        self._look_up = math.inf  # when the driver will look by itself
        self._bell = Bell()
        self._poll, self._polled_socket, self._pump_socket = select.poll(), -1, -1
        self._num_turns = self._seen_events = 0
        self._pump: threading.Thread | None = None
        self._pump_bell = Bell()
        self._pump_until = math.inf  # when the pump will look by itself
        self._orphans: deque[Run] = deque()
        self.is_forked = self._is_closed = False
        _lines.add(self)

    # --- for callers -----------------------------------------------------------------------------------------------

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
        session = self.session
        if session.epoch is not None or session.state == ENDED:
            self.check_usable()
            return
        self.check_usable()
        with self.lock:
            session.open(time.monotonic())
            is_up = self.wait(lambda: session.epoch is not None or session.state == ENDED, self._connect_timeout)
        self.check_usable()
        if not is_up:
            why = f" ({session.last_fault})" if session.last_fault else ""
            raise Unavailable(f"no broker at {self._where}{why}; start one with `penstock up`")

    def send(self, run: Run) -> None:
        """Put a run on the line, waiting while too much waits already."""
        session = self.session
        with self.lock:
            if not session.has_room(run.num_rows, run.nbytes):
                self.wait(lambda: session.has_room(run.num_rows, run.nbytes), run.deadline - time.monotonic())
            session.send(run, time.monotonic())
            self.settle()
        self.call_back()

    def settle(self) -> None:
        """With the lock: hand over what is to be sent, and let go."""
        self._turn()
        self.leave()

    def wait_for(self, is_done: Callable[[], bool], timeout: float | None) -> bool:
        """Drive or sleep until `is_done()`; False if `timeout` (seconds) was over first."""
        with self.lock:
            done = self.wait(is_done, timeout)
        self.call_back()
        return done

    def ask(self, make: Callable[[int], Message], timeout: float | None) -> Request:
        """Put a question and wait for the reply.

        Raises:
            TimeoutError: none came in time.
            PenstockError: the broker could not answer it.
        """
        self.connect()
        with self.lock:
            request = self.session.ask(make, time.monotonic())
            is_done = self.wait(lambda: request.is_done, timeout)
            if not is_done:
                self.session.forget(request)
        self.call_back()
        if not is_done:
            raise TimeoutError("the broker did not answer in time")
        if request.error is not None:
            raise from_wire(request.error)
        return request

    def watch(self, run: Run, row: int, callback: Callable[[], object]) -> None:
        """Call back once the row has its outcome: from whichever thread receives it, or now if it is there."""
        with self.lock:
            if self.session.watch(run, row, callback):
                self.leave()
                return
        _call(callback)

    def call_back(self) -> None:
        """Without the lock: run the callbacks of what has arrived."""
        while self.session.changed:
            with self.lock:
                ready = self.session.callbacks()
            for callback in ready:
                _call(callback)

    def abandon(self, run: Run) -> None:
        """Cancel a run that nobody holds any more. Safe from a finalizer: takes no lock."""
        self._orphans.append(run)
        self._pump_bell.ring()

    def glance(self) -> None:
        """Take in what has arrived if nobody else does; never waits for the broker."""
        with self.lock:
            if self._driver is None and not self._is_closed:
                self._turn()
                self.leave()
        self.call_back()

    def forget_parent(self) -> None:
        """In a forked child: socket, lock and threads are the parent's."""
        self.is_forked = True
        self.lock = threading.Lock()
        self._link.abandon()

    def close(self) -> None:
        """Say goodbye, end what is open as cancelled, free the socket. May be called twice."""
        if self.is_forked or self._is_closed:
            return
        with self.lock:
            self._is_closed = True
            self.session.close()
            if self._link.num_sockets:
                self._link.turn()
            self._pump_bell.ring()
            if self._driver is not None:
                self._bell.ring()
            for waiter in self._sleepers:
                waiter.lock.release()
            self._sleepers.clear()
        self.call_back()
        if self._pump is not None and self._pump is not threading.current_thread():
            self._pump.join()
        with self.lock:
            self._link.close(self._linger_s)
        _lines.discard(self)

    # --- waiting, with the lock held -------------------------------------------------------------------------------

    def wait(self, is_done: Callable[[], bool], timeout: float | None) -> bool:
        """With the lock, which is let go meanwhile: drive or sleep until `is_done()`, at most `timeout` seconds."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        try:
            self._turn()
            while not is_done():
                now = time.monotonic()
                if now >= until or self._is_closed:
                    return is_done()
                if self._driver is None or self._driver is _PUMP:
                    self._drive(is_done, until, now)
                else:
                    self._sleep(is_done, until, now)
            return True
        finally:
            self.leave()

    def leave(self) -> None:
        """With the lock: see to it that somebody goes on if that is needed."""
        if self._driver is not None or self._is_closed:
            return
        if self._sleepers:
            self._sleepers.pop().lock.release()
            return
        due = self.session.next_deadline()
        if self.session.must_listen:
            due = min(due, time.monotonic() + MAX_NAP_S)
        if due < self._pump_until:
            self._pump_until = due
            if self._pump is None:
                self._pump = threading.Thread(target=self._run_pump, name="penstock-client", daemon=True)
                self._pump.start()
            else:
                self._pump_bell.ring()

    def _drive(self, is_done: Callable[[], bool], until: float, now: float) -> None:
        if self._driver is _PUMP:
            self._pump_bell.ring()
        self._driver = _Waiter(is_done)
        if self._polled_socket != self._link.num_sockets:
            self._poll, self._polled_socket = select.poll(), self._link.num_sockets
            self._poll.register(self._link.fileno(), select.POLLIN)
            self._poll.register(self._bell.fileno(), select.POLLIN)
        self._look_up = min(until, self.session.next_deadline())
        poll, timeout_ms = self._poll, _poll_ms(self._look_up, now)
        self.lock.release()
        events: list[tuple[int, int]] = []
        try:
            events = poll.poll(timeout_ms)
        finally:
            self.lock.acquire()
            self._driver = None
            if any(fd == self._bell.fileno() for fd, _ in events):
                self._bell.silence()
        self._turn()

    def _sleep(self, is_done: Callable[[], bool], until: float, now: float) -> None:
        waiter = _Waiter(is_done)
        self._sleepers.append(waiter)
        self.lock.release()
        try:
            waiter.lock.acquire(timeout=min(until - now, MAX_POLL_S))
        finally:
            self.lock.acquire()
            if waiter in self._sleepers:
                self._sleepers.remove(waiter)

    def _turn(self) -> None:
        """With the lock: drain the socket both ways, and wake whoever has something from it."""
        if self._is_closed:
            return
        if self._orphans:
            self._cancel_orphans()
        self._num_turns += 1
        self._link.turn()
        session, driver = self.session, self._driver
        if session.num_events != self._seen_events:
            self._seen_events = session.num_events
            if self._sleepers:
                awake = [w for w in self._sleepers if w.is_done()]
                for waiter in awake:
                    self._sleepers.remove(waiter)
                    waiter.lock.release()
            if driver is not None and driver.is_done():
                self._bell.ring()
        if driver is None:
            return
        polled = self._pump_socket if driver is _PUMP else self._polled_socket
        if polled != self._link.num_sockets or session.next_deadline() < self._look_up - 0.0005:
            (self._pump_bell if driver is _PUMP else self._bell).ring()

    def _cancel_orphans(self) -> None:
        while self._orphans:
            run = self._orphans.popleft()
            self.session.cancel(run, 0, run.num_rows, time.monotonic())

    # --- the pump --------------------------------------------------------------------------------------------------

    def _run_pump(self) -> None:
        nap, seen_turns, was_rung = NAP_S, -1, True
        bell_only = select.poll()
        bell_only.register(self._pump_bell.fileno(), select.POLLIN)
        while True:
            with self.lock:
                if self._is_closed:
                    return
                now = time.monotonic()
                if self._driver is _PUMP:
                    self._driver = None
                is_free = self._driver is None and not self._sleepers
                if is_free and (was_rung or self._num_turns == seen_turns):
                    nap, poll = NAP_S, self._stand_in(bell_only)
                else:
                    if self._orphans:
                        self._turn()
                    wake = now + nap if self.session.must_listen else self.session.next_deadline()
                    self._pump_until, poll = max(wake, now + NAP_S), bell_only
                    nap = min(MAX_NAP_S, nap * 2)
                seen_turns = self._num_turns
                timeout_ms = _poll_ms(self._pump_until, now)
            self.call_back()
            was_rung = any(fd == self._pump_bell.fileno() for fd, _ in poll.poll(timeout_ms))
            if was_rung:
                self._pump_bell.silence()

    def _stand_in(self, bell_only: "select.poll") -> "select.poll":
        """With the lock: do what is due, and become the driver if somebody must listen; what to poll comes back."""
        self._turn()
        self._look_up = self._pump_until = self.session.next_deadline()
        if not self.session.must_listen:
            return bell_only
        self._driver, self._pump_socket = _PUMP, self._link.num_sockets
        poll = select.poll()
        poll.register(self._pump_bell.fileno(), select.POLLIN)
        poll.register(self._link.fileno(), select.POLLIN)
        return poll


def _poll_ms(until: float, now: float) -> int:
    return max(0, math.ceil((min(until, now + MAX_POLL_S) - now) * 1000))


def _call(callback: Callable[[], object]) -> None:
    try:
        callback()
    except Exception:
        log.exception("a callback of a task failed")


def _after_fork() -> None:
    for line in _lines:
        line.forget_parent()


def _at_exit() -> None:
    for line in list(_lines):
        line.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

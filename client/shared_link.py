"""One link for many threads: whoever waits drives it.

One lock guards session and socket. At most one thread at a time is the *driver*: it alone polls the socket's descriptor,
without the lock. The rules that keep wake-ups from being lost:

- Every change and every wake-up ends in `turn`, which drains the socket; so when a driver goes to poll, nothing is left
  unread, and what a thread reads it accounts for: it wakes each sleeper that is done, and the driver if that one is done
  or has to look up earlier than it planned.
- Who leaves while others sleep wakes one of them to drive. A woken sleeper is off the list before it wakes, and looks
  again with the lock held.
- The pump (`pump.py`) stands in when nobody waits but somebody must listen. A caller takes the driver's place from it
  without waiting.
"""

import math
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from penstock.broker.ways import Ways
from penstock.client.bell import Bell
from penstock.client.link import Link
from penstock.client.news import safely
from penstock.client.pump import MAX_POLL_S, Pump, is_never_done, poll_ms
from penstock.client.run import Run
from penstock.client.session import Session

IsDone = Callable[[], bool]

EARLIER_S: Final = 0.0005
"""A driver is not woken for less than this."""


class Sleeper:
    """A thread that waits for `is_done` while another one drives. Its lock is free once somebody has woken it."""

    __slots__ = ("is_done", "lock")

    def __init__(self, is_done: IsDone) -> None:
        self.is_done = is_done
        self.lock = threading.Lock()
        self.lock.acquire()


class SharedLink:
    """See the module. Use `lock` around the session; all methods but `call_back` need it held.

    `driver` is what the thread that polls is waiting for; the pump waits for nothing.
    """

    def __init__(self, session: Session, ways: Ways) -> None:
        self.session = session
        self.lock = threading.Lock()
        self.is_closed = False
        self.link = Link(session, ways)
        self.driver: IsDone | None = None
        self.sleepers: list[Sleeper] = []
        self.look_up = math.inf
        """When the driver will look by itself."""
        self.num_turns = 0
        self.orphans: deque[Run] = deque()
        """Runs to cancel that nobody holds any more; appended without the lock."""
        self.polled_socket = -1
        """Which of the link's sockets the driver polls."""
        self.pump = Pump()
        self._seen_events = 0
        self._bell = Bell()
        self._bell_fd = self._bell.fileno()
        self._poll, self._poll_socket = select.poll(), -1

    def wait(self, is_done: IsDone, timeout: float | None) -> bool:
        """Drive or sleep until `is_done()`, at most `timeout` seconds; the lock is let go meanwhile."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        try:
            self.turn()
            while not is_done():
                now = time.monotonic()
                if now >= until or self.is_closed:
                    return is_done()
                if self.driver is None or self.driver is is_never_done:
                    self._drive(is_done, until, now)
                else:
                    self._sleep(is_done, until, now)
            return True
        finally:
            self.leave()

    def settle(self) -> None:
        """Hand over what is to be sent, and let go."""
        self.turn()
        self.leave()

    def leave(self) -> None:
        """See to it that somebody goes on if that is needed."""
        if self.driver is not None or self.is_closed:
            return
        if self.sleepers:
            self.sleepers.pop().lock.release()
        else:
            self.pump.take_over(self)

    def turn(self) -> None:
        """Drain the socket both ways, and wake whoever has something from it."""
        if self.is_closed:
            return
        if self.orphans:
            self._cancel_orphans()
        self.num_turns += 1
        self.link.turn()
        if self.driver is not None or self.sleepers:
            self._wake()

    def _wake(self) -> None:
        driver, has_news = self.driver, self.session.news.num_events != self._seen_events
        if has_news:
            self._seen_events = self.session.news.num_events
            for sleeper in [s for s in self.sleepers if s.is_done()]:
                self.sleepers.remove(sleeper)
                sleeper.lock.release()
        if driver is None:
            return
        must_look = self.polled_socket != self.link.num_sockets or self.link.due < self.look_up - EARLIER_S
        if must_look or (has_news and driver()):
            (self.pump.bell if driver is is_never_done else self._bell).ring()

    def _cancel_orphans(self) -> None:
        while self.orphans:
            run = self.orphans.popleft()
            self.session.cancel(run, 0, run.num_rows)

    def _drive(self, is_done: IsDone, until: float, now: float) -> None:
        if self.driver is not None:
            self.pump.bell.ring()
        self.driver, self.polled_socket = is_done, self.link.num_sockets
        if self._poll_socket != self.polled_socket:
            self._poll, self._poll_socket = select.poll(), self.polled_socket
            self._poll.register(self.link.fileno(), select.POLLIN)
            self._poll.register(self._bell_fd, select.POLLIN)
        self.look_up = min(until, self.link.due)
        poll, timeout_ms = self._poll, poll_ms(self.look_up, now)
        self.lock.release()
        events: list[tuple[int, int]] = []
        try:
            events = poll.poll(timeout_ms)
        finally:
            self.lock.acquire()
            self.driver = None
            for fd, _ in events:
                if fd == self._bell_fd:
                    self._bell.silence()
        self.turn()

    def _sleep(self, is_done: IsDone, until: float, now: float) -> None:
        sleeper = Sleeper(is_done)
        self.sleepers.append(sleeper)
        self.lock.release()
        try:
            sleeper.lock.acquire(timeout=min(until - now, MAX_POLL_S))
        finally:
            self.lock.acquire()
            if sleeper in self.sleepers:
                self.sleepers.remove(sleeper)

    def call_back(self) -> None:
        """Without the lock: run the callbacks of what has arrived."""
        news = self.session.news
        while news.changed:
            with self.lock:
                ready = news.callbacks()
            for callback in ready:
                safely(callback)

    def wake_all(self) -> None:
        """Whoever drives or sleeps shall look again."""
        self.pump.bell.ring()
        if self.driver is not None:
            self._bell.ring()
        for sleeper in self.sleepers:
            sleeper.lock.release()
        self.sleepers.clear()

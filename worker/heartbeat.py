"""The side thread: heartbeats from a socket of its own, whatever the kernel does, and a look at the parent process.

Knows its socket and the parent; when to beat, and what silence means, is `pulse.py`'s business. It tells the data loop by a
flag and a wake-up, and never touches its socket. A kernel that holds the interpreter's lock without a pause silences this
thread too, for as long.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping

import zmq

from penstock.broker.failpoints import ARMED, hit
from penstock.broker.keys import OwnKey
from penstock.broker.ways import Way
from penstock.worker.pulse import Pulse
from penstock.worker.transport import POLLIN, Socket, Wake, can_receive, dealer, receive, send

log = logging.getLogger("penstock.worker")
ORPHAN_GRACE_S = 5.0
LOOK_MS = 1000.0
CONNECT_S = 0.02


class Heart(threading.Thread):
    """Sends `heartbeat` while there is a session.

    Args:
        wake: ends the data loop's poll.
        facts: progress (a number that grows with the work done) and memory, asked once per interval.
        on_orphaned: called once when `parent` is no longer the parent process.
    """

    def __init__(
        self,
        context: zmq.Context[Socket],
        endpoint: str,
        secret: bytes,
        wake: Wake,
        facts: Callable[[], tuple[int, Mapping[str, float]]],
        parent: int | None = None,
        on_orphaned: Callable[[], None] = lambda: None,
        key: OwnKey | None = None,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.pulse = Pulse(secret)
        self._context = context
        self._where = endpoint, key
        self._wake = wake
        self._facts = facts
        self._parent = parent
        self._on_orphaned = on_orphaned
        self._own_wake = Wake()
        self._orphaned_at: float | None = None
        self._is_stopped = False

    def begin(self, interval_ms: float) -> None:
        """There is a session: beat from now on."""
        self.pulse.begin(interval_ms)
        self._own_wake.set()

    def move(self, way: Way) -> None:
        """The next session is with a broker there."""
        self._where = way.address.back, way.key

    def pause(self) -> None:
        """There is no session: no beats until the next `begin`."""
        self.pulse.pause()

    def stop(self) -> None:
        self._is_stopped = True
        self._own_wake.set()
        self.join()
        self._own_wake.close()

    def run(self) -> None:
        while not self._is_stopped:
            # A new session, a new socket: the old one may wait for seconds before it connects again.
            socket = dealer(self._context, *self._where)
            socket.setsockopt(zmq.LINGER, 0)
            try:
                self._beat(socket, self.pulse.num_sessions)
            finally:
                socket.close()

    def _beat(self, socket: Socket, session: int) -> None:
        poller = zmq.Poller()
        poller.register(socket, POLLIN)
        poller.register(self._own_wake.fd, POLLIN)
        due, pulse = 0.0, self.pulse
        while not self._is_stopped and pulse.num_sessions == session:
            now = time.monotonic()
            interval = pulse.interval_s
            if interval is not None and now >= due and self._send(socket):
                due = now + interval
            wait_ms = LOOK_MS if interval is None else min(max(due - now, CONNECT_S) * 1e3, LOOK_MS)
            poller.poll(int(wait_ms))
            self._own_wake.clear()
            while can_receive(socket):
                pulse.receive(receive(socket))
            pulse.look(time.monotonic())
            if pulse.is_lost:
                self._wake.set()
            self._look(time.monotonic())

    def _send(self, socket: Socket) -> bool:
        """One beat, if there is a connection."""
        progress, memory = self._facts()
        if ARMED:
            hit("worker.sending.heartbeat")
        return send(socket, self.pulse.beat(progress, memory, time.monotonic()))

    def _look(self, now: float) -> None:
        """At the parent process."""
        if self._parent is None or os.getppid() == self._parent:
            return
        if self._orphaned_at is None:
            self._orphaned_at = now
            self._on_orphaned()
        elif now - self._orphaned_at > ORPHAN_GRACE_S:
            log.error("the parent process is gone and the kernel does not end: leaving")
            os._exit(1)

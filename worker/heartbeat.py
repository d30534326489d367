"""The side thread: heartbeats from a socket of its own, whatever the kernel does, and a look at the parent process.

Knows the session's secret; does not know leases. It tells the data loop by a flag and a wake-up, and never touches its
socket. A kernel that holds the interpreter's lock without a pause silences this thread too, for as long.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping

import zmq

from penstock.broker.failpoints import ARMED, hit
from penstock.broker.keys import OwnKey
from penstock.broker.protocol import TO_WORKER, Code, Fault, Heartbeat, WorkerHeartbeat
from penstock.broker.wire import ProtocolError, decode, encode
from penstock.worker.transport import POLLIN, Socket, Wake, can_receive, dealer, receive, send

log = logging.getLogger("penstock.worker")
MAX_SILENT = 3
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
        self.is_lost = False
        self._context = context
        self._endpoint = endpoint
        self._key = key
        self._secret = secret
        self._wake = wake
        self._facts = facts
        self._parent = parent
        self._on_orphaned = on_orphaned
        self._own_wake = Wake()
        self._interval_s: float | None = None
        self._asked_at: float | None = None  # of the first beat since the last answer
        self._orphaned_at: float | None = None
        self._is_stopped = False
        self._num_sessions = 0

    def begin(self, interval_ms: float) -> None:
        """There is a session: beat from now on."""
        self._asked_at = None
        self._interval_s = max(interval_ms, 1.0) / 1e3
        self._num_sessions += 1
        self.is_lost = False
        self._own_wake.set()

    def pause(self) -> None:
        """There is no session: no beats until the next `begin`."""
        self._interval_s = None

    def stop(self) -> None:
        self._is_stopped = True
        self._own_wake.set()
        self.join()
        self._own_wake.close()

    def run(self) -> None:
        while not self._is_stopped:
            # A new session, a new socket: the old one may wait for seconds before it connects again.
            socket = dealer(self._context, self._endpoint, self._key)
            socket.setsockopt(zmq.LINGER, 0)
            try:
                self._beat(socket, self._num_sessions)
            finally:
                socket.close()

    def _beat(self, socket: Socket, session: int) -> None:
        poller = zmq.Poller()
        poller.register(socket, POLLIN)
        poller.register(self._own_wake.fd, POLLIN)
        due = 0.0
        while not self._is_stopped and self._num_sessions == session:
            now = time.monotonic()
            interval = self._interval_s
            if interval is not None and now >= due and self._send(socket):
                due = now + interval
            wait_ms = LOOK_MS if interval is None else min(max(due - now, CONNECT_S) * 1e3, LOOK_MS)
            poller.poll(int(wait_ms))
            self._own_wake.clear()
            while can_receive(socket):
                self._on_answer(socket)
            self._look(time.monotonic())

    def _send(self, socket: Socket) -> bool:
        """One beat, if there is a connection."""
        progress, memory = self._facts()
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        if ARMED:
            hit("worker.sending.heartbeat")
        return send(socket, encode(WorkerHeartbeat(session=self._secret, progress=progress, memory=memory)))

    def _on_answer(self, socket: Socket) -> None:
        try:
            message = decode(TO_WORKER, receive(socket))
        except ProtocolError as e:
            log.warning("ignored a malformed answer to a heartbeat: %s", e)
            return
        if isinstance(message, Heartbeat):
            self._asked_at = None
        elif isinstance(message, Fault) and message.error.code == Code.UNATTACHED:
            self._lose()

    def _look(self, now: float) -> None:
        """At the broker's silence, which begins with a beat of ours (this process may have stood still), and at the parent."""
        interval, asked_at = self._interval_s, self._asked_at
        if interval is not None and asked_at is not None and now - asked_at > MAX_SILENT * interval:
            self._lose()
        if self._parent is None or os.getppid() == self._parent:
            return
        if self._orphaned_at is None:
            self._orphaned_at = now
            self._on_orphaned()
        elif now - self._orphaned_at > ORPHAN_GRACE_S:
            log.error("the parent process is gone and the kernel does not end: leaving")
            os._exit(1)

    def _lose(self) -> None:
        self.pause()
        self.is_lost = True
        self._wake.set()

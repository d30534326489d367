"""The tcp connections of one socket as the kernel sees them: counted, and cut where a peer sends without end.

ZeroMQ hands over a message when its last frame is there, and keeps what has come of it without any bound: a limit on the size
of frames is none on their number. So the kernel is asked what each connection has received since its last whole message.
Knows descriptors that belong to ZeroMQ, and touches them for one thing only: `shutdown`, which ZeroMQ takes for the peer's end.
"""

import contextlib
import logging
import os
import socket
import struct
from collections import Counter
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from penstock.broker.curve import FAILED_EVENTS

log = logging.getLogger("penstock.broker")

LOOK_EVERY_S: Final = 0.5
MAX_LOOKED_AT: Final = 512
MAX_FIRST_BYTES: Final = 4 << 20
"""Up to its first whole message: who has no key yet may send large frames, too, and a greeting is small."""
MAX_EVENTS_PER_TURN: Final = 256
_ACCEPTED, _DISCONNECTED = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_DISCONNECTED)
_TCP_INFO_BYTES: Final = 136
_RECEIVED: Final = struct.Struct("=Q")  # tcpi_bytes_received of struct tcp_info, since Linux 4.1
_RECEIVED_AT: Final = 128


class _Connection:
    """`inode` tells it from a later one under the same descriptor; `base`: received with its last whole message."""

    __slots__ = ("base", "fd", "has_spoken", "inode", "must_go", "was_heard")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        self.base = 0
        self.was_heard = self.has_spoken = self.must_go = False


class Connections:
    """Of one ROUTER, from now on. `events` is to be polled for POLLIN.

    Args:
        max_partial_bytes: what one connection may have sent of a message that is not whole yet.
    """

    def __init__(self, s: "zmq.Socket[bytes]", max_partial_bytes: int, counters: Counter[str]) -> None:
        self._watched = s
        self._max_partial_bytes = max_partial_bytes
        self._counters = counters
        self._open: dict[int, _Connection] = {}
        self._next: list[_Connection] = []
        self._looks_at = 0.0
        self.events = s.get_monitor_socket(_ACCEPTED | _DISCONNECTED | FAILED_EVENTS)

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        self._watched.disable_monitor()
        self.events.close(0)

    def turn(self) -> None:
        """Take in what has happened, up to a bound."""
        for _ in range(MAX_EVENTS_PER_TURN):
            try:
                event = parse_monitor_message(self.events.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._on_event(int(event["event"]), int(event["value"]))

    def _on_event(self, event: int, value: int) -> None:
        if event == _ACCEPTED:
            self._counters["connections_accepted"] += 1
            with contextlib.suppress(OSError):  # gone already
                self._open[value] = _Connection(value)
        elif event == _DISCONNECTED:
            self._open.pop(value, None)
        else:
            self._counters["handshakes_failed"] += 1

    def heard(self, fd: int, must_go: bool = False) -> None:
        """A whole message came over it. `must_go`: cut it at the next look, when an answer has had time to leave."""
        connection = self._open.get(fd)
        if connection is not None:
            connection.was_heard = connection.has_spoken = True
            connection.must_go |= must_go

    def next_deadline(self) -> float | None:
        """When `sweep` is due; None while nobody is connected."""
        return self._looks_at if self._open else None

    def sweep(self, now: float) -> None:
        """Look at the connections, some at a time, and cut those that must go."""
        if now < self._looks_at or not self._open:
            return
        self._looks_at = now + LOOK_EVERY_S
        if not self._next:
            self._next = list(self._open.values())
        for connection in self._next[:MAX_LOOKED_AT]:
            if self._open.get(connection.fd) is connection:
                self._look(connection)
        del self._next[:MAX_LOOKED_AT]

    def _look(self, connection: _Connection) -> None:
        try:
            if os.fstat(connection.fd).st_ino != connection.inode:
                raise OSError  # it is closed, and its descriptor is another's
            s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=connection.fd)
        except OSError:
            self._open.pop(connection.fd, None)
            return
        try:
            received = _bytes_received(s)
            if connection.was_heard:
                connection.base, connection.was_heard = received, False
            limit = self._max_partial_bytes if connection.has_spoken else MAX_FIRST_BYTES
            is_endless = received - connection.base > limit
            if connection.must_go or is_endless:
                self._counters["connections_cut"] += 1
                log.warning("a connection is cut: %s", "its message does not end" if is_endless else "its key is revoked")
                s.shutdown(socket.SHUT_RDWR)
                del self._open[connection.fd]
        except OSError:
            self._open.pop(connection.fd, None)
        finally:
            s.detach()  # it is ZeroMQ's to close


def _bytes_received(s: Any) -> int:
    """Over the whole life of a connection; 0 where the kernel does not say."""
    option = getattr(socket, "TCP_INFO", None)
    info = s.getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO_BYTES) if option is not None else b""
    return int(_RECEIVED.unpack_from(info, _RECEIVED_AT)[0]) if len(info) == _TCP_INFO_BYTES else 0

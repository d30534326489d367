"""A session on a DEALER socket: sends what can be sent, receives what is there, connects again when told to, perhaps elsewhere.

Knows ZeroMQ's edge-triggered file descriptor: it only says that something may have changed, and any call on the socket
may swallow that edge. So `turn` goes on until EVENTS shows nothing more to do, and must be called after every change
of the session and after every wake-up of the descriptor. Does not wait, and does not know threads.
"""

import math
import time
from typing import Any, Final

import zmq
from zmq.backend import Socket as BareSocket
from zmq.utils.monitor import parse_monitor_message

from penstock.broker.columns import Buffer
from penstock.broker.curve import FAILED_EVENTS, is_refusal, reason, show_key
from penstock.broker.detectors import detect, reconnect
from penstock.broker.failpoints import ARMED, hit_message
from penstock.broker.layout import FRAMED_ROW_BYTES
from penstock.broker.ways import Ways
from penstock.client.connection import READY
from penstock.client.session import Session

# Plain ints: pyzmq's enum flags cost more than the calls that they go into.
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)
_NOBLOCK: Final = int(zmq.NOBLOCK)
_SEND_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)
_send_frame: Final[Any] = BareSocket.send
"""Without the options of pyzmq's own `send`, which nearly double its cost."""

_OPTIONS: Final = {
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,
    zmq.SNDHWM: 1000,
    zmq.RCVHWM: 10_000,
}
"""LINGER is set when the client closes; what a lost connection still held is sent again by the session."""


class Link:
    """One session's socket. Not thread-safe: its driver sees to that."""

    def __init__(self, session: Session, ways: Ways) -> None:
        self._session = session
        self._ways = ways
        self._events: zmq.Socket[bytes] | None = None
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self.num_sockets = 0
        """Grows with every new socket, which has another file descriptor."""
        self.due = math.inf
        """The session's next deadline, as of the last `turn`."""

    def fileno(self) -> int:
        """The descriptor to poll for reading, only after a `turn`."""
        return int(self._open().getsockopt(zmq.FD))

    def _open(self) -> "zmq.Socket[bytes]":
        if self._socket is None:
            socket = self._context.socket(zmq.DEALER)
            for option, value in _OPTIONS.items():
                socket.setsockopt(option, value)
            detect(socket)
            reconnect(socket)
            way = self._ways.now
            socket.setsockopt(zmq.IPV6, int("[" in way.address.front))
            show_key(socket, way.key)
            if not way.address.is_ipc:
                self._events = socket.get_monitor_socket(FAILED_EVENTS)
            socket.connect(way.address.front)
            self._socket = socket
            self.num_sockets += 1
        return self._socket

    def turn(self) -> None:
        """Receive and send until nothing is left to do."""
        session = self._session
        while True:
            socket = self._socket or self._open()
            now = time.monotonic()
            while True:
                events: Any = socket.getsockopt(_EVENTS)
                if events & _POLLIN:
                    session.receive(_receive(socket), now)
                    continue
                frames = session.take(now) if events & _POLLOUT else None
                if frames is None:
                    break
                if _send(socket, frames) and ARMED:
                    hit_message("client.sent", session.taken)
            session.can_send = bool(events & _POLLOUT)
            self.due = session.next_deadline()
            if now < self.due:
                return
            self.look()
            session.tick(now)
            if session.connection.must_reconnect:
                self._reconnect(now)

    def look(self) -> None:
        """Hear why there is no connection, if that is so: the broker refuses the key, or speaks another mechanism."""
        while self._events is not None and int(self._events.getsockopt(_EVENTS)) & _POLLIN:
            event = int(parse_monitor_message(self._events.recv_multipart(_NOBLOCK))["event"])
            why = self._ways.about(reason(event, self._ways.now.key))
            self._session.kept_out(why, is_refusal(event) and self._ways.refuse())

    def _drop(self, linger_ms: int) -> None:
        if self._events is not None and self._socket is not None:
            self._socket.disable_monitor()
            self._events.close(0)
        if self._socket is not None:
            self._socket.close(linger_ms)
        self._socket = self._events = None

    def _reconnect(self, now: float) -> None:
        """A new socket: by the preferred way if the broker has fallen silent, by the next one if none has answered here."""
        self._drop(0)
        if self._session.connection.state == READY:
            self._ways.begin()
        else:
            self._ways.move_on()
        self._open()
        self._session.reconnected(now)

    def close(self, linger_s: float) -> None:
        """Give what was sent `linger_s` to leave, then end the socket."""
        self._drop(int(linger_s * 1000))
        self._context.term()

    def abandon(self) -> None:
        """In a forked child: let go without touching what belongs to the parent."""
        self._socket = self._events = None


def _send(socket: "zmq.Socket[bytes]", frames: list[Buffer]) -> bool:
    """False if the connection has broken since it was said to take a message: that is lost with all that was on its way."""
    last = frames.pop()
    try:
        for frame in frames:  # from 64 KiB up the bytes are handed over uncopied; they are ours and never change
            _send_frame(socket, frame, _SEND_MORE, len(frame) < FRAMED_ROW_BYTES)
        _send_frame(socket, last, _NOBLOCK, len(last) < FRAMED_ROW_BYTES)
    except zmq.Again:  # only ever the first frame: a message that has begun is taken as a whole
        return False
    return True


def _receive(socket: "zmq.Socket[bytes]") -> list[Buffer]:
    """One message: version and header as bytes, payload as frames that are handed on uncopied."""
    frame = socket.recv(_NOBLOCK, False)
    frames: list[Buffer] = [frame.bytes]
    if frame.more:
        frame = socket.recv(_NOBLOCK, False)
        frames.append(frame.bytes)
        while frame.more:
            frame = socket.recv(_NOBLOCK, False)
            frames.append(frame)
    return frames

"""The worker's ZeroMQ sockets: how they are made, whole messages in and out without blocking, and a wake-up.

Knows frames; does not know messages. Flags are plain ints and EVENTS is asked first, because pyzmq's enum flags and its
exception for "would block" cost more than the call.
"""

import os
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from penstock.broker.columns import Buffer
from penstock.broker.curve import FAILED_EVENTS, is_refusal, reason, show_key
from penstock.broker.detectors import detect, reconnect
from penstock.broker.keys import OwnKey

LINGER_MS = 1000
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
_NOBLOCK, _SNDMORE, _EVENTS = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.EVENTS)

Socket = zmq.Socket[bytes]


def dealer(context: zmq.Context[Socket], endpoint: str, key: OwnKey | None = None) -> Socket:
    """A DEALER that connects when it can. Sends fail, instead of waiting in a queue, while there is no connection."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    detect(socket)
    reconnect(socket)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    show_key(socket, key)
    socket.connect(endpoint)
    return socket


def can_receive(socket: Socket) -> bool:
    return bool(int(socket.getsockopt(_EVENTS)) & POLLIN)


def is_ready(socket: Socket, events: int) -> bool:
    return bool(int(socket.getsockopt(_EVENTS)) & events)


def receive(socket: Socket) -> list[Buffer]:
    """The next message, which must have come. Payload frames stay where ZeroMQ put them."""
    frames: list[Buffer] = []
    is_payload = False
    while True:
        frame = socket.recv(_NOBLOCK, copy=False)
        frames.append(frame if is_payload else frame.bytes)
        if not frame.more:
            return frames
        is_payload = len(frames) >= 2


def send(socket: Socket, frames: Sequence[Buffer]) -> bool:
    """Send a message if it can go now. Copies: a kernel may use the memory of its output again."""
    last = len(frames) - 1
    try:
        for index, frame in enumerate(frames):
            socket.send(frame, _NOBLOCK | (_SNDMORE if index < last else 0))
    except zmq.Again:  # only ever the first frame: a message that has begun is taken as a whole
        return False
    return True


class Monitor:
    """Tells when a socket's connection breaks, and why none comes about. `fd` is to be polled for POLLIN.

    `refusal`: why the broker will not have this worker; `problem`: why the last handshake failed; empty if none did.
    """

    def __init__(self, socket: Socket, key: OwnKey | None = None) -> None:
        self.refusal = self.problem = ""
        self._watched = socket
        self._key = key
        self._events = socket.get_monitor_socket(int(zmq.EVENT_DISCONNECTED) | FAILED_EVENTS)
        self.fd = int(self._events.getsockopt(zmq.FD))
        self.has_disconnected()  # the descriptor signals only what comes after the socket was found empty

    def has_disconnected(self) -> bool:
        """Whether it broke since the last call."""
        has = False
        while can_receive(self._events):
            event = int(parse_monitor_message(self._events.recv_multipart(_NOBLOCK))["event"])
            has |= event == zmq.EVENT_DISCONNECTED
            if event & FAILED_EVENTS:
                self.problem = reason(event, self._key)
                self.refusal = self.problem if is_refusal(event) else ""
        return has

    def close(self) -> None:
        self._watched.disable_monitor()
        self._events.close()


class Wake:
    """Ends another thread's poll, or this one's from a signal handler."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)

    def set(self) -> None:
        try:
            os.write(self._write, b"!")
        except BlockingIOError:
            return  # full: it is set

    def clear(self) -> None:
        try:
            while os.read(self.fd, 512):
                continue
        except BlockingIOError:
            return  # empty

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write)

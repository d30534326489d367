"""When a connection counts as dead, and how it is tried again: the transport's half of the failure detectors, for every socket.

Each detector alone misses a case. ZMQ's own heartbeats see a peer that is gone from an idle connection; they wait behind what
is unsent, so that TCP's limit on unacknowledged bytes has to see one that stopped taking what it is sent. Both are answered
below the program: one that stands still is seen by the heartbeats of the protocol, which the broker, `worker/pulse.py` and
`client/connection.py` watch. docs/faults.md has what each of them takes. Knows socket options, not messages.
"""

import random
from typing import Any, Final

import zmq

PING_MS: Final = 2000
SILENT_MS: Final = 6000
"""A connection on which nothing comes for so long after a ping is closed."""
UNACKNOWLEDGED_MS: Final = 8000
"""So is one whose bytes TCP has sent, or could not send, and nobody took; where the system has such a limit (Linux)."""
RECONNECT_MS: Final = 100
MAX_RECONNECT_MS: Final = 2000
"""Pauses between tries double from one to the other; each socket's are its own, from a half to one and a half of these."""


def detect(socket: "zmq.Socket[Any]") -> None:
    """Before `bind` or `connect`: close connections whose other end is gone without a word, at the latest after 8 s."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
    socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)


def reconnect(socket: "zmq.Socket[Any]") -> None:
    """Before `connect`: try again when the connection is gone. All peers of a broker lose it at the same instant: with pauses
    of their own they do not come back at the same instant."""
    share = 0.5 + random.random()
    socket.setsockopt(zmq.RECONNECT_IVL, round(share * RECONNECT_MS))
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, round(share * MAX_RECONNECT_MS))

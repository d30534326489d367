"""A broker's own first peers: what comes in at its sockets is answered, or it does not say that it is ready.

Knows the two sockets from outside, and what a stranger is told there; leaves no session behind.
"""

import os
from collections.abc import Callable, Sequence

import zmq

from penstock.broker.protocol import TO_CLIENT, TO_WORKER, Code, Fault, Heartbeat, WorkerHeartbeat
from penstock.broker.wire import Message, decode, encode

SECRET_BYTES = 16


class SelfTestFailed(Exception):
    """The broker does not answer itself; the text says where."""


def strangers(front: str, back: str) -> Sequence[tuple[str, Message, dict[str, type[Message]]]]:
    """A question for each endpoint, from somebody without a session, and what may be said to such a peer."""
    return ((front, Heartbeat(), TO_CLIENT), (back, WorkerHeartbeat(session=os.urandom(SECRET_BYTES)), TO_WORKER))


def check(context: "zmq.Context[zmq.Socket[bytes]]", front: str, back: str, turn: Callable[[], bool]) -> None:
    """Ask at both endpoints; they must say that they do not know us.

    Args:
        turn: has the broker do a little of its work; False: the time for it is over.
    Raises:
        SelfTestFailed: there is no answer, or another one.
    """
    for endpoint, question, answers in strangers(front, back):
        with context.socket(zmq.DEALER) as peer:
            peer.set(zmq.LINGER, 0)
            peer.set(zmq.IPV6, int("[" in endpoint))
            peer.connect(endpoint)
            peer.send_multipart(encode(question))
            while not peer.poll(0):
                if not turn():
                    raise SelfTestFailed(f"{endpoint} is bound, but a message sent there is not answered")
            answer = decode(answers, peer.recv_multipart())
        if not isinstance(answer, Fault) or answer.error.code != Code.UNATTACHED:
            raise SelfTestFailed(f"{endpoint} answers a stranger with {answer}")

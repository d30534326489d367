"""The socket of a session, and what it does when the broker's end goes away in the middle of a turn."""

import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from penstock.broker import protocol as p
from penstock.broker.address import Address
from penstock.broker.columns import Buffer
from penstock.broker.ways import Way, Ways
from penstock.broker.wire import decode, encode
from penstock.client.config import ClientConfig
from penstock.client.connection import READY
from penstock.client.link import Link
from penstock.client.session import Session

LIMIT_MS = 10_000
TOLD_S = 0.02
"""A send hears of the end of its connection at most once in some milliseconds (libzmq's `max_command_delay`)."""


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    with zmq.Context() as made:
        yield made


def test_a_connection_that_breaks_between_looking_and_sending(
    tmp_path: Path, context: "zmq.Context[zmq.Socket[bytes]]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is lost with it, and the session says hello to whoever comes next."""
    address = Address(f"ipc://{tmp_path}")
    session = Session(ClientConfig(), "test", bytes)
    link = Link(session, Ways([Way(address)]))
    broker = listen(context, address)
    session.open(time.monotonic())
    greet(link, session, broker)

    def take_late(now: float) -> list[Buffer] | None:
        monkeypatch.undo()
        frames = session.take(now)
        broker.close(0)
        assert select.select([link.fileno()], [], [], LIMIT_MS / 1000)[0]
        while time.monotonic() < now + TOLD_S:
            pass
        return frames

    session.ask(lambda number: p.Status(request=number), time.monotonic())
    monkeypatch.setattr(session, "take", take_late)
    link.turn()
    assert session.error is None
    assert not session.can_send  # it has looked again: what the send heard of the socket is told once
    broker = listen(context, address)
    route, message = next_message(link, broker)
    while not isinstance(message, p.Attach):
        broker.send_multipart([route, *encode(p.Fault(error=p.Error("unattached", "hello?")))])
        route, message = next_message(link, broker)
    link.close(0.0)
    broker.close(0)


def listen(context: "zmq.Context[zmq.Socket[bytes]]", address: Address) -> "zmq.Socket[bytes]":
    broker = context.socket(zmq.ROUTER)
    broker.bind(address.front)
    return broker


def greet(link: Link, session: Session, broker: "zmq.Socket[bytes]") -> None:
    route, hello = next_message(link, broker)
    assert isinstance(hello, p.Hello)
    broker.send_multipart([route, *encode(p.Welcome(epoch=7, heartbeat_ms=1000.0, credit=[10, 1000]))])
    end = time.monotonic() + LIMIT_MS / 1000
    while session.connection.state != READY:
        zmq.select([link], [], [], 0.05)
        link.turn()
        assert time.monotonic() < end


def next_message(link: Link, broker: "zmq.Socket[bytes]") -> tuple[bytes, p.Message]:
    """What the session says next."""
    end = time.monotonic() + LIMIT_MS / 1000
    while not broker.poll(20):
        link.turn()
        assert time.monotonic() < end
    route, *frames = broker.recv_multipart()
    return route, decode(p.FROM_CLIENT, frames)

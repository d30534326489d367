"""The transport's failure detectors: every socket has them, and reconnecting peers do not move in step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from penstock.broker import detectors
from penstock.broker.address import Address
from penstock.broker.door import Door
from penstock.broker.state import FRONT
from penstock.broker.ways import Way, Ways
from penstock.client.config import ClientConfig
from penstock.client.link import Link
from penstock.client.session import Session
from penstock.worker.transport import dealer

LIMIT_MS = 10_000


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(0)


def assert_watches(socket: "zmq.Socket[bytes]") -> None:
    interval, timeout = socket.getsockopt(zmq.HEARTBEAT_IVL), socket.getsockopt(zmq.HEARTBEAT_TIMEOUT)
    assert isinstance(interval, int) and isinstance(timeout, int)
    assert 0 < interval < interval + timeout < LIMIT_MS
    assert 0 < int(socket.getsockopt(zmq.TCP_MAXRT)) < LIMIT_MS


def test_every_socket_has_the_detectors(context: "zmq.Context[zmq.Socket[bytes]]", tmp_path: Path) -> None:
    door = Door(0, FRONT, Address(f"ipc://{tmp_path}"), None, context)
    door.open(1 << 20)
    assert_watches(door.socket)
    worker = dealer(context, door.endpoint)
    assert_watches(worker)
    worker.close(0)
    link = Link(Session(ClientConfig(), "test", lambda n: bytes(n)), Ways([Way(Address(f"ipc://{tmp_path}"))]))
    link.turn()
    assert link._socket is not None
    assert_watches(link._socket)
    link.close(0.0)
    door.close()


def test_pauses_before_reconnecting_differ(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    pauses, longest = set[int](), set[int]()
    for _ in range(200):
        socket = context.socket(zmq.DEALER)
        detectors.reconnect(socket)
        pauses.add(int(socket.getsockopt(zmq.RECONNECT_IVL)))
        longest.add(int(socket.getsockopt(zmq.RECONNECT_IVL_MAX)))
        socket.close()
    assert len(pauses) > 30 and max(pauses) > 2 * min(pauses)
    assert len(longest) > 100 and max(longest) > 2 * min(longest) and max(longest) < LIMIT_MS / 2

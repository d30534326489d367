"""A worker's session, message by message, without sockets, clocks or kernels."""

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.broker import protocol as p
from penstock.broker.columns import Block
from penstock.broker.layout import Column
from penstock.broker.peer_memory import PeerMemory
from penstock.broker.wire import decode, encode
from penstock.worker.link import ATTACHED, GREETED, Final, Link
from penstock.worker.session import Session

ROW = Block(1, (Column("x", "uint8", (4,)),), [None], [b"1234"])
LONG = [p.Answer(i, i + 1, error=p.Error("kernel_failed", "y" * 4000, None, "x" * 4000)) for i in range(40)]
"""More than one header has room for."""


class Rig:
    """A session whose connection takes `room` more messages; what was sent is in `sent`."""

    def __init__(self) -> None:
        self.room = 1000
        self.sent: list[Any] = []
        self.link = Link("cpu-0", "cpu", 1 << 20)
        heart: Any = SimpleNamespace(begin=lambda interval_ms: None, pause=lambda: None)
        self.session = Session(self.link, PeerMemory(0), self.transmit, heart)
        pins = SimpleNamespace(unpin=lambda segments: None)
        engine = SimpleNamespace(specs=[], facts={}, runner=SimpleNamespace(resident={}), pins=pins)
        work: Any = SimpleNamespace(engine=engine, forget=lambda: None)
        self.session.work = work

    def transmit(self, frames: list[Any]) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.sent.append(decode(p.FROM_WORKER, frames))
        return True

    def attach(self, is_resumed: bool = False) -> p.Ready:
        """Hello, welcome, ready."""
        self.session.send_some(0.0)
        hello = self.take(p.WorkerHello)[-1]
        self.welcome(hello.number, is_resumed)
        (ready,) = self.take(p.Ready)
        assert isinstance(ready, p.Ready)
        return ready

    def welcome(self, number: int, is_resumed: bool = False) -> None:
        self.receive(p.Welcome(epoch=1, heartbeat_ms=100.0, is_resumed=is_resumed, number=number))
        self.session.get_ready(0.0)

    def receive(self, message: Any) -> None:
        self.session.receive(encode(message), 0.0)

    def hold(self, token: int, num_rows: int) -> None:
        """Take a lease whose answer is made at once."""
        blocks = [Block(num_rows, ROW.columns, [None], [bytes(4 * num_rows)])]
        assert self.link.on_assign(p.Assign(lease=token, kernel="echo", blocks=blocks))

    def take(self, kind: type[Any]) -> list[Any]:
        taken = [m for m in self.sent if type(m) is kind]
        self.sent = [m for m in self.sent if type(m) is not kind]
        return taken


@pytest.fixture
def rig() -> Rig:
    made = Rig()
    made.attach()
    return made


def rows(finals: list[Any]) -> list[int]:
    return [row for final in finals for answer in final.answers for row in range(answer.start, answer.stop)]


def test_a_long_answer_goes_on_where_it_found_no_room(rig: Rig) -> None:
    rig.hold(5, 40)
    rig.room = 1
    rig.session.send(Final(5, LONG, {}))
    assert 0 < len(rows(rig.sent)) < 40
    assert 5 in rig.link.held
    rig.room = 1000
    rig.session.flush()
    assert rows(rig.take(p.WorkerFinal)) == list(range(40))
    assert not rig.link.held
    assert not rig.session.outbox


def test_over_another_connection_a_long_answer_goes_whole_again(rig: Rig) -> None:
    rig.hold(5, 40)
    rig.room = 1
    rig.session.send(Final(5, LONG, {}))
    rig.take(p.WorkerFinal)
    rig.room = 1000
    rig.session.lose("a test", 0.0)
    assert list(rig.attach(is_resumed=True).leases) == [5]
    assert rows(rig.take(p.WorkerFinal)) == list(range(40))


def test_what_is_left_of_a_forgotten_answer_is_not_the_next_ones(rig: Rig) -> None:
    rig.hold(5, 40)
    rig.room = 1
    rig.session.send(Final(5, LONG, {}))
    rig.room = 1000
    rig.session.lose("a test", 0.0)
    rig.attach(is_resumed=False)
    rig.sent.clear()
    rig.hold(6, 1)
    rig.session.send(Final(6, [p.Answer(0, 1, ROW)], {}))
    assert [m.lease for m in rig.take(p.WorkerFinal)] == [6]


def test_a_welcome_of_an_earlier_hello_is_not_taken_for_the_last_ones(rig: Rig) -> None:
    """Else `ready` would leave out what was assigned between the two, and the broker give it to others."""
    for _ in range(2):  # two faults of the broker that have crossed with hellos
        rig.session.lose("a test", 0.0)
        rig.session.send_some(0.0)
    first, second = rig.take(p.WorkerHello)
    rig.welcome(first.number, is_resumed=True)
    assert rig.link.state == GREETED
    assert not rig.take(p.Ready)
    rig.welcome(second.number, is_resumed=True)
    assert rig.link.state == ATTACHED
    rig.welcome(first.number, is_resumed=True)
    assert rig.link.state == ATTACHED
    assert len(rig.take(p.Ready)) == 1

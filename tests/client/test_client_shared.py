"""A session that shares memory: what goes by descriptor, what comes back, and how it does without."""

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest
from client_fakes import SPECS
from session_rig import PLAIN, Rig

from penstock.broker import protocol
from penstock.broker.arena import Arena
from penstock.broker.columns import pack
from penstock.broker.layout import Column
from penstock.broker.peer_memory import IDLE_S
from penstock.broker.protocol import Code, Error, Outcome
from penstock.broker.segments import IS_POSSIBLE, Segment, make
from penstock.broker.shared import SharedBytes
from penstock.client.config import ClientConfig
from penstock.client.outputs import decode
from penstock.client.plan import Plan
from penstock.client.run import Run

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="shared memory is for Linux")
MIN_BYTES = 70_000
LARGE = np.arange(30_000, dtype="f4")


@pytest.fixture
def probe() -> Iterator[Segment]:
    return make(4096)


@pytest.fixture
def rig(probe: Segment) -> Rig:
    """A session to which the broker has offered to share."""
    rig = Rig(ClientConfig(max_retries=3))
    rig.broker.shared = offer(probe)
    return rig.attached()


def offer(probe: Segment, *held: int) -> dict[str, object]:
    return {"probe": list(probe.place), "min_bytes": MIN_BYTES, "max_bytes": 64 << 20, "held": list(held)}


def submit(rig: Rig, x: object = LARGE, kernel: str = "hold") -> Run:
    plan = Plan(kernel, SPECS[kernel], rig.session.memory.place)
    run, _ = rig.session.submit(plan.row({plan.payload[0].name: x}), PLAIN, rig.now)
    rig.session.flush()
    rig.send()
    return run


def arena(rig: Rig) -> Arena:
    found = rig.session.memory.arena
    assert found is not None
    return found


def shared_of(m: protocol.Submit) -> list[SharedBytes]:
    return [f for f in m.block.frames if isinstance(f, SharedBytes)]


def answer(rig: Rig, run: Run, *, seq: int = 1) -> None:
    block = pack([(Column("out", "uint8", (3,)), None, [b"abc"])], 1)
    rig.tell(protocol.Results(seq=seq, outcomes=[Outcome([(run.id, 0, 1)], block)], credit=(9999, 1 << 30)))


def release(rig: Rig, shared: SharedBytes) -> None:
    rig.tell(protocol.Release(slots=[shared.place[1], shared.offset]))


def test_an_offer_that_can_be_read_is_taken_up(probe: Segment) -> None:
    rig = Rig()
    rig.broker.shared = offer(probe)
    rig.session.open(rig.now)
    rig.exchange()
    assert [type(m) for m in rig.broker.log] == [protocol.Hello, protocol.Share]


@pytest.mark.parametrize("change", [
    {"probe": [1, 2, 3]}, {"probe": [os.getpid(), 0, 5]}, {"probe": None}, {"probe": []}, {"min_bytes": "1"}, {"held": [-1]},
    {"probe": ["..", 3, 4]},
])  # fmt: skip
def test_any_other_offer_is_not(probe: Segment, change: dict[str, object]) -> None:
    rig = Rig()
    rig.broker.shared = {**offer(probe), **change}
    rig.session.open(rig.now)
    rig.exchange()
    assert [type(m) for m in rig.broker.log] == [protocol.Hello]
    submit(rig)
    assert shared_of(rig.submits()[-1]) == []


def test_it_can_be_switched_off(probe: Segment) -> None:
    rig = Rig(ClientConfig(shared_bytes=0))
    rig.broker.shared = offer(probe)
    rig.attached()
    submit(rig)
    assert shared_of(rig.submits()[0]) == []
    assert rig.session.memory.arena is None


def test_large_rows_go_by_descriptor_and_small_ones_do_not(rig: Rig) -> None:
    submit(rig, LARGE[:10])
    submit(rig, LARGE)
    submit(rig, np.zeros(MIN_BYTES - 1, np.uint8))
    submit(rig, b"x" * MIN_BYTES, "data")
    assert [len(shared_of(m)) for m in rig.submits()] == [0, 1, 0, 1]
    (sent,) = shared_of(rig.submits()[1])
    assert os.pread(sent.place[1], sent.nbytes, sent.offset) == LARGE.tobytes()


def test_a_slot_is_free_when_the_task_has_ended_and_the_broker_gives_it_back(rig: Rig) -> None:
    run = submit(rig)
    (sent,) = shared_of(rig.submits()[0])
    answer(rig, run)
    assert arena(rig).num_taken == 1  # a worker may still read it
    release(rig, sent)
    assert arena(rig).num_taken == 0
    other = submit(rig)
    (again,) = shared_of(rig.submits()[1])
    release(rig, again)
    assert arena(rig).num_taken == 1  # it may have to be sent again
    answer(rig, other, seq=2)
    assert arena(rig).num_taken == 0


def test_what_the_broker_cannot_read_is_sent_again_in_frames(rig: Rig) -> None:
    rig.broker.refuse = lambda m: Error(Code.UNSHARED, "cannot open it") if shared_of(m) else None
    run = submit(rig)
    rig.exchange()
    first, second = rig.submits()
    assert shared_of(first)
    assert not shared_of(second)
    assert first.id == second.id == run.id
    assert bytes(second.block.row(0, 0)) == LARGE.tobytes()
    submit(rig)
    assert not shared_of(rig.submits()[-1])  # and nothing after it
    assert rig.session.memory.arena is None


def test_results_are_copied_out_and_acknowledged_at_once(rig: Rig) -> None:
    run = submit(rig)
    of_worker = make(1 << 20)
    of_worker.map[4096 : 4096 + LARGE.nbytes] = LARGE.tobytes()
    column = Column("out", "float32", LARGE.shape, is_framed=True)
    block = pack([(column, None, [SharedBytes(of_worker.place, 4096, LARGE.nbytes)])], 1)
    rig.tell(protocol.Results(seq=1, outcomes=[Outcome([(run.id, 0, 1)], block)], credit=(9999, 1 << 30)))
    assert [m.seq for m in rig.send() if isinstance(m, protocol.Ack)] == [1]
    of_worker.map[:] = b"\0" * (1 << 20)  # its owner uses it again
    part = run.slots[0]
    assert part is not None
    assert np.array_equal(decode(part, 0, False), LARGE)
    assert len(rig.session.memory.opened) == 1
    rig.tell(protocol.Release(segments=[of_worker.inode]))
    assert len(rig.session.memory.opened) == 0


def test_a_result_that_cannot_be_read_is_asked_for_again_in_frames(rig: Rig) -> None:
    run = submit(rig)
    gone = SharedBytes((os.getpid(), 100_000, 1), 0, 3 * 65536)
    block = pack([(Column("out", "uint8", (3 * 65536,), is_framed=True), None, [gone])], 1)
    rig.tell(protocol.Results(seq=1, outcomes=[Outcome([(run.id, 0, 1)], block)], credit=(9999, 1 << 30)))
    assert run.slots[0] is None
    (attach, *_) = rig.send()
    assert isinstance(attach, protocol.Attach)
    assert attach.received == 0
    rig.deliver()
    assert not any(isinstance(m, protocol.Share) for m in rig.send())
    answer(rig, run)
    assert run.slots[0] is not None


def test_after_a_reconnect_the_brokers_word_counts(rig: Rig, probe: Segment) -> None:
    run, ended = submit(rig), submit(rig)
    answer(rig, ended)
    first, second = (shared_of(m)[0] for m in rig.submits())
    assert arena(rig).num_taken == 2
    rig.broker.shared = offer(probe, first.place[1], first.offset)
    rig.broker.drop_connections()
    rig.tell(protocol.Fault(error=Error(Code.UNATTACHED, "who are you")))
    rig.exchange()
    assert arena(rig).num_taken == 1  # the release of the other one was lost on the way
    assert second.offset != first.offset
    assert run.slots[0] is None


def test_a_new_broker_gets_the_same_bytes_again(rig: Rig) -> None:
    run = submit(rig)
    rig.broker.restart()
    rig.reconnect()
    rig.exchange()
    again = rig.submits()[-1]
    assert again.is_again
    assert again.id == run.id
    (sent,) = shared_of(again)
    assert os.pread(sent.place[1], sent.nbytes, sent.offset) == LARGE.tobytes()


def test_a_new_broker_that_does_not_share_gets_them_in_frames(rig: Rig) -> None:
    run = submit(rig)
    rig.broker.restart()
    rig.broker.shared = {}
    rig.reconnect()
    rig.exchange()
    again = rig.submits()[-1]
    assert again.id == run.id
    assert not shared_of(again)
    assert bytes(again.block.row(0, 0)) == LARGE.tobytes()


def test_without_memory_it_goes_through_the_socket(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    submit(rig)
    (sent,) = rig.submits()
    assert not shared_of(sent)
    assert bytes(sent.block.row(0, 0)) == LARGE.tobytes()


def test_idle_memory_is_given_up_and_the_broker_told(rig: Rig) -> None:
    run = submit(rig)
    (sent,) = shared_of(rig.submits()[0])
    answer(rig, run)
    release(rig, sent)
    for _ in range(int(IDLE_S) + 5):
        rig.advance(1.1)
        rig.exchange()
    assert arena(rig).num_bytes == 0
    assert [list(m.segments) for m in rig.broker.log if isinstance(m, protocol.Share)][-1] == []


def test_closing_lets_go_of_everything(rig: Rig) -> None:
    before = len(os.listdir("/proc/self/fd"))
    submit(rig)
    assert len(os.listdir("/proc/self/fd")) > before
    rig.broker.log.clear()
    rig.broker.held.clear()
    rig.session.close()
    assert rig.session.memory.arena is None
    assert len(os.listdir("/proc/self/fd")) == before

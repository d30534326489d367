"""Slots of shared memory come back exactly once, whatever becomes of the tasks that they were for."""

import gc
from collections import Counter
from typing import Any

import pytest
from broker_world import FakeClient, FakeWorker, World, rows_of, spec, tag
from fake_memory import FakeHost, Memory

from penstock.broker import protocol as p
from penstock.broker.columns import Block, pack
from penstock.broker.events import ProcessEnded
from penstock.broker.layout import Column
from penstock.broker.shared import SharedBytes

IDEMPOTENT, ONCE = spec(max_batch_size=8), spec("once", idempotent=False)
ROW_BYTES = 100


class Scene:
    """One client and workers that share memory, and what the broker gave back."""

    def __init__(self, **config: Any) -> None:
        self.host = FakeHost()
        self.world = World(memory=self.host, **config)
        self.client = self.world.client(pid=500)
        self.client.send(p.Share())
        self.memory = Memory(self.host, 500)

    def worker(self, *specs: Any, pid: int = 600, principal: str = "uid:1", shares: bool = True) -> FakeWorker:
        worker = self.world.worker(*(specs or (IDEMPOTENT, ONCE)), pid=pid, principal=principal, name=f"w{pid}")
        if shares:
            worker.send(p.Share())
        return worker

    def submit(self, num_rows: int = 1, client: FakeClient | None = None, **fields: Any) -> bytes:
        run_id = fields.pop("run_id", None) or b"%016d" % next(self.world.numbers)
        block = self.memory.rows([tag(run_id, row).ljust(ROW_BYTES, b"\1") for row in range(num_rows)])
        return (client or self.client).submit(block=block, run_id=run_id, **fields)

    def released(self, peer: Any = None) -> Counter[tuple[int, int]]:
        """The slots that a peer got back since the last time."""
        slots = [n for m in (peer or self.client).take(p.Release) for n in m.slots]
        return Counter(zip(slots[::2], slots[1::2], strict=True))

    def all_released_once(self) -> bool:
        return self.released() == Counter(self.memory.lent)

    @property
    def held(self) -> int:
        sharer = next(iter(self.world.core.clients.sessions())).sharer
        return 0 if sharer is None else sum(sharer.held.values())


def descriptors(message: p.Assign) -> list[SharedBytes]:
    return [f for block in message.blocks for f in block.frames if isinstance(f, SharedBytes)]


def test_rows_go_to_the_worker_as_descriptors_and_back_when_the_lease_ends() -> None:
    s = Scene()
    worker = s.worker()
    run = s.submit(3)
    (assign,) = worker.leases.values()
    assert len(descriptors(assign)) == 3 and [r[:16] for r in rows_of(assign)] == [run] * 3
    assert not s.released() and s.held == 3
    worker.finish()
    assert s.client.results(run, 3)[2] == tag(run, 2).ljust(ROW_BYTES, b"\1")
    assert s.all_released_once() and not s.held


def test_failed() -> None:
    s = Scene()
    worker = s.worker()
    s.submit(2)
    worker.finish(error=p.Error("kernel_failed", "it broke"))
    assert s.all_released_once()


def test_cancelled_in_the_queue() -> None:
    s = Scene()
    s.worker(pid=600)
    busy, waiting = s.submit(), s.submit()
    s.client.send(p.Cancel(id=waiting))
    assert s.released() == {s.memory.lent[1]: 1}
    assert s.client.results(busy) == [None]


def test_cancelled_while_leased_comes_back_only_when_the_worker_has_answered() -> None:
    s = Scene()
    worker = s.worker()
    run = s.submit()
    s.client.send(p.Cancel(id=run))
    assert s.client.results(run) == ["cancelled"] and not s.released()  # the worker may still read it
    worker.finish()
    assert s.all_released_once()


def test_expired_while_leased_and_in_the_queue() -> None:
    s = Scene()
    worker = s.worker()
    s.submit(timeout_ms=100.0)
    s.submit(timeout_ms=100.0)
    s.world.advance(0.2)
    assert s.released() == {s.memory.lent[1]: 1}
    worker.finish()
    assert s.released() == {s.memory.lent[0]: 1}


def test_a_lost_worker_and_a_second_one_that_does_it() -> None:
    s = Scene()
    first, second = s.worker(pid=600), None
    run = s.submit(2)
    first.crash()
    assert not s.released() and s.held == 2
    second = s.worker(pid=601)
    sizes = second.finish_all()
    assert sum(sizes) == 2 and None not in s.client.results(run, 2)
    assert s.all_released_once()


def test_a_task_that_must_not_run_twice_ends_with_its_worker() -> None:
    s = Scene()
    worker = s.worker()
    run = s.submit(kernel="once")
    worker.crash()
    assert s.client.results(run) == ["worker_lost"] and s.all_released_once()


def test_refused_at_the_door() -> None:
    s = Scene(max_queue_rows=1)
    s.submit()
    refused = s.submit()
    assert s.client.refused[refused].code == "overloaded"
    assert s.released() == {s.memory.lent[1]: 1}


def test_the_same_submission_again_is_another_loan_of_the_same_slot() -> None:
    s = Scene()
    worker = s.worker()
    run = b"%016d" % 77
    block = s.memory.rows([tag(run, 0).ljust(ROW_BYTES)])
    s.client.submit(block=block, run_id=run)
    s.client.submit(block=block, run_id=run)
    assert s.world.counters["repeated"] == 1 and s.released() == {s.memory.lent[0]: 1}
    worker.finish()
    assert s.released() == {s.memory.lent[0]: 1}


def test_twins_by_key_share_an_answer_and_give_back_both() -> None:
    s = Scene()
    worker = s.worker()
    rows = [b"\7" * ROW_BYTES]
    first = s.client.submit(block=s.memory.rows(rows), key=b"k")
    second = s.client.submit(block=s.memory.rows(rows), key=b"k")
    third = s.client.submit(block=pack([(Column("x", "uint8", (ROW_BYTES,), is_framed=True), None, rows)], 1), key=b"k")
    worker.finish()
    assert s.client.results(first) == s.client.results(second) == s.client.results(third) == rows
    assert not s.client.refused and s.all_released_once()  # the same content is no conflict, however it came


def test_a_client_that_leaves() -> None:
    s = Scene()
    worker = s.worker()
    s.submit()
    s.submit()
    s.client.send(p.Goodbye())
    s.world.turn()
    worker.finish()
    s.world.turn()
    assert s.world.state.sharing.report()["segments"] == 0
    assert [m.segments for m in worker.take(p.Release)] == [[s.memory.segment.real[2]]]  # and told to forget it


def test_a_client_whose_process_ends_takes_its_session_along() -> None:
    s = Scene()
    worker = s.worker()
    s.submit()
    s.client.vanish()
    s.world.step(ProcessEnded(500))
    assert len(s.world.core.clients) == 0
    worker.finish()
    s.world.turn()
    assert s.world.state.sharing.report()["segments"] == 0


def test_results_are_lent_until_they_are_acknowledged() -> None:
    s = Scene()
    worker, of_worker = s.worker(), Memory(s.host, 600)
    run = s.submit(2)
    answer(worker, of_worker.rows([b"a" * 50, b"b" * 50], "out"))
    (results,) = s.client.take(p.Results)
    assert results.outcomes[0].block.has_shared and s.client.results(run, 2) == [b"a" * 50, b"b" * 50]
    assert not s.released(worker)
    s.client.send(p.Ack(seq=s.client.received))
    assert s.released(worker) == Counter(of_worker.lent)


def test_results_outlive_their_worker() -> None:
    s = Scene()
    worker, of_worker = s.worker(), Memory(s.host, 600)
    run = s.submit()
    s.client.disconnect()
    answer(worker, of_worker.rows([b"a" * 50], "out"))
    worker.crash()
    s.client.attach([run])
    assert s.client.results(run) == [b"a" * 50]
    assert not any(f for m in s.client.take(p.Results) for f in m.outcomes[0].block.frames if isinstance(f, SharedBytes))
    s.client.send(p.Ack(seq=s.client.received))
    assert s.world.state.sharing.report()["segments"] == 1  # the client's own


def test_late_answers_are_given_back_at_once() -> None:
    s = Scene()
    worker, of_worker = s.worker(), Memory(s.host, 600)
    run = s.submit()
    s.client.send(p.Cancel(id=run))
    answer(worker, of_worker.rows([b"a" * 50], "out"))
    assert s.released(worker) == Counter(of_worker.lent)
    worker.send(p.WorkerFinal(lease=12345, answers=[p.Answer(0, 1, of_worker.rows([b"b" * 50], "out"))]))
    assert s.released(worker) == {of_worker.lent[1]: 1}


def test_a_client_that_left_gives_back_results() -> None:
    s = Scene()
    worker, of_worker = s.worker(), Memory(s.host, 600)
    s.submit()
    answer(worker, of_worker.rows([b"a" * 50], "out"))
    s.client.send(p.Goodbye())
    assert s.released(worker) == Counter(of_worker.lent)


def test_a_remembered_outcome_does_not_keep_the_workers_memory() -> None:
    s = Scene()
    worker, of_worker = s.worker(), Memory(s.host, 600)
    first = s.submit(key=b"k")
    answer(worker, of_worker.rows([b"a" * 50], "out"))
    s.client.send(p.Ack(seq=s.client.received))
    assert s.released(worker) == Counter(of_worker.lent)
    request = bytes(s.memory.segment.data[:ROW_BYTES])
    again = s.client.submit(block=s.memory.rows([request]), key=b"k")
    assert s.client.results(again) == s.client.results(first) == [b"a" * 50]


def test_nothing_waits_for_the_collector() -> None:
    """The broker runs without it, and a slot comes back with the last reference."""
    s = Scene(max_queue_rows=6)
    worker, of_worker = s.worker(), Memory(s.host, 600)
    gc.collect()
    gc.disable()
    try:
        for number in range(12):
            run = s.submit(2, timeout_ms=50.0)
            s.submit(5)  # refused: the queue is full
            s.client.submit(block=pack([(Column("x", "uint8", (9,), is_framed=True), None, [far(s)])], 1))
            if number % 3 == 0:
                s.client.send(p.Cancel(id=run))
            if number % 4 == 1:
                answer(worker, of_worker.rows([b"a" * 50] * 2, "out"))
                s.client.send(p.Ack(seq=s.client.received))
            elif number % 4 == 2:
                worker.crash()
                worker, of_worker = s.worker(pid=700 + number), Memory(s.host, 700 + number)
            s.client.send(p.Share(segments=[s.memory.segment.real[2]]))
            s.world.advance(0.1)
            while worker.leases:
                worker.finish(next(iter(worker.leases)))
        s.client.send(p.Ack(seq=s.client.received))
        assert s.held == 0
    finally:
        gc.enable()


def far(s: Scene) -> SharedBytes:
    """A descriptor past the end."""
    return SharedBytes(s.memory.segment.real, s.memory.segment.nbytes, 9)


# --- who may read what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", [{"shares": False}, {"principal": "uid:2"}], ids=["does not share", "another user"])
def test_a_worker_that_cannot_read_it_gets_the_bytes(worker: dict[str, Any]) -> None:
    s = Scene()
    other = s.worker(**worker)
    run = s.submit(2)
    (assign,) = other.leases.values()
    assert not descriptors(assign) and [r[:16] for r in rows_of(assign)] == [run] * 2
    assert s.world.state.sharing.report()["fallbacks"] == {"reader": 2}
    other.finish()
    assert s.all_released_once()


def test_a_worker_is_told_when_not_everybody_can_read_its_answer() -> None:
    s = Scene()
    worker = s.worker()
    s.submit()
    assert not next(iter(worker.leases.values())).is_unshared
    worker.finish()
    plain = s.world.client("plain")
    plain.submit()
    assert next(iter(worker.leases.values())).is_unshared
    worker.finish()
    s.world.client("other", principal="uid:2").submit()
    assert next(iter(worker.leases.values())).is_unshared


def test_a_client_that_does_not_share_gets_results_in_frames() -> None:
    s = Scene()
    worker, of_worker = s.worker(), Memory(s.host, 600)
    plain = s.world.client("plain")
    run = plain.submit()
    answer(worker, of_worker.rows([b"a" * 50], "out"))
    (results,) = plain.take(p.Results)
    assert not results.outcomes[0].block.has_shared and plain.results(run) == [b"a" * 50]
    assert not s.released(worker)
    plain.send(p.Ack(seq=1))
    assert s.released(worker) == Counter(of_worker.lent)


def test_memory_of_another_user_is_refused() -> None:
    s = Scene()
    s.memory = Memory(s.host, 500, owner="uid:2")
    run = s.submit()
    assert s.client.refused[run].code == "unshared" and s.all_released_once()
    assert s.world.state.sharing.report()["fallbacks"] == {"owner": 1}


def test_memory_of_another_process_is_refused() -> None:
    s = Scene()
    s.memory = Memory(s.host, 501)
    run = s.submit()
    assert s.client.refused[run].code == "unshared" and s.all_released_once()


def test_a_descriptor_past_the_end_is_refused() -> None:
    s = Scene()
    frame = s.memory.place(b"x" * ROW_BYTES)
    for offset in (s.memory.segment.nbytes - ROW_BYTES + 1, s.memory.segment.nbytes, (1 << 48) - 1):
        far = SharedBytes(frame.place, offset, ROW_BYTES)
        run = s.client.submit(block=pack([(Column("x", "uint8", (ROW_BYTES,), is_framed=True), None, [far])], 1))
        assert s.client.refused[run].code == "unshared"


def test_too_many_slots_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.broker.sharing.MAX_LOANS", 3)
    s = Scene()
    s.submit(2)
    assert s.client.refused[s.submit(2)].code == "unshared"


def test_more_memory_than_allowed_is_refused() -> None:
    s = Scene(shared_bytes=1000)
    run = s.submit()
    assert s.client.refused[run].code == "unshared" and s.world.state.sharing.report()["segments"] == 0


def test_descriptors_from_who_never_said_so_are_a_protocol_error() -> None:
    s = Scene()
    plain = s.world.client("plain", pid=500)
    s.submit(client=plain)
    assert plain.take(p.Fault)[-1].error.code == "protocol"


def test_large_rows_that_found_no_room_are_counted() -> None:
    s = Scene(shared_min_bytes=50)
    for size in (49, 50, 100):
        s.client.submit(block=pack([(Column("x", "uint8", (size,), is_framed=True), None, [b"x" * size])], 1))
    assert s.world.state.sharing.report()["fallbacks"] == {"no_room": 2}


def test_shared_bytes_count_against_the_limits() -> None:
    s = Scene(max_queue_bytes=150)
    s.submit()
    assert s.client.refused[s.submit()].code == "overloaded"


def test_without_memory_nothing_is_offered_and_nothing_taken() -> None:
    world = World()
    client = world.client(pid=500)
    assert not client.take(p.Welcome)[-1].shared
    client.send(p.Share())
    assert client.take(p.Fault)[-1].error.code == "protocol"


# --- when it goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["echo", "once"])
def test_a_worker_that_cannot_open_it_gets_the_rows_again_in_frames(kernel: str) -> None:
    s = Scene()
    worker = s.worker()
    run = s.submit(2, kernel=kernel)
    worker.finish(error=p.Error("unshared", "cannot open it"), num_runs=0)
    if kernel == "once":
        assert s.client.results(run, 2) == ["worker_lost"] * 2
        return
    (assign,) = worker.leases.values()
    assert not descriptors(assign) and assign.is_unshared
    worker.finish()
    assert None not in s.client.results(run, 2) and s.all_released_once()


def test_an_answer_that_the_broker_cannot_open_is_asked_for_again() -> None:
    s = Scene()
    worker, elsewhere = s.worker(), Memory(s.host, 601)
    run = s.submit()
    answer(worker, elsewhere.rows([b"a" * 50], "out"))
    assert s.client.results(run) == [None]
    (assign,) = worker.leases.values()
    assert assign.is_unshared
    worker.finish()
    assert s.client.results(run) != [None]


def test_after_a_reconnect_the_broker_says_what_it_still_holds() -> None:
    s = Scene()
    worker = s.worker()
    s.submit(2)
    lost = s.submit()
    s.client.disconnect()
    worker.finish()  # the client is away, so the release is not sent
    welcome = s.client.attach([lost])
    fd = s.memory.segment.real[1]
    assert welcome.shared["held"] == [fd, s.memory.lent[2][1]]
    s.client.send(p.Share(segments=[s.memory.segment.real[2]]))
    worker.finish()
    assert s.released() == {s.memory.lent[2]: 1}


def test_segments_that_a_peer_has_given_up_are_closed() -> None:
    s = Scene()
    worker = s.worker()
    s.submit()
    worker.finish()
    assert s.world.state.sharing.report()["segments"] == 1
    s.client.send(p.Share(segments=[]))
    assert s.world.state.sharing.report()["segments"] == 0
    assert [list(m.segments) for m in worker.take(p.Release)] == [[s.memory.segment.real[2]]]


def answer(worker: FakeWorker, block: Block) -> None:
    """The whole lease with a block that lies in the worker's memory."""
    token = worker.the_lease()
    del worker.leases[token]
    worker.credit = [worker.credit[0] + 1, worker.credit[1]]
    worker.send(p.WorkerFinal(lease=token, answers=[p.Answer(0, block.num_rows, block)], credit=worker.credit))

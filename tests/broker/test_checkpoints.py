"""Checkpoints of streaming tasks in the core: whose counts, who is given one, what they weigh, and what a restart finds."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from broker_world import TAG_BYTES, FakeWorker, World, X, echo_block, spec, tag

from penstock.broker import durable
from penstock.broker import protocol as p
from penstock.broker.checkpoints import MAX_ACQUITTALS
from penstock.broker.storage.records import Corrupt, Put
from penstock.broker.storage.sqlite import LARGE_BYTES, SqliteStore
from penstock.broker.storage.store import MemoryStore
from penstock.broker.wire import VERSION, decode, encode

LONG = spec("long", modes=["stream"], max_batch_size=4, checkpoints=True)
PLAIN = spec("long", modes=["stream"], max_batch_size=4, digest=b"without")


def next_worker(w: World, *specs: Any, **fields: Any) -> FakeWorker:
    return w.worker(*(specs or (LONG,)), pid=next(w.numbers), **fields)


def saved(assign: p.Assign) -> bytes | None:
    """What a row goes on from, after its name, which must be its own."""
    if assign.checkpoint is None:
        return None
    data = bytes(assign.checkpoint.row(0, 0))
    assert data[:TAG_BYTES] == bytes(assign.blocks[0].row(0, 0))[:TAG_BYTES], "another row's checkpoint"
    return data[TAG_BYTES:]


def resumed(worker: FakeWorker) -> list[bytes | None]:
    return [saved(assign) for assign in worker.leases.values()]


# --- who gets it -------------------------------------------------------------------------------------------------------


def test_the_next_worker_goes_on_from_the_newest() -> None:
    w = World()
    client, worker = w.client(), next_worker(w)
    run = client.submit(kernel="long")
    assert resumed(worker) == [None]
    worker.save(data=b"one", part=2)
    worker.save(data=b"two", part=5)
    worker.crash()
    other = next_worker(w)
    assert resumed(other) == [b"two"]
    assert other.leases[other.the_lease()].part == 5
    assert w.counters["resumed"] == 1
    other.finish()
    assert client.results(run) == [tag(run, 0)]
    assert w.state.ledger.saved_bytes == w.state.ledger.open_bytes == 0


@pytest.mark.parametrize("how", ["crash", "goodbye", "silent", "left out"])
def test_whatever_the_reason(how: str) -> None:
    w = World()
    client, worker = w.client(), next_worker(w)
    client.submit(kernel="long")
    worker.save(data=b"here")
    if how == "crash":
        worker.crash()
    elif how == "goodbye":
        worker.send(p.Goodbye())
    elif how == "silent":
        w.advance(8.0)
    else:
        worker.ready(leases=())
        assert resumed(worker) == [b"here"]
        return
    assert resumed(next_worker(w)) == [b"here"]


def test_each_row_has_its_own() -> None:
    w = World()
    client, worker = w.client(), next_worker(w)
    client.submit(4, kernel="long")
    for number, token in enumerate(worker.leases):
        if number != 2:
            worker.save(token, b"%d" % number)
    worker.send(p.Goodbye())
    assert sorted(resumed(next_worker(w)), key=str) == sorted([b"0", b"1", None, b"3"], key=str)


def test_only_the_holder_of_the_lease_may_write() -> None:
    w = World()
    client, worker = w.client(), next_worker(w)
    client.submit(kernel="long")
    worker.save(data=b"true")
    token, other = worker.the_lease(), next_worker(w, name="other")
    other.send(p.Checkpoint(lease=token, block=echo_block([b"forged"])))
    worker.crash()
    assert resumed(other) == [b"true"]
    worker.hello()  # it was only cut off, and goes on with what is not its own any more
    worker.ready()
    worker.send(p.Checkpoint(lease=token, block=echo_block([b"late"])))
    assert w.counters["late_checkpoints"] == 2
    other.send(p.Goodbye())
    assert resumed(worker) == [b"true"]


def test_one_of_a_row_that_has_ended_is_dropped() -> None:
    w = World()
    client, worker = w.client(), next_worker(w)
    run = client.submit(kernel="long")
    worker.save(data=b"x" * 1000)
    client.send(p.Cancel(id=run))
    assert w.state.ledger.saved_bytes == 0
    worker.save(data=b"more")
    assert w.counters["late_checkpoints"] == 1
    assert w.state.ledger.saved_bytes == 0


def test_another_version_of_the_kernel_begins_anew() -> None:
    w = World()
    client, worker = w.client(), next_worker(w)
    client.submit(kernel="long")
    worker.save(data=b"old")
    worker.crash()
    newer = next_worker(w, {**LONG, "digest": b"version2"})
    assert resumed(newer) == [None]
    assert w.counters["checkpoints_outdated"] == 1
    newer.send(p.Goodbye())
    assert resumed(next_worker(w)) == [None], "nor does the old one come back to it"


# --- older and wrong peers ---------------------------------------------------------------------------------------------


def test_a_worker_of_1_2_is_given_none_and_sends_none() -> None:
    """Its kernels do not offer any; what it is sent has no field that it would have to know."""
    w = World()
    client, worker = w.client(), next_worker(w, PLAIN)
    client.submit(kernel="long")
    frames = encode(worker.leases[worker.the_lease()])
    assert {"checkpoint", "part"}.isdisjoint(msgpack.unpackb(frames[1]))
    assert len(frames) == 3
    worker.save(data=b"anyway")
    assert "offers none" in worker.take(p.Fault)[0].error.message
    assert w.state.ledger.saved_bytes == 0


def test_a_broker_of_1_2_offers_no_limits() -> None:
    welcome = decode(p.TO_WORKER, [b"PS\x01\x02", msgpack.packb({"type": "welcome", "epoch": 1, "heartbeat_ms": 1e3})])
    assert isinstance(welcome, p.Welcome)
    assert not welcome.limits
    assert VERSION == b"PS\x01\x03"


def test_workers_are_told_the_limits() -> None:
    worker = next_worker(World(checkpoint_s=2.0, max_checkpoint_bytes=1000))
    assert worker.take(p.Welcome)[0].limits == {"checkpoint_ms": 2000.0, "max_checkpoint_bytes": 1000}
    assert next_worker(World(max_message_bytes=500)).take(p.Welcome)[0].limits["max_checkpoint_bytes"] == 500
    assert next_worker(World(max_checkpoint_bytes=0)).take(p.Welcome)[0].limits == {}


def test_a_checkpoint_of_two_rows_is_none() -> None:
    w = World()
    client, worker = w.client(), next_worker(w)
    client.submit(kernel="long")
    worker.send(p.Checkpoint(lease=worker.the_lease(), block=echo_block([b"a", b"b"])))
    assert "one row" in worker.take(p.Fault)[0].error.message


# --- limits ------------------------------------------------------------------------------------------------------------


def test_too_large_ones_leave_the_one_before() -> None:
    w = World(max_checkpoint_bytes=1000)
    client, worker = w.client(), next_worker(w)
    client.submit(kernel="long")
    worker.save(data=b"small")
    worker.save(data=b"x" * 1000)
    assert w.counters["checkpoints_without_room"] == 1
    worker.crash()
    assert resumed(next_worker(w)) == [b"small"]


def test_half_of_the_queue_is_for_tasks() -> None:
    w = World(max_queue_bytes=2000)
    client, worker = w.client(), next_worker(w)
    for _ in range(3):
        client.submit(kernel="long")
    for token in worker.leases:
        worker.save(token, b"x" * 400)
    assert w.counters["checkpoints"] == 2
    assert w.counters["checkpoints_without_room"] == 1
    assert w.state.ledger.open_bytes == 3 * 20 + 2 * 420
    refused = client.submit(60)
    assert client.refused[refused].code == "overloaded", "they count as what is open does"
    worker.finish_all()
    assert w.state.ledger.open_bytes == w.state.ledger.saved_bytes == 0
    assert {account.open_bytes for account in w.state.policy.accounts} == {0}


def test_a_checkpoint_is_progress() -> None:
    w = World(progress_s=10.0)
    client, worker = w.client(), next_worker(w)
    client.submit(kernel="long")
    for _ in range(8):
        for _ in range(3):
            w.advance(1.0)
            worker.heartbeat()  # alive, and by its own count it gets nowhere
        worker.save()
    assert w.counters["workers_lost"] == 0
    for _ in range(12):
        w.advance(1.0)
        worker.heartbeat()
    assert w.counters["workers_lost"] == 1


# --- suspects ----------------------------------------------------------------------------------------------------------


def lives(w: World, client: Any, run: bytes, live: Callable[[FakeWorker], None], limit: int = 50) -> int:
    """Workers come one after another, live, and are lost; how many until the run has an outcome."""
    for number in range(1, limit):
        worker = next_worker(w)
        live(worker)
        worker.crash()
        if client.results(run) != [None]:
            return number
    raise AssertionError(f"no outcome after {limit} workers")


def test_what_never_gets_on_is_dead_as_ever() -> None:
    w = World(max_attempts=2)
    client = w.client()
    run = client.submit(kernel="long")
    assert lives(w, client, run, lambda worker: None) == 2
    assert client.results(run) == ["dead"]


def test_deaths_count_from_the_last_checkpoint() -> None:
    w = World(max_attempts=2)
    client = w.client()
    run = client.submit(kernel="long")
    count = iter(range(100))
    assert lives(w, client, run, lambda worker: worker.save() if next(count) < 6 else None) == 7
    assert client.results(run) == ["dead"]
    assert client.row(run).error.detail.count("\n") == 6, "with all the evidence there is"


def test_one_that_only_seems_to_get_on_ends_too() -> None:
    w = World(max_attempts=2)
    client = w.client()
    run = client.submit(kernel="long")
    assert lives(w, client, run, lambda worker: worker.save(data=b"again and again")) == MAX_ACQUITTALS + 2
    assert client.results(run) == ["dead"]


def test_a_suspect_goes_on_alone() -> None:
    w = World()
    client, worker = w.client(), next_worker(w)
    for _ in range(3):
        client.submit(kernel="long")
    for token in worker.leases:
        worker.save(token, b"there")
    worker.crash()
    worker = next_worker(w)
    for _ in range(3):
        assert resumed(worker) == [b"there"]
        worker.save(data=b"there")
        worker.finish()


# --- the disk ----------------------------------------------------------------------------------------------------------


class Disk:
    """A store on disk with the verbs by which the world drives its twin in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = SqliteStore(folder)
        self._ticket = 0
        self._next: Disk | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append(self, writes: Any) -> int:
        self._ticket = self._store.append(writes)
        return self._ticket

    def commit(self) -> None:
        limit = time.monotonic() + 20.0
        while self._store.committed < self._ticket:
            assert self._store.failure is None
            assert time.monotonic() < limit
            time.sleep(0.0005)

    def crash(self, num_kept: int = 0) -> "Disk":
        self._store.close()
        self._next = Disk(self._folder)
        return self._next

    def close_last(self) -> None:
        """Let go of the files, whoever has them now."""
        if self._next is not None:
            self._next.close_last()
        else:
            self._store.close()


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield MemoryStore()
        return
    opened = [Disk(tmp_path / "journal")]
    yield opened[0]
    opened[0].close_last()


def durable_run(w: World, rows: int = 1) -> bytes:
    run = w.client().submit(rows, kernel="long", is_durable=True, wants_accepted=True)
    w.commit()
    return run


@pytest.mark.parametrize("size", [10, LARGE_BYTES + 1])
def test_a_restarted_broker_has_the_newest(store: Any, size: int) -> None:
    w = World(store=store)
    durable_run(w, 3)
    worker = next_worker(w)
    for round_ in range(3):
        for number, token in enumerate(list(worker.leases)[:2]):
            worker.save(token, b"%d.%d" % (number, round_) + b"x" * size, part=10 * number + round_)
            w.now += 1.0
    w.commit()
    w.restart()
    other = next_worker(w)
    assert [(s or b"")[:3] for s in resumed(other)] == [b"0.2", b"1.2", b""]
    assert [assign.part for assign in other.leases.values()] == [2, 12, 0]
    num_lost = w.state.ledger.saved_bytes
    other.finish_all()
    w.commit()
    assert num_lost == 2 * (TAG_BYTES + 3 + size)
    assert w.state.ledger.saved_bytes == 0
    w.restart()
    assert w.state.ledger.num_open == 0


def test_old_ones_go_from_the_disk(store: Any) -> None:
    w = World(store=store)
    durable_run(w)
    worker = next_worker(w)
    for number in range(200):
        worker.save(data=b"%d" % number + b"x" * LARGE_BYTES)
        w.now += 1.0
        w.commit()
    assert w.store is not None
    w.store = w.store.crash()
    kinds = [put.kind for put in w.store.load()]
    assert sorted(kinds) == [1, 6], "the task and one checkpoint"


def test_the_end_of_a_row_takes_its_checkpoint_from_the_disk(store: Any) -> None:
    w = World(store=store)
    durable_run(w)
    worker = next_worker(w)
    worker.save()
    w.commit()
    worker.finish()
    w.commit()
    assert w.store is not None
    assert 6 not in [put.kind for put in w.store.crash().load()]


def test_numbers_are_not_used_twice() -> None:
    """The number of a checkpoint's record is no later task's: erasing one would take the other along."""
    w = World(store=MemoryStore())
    durable_run(w)
    next_worker(w).save(data=b"kept")
    w.commit()
    w.restart()
    second = durable_run(w)
    worker = next_worker(w)
    worker.finish(next(token for token, assign in worker.leases.items() if assign.checkpoint is not None))
    w.commit()
    w.restart()
    assert w.state.ledger.find("uid:1", second) is not None


def test_a_checkpoint_that_was_not_safe_costs_time_and_nothing_else() -> None:
    w = World(store=MemoryStore())
    durable_run(w)
    worker = next_worker(w)
    worker.save(data=b"safe")
    w.commit()
    w.now += 1.0
    worker.save(data=b"lost")
    w.restart()
    assert resumed(next_worker(w)) == [b"safe"]


def test_the_disk_is_not_kept_busy_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "SAVED_BYTES_PER_S", 100)
    w = World(store=MemoryStore())
    durable_run(w)
    worker = next_worker(w)
    worker.save(data=b"a" * 180)  # 200 bytes with its name: for two seconds nothing else is written
    worker.save(data=b"b")
    w.commit()
    worker.crash()
    other = next_worker(w)
    assert resumed(other) == [b"b"], "memory has the newest"
    w.now += 2.1
    w.restart()
    assert resumed(next_worker(w)) == [b"a" * 180]


def test_a_full_disk_keeps_the_old_one() -> None:
    w = World(store=MemoryStore())
    durable_run(w)
    worker = next_worker(w)
    worker.save(data=b"old")
    w.now += 1.0
    w.state.journal.has_room = False
    worker.save(data=b"new")
    w.commit()
    w.restart()
    assert resumed(next_worker(w)) == [b"old"]


def test_deaths_and_acquittals_outlive_the_broker() -> None:
    w = World(store=MemoryStore(), max_attempts=2)
    run = durable_run(w)
    for number in range(MAX_ACQUITTALS + 1):
        worker = next_worker(w)
        worker.save(data=b"%d" % number)
        worker.crash()
        w.now += 1.0
        w.commit()
        w.restart()
    assert w.state.ledger.num_open == 1
    next_worker(w).crash()
    w.commit()
    client = w.client()
    client.submit(kernel="long", run_id=run, is_durable=True)
    assert client.results(run) == ["dead"]


def test_a_restart_counts_deaths_from_the_checkpoint_on() -> None:
    w = World(store=MemoryStore(), max_attempts=2)
    durable_run(w)
    next_worker(w).crash()
    next_worker(w).save()
    w.commit()
    w.restart()
    next_worker(w).crash()
    assert w.state.ledger.num_open == 1, "the death before it counts no more"
    next_worker(w).crash()
    assert w.state.ledger.num_open == 0


def test_a_requeued_task_begins_anew() -> None:
    w = World(store=MemoryStore())
    run = durable_run(w)
    client = w.client()
    client.submit(kernel="long", run_id=run, is_durable=True)
    worker = next_worker(w)
    worker.save(data=b"where it failed")
    worker.finish(error=p.Error("kernel_failed", "it broke"))
    w.commit()
    client.send(p.Control(request=1, op="requeue", id=run))
    w.commit()
    assert resumed(worker) == [None]


@pytest.mark.parametrize("damage", ["task", "rows", "kind"])
def test_a_record_that_no_broker_wrote_is_refused(damage: str) -> None:
    w = World(store=MemoryStore())
    durable_run(w)
    next_worker(w).save()
    w.commit()
    assert w.store is not None
    store = w.store.crash()
    (put,) = [put for put in store.load() if put.kind == 6]
    head = msgpack.unpackb(bytes(memoryview(put.frames[0])))  # type: ignore[arg-type]
    frames = list(put.frames)
    if damage == "task":
        frames[0] = msgpack.packb([999, *head[1:]])
    elif damage == "rows":
        frames[1:] = encode(p.Checkpoint(lease=0, block=echo_block([b"a", b"b"])))
    else:
        frames[1:] = encode(p.Pull(credit=(0, 0)))
    store.append([Put(put.task + 1, 6, frames)])
    store.commit()
    with pytest.raises(Corrupt, match="cannot be understood"):
        World(store=store)


def test_batch_leases_know_nothing_of_it() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec("echo", (X,), modes=["batch", "stream"], checkpoints=True))
    client.submit(3)
    worker.send(p.Checkpoint(lease=worker.the_lease(), block=echo_block([b"x"])))
    assert "offers none" in worker.take(p.Fault)[0].error.message

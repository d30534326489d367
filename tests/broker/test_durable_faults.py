"""What durable tasks owe when several submissions share a key, when acknowledgements come late, and at their limits."""

import struct
import time
from pathlib import Path
from typing import Any

import pytest
from broker_world import FakeClient, FakeWorker, World, echo_block, spec, tag, tensor_rows

from penstock.broker import protocol as p
from penstock.broker.columns import pack
from penstock.broker.kept import ACKED, STARTED, UNTIMED, noted, outcome_of
from penstock.broker.layout import Column
from penstock.broker.storage.records import Corrupt, Put
from penstock.broker.storage.sqlite import SqliteStore
from penstock.broker.storage.store import MemoryStore

KEY = b"key"
BLOCK = tensor_rows(b"b" * 16, 1)
TOLD = tag(b"b" * 16, 0)
BROKEN = p.Error("kernel_failed", "it broke")


def durable_world(**config: Any) -> World:
    return World(store=MemoryStore(), **{"session_ttl_s": 1e6, "liveness_s": 1e6, **config})


def submit(client: FakeClient, rows: int = 1, **fields: Any) -> bytes:
    return client.submit(rows, is_durable=True, wants_accepted=True, **fields)


def twins(**first: Any) -> tuple[World, FakeClient, FakeClient, bytes, bytes]:
    """Two clients with one durable task."""
    w = durable_world()
    a, b = w.client("a"), w.client("b")
    runs = submit(a, key=KEY, block=BLOCK, **first), submit(b, key=KEY, block=BLOCK)
    w.commit()
    return w, a, b, *runs


def ask(client: FakeClient, make: type[Any], **fields: Any) -> p.Reply:
    client.send(make(request=1, **fields))
    client.world.commit()
    (reply,) = client.take(p.Reply)
    return reply


def acknowledge(*clients: FakeClient) -> None:
    for client in clients:
        client.send(p.Ack(seq=client.received))
        client.world.commit()


def finish(w: World, worker: FakeWorker | None = None, error: p.Error | None = None) -> None:
    (worker or w.worker()).finish(error=error)
    w.commit()


def kept_bytes(w: World) -> int:
    return int(w.state.journal.retained.num_bytes)


# --- one key, several submissions --------------------------------------------------------------------------------------


def test_an_outcome_is_told_to_nobody_before_it_is_safe() -> None:
    w, a, b, first, second = twins()
    w.worker().finish()
    assert (a.results(first), b.results(second)) == ([None], [None])
    w.commit()
    assert (a.results(first), b.results(second)) == ([TOLD], [TOLD])


def test_who_comes_late_is_told_what_there_is_when_it_is_safe() -> None:
    w = durable_world()
    a, b = w.client("a"), w.client("b")
    block = tensor_rows(b"b" * 16, 2)
    submit(a, key=KEY, block=block)
    w.commit()
    worker = w.worker()
    worker.answer(worker.the_lease(), 0, 1)
    second = b.submit(2, key=KEY, block=block)
    assert b.results(second, 2) == [None, None]
    w.commit()
    assert b.results(second, 2) == [TOLD, None]


@pytest.mark.parametrize("how", ["cancel", "expire"])
def test_the_same_key_is_the_same_task_when_it_ends_early(how: str) -> None:
    """All that submitted it are told the same, and so is whoever asks after a crash."""
    w, a, b, first, second = twins(timeout_ms=5000.0 if how == "expire" else None)
    code = "cancelled" if how == "cancel" else "deadline_exceeded"
    if how == "cancel":
        a.send(p.Cancel(id=first))
    else:
        w.advance(6.0)
    w.commit()
    assert (a.results(first), b.results(second)) == ([code], [code])
    w.restart()
    heir = w.client()
    third = submit(heir, key=KEY, block=BLOCK)
    w.commit()
    assert heir.results(third) == [code]
    assert not w.worker().leases


@pytest.mark.parametrize("how", ["cancel", "expire", "leave"])
def test_who_ends_its_own_submission_ends_no_other(how: str) -> None:
    w = durable_world()
    a, b = w.client("a"), w.client("b")
    first = submit(a, key=KEY, block=BLOCK)
    second = submit(b, key=KEY, block=BLOCK, timeout_ms=5000.0)
    w.commit()
    if how == "cancel":
        b.send(p.Cancel(id=second))
    elif how == "leave":
        b.send(p.Goodbye())
    else:
        w.advance(6.0)
    finish(w)
    acknowledge(*([] if how == "leave" else [b]))
    assert a.results(first) == [TOLD]
    assert b.results(second) == {"cancel": ["cancelled"], "expire": ["deadline_exceeded"], "leave": [None]}[how]
    assert kept_bytes(w) > 0, "who has not had the outcome has not acknowledged it"
    acknowledge(a)
    assert kept_bytes(w) == 0


def test_the_acknowledgement_of_any_submission_counts() -> None:
    w, a, b, _, second = twins()
    a.vanish()
    finish(w)
    assert b.results(second) == [TOLD]
    acknowledge(b)
    assert kept_bytes(w) == 0


def test_a_task_is_fetched_by_the_id_of_any_submission() -> None:
    w, a, b, first, second = twins()
    b.send(p.Goodbye())
    a.send(p.Goodbye())
    for _ in range(2):  # before a restart and after
        heir = w.client()
        assert ask(heir, p.Fetch, id=second).body["id"] == first
        w.restart()
    finish(w)
    heir = w.client()
    ask(heir, p.Fetch, id=second)
    assert heir.results(first) == [TOLD]
    acknowledge(heir)
    w.restart()
    assert ask(w.client(), p.Fetch, id=second).error is None


def test_submissions_that_have_ended_leave_nothing_behind() -> None:
    w, _, b, first, _ = twins()
    for _ in range(50):
        b.send(p.Cancel(id=submit(b, key=KEY, block=BLOCK)))
        w.commit()
        acknowledge(b)
    assert len(w.state.ledger.find("uid:1", first).followers) == 1
    finish(w)
    assert w.state.ledger.num_open == 0


def test_it_waits_with_its_twin_for_a_kernel_that_nobody_offers_yet() -> None:
    w = durable_world(worker_grace_s=1.0)
    submit(w.client(), key=KEY, block=BLOCK)
    w.commit()
    w.restart()
    w.worker(spec("other"))
    w.advance(5.0)
    client = w.client()
    run = submit(client, key=KEY, block=BLOCK)
    w.commit()
    assert client.take(p.Accepted)
    finish(w, w.worker(name="late"))
    assert client.results(run) == [TOLD]


def test_what_was_not_durable_is_run_again_for_who_wants_it_to_be() -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    client.submit(key=KEY, block=BLOCK)
    worker.finish()
    run = submit(client, key=KEY, block=BLOCK)
    w.commit()
    assert client.take(p.Accepted)[0].is_durable
    finish(w, worker)
    assert client.results(run) == [TOLD]
    w.restart()
    assert ask(w.client(), p.Fetch, key=KEY).error is None


# --- acknowledgements --------------------------------------------------------------------------------------------------


def test_a_late_acknowledgement_of_what_failed_is_not_that_of_what_came_after() -> None:
    w = durable_world(dedup_window_s=10.0)
    client, worker = w.client(), w.worker()
    run = submit(client, key=KEY)
    w.commit()
    finish(w, worker, BROKEN)
    assert client.results(run) == ["kernel_failed"]
    ask(client, p.Control, op="requeue", key=KEY)
    finish(w, worker)
    acknowledge(client)
    w.advance(11.0)
    heir = w.client("heir")
    assert ask(heir, p.Fetch, key=KEY).error is None
    assert next(iter(heir.got.values())).data is not None


def test_rows_that_were_cancelled_stay_so_when_the_others_run_again() -> None:
    w = durable_world()
    client, worker = w.client(), w.worker(spec(max_batch_size=1))
    run = submit(client, 2, key=KEY)
    client.send(p.Cancel(id=run, start=1, stop=2))
    finish(w, worker, BROKEN)
    ask(client, p.Control, op="requeue", key=KEY)
    finish(w, worker)
    assert not worker.leases
    heir = w.client("heir")
    new = ask(heir, p.Fetch, key=KEY).body["id"]
    assert heir.results(new, 2) == [tag(run, 0), "cancelled"]


# --- starting ----------------------------------------------------------------------------------------------------------


def test_what_is_not_idempotent_is_given_out_when_that_is_safe() -> None:
    w = durable_world()
    once = spec(idempotent=False, max_batch_size=1)
    worker = w.worker(once)
    submit(w.client())
    assert not worker.leases
    w.commit()
    assert len(worker.leases) == 1
    w.restart()
    assert not w.worker(once).leases


def test_what_is_idempotent_is_given_out_at_once_and_that_is_not_written() -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    submit(client)
    assert len(worker.leases) == 1
    w.commit()
    assert w.store is not None
    assert len(list(w.store.load())) == 1


# --- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["disk", "results"])
def test_at_the_limit_what_is_known_is_still_told(limit: str) -> None:
    w = durable_world(max_kept_bytes=30)
    client = w.client()
    over, still = submit(client, key=b"over", block=BLOCK), submit(client, key=b"open", block=BLOCK)
    w.commit()
    w.worker(spec(max_batch_size=1), batches=1).finish()
    w.commit()
    w.restart()
    w.state.journal.has_room = limit != "disk"
    client = w.client()
    again = [submit(client, key=key, block=BLOCK) for key in (b"over", b"open")]
    refused = submit(client)
    w.commit()
    assert list(client.refused) == [refused]
    assert client.results(again[0]) == [TOLD]
    finish(w)
    assert client.results(again[1]) == [TOLD]
    assert over != again[0] and still != again[1]


def test_outcomes_without_payload_count_as_well() -> None:
    w = durable_world(max_kept_bytes=100_000)
    client = w.client()
    for _ in range(1000):
        run = submit(client)
        client.send(p.Cancel(id=run))
    w.commit()
    assert client.refused
    assert len(w.state.journal.retained) <= 100


def test_the_disk_keeps_no_content_of_what_is_acknowledged(tmp_path: Path) -> None:
    num_bytes, num_tasks = 1 << 20, 8
    store = SqliteStore(tmp_path / "journal", 0)
    w = World(store=store, dedup_bytes=num_bytes, window_bytes=1 << 30)  # type: ignore[arg-type]
    client, worker = w.client(), w.worker(spec(max_batch_size=1))

    def settle() -> None:
        limit = time.monotonic() + 20.0
        while store.committed < store._last:
            assert time.monotonic() < limit
            time.sleep(0.001)
        w.promises.release()

    for i in range(num_tasks):
        run = struct.pack("<Q8s", i, b"a-run-id")
        data = tag(run, 0).ljust(num_bytes, b"\0")
        block = pack([(Column("x", "uint8", (num_bytes,), is_framed=True), None, [data])], 1)
        submit(client, run_id=run, block=block)
        token = worker.the_lease()
        del worker.leases[token]
        worker.credit = [worker.credit[0] + 1, worker.credit[1] + num_bytes]
        answers = [p.Answer(0, 1, echo_block([data[: num_bytes // 2]]))]
        worker.send(p.WorkerFinal(lease=token, answers=answers, credit=worker.credit))
        settle()
        client.send(p.Ack(seq=client.received))
        settle()
    store.close()
    again = SqliteStore(tmp_path / "journal", 0)
    found = list(again.load())
    again.close()
    assert sum(memoryview(frame).nbytes for put in found for frame in put.frames) < 1.1 * num_bytes  # type: ignore[arg-type]
    assert len({put.task for put in found}) == num_tasks, "all are remembered"


def test_what_is_gone_is_known_to_be_after_a_restart() -> None:
    w = durable_world(dedup_bytes=1)
    client = w.client()
    names = [submit(client, key=KEY, block=BLOCK), submit(client, key=KEY, block=BLOCK)]
    w.commit()
    finish(w)
    acknowledge(client)
    for _ in range(2):
        client = w.client()
        run, other = submit(client, key=KEY, block=BLOCK), submit(client, key=KEY)
        w.commit()
        assert (client.refused[run].code, client.refused[other].code) == ("result_gone", "conflict")
        assert [getattr(ask(client, p.Fetch, id=name).error, "code", None) for name in names] == ["result_gone"] * 2
        w.restart()
    w.advance(3601.0)
    w.commit()
    assert w.store is not None
    assert list(w.store.load()) == []


# --- clocks ------------------------------------------------------------------------------------------------------------


def test_the_time_of_an_outcome_counts_on_through_restarts() -> None:
    w = durable_world(result_ttl_s=100.0)
    submit(w.client())
    w.commit()
    finish(w)
    for _ in range(2):
        w.advance(40.0)
        w.restart()
        assert w.state.journal.retained
    w.advance(21.0)
    assert not w.state.journal.retained


@pytest.mark.parametrize("is_acked", [True, False])
def test_a_clock_that_was_wrong_keeps_nothing_longer(is_acked: bool) -> None:
    w = durable_world(dedup_window_s=100.0, result_ttl_s=100.0)
    w.state.journal._wall_offset_s += 1e8
    for _ in range(2):
        client = w.client()
        submit(client)
        w.commit()
        finish(w)
        if is_acked:
            acknowledge(client)
        w.restart()
    w.advance(101.0)
    w.commit()
    assert w.store is not None
    assert list(w.store.load()) == []


def test_who_submitted_a_task_is_known_whoever_had_it_last() -> None:
    w = durable_world()
    client = w.client("first")
    submit(client, key=KEY)
    w.commit()
    client.send(p.Goodbye())
    heir = w.client("heir")
    ask(heir, p.Fetch, key=KEY)
    finish(w)
    names = [ask(heir, p.Status, what="jobs", key=KEY).body["jobs"][0]["client"]]
    w.restart()
    names.append(ask(w.client(), p.Status, what="jobs", key=KEY).body["jobs"][0]["client"])
    assert names == ["first", "first"]


# --- records of earlier brokers ----------------------------------------------------------------------------------------


def test_records_without_times_are_read() -> None:
    """STARTED with a count, OUTCOME, and ACKED after a whole submission, as they were written first."""
    import msgpack

    w = durable_world(dedup_window_s=50.0)
    client = w.client()
    run = submit(client, key=KEY)
    w.commit()
    assert w.store is not None
    outcome = p.Outcome([(run, 0, 1)], echo_block([tag(run, 0)]))
    old = [Put(1, STARTED, [msgpack.packb([0, 1, 1])]), Put(1, UNTIMED, outcome_of(1, outcome, 0.0).frames[1:])]
    w.store.append(old)
    w.commit()
    w.restart()
    heir = w.client()
    assert ask(heir, p.Fetch, key=KEY).body["state"] == "done"
    assert heir.results(run) == [tag(run, 0)]
    w.store.append([Put(1, ACKED, [msgpack.packb(w.now + 1e9)])])
    w.commit()
    w.restart()
    w.advance(51.0)
    assert w.state.journal.locate("uid:1", None, KEY, w.now) is None


def test_an_outcome_of_no_task_is_refused() -> None:
    store = MemoryStore()
    store.append([noted(1, STARTED, 0, 1)])
    store.commit()
    with pytest.raises(Corrupt, match="task 1"):
        World(store=store)

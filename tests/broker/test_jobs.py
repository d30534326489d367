"""What is done with durable tasks once they are taken, and that nobody does it to another's."""

from typing import Any

import pytest
from broker_world import FakeClient, World, blob_rows, spec, tag

from penstock.broker import protocol as p
from penstock.broker.events import ProcessEnded
from penstock.broker.retention import ENTRY_BYTES
from penstock.broker.storage.store import MemoryStore

POISON = p.Error("kernel_failed", "no good", detail="Traceback: the end")


def durable_world(**config: Any) -> World:
    return World(store=MemoryStore(), **config)


def submit(client: FakeClient, rows: int = 2, **fields: Any) -> bytes:
    return client.submit(rows, is_durable=True, **fields)


def ask(client: FakeClient, make: type[Any], **fields: Any) -> p.Reply:
    """The reply to a question; what it promises is made safe meanwhile."""
    client.send(make(request=next(client.world.numbers), **fields))
    if client.world.store is not None:
        client.world.commit()
    (reply,) = client.take(p.Reply)
    return reply


def fetch(client: FakeClient, **fields: Any) -> p.Reply:
    return ask(client, p.Fetch, **fields)


def control(client: FakeClient, op: str, **fields: Any) -> p.Reply:
    return ask(client, p.Control, op=op, **fields)


def jobs(client: FakeClient, what: str = "jobs", **fields: Any) -> list[dict[str, Any]]:
    reply = ask(client, p.Status, what=what, **fields)
    assert reply.error is None
    return list(reply.body["jobs"])


def code(reply: p.Reply) -> str | None:
    return None if reply.error is None else reply.error.code


def echoed(client: FakeClient, run: bytes, rows: int = 2, by: bytes | None = None) -> bool:
    """Each row has its one outcome; the payload names the submission that it was first made for."""
    finals = [client.row(run, row).num_finals for row in range(rows)]
    return finals == [1] * rows and client.results(run, rows) == [tag(by or run, row) for row in range(rows)]


def kill_twice(w: World) -> None:
    """Two workers die of the task that they run alone."""
    for pid in (5, 6):
        w.worker(spec(), pid=pid, name=f"w{pid}")
        w.now += 1.0
        w.step(ProcessEnded(pid))


# --- fetching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["key", "id"])
@pytest.mark.parametrize("is_restarted", [False, True])
def test_what_is_over_is_fetched_by_key_and_by_id(by: str, is_restarted: bool) -> None:
    w = durable_world()
    client = w.client()
    run = submit(client, key=b"nightly")
    client.send(p.Goodbye())
    w.worker().finish()
    w.commit()
    if is_restarted:
        w.restart()
    heir = w.client("heir")
    reply = fetch(heir, **{by: run if by == "id" else b"nightly"})
    assert reply.body["is_handed"]
    told = {name: reply.body[name] for name in ("id", "key", "kernel", "rows", "state", "client", "done", "uses")}
    assert told == {
        "id": run, "key": b"nightly", "kernel": "echo", "rows": 2, "state": "done", "client": "client", "done": 2,
        "uses": [0, 0],
    }  # fmt: skip
    assert echoed(heir, run)


def test_what_is_open_is_handed_over_with_what_there_is_and_what_comes() -> None:
    w = durable_world()
    worker, client = w.worker(spec(max_batch_size=1), batches=1), w.client()
    run = submit(client, 3)
    worker.finish()
    w.commit()
    client.send(p.Goodbye())
    heir = w.client("heir")
    reply = fetch(heir, id=run)
    assert (reply.body["state"], reply.body["open"], reply.body["uses"]) == ("running", 2, [2, 60])
    assert heir.results(run, 3) == [tag(run, 0), None, None]
    worker.finish_all()
    w.commit()
    assert echoed(heir, run, 3)
    assert tuple(heir.credit) == (4096 + 2, (256 << 20) + 60), "what was spent has come back"
    heir.send(p.Ack(seq=heir.received))
    assert not w.state.journal.retained


def test_a_reply_comes_before_the_outcomes() -> None:
    w = durable_world()
    w.worker()
    run = submit(w.client())
    w.peers[("back", next(r for s, r in w.peers if s == "back"))].finish()  # type: ignore[attr-defined]
    heir = w.client("heir")
    heir.send(p.Fetch(request=1, id=run))
    assert [type(m) for m in heir.inbox] == [p.Welcome], "nothing before it is safe"
    w.commit()
    assert [type(m) for m in heir.inbox] == [p.Welcome, p.Reply, p.Results]


def test_a_task_whose_client_is_connected_stays_with_it_unless_it_is_taken() -> None:
    w = durable_world()
    worker, owner, other = w.worker(), w.client("owner"), w.client("other")
    run = submit(owner, key=b"k")
    w.now += 2.0
    reply = fetch(other, key=b"k")
    assert (reply.body["is_handed"], reply.body["client"], reply.body["seen_ms"]) == (False, "owner", 2000.0)
    assert fetch(other, key=b"k", take=True).body["is_handed"]
    assert owner.results(run, 2) == ["unavailable", "unavailable"]
    assert "other" in (owner.row(run).error or POISON).message
    owner.send(p.Ack(seq=owner.received))
    worker.finish()
    w.commit()
    assert echoed(other, run)
    assert [owner.row(run, row).num_finals for row in range(2)] == [1, 1]
    assert w.state.journal.retained, "who lost it has not acknowledged it"
    assert tuple(owner.credit) == (4096 + 2, (256 << 20) + 40)


def test_who_was_away_while_its_task_was_taken_does_not_submit_it_again() -> None:
    w = durable_world()
    w.worker()
    owner, other = w.client("owner"), w.client("other")
    run = submit(owner)
    owner.disconnect()
    fetch(other, id=run, take=True)
    assert owner.attach([run]).unknown == b""
    assert owner.results(run, 2) == ["unavailable", "unavailable"]


def test_ones_own_task_is_told_again() -> None:
    w = durable_world()
    worker, client = w.worker(spec(max_batch_size=1), batches=1), w.client()
    run = submit(client)
    worker.finish()
    w.commit()
    assert fetch(client, id=run).body["uses"] == [1, 40]
    assert client.row(run).num_finals == 2
    worker.finish()
    w.commit()
    assert client.row(run, 1).num_finals == 1


def test_what_was_taken_once_can_be_fetched_without_credit() -> None:
    """A session that has all of its window open hears of its tasks again after a crash; it may submit when they are done."""
    w = durable_world(window_rows=3)
    for name in ("a", "b"):
        client = w.client(name)
        submit(client, 2, key=name.encode())
        client.send(p.Goodbye())
    heir = w.client("heir")
    assert fetch(heir, key=b"a").body["is_handed"]
    assert fetch(heir, key=b"b").body["is_handed"]
    run = submit(heir, 1)
    assert heir.refused[run].code == "overloaded"
    w.worker().finish_all()
    w.commit()
    assert submit(heir, 1) not in heir.refused


def test_what_is_not_there_is_said_so() -> None:
    w = durable_world()
    client = w.client()
    plain = client.submit(1, key=b"plain")
    assert code(fetch(client, key=b"nothing")) == "unknown_task"
    assert code(fetch(client, id=b"\0" * 16)) == "unknown_task"
    assert code(fetch(client, id=plain)) == "unknown_task"
    assert code(fetch(client, key=b"plain")) == "unknown_task"
    assert code(fetch(client)) == "invalid_input"
    memory = World().client()
    assert code(fetch(memory, key=b"k")) == "invalid_input"
    assert code(ask(memory, p.Status, what="jobs")) == "invalid_input"


def test_a_result_that_is_kept_no_longer_is_gone() -> None:
    w = durable_world(dedup_bytes=1)
    worker, client = w.worker(), w.client()
    run = submit(client)
    worker.finish()
    w.commit()
    client.send(p.Ack(seq=client.received))
    assert code(fetch(client, id=run)) == "result_gone"
    assert jobs(client) == []


# --- lists -------------------------------------------------------------------------------------------------------------


def test_the_list_has_what_is_open_and_what_is_kept() -> None:
    w = durable_world(result_ttl_s=100.0, session_ttl_s=1e6, liveness_s=1e6)
    worker, client = w.worker(spec(max_batch_size=2), batches=1), w.client()
    first, second = submit(client, key=b"k"), submit(client, 3)
    worker.finish()
    w.commit()
    client.submit(1)
    w.advance(10.0)
    found = {job["id"]: job for job in jobs(client)}
    assert set(found) == {first, second}
    one, two = found[first], found[second]
    assert (one["state"], one["done"], one["open"], one["key"]) == ("done", 2, 0, b"k")
    assert (one["expires_in_ms"], one["age_ms"]) == (90_000.0, 10_000.0)
    assert (two["state"], two["done"], two["open"], two["key"], two["expires_in_ms"]) == ("running", 0, 3, None, None)
    client.send(p.Ack(seq=client.received))
    assert [job["id"] for job in jobs(client)] == [second], "what its client has is not listed"
    assert jobs(client, id=first)[0]["is_acknowledged"]


def test_one_that_failed_is_listed_until_it_is_forgotten() -> None:
    w = durable_world(dedup_window_s=50.0, session_ttl_s=1e6, liveness_s=1e6)
    worker, client = w.worker(), w.client()
    run = submit(client, 2)
    w.commit()
    worker.answer(worker.the_lease(), 0, 1)
    worker.answer(worker.the_lease(), 1, 2, POISON)
    client.send(p.Ack(seq=client.received))
    w.commit()
    client.send(p.Ack(seq=client.received))
    (job,) = jobs(client, "dead")
    assert (job["id"], job["state"], job["done"], job["failed"], job["can_requeue"]) == (run, "failed", 1, 1, True)
    assert jobs(client)[0]["id"] == run
    (shown,) = jobs(client, id=run)
    assert shown["errors"] == [
        {"rows": [[1, 2]], "code": "kernel_failed", "message": "no good", "detail": "Traceback: the end"}
    ]
    w.restart()
    client = w.client()
    assert jobs(client, "dead")[0]["failed"] == 1
    w.advance(51.0)
    assert jobs(client, "dead") == []


def test_a_long_list_fits_a_message() -> None:
    w = durable_world(max_queue_rows=10_000)
    client = w.client()
    for i in range(400):
        submit(client, 1, key=b"%128d" % i)
    reply = ask(client, p.Status, what="jobs")
    assert 20 < len(reply.body["jobs"]) <= 100
    assert reply.body["num_open"] == 400
    assert reply.body["jobs"][0]["key"] == b"%128d" % 0, "the oldest first"
    w.worker(spec(max_batch_size=400)).finish_all()
    w.commit()
    reply = ask(client, p.Status, what="jobs")
    assert 20 < len(reply.body["jobs"]) <= 100
    assert (reply.body["num_open"], reply.body["num_over"]) == (0, 400)


def test_many_long_errors_fit_a_message() -> None:
    w = durable_world()
    worker, client = w.worker(spec(max_batch_size=64)), w.client()
    run = submit(client, 64)
    for row in range(64):
        worker.answer(worker.the_lease(), row, row + 1, p.Error("kernel_failed", "é" * 4000, None, "é" * 16_000))
    w.commit()
    assert jobs(client, id=run)[0]["errors"]


# --- cancel, drop, requeue ---------------------------------------------------------------------------------------------


def test_anothers_open_task_of_the_same_user_can_be_cancelled() -> None:
    w = durable_world()
    owner, other = w.client("owner"), w.client("other")
    run = submit(owner, key=b"k")
    other.send(p.Control(request=7, op="cancel", key=b"k"))
    assert other.take(p.Reply) == [], "not before it is safe"
    w.commit()
    assert other.take(p.Reply)[0].body["id"] == run
    assert owner.results(run, 2) == ["cancelled", "cancelled"]
    assert code(control(other, "cancel", key=b"k")) == "invalid_input"
    w.restart()
    assert jobs(w.client(), id=run)[0]["state"] == "cancelled"


def test_a_dropped_task_is_forgotten_and_its_key_is_free() -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    run = submit(client, key=b"k")
    assert code(control(client, "drop", key=b"k")) == "invalid_input"
    worker.finish()
    assert w.state.journal.retained.num_bytes > 0
    assert code(control(client, "drop", key=b"k")) is None
    assert code(fetch(client, id=run)) == "unknown_task"
    assert w.state.journal.retained.num_bytes == 0
    assert list(w.store.load()) == []  # type: ignore[union-attr]
    again = client.submit(3, is_durable=True, key=b"k")
    worker.finish_all()
    w.commit()
    assert echoed(client, again, 3)


@pytest.mark.parametrize("is_acked", [False, True])
@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("key", [None, b"k"])
def test_a_dead_task_runs_again(is_acked: bool, is_restarted: bool, key: bytes | None) -> None:
    w = durable_world(max_attempts=2)
    client = w.client()
    run = submit(client, 1, key=key, timeout_ms=60_000.0)
    w.commit()
    kill_twice(w)
    w.commit()
    assert client.results(run) == ["dead"]
    if is_acked:
        client.send(p.Ack(seq=client.received))
        w.commit()
    if is_restarted:
        w.restart()
    operator = w.client("operator")
    (job,) = jobs(operator, "dead")
    assert (job["dead"], job["state"], job["client"]) == (1, "dead", "client")
    new = control(operator, "requeue", id=run).body["id"]
    assert new != run
    assert control(operator, "requeue", id=run).body["id"] == new, "asked twice, done once"
    assert jobs(operator, "dead") == []
    w.now += 59.0
    w.restart()
    w.worker().finish()
    w.commit()
    operator = w.client("operator")
    assert fetch(operator, **({"key": key} if key else {"id": new})).body["id"] == new
    assert echoed(operator, new, 1, by=run)
    assert code(control(operator, "requeue", id=new)) == "invalid_input", "nothing of it has failed"


def test_only_the_rows_that_failed_run_again() -> None:
    w = durable_world()
    worker, client = w.worker(batches=2), w.client()
    run = submit(client, 4)
    token = worker.the_lease()
    for row in range(4):
        worker.answer(token, row, row + 1, POISON if row == 2 else None)
    w.commit()
    new = control(client, "requeue", id=run).body["id"]
    (again,) = [batch for batch in worker.batches() if batch != [(run, row) for row in range(4)]]
    assert again == [(run, 2)]
    worker.finish(max(worker.leases))
    w.restart()
    client = w.client()
    fetch(client, id=new)
    assert client.results(new, 4)[:2] == [tag(run, 0), tag(run, 1)]
    w.worker().finish_all()
    w.commit()
    assert echoed(client, new, 4, by=run)


def test_a_requeued_task_may_die_again_and_be_requeued_again() -> None:
    w = durable_world()
    client = w.client()
    ids = [submit(client, 1)]
    w.commit()
    for _ in range(3):
        kill_twice(w)
        w.commit()
        ids.append(control(client, "requeue", id=ids[-1]).body["id"])
    assert len(set(ids)) == 4
    w.worker().finish()
    w.commit()
    assert fetch(client, id=ids[0]).body["id"] == ids[-1], "known by its first id as well"
    assert echoed(client, ids[-1], 1, by=ids[0])


def test_the_first_client_follows_its_task_when_it_comes_back() -> None:
    w = durable_world()
    client = w.client()
    run = submit(client, 1)
    w.commit()
    kill_twice(w)
    w.commit()
    w.restart()
    control(w.client("operator"), "requeue", id=run)
    client = w.client()
    submit(client, 1, run_id=run, is_again=True)
    w.worker().finish()
    w.commit()
    assert echoed(client, run, 1)


@pytest.mark.parametrize("limit", ["queue", "disk"])
def test_without_room_nothing_is_requeued(limit: str) -> None:
    w = durable_world(max_queue_rows=2)
    worker, client = w.worker(), w.client()
    run = submit(client, 1)
    worker.finish(error=POISON)
    w.commit()
    if limit == "disk":
        w.state.journal.has_room = False
    else:
        client.submit(2, kernel="echo")
    assert code(control(client, "requeue", id=run)) == "overloaded"
    assert jobs(client, "dead")[0]["id"] == run


def test_the_payload_of_what_failed_counts() -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    submit(client, 1, block=blob_rows(b"r" * 16, [1000]), kernel="echo")
    run = submit(client, 2)
    worker.finish(error=POISON) if worker.leases else None
    w.commit()
    assert w.state.journal.retained.num_bytes == ENTRY_BYTES + 40
    control(client, "drop", id=run)
    assert w.state.journal.retained.num_bytes == 0


def test_nobody_touches_the_tasks_of_another_user() -> None:
    w = durable_world()
    worker, client, stranger = w.worker(), w.client(), w.client(principal="uid:2")
    over = submit(client, 1, key=b"over")
    worker.finish(error=POISON)
    still = submit(client, 1, key=b"open")
    w.commit()
    for run, key in ((over, b"over"), (still, b"open")):
        for which in ({"id": run}, {"key": key}):
            assert code(fetch(stranger, take=True, **which)) == "unknown_task"
            assert code(ask(stranger, p.Status, what="jobs", **which)) == "unknown_task"
            for op in ("cancel", "requeue", "drop"):
                assert code(control(stranger, op, **which)) == "unknown_task"
    assert jobs(stranger) == []
    assert jobs(stranger, "dead") == []
    assert len(jobs(client)) == 2


# --- evidence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_dead_task_carries_what_is_known(is_restarted: bool) -> None:
    w = durable_world(max_attempts=2)
    run = submit(w.client(), 1)
    w.commit()
    w.worker(pid=5, name="first")
    w.now += 3.0
    w.step(ProcessEnded(5))
    w.commit()
    if is_restarted:
        w.restart()
    w.worker(pid=6, name="second")
    w.now += 4.0
    w.step(ProcessEnded(6))
    w.commit()
    (job,) = jobs(w.client(), id=run)
    lines = job["errors"][0]["detail"].splitlines()
    assert lines == [
        "3.0 s after the task was taken, 3.0 s after it was assigned: worker first: its process 5 has ended (pid 5, cpu)",
        "7.0 s after the task was taken, 4.0 s after it was assigned: worker second: its process 6 has ended (pid 6, cpu)",
    ]


# --- backup ------------------------------------------------------------------------------------------------------------


def test_a_backup_is_answered_when_it_is_made_and_can_be_restored() -> None:
    w = durable_world()
    client = w.client()
    run = submit(client, key=b"k")
    client.send(p.Control(request=5, op="backup", target="/copy"))
    assert client.take(p.Reply) == []
    w.commit()
    (reply,) = client.take(p.Reply)
    assert (reply.request, reply.error, reply.body["folder"]) == (5, None, "/copy")
    assert code(control(client, "backup", target="/copy")) == "invalid_input"
    assert w.store is not None
    other = World(store=w.store.copies["/copy"])
    heir = other.client()
    assert fetch(heir, key=b"k").body["is_handed"]
    other.worker().finish()
    other.commit()
    assert echoed(heir, run)


def test_a_backup_is_for_the_brokers_own_user() -> None:
    w = durable_world()
    assert code(control(w.client(principal="uid:2"), "backup", target="/copy")) == "not_authorised"
    assert w.store is not None
    assert w.store.copies == {}
    assert code(control(World().client(), "backup", target="/copy")) == "invalid_input"


def test_two_backups_to_one_folder() -> None:
    w = durable_world()
    client, other = w.client(), w.client("other")
    client.send(p.Control(request=1, op="backup", target="/copy"))
    client.send(p.Control(request=1, op="backup", target="/copy"))  # asked again over a new connection
    other.send(p.Control(request=1, op="backup", target="/copy"))
    w.commit()
    assert [code(reply) for reply in client.take(p.Reply)] == [None]
    assert [code(reply) for reply in other.take(p.Reply)] == ["conflict"]


def test_rows_of_the_journal_of_an_earlier_broker_have_no_evidence() -> None:
    """DIED as it was written before evidence was: [start, stop, count]."""
    from penstock.broker.kept import DIED, noted

    w = durable_world(max_attempts=2)
    run = submit(w.client(), 1)
    assert w.store is not None
    w.store.append([noted(1, DIED, 0, 1, 1)])
    w.commit()
    w.restart()
    w.worker(pid=6)
    w.step(ProcessEnded(6))
    w.commit()
    assert len(jobs(w.client(), id=run)[0]["errors"][0]["detail"].splitlines()) == 1


@pytest.mark.parametrize("op", ["drop", "requeue", "backup"])
def test_a_wish_whose_answer_was_lost_is_answered_once_more(op: str) -> None:
    w = durable_world()
    client, worker = w.client(), w.worker()
    submit(client, 1, key=b"k")
    w.commit()
    worker.finish(error=POISON)
    w.commit()
    wish = p.Control(request=6, op=op, **({"target": "/backups/one"} if op == "backup" else {"key": b"k"}))
    client.send(wish)
    client.vanish()
    w.commit()
    client.attach()
    client.take(p.Reply)
    if op == "requeue":
        worker.finish(error=POISON)  # it may not begin again because it was asked for twice
    client.send(wish)
    w.commit()
    (reply,) = client.take(p.Reply)
    assert reply.error is None
    assert not worker.leases


def test_a_report_tells_what_is_safe() -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    run = submit(client, 1)
    w.commit()
    worker.finish()
    client.send(p.Status(request=1, what="jobs", id=run))
    assert not client.take(p.Reply)
    w.commit()
    assert client.take(p.Reply)[0].body["jobs"][0]["state"] == "done"

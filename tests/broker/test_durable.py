"""Durable tasks through crashes of the broker: what was promised holds, and nothing is promised before it is safe."""

import pytest
from broker_world import FakeClient, FakeWorker, World, spec, tag, tensor_rows

from penstock.broker import protocol as p
from penstock.broker.events import ProcessEnded, Stop
from penstock.broker.retention import ENTRY_BYTES
from penstock.broker.storage.records import Corrupt, Put
from penstock.broker.storage.store import MemoryStore


def durable_world(**config: object) -> World:
    return World(store=MemoryStore(), **config)


def submit(client: FakeClient, rows: int = 2, **fields: object) -> bytes:
    return client.submit(rows, is_durable=True, wants_accepted=True, **fields)  # type: ignore[arg-type]


def again(world: World, run: bytes, rows: int = 2, **fields: object) -> FakeClient:
    """The client comes to another broker and submits what it has not heard of."""
    client = world.client()
    submit(client, rows, run_id=run, is_again=True, **fields)
    return client


def told(client: FakeClient, run: bytes, rows: int = 2) -> None:
    assert client.results(run, rows) == [tag(run, row) for row in range(rows)]
    assert [client.row(run, row).num_finals for row in range(rows)] == [1] * rows


def all_told(w: World, runs: list[bytes]) -> None:
    """All of these, of one row each, are done: a client that submits them again hears it."""
    client = w.client()
    for run in runs:
        submit(client, 1, run_id=run, is_again=True)
    w.commit()
    assert all(client.results(run) == [tag(run, 0)] for run in runs)


# --- promises ----------------------------------------------------------------------------------------------------------


def test_accepted_is_said_when_it_is_safe() -> None:
    w = durable_world()
    w.worker()
    client = w.client()
    submit(client)
    assert client.take(p.Accepted) == []
    w.commit()
    assert len(client.take(p.Accepted)) == 1


def test_an_outcome_is_told_when_it_is_safe() -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    run = submit(client)
    w.commit()
    worker.finish()
    assert client.results(run, 2) == [None, None]
    w.commit()
    told(client, run)


def test_who_shares_a_key_is_told_when_it_is_safe() -> None:
    """Else one client could have had an outcome that a crash undoes for the other."""
    w = durable_world()
    worker, client, other = w.worker(), w.client(), w.client("other")
    run = submit(client, key=b"key", block=tensor_rows(b"k" * 16, 2))
    twin = submit(other, key=b"key", block=tensor_rows(b"k" * 16, 2))
    w.commit()
    worker.finish()
    assert client.results(run, 2) == other.results(twin, 2) == [None, None]
    w.commit()
    assert client.results(run, 2) == other.results(twin, 2) == [tag(b"k" * 16, row) for row in range(2)]


def test_what_shares_a_key_with_a_task_that_was_taken_is_taken() -> None:
    """No worker has come for so long that its kernel counts as unknown; a durable task waits for it all the same."""
    w = durable_world(worker_grace_s=1.0)
    w.worker(pid=5)
    block = tensor_rows(b"k" * 16, 2)
    submit(w.client(), key=b"key", block=block)
    w.commit()
    w.restart()
    w.advance(2.0)
    client = w.client("other")
    twin = submit(client, key=b"key", block=block)
    w.commit()
    assert twin not in client.refused
    w.worker().finish_all()
    w.commit()
    assert client.results(twin, 2) == [tag(b"k" * 16, row) for row in range(2)]


def test_what_follows_a_promise_waits_behind_it() -> None:
    w = durable_world()
    worker, client, other = w.worker(batches=3), w.client(), w.client("other")
    durable = submit(client)
    quick, elsewhere = client.submit(1), other.submit(1)
    worker.finish_all()
    assert client.results(quick) == [None]
    assert other.results(elsewhere) != [None], "nobody else waits"
    w.commit()
    assert client.results(quick) != [None]
    told(client, durable)


def test_tasks_that_are_not_durable_write_nothing() -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    client.submit(2, key=b"key")
    worker.finish()
    assert w.store is not None
    w.store.commit()
    assert list(w.store.crash().load()) == []


def test_a_broker_without_a_disk_refuses() -> None:
    w = World()
    client = w.client()
    run = submit(client)
    assert client.refused[run].code == "invalid_input"


@pytest.mark.parametrize("reason", ["disk", "results"])
def test_without_room_durable_tasks_are_refused_and_others_taken(reason: str) -> None:
    w = durable_world(max_kept_bytes=30)
    worker, client = w.worker(), w.client()
    if reason == "disk":
        w.state.journal.has_room = False
    else:
        submit(client)
        w.commit()
        worker.finish()
    run = submit(client)
    w.commit()
    assert client.refused[run].code == "overloaded"
    assert client.refused[run].retry_after_ms is not None
    plain = client.submit(1)
    worker.finish()
    w.commit()
    assert client.results(plain) != [None]


def test_nobody_takes_all_the_room_for_results() -> None:
    """Whoever leaves its results unfetched is refused before the others are."""
    w = durable_world(max_kept_bytes=10 * (ENTRY_BYTES + 80))
    worker = w.worker()
    greedy, modest = w.client(principal="client:greedy"), w.client(principal="client:modest")

    def is_taken(client: FakeClient) -> bool:
        run = submit(client)
        w.commit()
        if run not in client.refused:
            worker.finish()
            w.commit()
        return run not in client.refused

    assert [is_taken(greedy) for _ in range(10)] == [True] * 9 + [False]
    assert is_taken(modest)
    modest.send(p.Ack(seq=modest.received))
    assert is_taken(modest)
    greedy.send(p.Ack(seq=greedy.received))
    assert is_taken(greedy)
def test_what_is_over_is_told_again_without_room() -> None:
    """A client that heard of its acceptance and submits again after a crash gets the outcome, however full the disk is."""
    w = durable_world()
    worker, client = w.worker(), w.client()
    run = submit(client)
    w.commit()
    worker.finish()
    w.commit()
    w.restart()
    w.state.journal.has_room = False
    client = again(w, run)
    w.commit()
    told(client, run)


def test_a_kernel_can_be_durable_by_configuration() -> None:
    w = durable_world(durable_kernels=("echo",))
    client = w.client()
    run = client.submit(1, wants_accepted=True)
    w.commit()
    w.restart()
    told(resubmitted(w, run), run, 1)


def resubmitted(w: World, run: bytes) -> FakeClient:
    client = w.client()
    client.submit(1, run_id=run, wants_accepted=True)
    w.worker().finish()
    w.commit()
    return client


# --- crashes -----------------------------------------------------------------------------------------------------------


def test_an_accepted_task_survives() -> None:
    w = durable_world()
    run = submit(w.client())
    w.commit()
    w.restart()
    client = again(w, run)
    w.commit()
    assert len(client.take(p.Accepted)) == 1
    worker = w.worker()
    assert worker.sizes() == [2]
    worker.finish()
    w.commit()
    told(client, run)


def test_a_task_that_was_not_accepted_may_be_lost_and_is_taken_again() -> None:
    w = durable_world()
    run = submit(w.client())
    w.restart()
    client = again(w, run)
    w.worker().finish()
    w.commit()
    told(client, run)


@pytest.mark.parametrize("num_kept", [0, 1, 2, 3])
def test_whatever_part_was_written_the_outcome_is_one(num_kept: int) -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    run = submit(client)
    w.commit()
    worker.finish()
    w.restart(num_kept)
    client, worker = again(w, run), w.worker()
    if worker.leases:
        worker.finish()
    w.commit()
    told(client, run)


def test_a_finished_task_is_not_run_again() -> None:
    w = durable_world()
    worker, client = w.worker(), w.client()
    run = submit(client)
    worker.finish()
    w.commit()
    w.restart()
    worker, client = w.worker(), again(w, run)
    assert not worker.leases
    w.commit()
    told(client, run)


def test_rows_that_ended_before_the_crash_stay_ended() -> None:
    w = durable_world()
    worker, client = w.worker(spec(max_batch_size=1), batches=1), w.client()
    run = submit(client, 3)
    worker.finish()
    w.commit()
    w.restart()
    client = again(w, run, 3)
    worker = w.worker(spec(max_batch_size=8))
    assert worker.sizes() == [2]
    worker.finish()
    w.commit()
    told(client, run, 3)


def test_a_cancelled_task_stays_cancelled() -> None:
    w = durable_world()
    client = w.client()
    run = submit(client)
    client.send(p.Cancel(id=run))
    w.commit()
    w.restart()
    client = again(w, run)
    w.commit()
    assert client.results(run, 2) == ["cancelled", "cancelled"]


def test_a_time_limit_counts_on_through_a_restart() -> None:
    w = durable_world()
    run = submit(w.client(), timeout_ms=5000.0)
    w.commit()
    w.now += 6.0
    w.restart()
    client = again(w, run, timeout_ms=5000.0)
    w.commit()
    assert client.results(run, 2) == ["deadline_exceeded"] * 2


def test_what_is_not_idempotent_and_had_started_is_not_run_again() -> None:
    w = durable_world()
    kernel = spec(idempotent=False, max_batch_size=1)
    w.worker(kernel, batches=1)
    run = submit(w.client(), 2)
    w.commit()
    w.restart()
    worker = w.worker(kernel, batches=9)
    client = again(w, run)
    w.commit()
    worker.finish_all()
    w.commit()
    assert client.results(run, 2) == ["worker_lost", tag(run, 1)]


def test_what_must_not_run_twice_leaves_when_it_is_on_disk_that_it_may_have_started() -> None:
    w = durable_world()
    kernel = spec(idempotent=False)
    worker = w.worker(kernel, batches=1)
    run = submit(w.client(), 2)
    assert worker.leases == {}
    w.commit()
    assert worker.sizes() == [2]
    w.restart()
    worker = w.worker(kernel)
    client = again(w, run)
    worker.finish_all()
    w.commit()
    assert client.results(run, 2) == ["worker_lost"] * 2


def test_deaths_count_through_a_restart() -> None:
    w = durable_world(max_attempts=2)
    w.worker(pid=5)
    run = submit(w.client(), 1)
    w.step(ProcessEnded(5))
    w.commit()
    w.restart()
    w.worker(pid=6)
    w.step(ProcessEnded(6))
    client = again(w, run, 1)
    w.commit()
    assert client.results(run) == ["dead"]


def test_a_durable_task_waits_for_its_kernel_beyond_any_grace() -> None:
    w = durable_world(worker_grace_s=1.0)
    run = submit(w.client())
    w.commit()
    w.restart()
    client = again(w, run)
    w.worker(spec("other"))
    for _ in range(20):
        w.advance(1.0)
        client.send(p.Heartbeat())
    assert client.results(run, 2) == [None, None]
    w.worker(name="late").finish()
    w.commit()
    told(client, run)


def test_many_crashes_in_a_row() -> None:
    w = durable_world()
    run = submit(w.client(), 4)
    w.commit()
    for _ in range(4):
        w.worker(spec(max_batch_size=1), batches=1).finish()
        w.commit()
        w.restart()
    client = again(w, run, 4)
    w.commit()
    told(client, run, 4)


# --- clients that come and go ------------------------------------------------------------------------------------------


def test_a_client_that_leaves_can_fetch_by_key_later() -> None:
    w = durable_world()
    client = w.client()
    first = submit(client, key=b"nightly")
    w.commit()
    client.send(p.Goodbye())
    w.worker().finish()
    w.commit()
    other = w.client()
    block = p.Submit(id=b"\1" * 16, kernel="echo", block=tensor_rows(first, 2), is_durable=True, key=b"nightly")
    other.send(block)
    w.commit()
    assert [other.row(b"\1" * 16, row).data for row in range(2)] == [tag(first, 0), tag(first, 1)]


def test_a_client_that_comes_back_hears_what_it_missed() -> None:
    w = durable_world()
    worker, client = w.worker(spec(max_batch_size=1), batches=1), w.client()
    run = submit(client, 2)
    w.commit()
    client.send(p.Goodbye())
    worker.finish()
    w.commit()
    client = again(w, run)
    worker.finish()
    w.commit()
    told(client, run)
    assert client.credit[0] == 4096 + 2, "all credit came back"


def test_clients_that_left_are_forgotten_with_their_last_task() -> None:
    """A client may call itself something else each time."""
    w = durable_world()
    worker, stays = w.worker(), w.client("stays")
    kept = submit(stays)
    stays.send(p.Goodbye())
    for i in range(100):
        client = w.client(f"client {i}")
        run = submit(client)
        client.send(p.Goodbye())
        w.core.clients.outcomes.end_run(w.state.ledger.find("uid:1", run), "cancelled", p.Error("cancelled", ""), w.now)
    w.advance(1.0)
    assert len(w.core.clients.absent._sessions) == 1
    w.commit()
    worker.finish_all()
    w.commit()
    told(again(w, kept), kept)


def test_another_principal_does_not_see_it() -> None:
    w = durable_world()
    run = submit(w.client())
    w.commit()
    w.restart()
    stranger = w.client(principal="uid:2")
    submit(stranger, run_id=run)
    w.worker(batches=9).finish_all()
    w.commit()
    assert stranger.row(run).num_finals == 1, "its own task of that id"
    client = again(w, run)
    w.commit()
    told(client, run)


def test_an_id_with_other_content_is_a_conflict() -> None:
    w = durable_world()
    run = submit(w.client())
    w.commit()
    w.restart()
    client = w.client()
    submit(client, 3, run_id=run)
    assert client.refused[run].code == "conflict"


# --- how long ----------------------------------------------------------------------------------------------------------


def num_records(w: World) -> int:
    assert w.store is not None
    w.store.commit()
    return len(list(w.store.load()))


def test_an_outcome_is_kept_until_it_is_acknowledged_and_its_key_for_the_window() -> None:
    w = durable_world(dedup_window_s=100.0, result_ttl_s=1000.0, session_ttl_s=1e6, liveness_s=1e6)
    worker, client = w.worker(), w.client()
    submit(client)
    worker.finish()
    w.commit()
    w.advance(500.0)
    assert num_records(w) > 0
    client.send(p.Ack(seq=client.received))
    assert not w.state.journal.retained
    w.advance(99.0)
    assert num_records(w) > 0
    w.advance(2.0)
    assert num_records(w) == 0
    w.restart()
    assert w.state.ledger.num_open == 0


@pytest.mark.parametrize("has_cancelled", [False, True])
def test_a_second_client_that_waited_for_the_outcome_acknowledges_it(has_cancelled: bool) -> None:
    """The first one was killed; whoever submits with its key again while the task is open is the one that gets the outcome."""
    w = durable_world()
    worker, killed, second = w.worker(), w.client("killed"), w.client("second")
    first = submit(killed, key=b"k")
    killed.vanish()
    run = second.submit(2, block=tensor_rows(first, 2), is_durable=True, key=b"k")
    if has_cancelled:
        second.send(p.Cancel(id=run, start=0, stop=2))
    w.commit()
    worker.finish()
    w.commit()
    assert second.results(run, 2) == (["cancelled"] * 2 if has_cancelled else [tag(first, 0), tag(first, 1)])
    second.send(p.Ack(seq=second.received))
    assert (len(w.state.journal.retained) == 1) is has_cancelled, "what it has not got it cannot acknowledge"


@pytest.mark.parametrize("how", [p.Code.DEADLINE, p.Code.CANCELLED])
def test_a_second_submission_with_the_key_shares_every_end_of_the_first(how: str) -> None:
    """It is one task: if the second went on alone, in memory, it would have been accepted and could be lost."""
    w = durable_world(session_ttl_s=1e6, liveness_s=1e6)
    first, second = w.client("first"), w.client("second")
    w.worker(batches=0)
    one = submit(first, key=b"k", timeout_ms=5000.0)
    two = second.submit(2, block=tensor_rows(one, 2), is_durable=True, wants_accepted=True, key=b"k")
    w.commit()
    assert len(second.take(p.Accepted)) == 1
    if how == p.Code.CANCELLED:
        first.send(p.Cancel(id=one, start=0, stop=2))
    w.advance(6.0)
    w.commit()
    assert second.results(two, 2) == first.results(one, 2) == [how] * 2
    assert w.state.ledger.num_open == 0, "whatever is open is on disk"


def test_an_outcome_that_nobody_fetches_goes_after_its_time() -> None:
    w = durable_world(result_ttl_s=1000.0, session_ttl_s=10.0, liveness_s=1e6)
    worker, client = w.worker(), w.client()
    submit(client)
    worker.finish()
    w.commit()
    w.advance(999.0)
    assert num_records(w) > 0
    assert w.state.journal.retained.num_bytes > 0
    w.advance(2.0)
    assert num_records(w) == 0
    assert w.state.journal.retained.num_bytes == 0


def test_an_acknowledged_key_is_remembered_through_a_restart() -> None:
    w = durable_world(dedup_window_s=100.0)
    worker, client = w.worker(), w.client()
    run = submit(client)
    worker.finish()
    w.commit()
    client.send(p.Ack(seq=client.received))
    w.commit()
    w.restart()
    worker, client = w.worker(), again(w, run)
    assert not worker.leases
    told_again = client.results(run, 2)
    w.commit()
    assert told_again in ([None, None], [tag(run, 0), tag(run, 1)])
    told(client, run)


def test_records_of_nobody_are_refused() -> None:
    store = MemoryStore()
    store.append([Put(1, 99, [b"?"])])
    store.commit()
    with pytest.raises(Corrupt, match="task 1"):
        World(store=store)


def test_workers_are_not_disturbed_by_a_full_turn_of_restored_tasks() -> None:
    w = durable_world()
    client = w.client()
    runs = [submit(client, 1) for _ in range(300)]
    w.commit()
    w.restart()
    worker: FakeWorker = w.worker(batches=1000)
    worker.finish_all()
    w.commit()
    all_told(w, runs)


def test_after_a_restart_tasks_are_queued_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.broker.core.MAX_BOUND_PER_TURN", 10)
    w = durable_world()
    client = w.client()
    runs = [submit(client, 1) for _ in range(35)]
    w.commit()
    w.restart()
    worker = w.worker(spec(max_batch_size=64), batches=1)
    assert worker.sizes() == [10], "the first portion, and no other was waited for"
    assert not w.state.kernels.awaited()
    worker.finish()
    assert worker.sizes() == [25]
    worker.finish()
    w.commit()
    all_told(w, runs)


# --- a broker that stops -----------------------------------------------------------------------------------------------


def test_a_stop_waits_for_what_runs_and_for_no_durable_task_that_waits() -> None:
    w = durable_world()
    worker, client = w.worker(spec(max_batch_size=1), batches=1), w.client()
    runs = [submit(client, 1) for _ in range(3)]
    w.commit()
    w.step(Stop())
    assert not w.core.is_idle, "one runs"
    worker.finish()
    assert w.core.is_idle
    assert not worker.leases, "nothing is begun that the next broker can do as well"
    w.commit()
    w.restart()
    worker = w.worker(batches=9)
    worker.finish_all()
    all_told(w, runs)


def test_a_stop_with_nothing_but_waiting_durable_tasks_is_idle_at_once() -> None:
    w = durable_world()
    submit(w.client(), kernel="late")
    w.commit()
    w.step(Stop())
    assert w.core.is_idle


def test_a_stop_waits_for_tasks_that_would_be_lost() -> None:
    w = durable_world()
    worker, client = w.worker(spec(max_batch_size=1), batches=1), w.client()
    submit(client, 1)
    plain = [client.submit(1) for _ in range(2)]
    w.commit()
    w.step(Stop())
    for _ in range(3):
        assert not w.core.is_idle
        worker.finish()
    assert w.core.is_idle
    w.commit()
    assert all(client.results(run) == [tag(run, 0)] for run in plain)

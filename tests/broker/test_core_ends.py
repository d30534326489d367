"""Deadlines and cancels in every state: exactly one outcome, at once, and the worker's credit stays with the worker."""

import pytest
from broker_world import START, World, spec

from penstock.broker import protocol as p
from penstock.broker.events import Received, Turn


def cancel(run: bytes, start: int = 0, stop: int = 4096) -> p.Cancel:
    return p.Cancel(id=run, start=start, stop=stop)


def test_a_queued_task_expires_on_its_instant_though_every_worker_is_busy() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    client.submit()
    run = client.submit(timeout_ms=2500.0)
    assert w.core.next_deadline(w.now) is not None
    w.now = START + 2.4999
    worker.heartbeat()
    assert client.results(run) == [None]
    assert w.core.next_deadline(w.now) == START + 2.5
    w.now = START + 2.5
    w.turn()
    assert client.results(run) == ["deadline_exceeded"]
    assert worker.sizes() == [1]


def test_expiry_goes_by_deadline_not_by_arrival() -> None:
    w = World()
    client = w.client()
    runs = [client.submit(timeout_ms=t) for t in (300.0, 100.0, 200.0)]
    for expected in (1, 2, 0):
        due = w.core.next_deadline(w.now)
        assert due is not None
        w.now = due
        w.turn()
        assert client.results(runs[expected]) == ["deadline_exceeded"]
    assert [client.row(r).num_finals for r in runs] == [1, 1, 1]


def test_a_running_task_that_expires_is_answered_at_once_and_its_late_answer_dropped() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit(timeout_ms=1000.0)
    token = worker.the_lease()
    waiting = client.submit()
    w.now += 1.0
    w.turn()
    assert client.results(run) == ["deadline_exceeded"]
    assert worker.cancelled == [token], "nobody waits for it any more"
    assert worker.sizes() == [1], "credit stays held until the worker answers"
    assert client.credit[0] == 4096 + 1, "the client's does not"
    worker.finish()
    assert w.counters["late_answers"] == 1
    assert client.row(run).num_finals == 1
    assert [batch[0][0] for batch in worker.batches()] == [waiting]


def test_one_expired_row_in_a_batch_leaves_the_others() -> None:
    w = World()
    client, worker = w.client(), w.worker(is_ready=False)
    short, long = client.submit(2, timeout_ms=1000.0), client.submit(2)
    worker.ready()
    w.now += 1.0
    w.turn()
    assert worker.cancelled == []
    worker.finish()
    assert client.results(short, 2) == ["deadline_exceeded"] * 2
    assert None not in client.results(long, 2)
    assert w.counters["late_answers"] == 2


@pytest.mark.parametrize("timeout_ms", [0.0, -5.0])
def test_a_deadline_in_the_past_is_refused(timeout_ms: float) -> None:
    w = World()
    client = w.client()
    w.worker()
    run = client.submit(timeout_ms=timeout_ms)
    assert client.refused[run].code == "deadline_exceeded"


def test_ten_thousand_expire_over_several_turns() -> None:
    w = World(window_rows=20_000)
    client = w.client()
    runs = [client.submit(timeout_ms=1000.0, is_turn=False) for _ in range(10_000)]
    w.now += 2.0
    w.handle(Turn())
    num_ended = w.state.ledger.outcomes["expired"]
    assert 0 < num_ended < 10_000
    assert w.core.next_deadline(w.now) is not None
    assert w.core.next_deadline(w.now) <= w.now  # type: ignore[operator]
    w.turn()
    assert all(client.row(run).num_finals == 1 for run in runs)


def test_cancel_while_queued() -> None:
    w = World()
    client = w.client()
    run = client.submit(3)
    client.send(cancel(run))
    assert client.results(run, 3) == ["cancelled"] * 3
    worker = w.worker()
    assert worker.sizes() == []


def test_cancel_while_running() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit(3)
    token = worker.the_lease()
    client.send(cancel(run, 0, 2))
    assert worker.cancelled == [], "somebody waits for the third row"
    client.send(cancel(run))
    assert worker.cancelled == [token]
    worker.finish()
    assert client.results(run, 3) == ["cancelled"] * 3
    assert w.counters["late_answers"] == 3


def test_cancel_after_the_finish_changes_nothing() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit()
    worker.finish()
    client.send(cancel(run))
    client.send(p.Ack(seq=client.received))
    client.send(cancel(run))
    client.send(cancel(b"never submitted!"))
    assert client.row(run).num_finals == 1
    assert client.row(run).error is None
    assert w.counters["cancelled_too_late"] == 3


@pytest.mark.parametrize("is_leased", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (3, 7), (7, 10), (0, 10), (4, 5), (8, 4000), (5, 5)])
def test_cancel_of_row_ranges(is_leased: bool, start: int, stop: int) -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=6), batches=9, is_ready=False)
    run = client.submit(10)
    if is_leased:
        worker.ready()
        client.send(cancel(run, start, stop))
    else:
        client.send(cancel(run, start, stop))
        worker.ready()
    worker.finish_all()
    wanted = ["cancelled" if start <= row < stop else "done" for row in range(10)]
    assert ["cancelled" if r == "cancelled" else "done" for r in client.results(run, 10)] == wanted
    assert all(client.row(run, row).num_finals == 1 for row in range(10))


def test_nobody_cancels_another_sessions_task() -> None:
    w = World()
    mine, yours = w.client(), w.client()
    run = mine.submit()
    yours.send(cancel(run))
    assert mine.results(run) == [None]
    assert yours.got == {}


def test_a_cancel_storm_while_batches_form() -> None:
    """All in one turn: submits and cancels of every second row range, then the batches."""
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=16), batches=50)
    runs = list[bytes]()
    for _ in range(100):
        runs.append(client.submit(4, is_turn=False))
        client.send(cancel(runs[-1], 1, 3), is_turn=False)
        client.send(cancel(runs[len(runs) // 2], 0, 1), is_turn=False)
    w.turn()
    for run in runs[::3]:
        client.send(cancel(run), is_turn=False)
    w.turn()
    worker.finish_all()
    for run in runs:
        assert all(client.row(run, row).num_finals == 1 for row in range(4))
        assert client.results(run, 4)[1:3] == ["cancelled"] * 2
    assert w.state.ledger.num_open == 0


def test_the_order_of_equal_times_is_first_come() -> None:
    """An answer that is taken in at the deadline's instant, before the turn, still counts."""
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit(timeout_ms=1000.0)
    w.now += 1.0
    worker.answer(worker.the_lease())
    assert client.row(run).error is None
    assert client.row(run).num_finals == 1


def test_the_deadline_may_not_be_heard_of_twice() -> None:
    w = World()
    client = w.client()
    run = client.submit(2, timeout_ms=1000.0)
    w.handle(Received("front", client.route, client.principal, cancel(run, 0, 1)))
    w.now += 5.0
    w.turn()
    w.turn()
    assert client.results(run, 2) == ["cancelled", "deadline_exceeded"]
    assert [client.row(run, row).num_finals for row in range(2)] == [1, 1]

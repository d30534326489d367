"""Credit: batches and bytes for workers, rows and bytes for clients, and the bounds of the whole queue."""

import pytest
from broker_world import BLOB, World, blob_rows, spec, tensor_rows

from penstock.broker import protocol as p


def test_a_worker_gets_as_many_batches_as_it_granted() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=2), batches=3)
    client.submit(20)
    assert worker.sizes() == [2, 2, 2]
    worker.pull(2)
    assert worker.sizes() == [2] * 5
    worker.send(p.Pull(credit=[1, 1]))  # totals only grow: an old one changes nothing
    assert worker.sizes() == [2] * 5
    worker.finish_all()
    assert w.state.ledger.num_open == 0


def test_an_answer_without_new_credit_brings_no_new_batch() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=2), batches=1)
    client.submit(4)
    token = worker.the_lease()
    worker.answer(token)
    assert len(worker.leases) == 1
    worker.pull(1)
    assert len(worker.leases) == 2


def test_bytes_bound_a_batch() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=64), batches=8, num_bytes=5 * 20)
    client.submit(8)
    assert worker.sizes() == [5]
    worker.pull(0, 2 * 20)
    assert worker.sizes() == [5, 2]
    worker.finish_all()
    assert w.state.ledger.num_open == 0


def test_a_row_past_the_byte_credit_waits_for_an_idle_worker_and_goes_alone() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=(BLOB,), max_batch_size=4), batches=4, num_bytes=100)
    small, large = b"s" * 16, b"l" * 16
    client.submit(run_id=small, block=blob_rows(small, [40]))
    client.submit(run_id=large, block=blob_rows(large, [500, 500]))
    assert worker.sizes() == [1], "busy: it has to wait"
    worker.finish()
    assert worker.sizes() == [1]
    assert worker.batches()[0][0] == (large, 0)
    worker.finish()
    worker.finish()
    assert client.results(large, 2).count(None) == 0


def test_bytes_already_past_the_credit_do_not_turn_into_rows() -> None:
    """Credit of 100 bytes, 500 assigned to the idle worker: what is left is negative, and means nothing."""
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=(BLOB,), max_batch_size=4), batches=4, num_bytes=100)
    large, small = b"l" * 16, b"s" * 16
    client.submit(run_id=large, block=blob_rows(large, [500]))
    client.submit(run_id=small, block=blob_rows(small, [30, 30]))
    assert worker.sizes() == [1]
    worker.finish()
    assert worker.sizes() == [2]
    worker.finish()
    assert client.results(small, 2).count(None) == 0


@pytest.mark.parametrize(("field", "window"), [("window_rows", 10), ("window_bytes", 200)])
def test_a_client_has_a_window(field: str, window: int) -> None:
    w = World(**{field: window})
    client, worker = w.client(), w.worker(is_ready=False)
    assert client.credit == [w.core.state.config.window_rows, w.core.state.config.window_bytes]
    runs = [client.submit(5), client.submit(5)]
    over = client.submit(1)
    assert client.refused[over].code == "overloaded"
    assert client.refused[over].retry_after_ms is not None
    worker.ready()
    worker.finish_all()
    assert None not in client.results(runs[0], 5) + client.results(runs[1], 5)
    rows, num_bytes = w.core.state.config.window_rows, w.core.state.config.window_bytes
    assert client.credit == [rows + 10, num_bytes + 10 * 20], "what was refused does not count"
    client.submit(5)
    assert worker.sizes() == [5]


def test_rows_come_back_as_they_end_and_bytes_when_the_run_ends() -> None:
    w = World(window_rows=4)
    client, worker = w.client(), w.worker(spec(max_batch_size=2), batches=1)
    client.submit(4)
    worker.answer(worker.the_lease())
    assert client.credit[0] == 4 + 2
    client.submit(2)
    assert not client.refused


@pytest.mark.parametrize("limit", [{"max_queue_rows": 10}, {"max_queue_bytes": 200}])
def test_the_queue_is_bounded_for_all_clients_together(limit: dict[str, int]) -> None:
    w = World(**limit)
    first, second, worker = w.client(), w.client(), w.worker(spec(max_batch_size=5))
    first.submit(6)
    second.submit(4)
    over = second.submit(1)
    assert second.refused[over].code == "overloaded"
    assert "the queue is full" in second.refused[over].message
    many = second.submit(8)
    assert second.refused[many].code == "overloaded", "the same admission for one task and for many"
    worker.finish_all()
    second.submit(8)
    assert len(second.refused) == 2


def test_retry_after_follows_the_rate() -> None:
    w = World(max_queue_rows=100)
    client, worker = w.client(), w.worker(spec(max_batch_size=100))
    for _ in range(10):
        client.submit(100)
        worker.finish_all()
    client.submit(100)
    one, many = client.submit(1), client.submit(90)
    one_ms, many_ms = client.refused[one].retry_after_ms, client.refused[many].retry_after_ms
    assert one_ms is not None and many_ms is not None
    assert 20.0 <= one_ms < many_ms <= 30_000.0


def test_results_that_nobody_acknowledges_stop_submissions() -> None:
    w = World(max_result_bytes=50)
    client, worker = w.client(), w.worker()
    for _ in range(3):
        client.submit()
        worker.finish_all()
    over = client.submit()
    assert client.refused[over].code == "overloaded"
    client.submit(ack=client.received)
    assert len(client.refused) == 1
    assert not w.core.clients.by_route[client.route].outbox


def test_a_run_has_a_bounded_number_of_rows() -> None:
    w = World(max_rows_per_run=10)
    client = w.client()
    w.worker()
    assert client.refused[client.submit(11)].code == "invalid_input"
    run = b"0" * 16
    assert client.refused[client.submit(run_id=run, block=tensor_rows(run, 0))].code == "invalid_input"


def test_nobody_takes_the_last_sessions() -> None:
    """One principal that opens session after session, over one connection even, leaves room for the others."""
    w = World(max_clients=100)
    greedy = [w.client(principal="client:greedy") for _ in range(95)]
    assert [len(c.take(p.Fault)) for c in greedy] == [0] * 90 + [1] * 5
    others = [w.client(principal=f"client:{i}") for i in range(10)]
    assert [len(c.take(p.Fault)) for c in others] == [0] * 10
    greedy[0].send(p.Goodbye())
    assert w.client(principal="client:greedy").take(p.Fault), "what it gives back is not its own again at once"
    for client in greedy[1:20]:
        client.send(p.Goodbye())
    assert not w.client(principal="client:greedy").take(p.Fault)


def test_sessions_are_bounded() -> None:
    w = World(max_clients=2, max_workers=1)
    w.client()
    w.client()
    third = w.client()
    assert third.take(p.Fault)[0].error.code == "overloaded"
    w.worker()
    second = w.worker(is_ready=False)
    assert second.take(p.Fault)[0].error.code == "overloaded"

"""Streaming leases: slots, partials in order, and a final that holds everything."""

from broker_world import FakeWorker, World, echo_block, number_per_row, spec

from penstock.broker import protocol as p

STREAM = spec(modes=["stream"], max_batch_size=3)


def piece(worker: FakeWorker, token: int, part: int, text: bytes = b"tok") -> None:
    worker.send(p.WorkerPartial(lease=token, part=part, block=echo_block([text])))


def test_a_worker_has_as_many_slots_as_the_batch_size() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM)
    runs = [client.submit(wants_partials=True) for _ in range(5)]
    assert worker.sizes() == [1, 1, 1]
    worker.finish(next(iter(worker.leases)))
    assert worker.sizes() == [1, 1, 1], "a slot is free at once"
    worker.finish_all()
    assert all(client.row(run).num_finals == 1 for run in runs)


def test_slots_are_per_kernel_and_use_no_batch_credit() -> None:
    w = World()
    client = w.client()
    worker = w.worker(STREAM, spec("other", modes=["stream"], max_batch_size=2), spec("batched"), batches=1)
    for _ in range(4):
        client.submit()
        client.submit(kernel="other")
    client.submit(4, kernel="batched")
    client.submit(4, kernel="batched", statics=b"x")
    assert sorted(worker.sizes()) == [1] * 5 + [4]
    worker.finish_all()
    assert w.state.ledger.num_open == 0


def test_slots_do_not_use_byte_credit() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM, batches=0, num_bytes=0)
    for _ in range(3):
        client.submit()
    assert worker.sizes() == [1, 1, 1]


def test_slots_do_not_wait_for_each_other_over_a_batch_budget() -> None:
    """`max_batch_cost_ms` bounds a batch; a stream is none."""
    w = World()
    inputs = (*STREAM["inputs"], number_per_row("ms"))
    made = spec(modes=["stream"], max_batch_size=3, max_batch_cost_ms=5.0, per={"ms": 1.0}, inputs=inputs)
    client, worker = w.client(), w.worker(made)
    for _ in range(3):
        client.submit(scalars={"ms": 10.0})
    assert worker.sizes() == [1, 1, 1]


def test_partials_come_in_order_and_the_final_after_them() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM)
    first, second = client.submit(wants_partials=True), client.submit(wants_partials=True)
    tokens = list(worker.leases)
    for part in range(3):
        for token in tokens:
            piece(worker, token, part)
    worker.finish_all()
    for run in (first, second):
        got = client.row(run)
        assert [o.part for o in got.partials] == [0, 1, 2]
        assert [bytes(o.block.row(0, 0)) for o in got.partials if o.block] == [b"tok"] * 3
        assert got.num_finals == 1


def test_who_does_not_want_partials_gets_only_the_final() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM)
    run = client.submit()
    piece(worker, worker.the_lease(), 0)
    worker.finish()
    assert client.row(run).partials == []
    assert client.row(run).num_finals == 1


def test_a_kernel_of_both_modes_streams_only_when_asked() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(modes=["batch", "stream"]), batches=2)
    client.submit()
    client.submit(wants_partials=True)
    assert sorted(a.mode for a in worker.leases.values()) == ["batch", "stream"]


def test_partials_of_an_absent_client_wait_merged_and_none_is_lost() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM)
    run = client.submit(wants_partials=True)
    token = worker.the_lease()
    piece(worker, token, 0)
    piece(worker, token, 1)
    client.disconnect()
    for part in range(2, 600):
        piece(worker, token, part)
    session = next(iter({r.session for r in w.state.ledger.runs()}))
    assert len(session.outbox) < 10, "they share messages"
    client.attach([run])
    piece(worker, token, 600)
    worker.finish()
    assert [o.part for o in client.row(run).partials] == list(range(601))
    assert client.row(run).num_finals == 1
    client.send(p.Ack(seq=client.received))
    assert session.num_unacked_bytes == 0


def test_partials_under_way_at_the_break_come_again_as_they_were() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM)
    run = client.submit(wants_partials=True)
    token = worker.the_lease()
    for part in range(3):
        piece(worker, token, part)
    client.received = 1  # the other two are lost
    client.row(run).partials[1:] = []
    client.disconnect()
    piece(worker, token, 3)
    client.attach([run])
    assert [o.part for o in client.row(run).partials] == [0, 1, 2, 3]


def test_cancelling_a_stream() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM)
    run = client.submit(wants_partials=True)
    token = worker.the_lease()
    piece(worker, token, 0)
    client.send(p.Cancel(id=run))
    assert worker.cancelled == [token]
    piece(worker, token, 1)
    assert client.results(run) == ["cancelled"]
    assert len(client.row(run).partials) == 1
    worker.finish()
    assert client.row(run).num_finals == 1
    assert w.counters["late_answers"] == 2


def test_partials_renew_a_lease() -> None:
    w = World(progress_s=20.0, session_ttl_s=1e6)
    client, worker = w.client(), w.worker(STREAM)
    client.submit(wants_partials=True)
    token = worker.the_lease()
    for part in range(40):
        w.advance(1.0)
        piece(worker, token, part)
    assert w.core.workers.by_secret


def test_a_stream_whose_worker_dies_starts_again_with_the_next_attempt() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM, pid=5000)
    run = client.submit(wants_partials=True)
    piece(worker, worker.the_lease(), 0)
    worker.crash()
    worker = w.worker(STREAM, pid=5001)
    piece(worker, worker.the_lease(), 0)
    worker.finish()
    assert [(o.attempt, o.part) for o in client.row(run).partials] == [(1, 0), (2, 0)]
    assert client.row(run).num_finals == 1


def test_a_stream_held_over_a_reconnect_keeps_its_slot() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM)
    for _ in range(5):
        client.submit(wants_partials=True)
    worker.disconnect()
    worker.hello()
    worker.ready()
    assert worker.sizes() == [1, 1, 1]
    worker.finish_all()
    assert w.state.ledger.num_open == 0


def test_a_partial_of_several_rows_is_dropped() -> None:
    w = World()
    client, worker = w.client(), w.worker(STREAM)
    run = client.submit(wants_partials=True)
    worker.send(p.WorkerPartial(lease=worker.the_lease(), part=0, block=echo_block([b"a", b"b"])))
    assert client.row(run).partials == []

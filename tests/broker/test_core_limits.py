"""Large batches and many peers: whatever the broker has to say fits the messages it may send."""

import msgpack
import pytest
from broker_world import BLOB, TAG_BYTES, World, X, blob_rows, number_per_row, spec, tag, tensor_rows

from penstock.broker import layout
from penstock.broker import protocol as p
from penstock.broker.columns import pack
from penstock.broker.layout import Column, Layout


def test_four_thousand_tasks_of_one_client_in_one_batch() -> None:
    w = World(window_rows=5000)
    client, worker = w.client(), w.worker(spec(max_batch_size=4096), is_ready=False)
    runs = [client.submit(is_turn=False) for _ in range(4096)]
    worker.ready()
    assert worker.sizes() == [4096]
    worker.finish()
    assert all(client.row(run).num_finals == 1 for run in runs)
    client.send(p.Ack(seq=client.received))
    session = w.core.clients.by_route[client.route]
    assert (session.finished, len(session.outbox), session.num_unacked_bytes) == ({}, 0, 0)


def test_runs_that_straddle_messages_are_told_once() -> None:
    w = World(window_rows=10_000)
    client, worker = w.client(), w.worker(spec(max_batch_size=4096), is_ready=False, batches=4)
    runs = [client.submit(1 + number % 3, is_turn=False) for number in range(2000)]
    worker.ready()
    worker.finish_all()
    for number, run in enumerate(runs):
        assert all(client.row(run, row).num_finals == 1 for row in range(1 + number % 3))
        assert bytes(client.row(run, number % 3).data or b"") == tag(run, number % 3)
    client.send(p.Ack(seq=client.received))
    assert not w.core.clients.by_route[client.route].finished


def test_every_error_of_a_large_batch_is_told() -> None:
    w = World(window_rows=5000)
    client = w.client()
    runs = [client.submit(timeout_ms=100.0, is_turn=False) for _ in range(4000)]
    worker = w.worker(spec(max_batch_size=4096, idempotent=False), pid=5000)
    worker.crash()
    assert {client.results(run)[0] for run in runs} == {"worker_lost"}


NAMES = [f"in{i}" for i in range(6)]


def test_a_batch_of_many_ragged_columns_and_scalars() -> None:
    """The lengths and scalars of a batch stand in its header: they bound its rows."""
    w = World(window_rows=10_000)
    blobs = [[name, "blob", {"kind": "bytes"}] for name in NAMES]
    made = spec(inputs=(*blobs, number_per_row("a"), number_per_row("b")), max_batch_size=4096)
    client, worker = w.client(), w.worker(made, is_ready=False)
    runs = list[bytes]()
    for number in range(10):
        run = b"%016d" % number
        rows = [tag(run, row) + b"x" * 280 for row in range(400)]
        block = pack([(Column(name, "bytes", (), True), [len(r) for r in rows], rows) for name in NAMES], 400)
        scalars = {name: [row / 7.0 for row in range(400)] for name in "ab"}
        runs.append(client.submit(run_id=run, block=block, scalars=scalars, is_turn=False))
    assert not client.refused
    worker.ready()
    worker.finish_all()
    assert all(None not in client.results(run, 400) for run in runs)


def test_a_status_of_many_workers_and_kernels() -> None:
    w = World()
    client = w.client()
    for number in range(40):
        w.worker(*(spec(f"a-kernel-of-worker-{number}-number-{i}") for i in range(10)), name=f"worker-{number}")
    client.send(p.Status(request=1))
    (reply,) = client.take(p.Reply)
    assert reply.request == 1
    assert reply.body["left_out"] == ["kernels"]
    assert len(reply.body["workers"]) == 40


def test_mixed_framed_and_packed_rows_in_one_batch() -> None:
    """A peer may frame small rows; a batch of both kinds is still one message."""
    w = World(window_rows=10_000)
    client, worker = w.client(), w.worker(spec(max_batch_size=4096), is_ready=False, batches=8)
    runs = list[bytes]()
    for number in range(4096):
        run = b"%016d" % number
        runs.append(client.submit(run_id=run, block=tensor_rows(run, 1, is_framed=number % 2 == 0), is_turn=False))
    worker.ready()
    worker.finish_all()
    assert all(client.row(run).num_finals == 1 for run in runs)


def test_what_is_remembered_of_layouts_is_bounded() -> None:
    """The same columns, packed in ever other bytes."""
    ones = (b"\x01", b"\xcc\x01", b"\xcd\x00\x01", b"\xce\x00\x00\x00\x01")  # the integer 1 in four ways
    wide = msgpack.packb([["x", "uint8", [], False, False]])
    for number in range(3 * layout.MAX_INTERNED):
        padded = wide.replace(b"\x90", b"\x98" + b"".join(ones[(number >> 2 * i) % 4] for i in range(8)))
        assert Layout.parse(padded).columns == (Column("x", "uint8", (1,) * 8),)
    assert len(layout._BY_BYTES) <= layout.MAX_INTERNED + 1
    for number in range(3 * layout.MAX_INTERNED):
        Layout.of((Column("x", "uint8", (number,)),))
    assert len(layout._BY_BYTES) <= layout.MAX_INTERNED + 1
    assert len(layout._BY_COLUMNS) <= layout.MAX_INTERNED + 1


@pytest.mark.parametrize("inputs", [(X,), (BLOB,)])
def test_a_run_of_the_largest_size(inputs: tuple[object, ...]) -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=inputs, max_batch_size=4096))
    run = b"r" * 16
    block = tensor_rows(run, 4096) if inputs[0] is X else blob_rows(run, [TAG_BYTES + i % 300 for i in range(4096)])
    client.submit(run_id=run, block=block)
    worker.finish_all()
    assert None not in client.results(run, 4096)

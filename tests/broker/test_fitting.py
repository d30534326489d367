"""Whatever is told fits a message: remembered outcomes, merged partials, errors in any language, records of the journal."""

import msgpack
import pytest
from broker_world import World, X, number_per_row, spec, tensor_rows
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker import fitting, wire
from penstock.broker import protocol as p
from penstock.broker.columns import Block, pack
from penstock.broker.events import Received
from penstock.broker.layout import Column
from penstock.broker.state import FRONT
from penstock.broker.storage.store import MemoryStore

LONG = p.Error("kernel_failed", "boom", None, "x" * 4000)
WIDE = p.Error("kernel_failed", "中" * p.MAX_TEXT, None, "中" * p.MAX_DETAIL)


def columns(num: int, num_rows: int, length: int = 3) -> Block:
    """Ragged columns, each row of each so many bytes long."""
    rows = [b"abc".ljust(length, b"c")] * num_rows
    return pack([(Column(f"output_{i}", "bytes", (), True), [length] * num_rows, rows) for i in range(num)], num_rows)


def sent(outcomes: list[p.Outcome]) -> None:
    """Raises ProtocolError if they do not fit a message that can be read again."""
    message = p.Results(seq=1, outcomes=outcomes, credit=(1 << 40, 1 << 40))
    assert wire.decode(p.TO_CLIENT, wire.encode(message))


BLOCKS = st.builds(columns, st.integers(1, 12), st.integers(1, 3000))
ERRORS = st.builds(lambda text, num: p.Error("kernel_failed", text, None, text * num), st.text(min_size=1), st.integers(1, 99))


@given(st.lists(st.one_of(BLOCKS, ERRORS), min_size=1, max_size=60))
def test_messages_fit_and_lose_nothing(answers: list[Block | p.Error]) -> None:
    outcomes = [
        p.Outcome([(b"%016d" % i, 0, a.num_rows)], a, queue_ms=[1.5], timings={"bin": "b" * 32, "worker": "w" * 64})
        if isinstance(a, Block) else p.Outcome([(b"%016d" % i, 0, 1)], error=a)
        for i, a in enumerate(answers)
    ]  # fmt: skip
    told = list(fitting.messages(outcomes))
    for one in told:
        sent(one)
    rows = [(id_, row) for one in told for o in one for id_, start, stop in o.spans for row in range(start, stop)]
    assert rows == [(id_, row) for o in outcomes for id_, start, stop in o.spans for row in range(start, stop)]
    data = [bytes(o.block.row(0, row)) for one in told for o in one if o.block for row in range(o.block.num_rows)]
    assert len(data) == sum(a.num_rows for a in answers if isinstance(a, Block)) and set(data) <= {b"abc"}


def test_many_long_errors_are_told_again() -> None:
    w = World()
    worker, client = w.worker(spec(max_batch_size=64)), w.client()
    run = client.submit(32, key=b"k")
    for row in range(32):
        worker.answer(worker.the_lease(), row, row + 1, LONG)
    again = client.submit(32, key=b"k", block=tensor_rows(run, 32))
    assert client.results(again, 32) == ["kernel_failed"] * 32


def test_many_long_errors_can_be_fetched() -> None:
    w = World(store=MemoryStore())
    worker, client = w.worker(spec(max_batch_size=64)), w.client()
    run = client.submit(32, is_durable=True)
    for row in range(32):
        worker.answer(worker.the_lease(), row, row + 1, LONG)
    w.commit()
    other = w.client("other")
    other.send(p.Fetch(request=1, id=run))
    w.commit()
    assert other.results(run, 32) == ["kernel_failed"] * 32


def test_an_error_in_a_language_of_wide_characters_goes_to_many() -> None:
    w = World()
    worker, client = w.worker(spec(max_batch_size=1024)), w.client()
    runs = [client.submit(1, is_turn=False) for _ in range(400)]
    w.turn()
    while worker.leases:
        worker.finish(next(iter(worker.leases)), WIDE)
    assert {client.results(run)[0] for run in runs} == {"kernel_failed"}


def test_partials_that_wait_are_merged_as_far_as_they_fit() -> None:
    w = World()
    worker, client = w.worker(spec(modes=("stream",))), w.client()
    run = client.submit(1, wants_partials=True)
    client.disconnect()
    for part in range(300):
        worker.send(p.WorkerPartial(lease=worker.the_lease(), part=part, block=columns(12, 1)))
    client.attach([run])
    assert [o.part for o in client.row(run).partials] == list(range(300))
    assert len(client.take(p.Partial)) < 100


@pytest.mark.parametrize("store", [None, MemoryStore()], ids=["memory", "durable"])
def test_numbers_in_narrow_types_may_take_more_room_here(store: MemoryStore | None) -> None:
    """A client may pack float32, which the broker packs again as float64: its header is then twice as long."""
    w = World(store=store)
    kernel = spec(inputs=(X, number_per_row("a"), number_per_row("b"), number_per_row("c")), max_batch_size=4096)
    worker, client, run = w.worker(kernel), w.client(), b"0123456789abcdef"
    scalars = {name: [0.5] * 3500 for name in "abc"}
    message = p.Submit(id=run, kernel="echo", block=tensor_rows(run, 3500), scalars=scalars, is_durable=store is not None)
    header = {"type": "submit", "id": run, "kernel": "echo", "block": message.block.describe(), "scalars": scalars}
    header |= {"is_durable": True} if store is not None else {}
    frames = [wire.VERSION, msgpack.packb(header, use_single_float=True), *message.block.frames]
    w.step(Received(FRONT, client.route, client.principal, wire.decode(p.FROM_CLIENT, frames), 0))
    if store is not None:
        w.commit()
        w.restart()
        client, worker = w.client(), w.worker(kernel)
        client.send(p.Fetch(request=1, id=run))
    worker.finish_all()
    if store is not None:
        w.commit()
    assert all(isinstance(data, bytes) for data in client.results(run, 3500))


def test_an_answer_whose_lengths_fill_a_header_is_recorded_whole() -> None:
    w = World(store=MemoryStore())
    worker, client = w.worker(spec(max_batch_size=2000)), w.client()
    run = client.submit(1500, is_durable=True)
    answer = p.Answer(0, 1500, columns(14, 1500, 256))
    message = p.WorkerFinal(lease=worker.the_lease(), answers=[answer], timings=dict.fromkeys("abcdefghijklmnop", 1e-3))
    size = len(wire.encode(message)[1])
    assert wire.MAX_HEADER_BYTES - 2000 < size < wire.MAX_HEADER_BYTES
    worker.send(message)
    w.commit()
    w.restart()
    client = w.client()
    client.send(p.Fetch(request=1, id=run))
    w.commit()
    assert client.results(run, 1500) == [b"abc".ljust(256, b"c")] * 1500


@pytest.mark.parametrize("value", [1 << 80, "\ud800"], ids=["a number", "half a character"])
def test_what_msgpack_cannot_hold_is_an_error_of_the_protocol(value: object) -> None:
    with pytest.raises(wire.ProtocolError, match="cannot be packed"):
        wire.encode(p.Reply(request=1, body={"value": value}))

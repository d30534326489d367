"""Well-formed messages with any content, in any order, from peers with and without a session: the core stands."""

from typing import Any

import msgpack
import pytest
from broker_world import BLOB, PAD, FakeClient, FakeWorker, World, number_per_row, spec, tensor_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import NESTED, blocks, messages

from penstock.broker import protocol as p
from penstock.broker.wire import ProtocolError, decode, encode

IDS = [bytes([i]) * 16 for i in range(3)]
KERNELS = ["echo", "texts", "padded", "stream", "unknown"]
SPECS = [
    spec("echo", max_batch_size=3), spec("texts", (BLOB, number_per_row("ms", 1.0)), per={"ms": 1.0, "x.bytes": 0.1}),
    spec("padded", (PAD,), per={"x.numel": 1.0}, max_batch_cost_ms=5.0), spec("stream", modes=["stream"]),
]  # fmt: skip
FROM_CLIENT = [c for t, c in p.FROM_CLIENT.items() if t not in ("hello", "attach", "submit")]
FROM_WORKER = [c for t, c in p.FROM_WORKER.items() if t != "hello"]


def adapt(draw: Any, message: Any) -> Any:
    """Names and numbers that mean something here, mostly."""
    for name, choices in (("id", IDS), ("kernel", KERNELS), ("target", ["worker"]), ("op", ["drain"]), ("session", [])):
        if hasattr(message, name) and choices and draw(st.booleans()):
            object.__setattr__(message, name, draw(st.sampled_from(choices)))
    return message


NUMBERS = st.floats() | st.integers(-9, 9)
SUBMITS = st.builds(
    p.Submit, id=st.sampled_from(IDS), kernel=st.sampled_from(KERNELS),
    block=blocks() | st.builds(tensor_rows, st.sampled_from(IDS), st.integers(0, 5)), statics=st.sampled_from([b"", b"s"]),
    scalars=st.dictionaries(st.sampled_from(["ms", "y"]), NUMBERS | st.lists(NUMBERS, max_size=3), max_size=2),
    timeout_ms=st.none() | st.floats(-5, 1e4), wants_partials=st.booleans(), key=st.none() | st.sampled_from([b"k", b"l"]),
    priority=st.integers(0, 9), is_again=st.booleans(), wants_accepted=st.booleans(), is_durable=st.just(False),
)  # fmt: skip


def world() -> tuple[World, FakeClient, FakeWorker]:
    w = World(window_rows=50, liveness_s=1e6, session_ttl_s=1e6)
    return w, w.client(), w.worker(*SPECS, batches=3)


@given(data=st.data())
@settings(max_examples=300)
def test_any_messages_in_any_order(data: st.DataObject) -> None:
    w, client, worker = world()
    for _ in range(data.draw(st.integers(1, 12))):
        who = data.draw(st.sampled_from(["submit", "submit", "client", "worker", "lease", "lease"]))
        if who == "submit":
            client.send(data.draw(SUBMITS))
        elif who == "client":
            client.send(adapt(data.draw, data.draw(messages(data.draw(st.sampled_from(FROM_CLIENT))))))
        elif who == "worker":
            worker.send(adapt(data.draw, data.draw(messages(data.draw(st.sampled_from(FROM_WORKER))))))
        elif w.state.ledger.leases:
            token = data.draw(st.sampled_from(list(w.state.ledger.leases)))
            answer = data.draw(messages(data.draw(st.sampled_from([p.WorkerFinal, p.WorkerPartial]))))
            object.__setattr__(answer, "lease", token)
            worker.send(answer)
        client.inbox.clear()
        client.received = max(client.received, 0)
        w.now += data.draw(st.sampled_from([0.0, 0.001, 2.0]))
        w.turn()


@given(data=st.data())
@settings(max_examples=300)
def test_any_spec_is_taken_or_refused_and_then_submitted_to(data: st.DataObject) -> None:
    """A worker's spec with one part replaced by anything: refused when it comes, or harmless ever after."""
    w = World()
    made = data.draw(st.sampled_from(SPECS))
    parts = [("inputs", i, j) for i in range(2) for j in range(3)]
    path: tuple[Any, ...] = data.draw(st.sampled_from([*parts, *((k,) for k in made), ("cost", "per")]))
    made = msgpack.unpackb(msgpack.packb(made))
    inner: Any = made
    for step in path[:-1]:
        inner = inner[min(step, len(inner) - 1)] if isinstance(inner, list) else inner[step]
    inner[path[-1]] = data.draw(NESTED)
    client, worker = w.client(), w.worker(is_ready=False)
    try:
        ready = p.Ready(specs=[made], credit=[2, 1 << 30])
        decode(p.FROM_WORKER, encode(ready))
    except (ProtocolError, OverflowError):
        return
    worker.send(ready)
    for _ in range(3):
        message = data.draw(SUBMITS)
        name = made["name"] if isinstance(made["name"], str) and 0 < len(made["name"]) <= 64 else "echo"
        object.__setattr__(message, "kernel", name)
        client.send(message)


@pytest.mark.parametrize("side", ["front", "back"])
@given(data=st.data())
@settings(max_examples=60)
def test_strangers_are_told_to_say_hello(side: str, data: st.DataObject) -> None:
    w, client, worker = world()
    run = client.submit()
    stranger = w.client(is_connected=False) if side == "front" else w.worker(is_ready=False)
    stranger.connect()
    table = p.FROM_CLIENT if side == "front" else p.FROM_WORKER
    classes = [c for t, c in table.items() if t not in ("hello", "attach")]
    stranger.send(data.draw(messages(data.draw(st.sampled_from(classes)))))
    assert stranger.take(p.Fault)[0].error.code == "unattached"
    worker.finish()
    assert client.row(run).num_finals == 1

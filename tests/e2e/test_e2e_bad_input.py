"""Whatever users get wrong: a clear typed error for them, and nothing else is disturbed."""

import asyncio
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from running import Running, running, until

from penstock.client import (
    AsyncClient,
    Cancelled,
    Client,
    Conflict,
    Dead,
    DeadlineExceeded,
    InvalidInput,
    KernelFailed,
    UnknownKernel,
    WorkerLost,
)  # fmt: skip

MAX_BYTES = 8 << 20
ONE = np.ones(3, np.float32)


@pytest.fixture(scope="module")
def stack(module_folder: Path) -> Iterator[Running]:
    small = {"PENSTOCK_BROKER_WINDOW_BYTES": str(MAX_BYTES), "PENSTOCK_BROKER_MAX_QUEUE_BYTES": str(MAX_BYTES)}
    with running(module_folder, "w", extra=small) as run:
        yield run


@pytest.fixture
def ps(stack: Running) -> Iterator[Client]:
    """A client; when its test is over, broker, worker and other tasks are as they were."""
    processes = {name: process.pid for name, process in stack.processes.items()}
    with stack.client() as client:
        yield client
    assert {name: process.pid for name, process in stack.processes.items() if process.poll() is None} == processes
    with stack.client() as other:
        assert other.call("scale", x=ONE).tolist() == [2.0] * 3
        assert other.status()["tasks"]["open"] == 0


def test_an_unknown_kernel(ps: Client) -> None:
    with pytest.raises(UnknownKernel, match=r"'softmux'.*softmax"):
        ps.call("softmux", x=ONE)


def test_draining_an_unknown_worker_names_the_known_ones(stack: Running, ps: Client) -> None:
    with pytest.raises(InvalidInput, match="workers: "):
        ps.drain("nobody")

    async def ask() -> None:
        async with AsyncClient(stack.url) as client:
            await client.drain("nobody")

    with pytest.raises(InvalidInput, match="workers: "):
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("kernel", "inputs", "says"),
    [
        ("matmul", {"a": np.ones((2, 3)), "b": np.ones((2, 3))}, "as many rows"),
        ("matmul", {"a": np.ones(3), "b": np.ones((2, 3))}, "2 dimensions"),
        ("matmul", {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 2))}, "one dtype"),
        ("softmax", {"x": np.ones(3, np.int32)}, "int32"),
        ("softmax", {"x": np.array(["a"])}, "cannot travel|numbers"),
        ("softmax", {"x": ONE, "axis": 5}, "axis"),
        ("softmax", {"y": ONE}, "unknown argument 'y'"),
        ("sleep", {"seconds": -1.0}, "seconds"),
        ("sleep", {"seconds": float("nan")}, "finite"),
        ("sleep", {"seconds": 0.0, "steps": "many"}, "steps"),
        ("embed", {"text": ["a", "b"]}, "map_rows"),
        ("sha256", {"data": "text"}, "bytes"),
        ("filter", {"table": np.ones((2, 1)), "columns": ["x"], "where": "open('x')"}, "open"),
        ("search", {"query": ONE, "corpus": "never-made"}, "never-made"),
    ],
)  # fmt: skip
def test_wrong_inputs(ps: Client, kernel: str, inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        ps.call(kernel, **inputs)


def test_too_large(ps: Client) -> None:
    with pytest.raises(InvalidInput, match="bytes"):  # not Overloaded: to wait would not help
        ps.call("sha256", data=bytes(MAX_BYTES + 1))
    data = bytes(MAX_BYTES // 2)
    assert bytes(ps.call("sha256", data=data)) == hashlib.sha256(data).digest()


def test_one_bad_item_fails_alone(ps: Client) -> None:
    values = [float(-i if i % 20 == 7 else i) for i in range(200)]
    items = [{"x": np.full(2, v, np.float32)} for v in values]
    for value, result in zip(values, ps.map("picky", items, return_exceptions=True), strict=True):
        if value < 0:
            assert isinstance(result, KernelFailed)
            assert "a negative number" in f"{result} {result.detail}"
        else:
            assert result.tolist() == [value + 1] * 2


def test_the_deadline_is_in_the_past(ps: Client) -> None:
    for timeout in (0.0, -5.0):
        with pytest.raises(DeadlineExceeded):
            ps.options(timeout=timeout).call("softmax", x=ONE)


def test_the_deadline_passes_while_the_worker_is_busy(ps: Client) -> None:
    busy = ps.submit("sleep", seconds=1.0)
    until(lambda: any(worker["leases"] for worker in ps.status()["workers"]), "the worker sleeps")
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        ps.options(timeout=0.2).call("sleep", seconds=0.0, steps=2)
    assert 0.19 < time.monotonic() - began < 0.5
    assert not busy.done()
    assert busy.result(10)["seconds"] == 1.0


def test_the_same_key_is_the_same_task(ps: Client) -> None:
    keyed = ps.options(idempotency_key="once")
    first = keyed.submit("sleep", seconds=0.2)
    began = time.monotonic()
    assert keyed.call("sleep", seconds=0.2) == first.result(10)
    assert keyed.call("sleep", seconds=0.2) == first.result(10)
    assert time.monotonic() - began < 0.35
    with pytest.raises(Conflict):
        keyed.call("sleep", seconds=0.3)


def test_cancel(ps: Client) -> None:
    ended = ps.submit("softmax", x=ONE)
    value = ended.result(10)
    assert ended.cancel() is False
    assert ended.result(0).tolist() == value.tolist()
    running_, waiting = ps.submit("sleep", seconds=0.5), ps.submit("sleep", seconds=0.5, steps=3)
    assert waiting.cancel() is True
    with pytest.raises(Cancelled):
        waiting.result(0)
    assert running_.result(10)["seconds"] == 0.5


def test_a_cancel_storm(ps: Client) -> None:
    tasks = [ps.submit("slow_hash", data=str(i).encode()) for i in range(400)]
    assert ps.cancel(tasks[::2]) >= 150
    for i, task in enumerate(tasks):
        if task.exception(30) is None:
            assert bytes(task.result()) == hashlib.sha256(str(i).encode()).digest()
        else:
            assert i % 2 == 0


@pytest.mark.parametrize("side", ["clients", "workers"])
@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"GET / HTTP/1.1"],
        [b"PS\x01\x00"],
        [b"PS\x09\x00", msgpack.packb({"type": "hello"})],
        [b"PS\x01\x00", b"\xc1\xff"],
        [b"PS\x01\x00", msgpack.packb({"type": "ruin"})],
        [b"PS\x01\x00", msgpack.packb({"type": "hello", "name": 5, "secret": b""})],
        [b"PS\x01\x00", b"x" * 100_000],
        [b"x"] * 50,
    ],
    ids=["empty", "http", "no header", "version 9", "no msgpack", "unknown type", "wrong types", "huge header", "50 frames"],
)
def test_malformed_bytes(stack: Running, ps: Client, side: str, frames: list[bytes]) -> None:
    before = ps.status()["counters"].get("malformed", 0)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(f"{stack.url}/{side}.sock")
        socket.send_multipart(frames)
        assert socket.poll(5000)
        answer = msgpack.unpackb(socket.recv_multipart()[1])
    assert answer["type"] == "error"
    assert answer["error"][0] == "protocol"
    assert ps.status()["counters"]["malformed"] == before + 1


def test_errors_on_the_command_line_are_one_line(stack: Running, ps: Client) -> None:
    for arguments, status, says in (
        (["call", "softmux", "x=1"], 1, "softmux"),
        (["call", "softmax", "y=[1]"], 1, "unknown argument 'y'"),
        (["call", "softmax", "x=@/nowhere.npy"], 2, "/nowhere.npy"),
        (["call", "softmax", "x"], 2, "name=value"),
        (["call", "picky", "x=[-1.0]"], 1, "KernelFailed"),
        (["call", "sleep", "seconds=1", "--timeout", "0.1"], 1, "DeadlineExceeded"),
        (["call", "softmax", "x=[1]", "--priority", "urgent"], 1, "priority"),
        (["call", "softmax", "x=[1]", "--stream"], 1, "stream"),
        (["bench", "embed"], 2, "needs inputs"),
        (["drain", "nobody"], 1, "nobody"),
        (["status", "--url", "nonsense"], 2, "nonsense"),
        (["status", "--nonsense"], 2, "--nonsense"),
    ):
        done = stack.cli(*arguments)
        assert (done.returncode, done.stdout) == (status, ""), arguments
        assert done.stderr.startswith("penstock: ")
        assert done.stderr.count("\n") == 1
        assert says in done.stderr


def test_a_task_that_kills_its_worker(stack: Running) -> None:
    """It is dead after two workers that it had alone; whatever shared its batch or its worker is answered."""
    before = stack.log("w").count("killed by SIGKILL")
    with stack.client() as ps:
        bad = ps.submit("fatal", x=-ONE)
        neighbour = ps.submit("fatal", x=ONE)
        # Of other shapes, so that they wait at the same worker in batches of their own.
        others = [ps.submit("fatal", x=np.ones(n, np.float32)) for n in (4, 5, 6)]
        with pytest.raises(Dead, match="alone"):
            bad.result(60)
        assert [task.result(60)[0] for task in (neighbour, *others)] == [2.0] * 4
        assert 2 <= stack.log("w").count("killed by SIGKILL") - before <= 4


def test_a_task_that_must_not_run_twice(stack: Running) -> None:
    stack.wait_ready("w")
    with stack.client() as ps:
        assert ps.call("once", x=ONE).tolist() == [2.0] * 3
        with pytest.raises(WorkerLost, match="not idempotent"):
            ps.call("once", x=-ONE)

"""Rows that lie in a client's memory: read once, before anything looks at them; and answers that go into the worker's own."""

import gc
import os
from typing import Any

import numpy as np
import pytest
import torch

from penstock.broker import protocol
from penstock.broker.columns import Block, pack
from penstock.broker.layout import Column
from penstock.broker.peer_memory import PeerMemory
from penstock.broker.protocol import Assign, Code, Welcome
from penstock.broker.segments import IS_POSSIBLE, Segment, make, open_segment
from penstock.broker.shared import SharedBytes
from penstock.kernels import Blob, Tensor, kernel, registry
from penstock.worker import pinned
from penstock.worker.config import WorkerConfig
from penstock.worker.engine import Engine
from penstock.worker.inputs import Plan
from penstock.worker.link import Final, Link
from penstock.worker.watch import Watch
from penstock.worker.work import Work

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="shared memory is for Linux")
CPU = torch.device("cpu")
N = 200_000


def target(declared: Any) -> Any:
    @kernel("target", inputs={"x": declared})
    def run(x: Any, x_lengths: Any = None, x_offsets: Any = None) -> Any:
        return x

    return registry.create(run)


def shared_rows(segment: Segment, rows: list[np.ndarray], dtype: str, is_ragged: bool = False) -> Block:
    """Rows in another process's memory, as a worker sees them: a mapping that can only be read."""
    frames, offset = list[SharedBytes](), 0
    opened = open_segment(segment.place)
    for row in rows:
        segment.map[offset : offset + row.nbytes] = row.tobytes()
        frames.append(SharedBytes(segment.place, offset, row.nbytes, opened))
        offset += -(-row.nbytes // 4096) * 4096
    shape = rows[0].shape[1:] if is_ragged else rows[0].shape
    lengths = [len(row) for row in rows] if is_ragged else None
    return pack([(Column("x", dtype, shape, is_ragged, True), lengths, frames)], len(rows))


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(("declared", "dtype"), [
    (Tensor(), "float32"), (Tensor(), "bool"), (Tensor(), "uint8"), (Tensor(ragged="pad"), "int64"),
    (Tensor(ragged="pack"), "float32"), (Blob("bytes"), "bytes"),
])  # fmt: skip
def test_inputs_are_a_snapshot(declared: Any, dtype: str, num_rows: int) -> None:
    """What the client writes afterwards changes nothing that was validated or will be used."""
    is_ragged = isinstance(declared, Blob) or declared.ragged != "exact"
    stored = "uint8" if dtype == "bytes" else dtype
    rows = [(np.arange(N + 8 * i * is_ragged) % 2 + i).astype(stored) for i in range(num_rows)]
    segment = make(16 << 20)
    block = shared_rows(segment, rows, dtype, is_ragged)
    plan = Plan(target(declared), CPU)
    before = _values(plan.batch([block], {}))
    kept = plan.batch([block], {})
    segment.map[:] = b"\xff" * segment.nbytes
    after = _values(kept)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)
    assert any(v.size >= N for v in before.values())


def _values(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: value.numpy().copy() if isinstance(value, torch.Tensor) else np.frombuffer(b"".join(value), np.uint8).copy()
        for name, value in inputs.items()
    }


class Rig:
    """The leases of a worker, with memory to share and no socket."""

    def __init__(self, tmp_path: Any) -> None:
        self.sent: list[Any] = []
        self.probe = make(4096)
        self.memory = PeerMemory(64 << 20)
        self.memory.welcome({"probe": list(self.probe.place), "min_bytes": 70_000, "max_bytes": 64 << 20, "held": []})
        self.link = Link("cpu", "cpu", 1 << 30)
        config = WorkerConfig(device="cpu", state_dir=tmp_path, threads=1)
        self.work = Work(lambda announce: Engine(config, announce, Watch()), self.link, self.memory, self.sent.append)
        self.link.hello()
        self.link.on_welcome(Welcome(epoch=1, heartbeat_ms=1000.0))
        self.link.ready([], {}, {})

    def run(self, block: Block, **fields: Any) -> Final:
        self.work.take(Assign(lease=len(self.sent) + 1, kernel="softmax", blocks=[block], **fields))
        self.work.run_batch()
        final = self.sent[-1]
        assert isinstance(final, Final)
        return final


def test_large_answers_lie_in_the_workers_memory(tmp_path: Any) -> None:
    rig, rows = Rig(tmp_path), np.random.default_rng(0).standard_normal((2, N)).astype("f4")
    segment = make(16 << 20)
    final = rig.run(shared_rows(segment, list(rows), "float32"))
    (answer,) = final.answers
    assert answer.block is not None
    assert all(isinstance(f, SharedBytes) for f in answer.block.frames)
    found = np.frombuffer(answer.block.row(0, 1), "f4")
    np.testing.assert_allclose(found, torch.softmax(torch.from_numpy(rows[1]), 0).numpy(), rtol=1e-5)
    small = rig.run(pack([(Column("x", "float32", (4,)), None, [np.zeros(4, "f4").tobytes()])], 1))
    assert not small.answers[0].block.has_shared


def test_answers_that_not_everybody_can_read_go_in_frames(tmp_path: Any) -> None:
    rig = Rig(tmp_path)
    segment = make(16 << 20)
    block = shared_rows(segment, [np.zeros(N, "f4")], "float32")
    assert not rig.run(block, is_unshared=True).answers[0].block.has_shared
    rig.memory.is_ending = True
    assert not rig.run(block).answers[0].block.has_shared


def test_rows_that_cannot_be_opened_are_answered_at_once(tmp_path: Any) -> None:
    rig = Rig(tmp_path)
    frames = [SharedBytes((os.getpid(), 100_000, 7), 0, 4 * N)]
    final = rig.run(pack([(Column("x", "float32", (N,), is_framed=True), None, frames)], 1))
    assert final.answers[0].error.code == Code.UNSHARED
    assert final.timings == {"num_runs": 0}
    assert rig.memory.arena is None


def test_a_slot_is_lent_once_per_message_and_comes_back(tmp_path: Any) -> None:
    rig, segment = Rig(tmp_path), make(16 << 20)
    final = rig.run(shared_rows(segment, [np.zeros(N, "f4")], "float32"))
    arena = rig.memory.arena
    (message,) = rig.link.encode(final)
    rig.memory.lend(a.block for a in message[1] if a.block is not None)
    shared = final.answers[0].block.frames[0]
    slot = [shared.place[1], shared.offset]
    rig.link.sent(final)
    del final, message, shared
    rig.sent.clear()
    gc.collect()
    assert arena.num_taken == 1
    rig.memory.release(protocol.Release(slots=slot))
    assert arena.num_taken == 0


@pytest.mark.gpu
def test_pinned_memory_is_read_by_the_device_itself() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    device = torch.device("cuda")
    rows = [np.random.default_rng(i).standard_normal(N).astype("f4") for i in range(3)]
    segment = make(16 << 20)
    block = shared_rows(segment, rows, "float32")
    opened = open_segment(segment.place, is_writable=True)
    for frame in block.frames:
        frame.attach(opened)
    pins = pinned.Pins(device)
    pins.pin([opened])
    assert opened.is_pinned
    assert pinned.are_pinned(block.frames)
    assert torch.from_numpy(np.frombuffer(opened.map, np.uint8)).is_pinned()
    for declared in (Tensor(), Tensor(ragged="pad")):
        x = Plan(target(declared), device).batch([block], {})["x"]
        assert x.device.type == "cuda"
        torch.testing.assert_close(x.cpu(), torch.from_numpy(np.stack(rows)), rtol=0, atol=0)
    torch.cuda.synchronize()
    pins.unpin([opened])
    assert not opened.is_pinned


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_read_by_the_processor() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    device, segment = torch.device("cuda"), make(16 << 20)
    block = shared_rows(segment, [np.ones(N, "f4")], "float32")
    whole = torch.frombuffer(make(4096).map, dtype=torch.uint8)
    assert pinned.register(whole)
    assert not pinned.register(whole)  # twice is an error, which must not stay behind
    torch.ones(4, device=device).sum().item()
    pinned.unregister(whole)
    x = Plan(target(Tensor()), device).batch([block], {})["x"]
    assert float(x.sum()) == N

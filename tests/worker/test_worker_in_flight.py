"""A worker process with batches in flight, against a fake broker: what travels is the same, and what it says of itself."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_broker import FakeBroker, assign, start_worker, tensor_block

from penstock.broker import protocol
from penstock.broker.protocol import Code

EXIT_S = 20.0


@pytest.fixture
def broker(tmp_ipc: Path) -> Iterator[FakeBroker]:
    made = FakeBroker(tmp_ipc)
    yield made
    made.close()


def numbers(final: protocol.WorkerFinal) -> list[float]:
    block = final.answers[0].block
    assert block is not None, final.answers
    return np.frombuffer(block.column(0, 0, block.num_rows), np.float32).tolist()


def test_batches_in_flight_are_answered_and_their_memory_comes_back(broker: FakeBroker, tmp_ipc: Path) -> None:
    slots = ("--slots", "3", "--pool-bytes", str(1 << 20), "--scrub", "poison", "--precision", "scale=bf16")
    worker = start_worker(broker.url, tmp_ipc, *slots)
    try:
        ready = broker.expect(protocol.Ready)
        assert ready.credit[0] == 4, "one batch ahead of those in the slots"
        leases = itertools.count(1)
        for _ in range(40):
            some = list(itertools.islice(leases, 4))
            for lease in some:
                broker.send(assign(lease, "scale", tensor_block(np.full((3, 1000), lease, np.float32))))
            finals = [broker.expect(protocol.WorkerFinal) for _ in some]
            assert sorted(final.lease for final in finals) == some
            for final in finals:
                assert set(numbers(final)) == {2.0 * final.lease}
        count = assign(next(leases), "count", tensor_block(np.array([5]), "start"), mode="stream")
        broker.send(count)
        broker.send(assign(next(leases), "picky", tensor_block(np.array([[1, 0], [666, 0]], np.float32))))
        endings = {final.lease: final for final in (broker.expect(protocol.WorkerFinal) for _ in range(2))}
        assert endings[count.lease].answers[0].error is None
        [good, bad] = endings[count.lease + 1].answers
        assert good.error is None
        assert bad.error is not None
        assert bad.error.code == Code.FAILED
        broker.beats.clear()
        broker.wait_until(lambda: len(broker.beats) > 1, "two heartbeats")
        memory = broker.beats[-1][1].memory
        assert memory["queue_submitted"] == memory["queue_completed"] == 161
        assert memory["queue_in_flight"] == 0
        assert 0.0 < memory["queue_efficiency"] <= 1.0
        for pool in ("host_pool", "device_pool"):
            assert memory[f"{pool}_allocated"] == 0
            assert memory[f"{pool}_borrowed"] == memory[f"{pool}_returned"] > 0
            assert memory[f"{pool}_available_bytes"] == 1 << 20
        assert {"utilisation", "foreign_bytes", "used_fraction"} <= memory.keys()
        assert all(type(value) in (int, float) for value in memory.values())
        assert len(memory) <= 32
    finally:
        worker.terminate()
        broker.send(protocol.Drain())
        assert worker.wait(EXIT_S) == 0


BREAKS = '''
import time, torch
from penstock.kernels import kernel

@kernel("breaks", max_batch_size=8)
def breaks(x):
    if (x[:, 0] == 666).any():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return x
'''


def test_a_broken_device_ends_the_worker_with_a_status_of_its_own(broker: FakeBroker, tmp_ipc: Path) -> None:
    (tmp_ipc / "breaking.py").write_text(BREAKS)
    worker = start_worker(broker.url, tmp_ipc, "--kernels", str(tmp_ipc / "breaking.py"), "--slots", "2")
    try:
        broker.expect(protocol.Ready)
        broker.send(assign(1, "breaks", tensor_block(np.array([[666, 0]], np.float32))))
        goodbye = broker.expect(protocol.Goodbye)
        assert goodbye.is_fault
        assert "illegal memory access" in goodbye.reason
        assert worker.wait(EXIT_S) == 86
    finally:
        worker.kill()
        worker.wait()

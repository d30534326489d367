"""On a CUDA device: an assert, an illegal access, a kernel without end and memory that runs out, each contained."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_fault_kernels as faults
import numpy as np
import pytest
import torch
from fake_broker import FakeBroker, assign, start_command, tensor_block

from penstock.broker import protocol
from penstock.worker import devices
from penstock.worker.failures import describe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(300),
]
START_S = 120.0
HANG_S = 3.0


class Device:
    """A supervised worker on the first CUDA device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = FakeBroker(folder, heartbeat_ms=1000.0)
        arguments = ("--device", "cuda:0", "--kernels", "gpu_fault_kernels", "--hang-limit-s", str(HANG_S))
        self.process = start_command(self.broker.url, folder, *arguments)
        self.ready = self.broker.expect(protocol.Ready, START_S)
        self.lease = 0

    def run(self, kernel: str, *firsts: float, **statics: Any) -> int:
        self.lease += 1
        rows = np.array([[first, 0.5] for first in firsts], np.float32)
        self.broker.send(assign(self.lease, kernel, tensor_block(rows), statics=statics or None))
        return self.lease

    def answers(self, kernel: str, *firsts: float, **statics: Any) -> tuple[list[protocol.Answer], protocol.WorkerFinal]:
        return self.broker.answers(self.run(kernel, *firsts, **statics), len(firsts))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.broker.close()


@pytest.fixture(scope="module")
def device(module_folder: Path) -> Iterator[Device]:
    made = Device(module_folder)
    yield made
    made.close()


def assert_back(device: Device, text: str) -> None:
    """A new process serves the same device, and nothing was answered of what broke it."""
    ready = device.broker.expect(protocol.Ready, START_S)
    assert text in str(ready.device["fault"])
    assert not any(isinstance(m, protocol.WorkerFinal) for m in device.broker.inbox)
    (answer,), _ = device.answers("wild", faults.FINE)
    assert answer.error is None
    assert answer.block is not None
    assert np.frombuffer(bytes(answer.block.row(0, 0)), np.float32).tolist() == [1.0, 1.5]


@pytest.mark.parametrize(
    ("what", "text"), [(faults.ASSERT, "device-side assert"), (faults.ILLEGAL, "illegal memory access")]
)
def test_a_broken_context_is_left(device: Device, what: int, text: str) -> None:
    if what == faults.ILLEGAL:
        pytest.importorskip("triton")
    device.answers("wild", faults.FINE)
    device.run("wild", faults.FINE, what)
    goodbye = device.broker.expect(protocol.Goodbye, START_S)
    assert goodbye.is_fault
    assert text in goodbye.reason
    assert_back(device, "exit status 86")


def test_a_kernel_without_end_is_ended_and_its_memory_is_free(device: Device) -> None:
    device.answers("wild", faults.FINE)
    device.broker.wait_until(lambda: device.broker.beats[-1][1].progress > 0, "a heartbeat after a batch")
    before = device.broker.beats[-1][1].memory["free_bytes"]
    began = time.monotonic()
    device.run("wild", faults.SPIN)
    assert_back(device, "a run of kernel 'wild' has taken")
    print(f"from the hang to the next answer: {time.monotonic() - began:.1f} s, of which {HANG_S} s are the limit")
    device.broker.wait_until(
        lambda: device.broker.beats[-1][1].memory.get("free_bytes", 0) > before - (256 << 20), "the memory of the one before"
    )


def test_out_of_memory_is_split_and_told(device: Device) -> None:
    device.broker.inbox.clear()
    pid = device.broker.hellos[-1].pid
    answers, final = device.answers("wide", *[0.0] * 8)
    assert all(answer.error is None for answer in answers)
    assert len(answers) >= 3
    assert final.timings["num_oom"] >= 1
    assert final.timings["oom_rows"] == 4
    (answer,), final = device.answers("wide", 0.0, share=2.0)
    assert answer.error is not None
    assert "ran out of memory" in answer.error.message
    (answer,), _ = device.answers("wild", faults.FINE)
    assert answer.error is None
    assert device.broker.hellos[-1].pid == pid, "out of memory is no reason to end"


def test_the_canary_and_what_torch_says_of_a_refusal() -> None:
    """In this process, which must stay well: only what leaves the context as it was."""
    cuda = torch.device("cuda:0")
    devices.known_answer(cuda)
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8, device=cuda)
    failure = describe("k", raised.value)
    assert failure.is_out_of_memory
    assert not failure.is_device_fault
    devices.known_answer(cuda)

"""What only a CUDA device can show: overlap, saturation, no allocation, faults contained. Run with `pytest -m gpu`."""

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import worker_kernels as kernels
from fake_broker import HERE, assign, tensor_block
from test_runner import by_row

from penstock.kernels import Kernel, kernel, registry
from penstock.worker import devices
from penstock.worker.batch import run_alone
from penstock.worker.devices.timeline import timeline
from penstock.worker.engine import take_off
from penstock.worker.executor import AsyncDeviceExecutor
from penstock.worker.flights import Flights, Landed
from penstock.worker.pool import Buffer, Scrub, pinned
from penstock.worker.runner import Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def device() -> Any:
    """The first GPU; the thread's current stream is as before when the test is over."""
    before = torch.cuda.current_stream()
    chosen = devices.choose("cuda")
    yield chosen
    torch.cuda.synchronize(chosen)
    torch.cuda.set_stream(before)
    gc.collect()
    torch.cuda.empty_cache()


def flying(device: torch.device, *targets: Any, num_slots: int = 3, pool_bytes: int = 1 << 28) -> Flights:
    made: list[Kernel] = [registry.create(target) for target in targets]
    streams = timeline(device)
    runner = Runner({k.spec.name: k for k in made}, device, Path("/tmp"), lambda _: None)
    return take_off(runner, streams, num_slots, pool_bytes, "zero")


def drive(flights: Flights, name: str, block: Any, count: int, look: Callable[[Landed], None] = lambda _: None) -> float:
    """So many batches through, as fast as they go; seconds."""
    began = time.perf_counter()
    num_out = 0

    def take(some: list[Landed]) -> int:
        for one in some:
            assert one.fault is None
            look(one)
            one.release()
        return len(some)

    for lease in range(count):
        while not flights.has_room:
            num_out += take(flights.landed())
        flights.take(assign(lease, name, block), time.perf_counter())
    num_out += take(flights.finish())
    assert num_out == count
    return time.perf_counter() - began


@kernel("squarings", max_batch_size=64)
def squarings(x: torch.Tensor, rounds: int = 24) -> torch.Tensor:
    """[batch, n, n]: a computation as long as `rounds` says, with an output of the input's size."""
    y = x
    for _ in range(rounds):
        y = torch.bmm(y, x) * (1.0 / x.shape[-1])
    return y


def test_known_answer_facts_and_health(device: torch.device) -> None:
    devices.known_answer(device)
    used = devices.memory(device)
    assert used["allocated_bytes"] <= used["reserved_bytes"] <= used["total_bytes"]
    assert 0 <= used["foreign_bytes"] <= used["total_bytes"] - used["free_bytes"]
    health = devices.health(device)
    print("health:", health, health.troubles)
    assert all(value >= 0 for value in health.numbers().values())


def test_answers_are_those_of_one_after_another(device: torch.device) -> None:
    flights = flying(device, kernels.scale, kernels.pads, kernels.packs)
    rng = np.random.default_rng(0)
    wanted = dict[int, np.ndarray]()
    answers = dict[int, dict[int, Any]]()

    def keep(one: Landed) -> None:
        assert one.answers is not None
        answers[one.lease] = by_row(one.answers, len(wanted[one.lease]))

    for lease in range(300):
        x = rng.standard_normal((int(rng.integers(1, 9)), int(rng.integers(1, 200_000)))).astype(np.float32)
        wanted[lease] = x * 2
        while not flights.has_room:
            for one in flights.landed():
                keep(one)
                one.release()
        flights.take(assign(lease, "scale", tensor_block(x), principal="ab"[lease % 2]), time.perf_counter())
    for one in flights.finish():
        keep(one)
        one.release()
    for lease, rows in wanted.items():
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(answers[lease][i], row)
    assert flights.host.num_allocated == flights.device.num_allocated == 0


def test_copies_hide_under_compute_and_the_device_is_busy(device: torch.device) -> None:
    """At least 90 % of the shorter of copy and compute hidden, and busy for at least 95 % of the time, at saturation."""
    flights = flying(device, squarings)
    x = np.random.default_rng(0).standard_normal((16, 1024, 1024)).astype(np.float32)  # 64 MiB
    block = tensor_block(x)
    drive(flights, "squarings", block, 5)
    flights = flying(device, squarings)
    seconds = drive(flights, "squarings", block, 60)
    numbers = flights.numbers()
    print(f"{60 / seconds:.1f} batches/s, overlap {numbers['queue_overlap']:.3f}, busy {numbers['queue_efficiency']:.3f}")
    assert numbers["queue_overlap"] >= 0.9
    assert numbers["queue_efficiency"] >= 0.95


def test_copies_are_as_fast_as_pinned_memory_allows(device: torch.device) -> None:
    num_bytes = 1 << 28
    here, there = pinned(num_bytes), torch.empty(num_bytes, dtype=torch.uint8, device=device)
    there.copy_(here)
    begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(10):
        there.copy_(here, non_blocking=True)
    done.record()
    done.synchronize()
    rate = 10 * num_bytes / begun.elapsed_time(done) / 1e6
    print(f"pinned host to device: {rate:.1f} GB/s")
    assert rate > 5.0


def test_a_hundred_thousand_tasks_allocate_nothing_and_leave_nothing(device: torch.device) -> None:
    flights = flying(device, kernels.scale)
    block = tensor_block(np.ones((64, 256), np.float32))
    drive(flights, "scale", block, 200)
    gc.collect()
    before, resident = torch.cuda.memory_stats(device), psutil.Process().memory_info().rss
    drive(flights, "scale", block, 1600)
    gc.collect()
    after = torch.cuda.memory_stats(device)
    # Outputs come from torch's caching allocator: blocks again and again, never memory of the device.
    for name in ("num_device_alloc", "num_alloc_retries", "reserved_bytes.all.current", "allocated_bytes.all.current"):
        assert after.get(name, 0) == before.get(name, 0), name
    assert after["allocated_bytes.all.peak"] <= before["allocated_bytes.all.peak"] + 3 * 64 * 1024
    assert psutil.Process().memory_info().rss < resident + (32 << 20)
    for pool in (flights.host, flights.device):
        assert pool.num_allocated == 0
        assert pool.num_borrowed == pool.num_returned
        assert pool.available_bytes == pool.total_bytes


def test_small_batches_are_fast(device: torch.device) -> None:
    """1,000 tasks/s and 50 ms at batches of 64 are far below what a pipeline of this size does; printed for the record."""
    flights = flying(device, kernels.scale)
    waits = list[float]()
    block = tensor_block(np.ones((64, 1024), np.float32))
    drive(flights, "scale", block, 50)
    seconds = drive(flights, "scale", block, 1000, lambda one: waits.append(sum(one.clock.timings().values())))
    print(f"{64 * 1000 / seconds:,.0f} tasks/s; queue {flights.numbers()}")
    assert 64 * 1000 / seconds > 1000
    assert np.quantile(waits, 0.99) < 50.0


def test_another_clients_bytes_are_zeroed_in_the_order_of_the_stream(device: torch.device) -> None:
    flights = flying(device, kernels.scale, pool_bytes=1 << 20)
    pool = flights.device
    for byte in range(1, 20):
        buffer = pool.borrow(1 << 20, f"client {byte}")
        assert isinstance(buffer, Buffer)
        flights.pipeline.h2d.finish()
        assert not buffer.bytes.any()
        buffer.bytes.fill_(byte)
        torch.cuda.synchronize(device)
        buffer.give_back()
    assert Scrub("zero") is Scrub.ZERO


def test_out_of_memory_splits_and_the_device_lives_on(device: torch.device) -> None:
    total = torch.cuda.get_device_properties(device).total_memory

    @kernel("huge", max_batch_size=8)
    def huge(x: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(len(x), total // 3, dtype=torch.uint8, device=x.device)  # two of them fit at most
        return x + rows[:, :1] * 0

    flights = flying(device, huge, kernels.scale)
    block = tensor_block(np.arange(4, dtype=np.float32).reshape(4, 1))
    seen = list[Landed]()
    drive(flights, "huge", block, 1, lambda one: seen.append(Landed(one.lease, list(one.answers or []), one.clock)))
    assert sum(a.stop - a.start for a in seen[0].answers or [] if a.error is None) == 4
    assert seen[0].clock.num_oom >= 1
    drive(flights, "scale", block, 3)


BROKEN = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from fake_broker import assign, tensor_block
from penstock.kernels import kernel, registry
from penstock.worker import devices
from penstock.worker.devices.timeline import timeline
from penstock.worker.engine import take_off
from penstock.worker.runner import Runner

@kernel("illegal", max_batch_size=8)
def illegal(x):
    index = torch.full((4,), 10**9, device=x.device)
    return x + torch.zeros(4, device=x.device)[index].sum()

device = devices.choose("cuda")
made = registry.create(illegal)
streams = timeline(device)
flights = take_off(Runner({"illegal": made}, device, Path("/tmp"), lambda _: None), streams, 3, 1 << 20, "zero")
flights.take(assign(1, "illegal", tensor_block(np.ones((2, 2), np.float32))), 0.0)
landed = flights.finish()
assert len(landed) == 1 and landed[0].fault is not None, landed
print("fault:", landed[0].fault.error.message)
try:
    devices.known_answer(device)
except Exception as e:
    print("canary:", type(e).__name__)
import os
sys.stdout.flush()
os._exit(86)
"""


def test_an_illegal_access_is_a_device_fault_and_stays_in_its_process(device: torch.device) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", BROKEN, str(HERE)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 86, done.stderr
    assert "fault: kernel 'illegal'" in done.stdout
    assert "canary: DeviceFault" in done.stdout
    devices.known_answer(device)


def test_the_executor_runs_on_streams_of_its_own(device: torch.device) -> None:
    async def main() -> None:
        async with AsyncDeviceExecutor("cuda", num_streams=4) as executor:
            x = torch.randn(512, 512, device=executor.device)
            results = await executor.run_batch([(torch.matmul, x, x)] * 32)
            wanted = x @ x
            assert all(torch.equal(y, wanted) or torch.allclose(y, wanted, rtol=1e-3, atol=1e-3) for y in results)
            streams = await executor.run_batch([lambda: torch.cuda.current_stream().cuda_stream] * 16)
            assert torch.cuda.current_stream().cuda_stream not in streams
            assert executor.stats.num_completed == 48

    asyncio.run(main())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(device: torch.device, precision: str) -> None:
    from penstock.worker.precision import precisions

    made = registry.create(squarings)
    found = precisions({"squarings": made}, {"squarings": precision}, device)
    runner = Runner({"squarings": made}, device, Path("/tmp"), lambda _: None, precisions=found)
    x = np.eye(64, dtype=np.float32)[None] * 64
    answers, _, _ = run_alone(runner, assign(1, "squarings", tensor_block(x)), time.perf_counter())
    assert answers[0].block is not None
    assert answers[0].block.columns[0].dtype == "float32"
    np.testing.assert_allclose(by_row(answers, 1)[0].reshape(64, 64), x[0], rtol=1e-2)

"""AsyncDeviceExecutor on the CPU: results, bounds, exceptions, what cancelling does and does not do."""

import asyncio
import contextvars
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from penstock.worker.devices import DeviceError
from penstock.worker.executor import AsyncDeviceExecutor

LIMIT_S = 10.0


def run(body: Callable[[AsyncDeviceExecutor], Coroutine[Any, Any, Any]], num_streams: int = 2) -> Any:
    async def main() -> Any:
        async with AsyncDeviceExecutor("cpu", num_streams) as executor:
            return await asyncio.wait_for(body(executor), LIMIT_S)

    return asyncio.run(main())


async def until(is_true: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not is_true():
        assert time.monotonic() < limit
        await asyncio.sleep(0.001)


def test_the_example() -> None:
    async def body(executor: AsyncDeviceExecutor) -> None:
        x = torch.ones(8, 8, device=executor.device)
        assert (await executor.run(torch.matmul, x, x)).eq(8).all()
        a, b = await executor.run_batch([(torch.sin, x), (torch.cos, x)])
        assert (a * a + b * b).allclose(x)
        assert await executor.run_batch([]) == []
        assert await executor.run_batch([lambda: 5]) == [5]
        stats = executor.stats
        assert (stats.num_submitted, stats.num_completed, stats.num_in_flight) == (4, 4, 0)
        assert stats.busy_s > 0

    run(body)


def test_no_more_at_once_than_there_are_streams() -> None:
    lock, now, most = threading.Lock(), [0], [0]
    gate = threading.Barrier(3, timeout=LIMIT_S)

    def op(i: int) -> int:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        gate.wait()
        with lock:
            now[0] -= 1
        return i

    async def body(executor: AsyncDeviceExecutor) -> list[int]:
        results: list[int] = await executor.run_batch([(op, i) for i in range(12)])
        assert executor.stats.max_in_flight == 3
        return results

    assert run(body, 3) == list(range(12))
    assert most == [3]


def test_exceptions_are_the_functions_own() -> None:
    async def body(executor: AsyncDeviceExecutor) -> None:
        with pytest.raises(ZeroDivisionError):
            await executor.run(lambda: 1 / 0)
        with pytest.raises(TypeError, match="takes a function"):
            await executor.run(5)  # type: ignore[arg-type]
        assert await executor.run(lambda: 1) == 1
        assert executor.stats.num_failed == 1

    run(body)


def test_what_has_not_begun_does_not_begin_after_a_failure() -> None:
    begun = list[int]()

    def op(i: int) -> None:
        begun.append(i)
        if i == 1:
            raise KeyError(i)

    async def body(executor: AsyncDeviceExecutor) -> None:
        with pytest.raises(KeyError):
            await executor.run_batch([(op, i) for i in range(50)])

    run(body, 1)
    assert begun[:2] == [0, 1]
    assert len(begun) < 10


def test_a_cancelled_await_keeps_its_memory_and_its_place_until_the_work_is_done() -> None:
    go, is_running = threading.Event(), threading.Event()

    def slow(x: torch.Tensor) -> torch.Tensor:
        is_running.set()
        assert go.wait(LIMIT_S)
        return x + 1

    async def body(executor: AsyncDeviceExecutor) -> None:
        x = torch.ones(4)
        alive = weakref.ref(x)
        task = asyncio.ensure_future(executor.run(slow, x))
        await until(is_running.is_set)
        del x
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        assert alive() is not None
        assert executor.stats.num_in_flight == 1
        waiting = asyncio.ensure_future(executor.run(lambda: "next"))
        await asyncio.sleep(0.01)
        assert not waiting.done(), "the place is not free"
        go.set()
        assert await waiting == "next"
        await until(lambda: alive() is None)
        assert executor.stats.num_cancelled == 1

    run(body, 1)


def test_a_cancelled_await_that_waits_for_a_place_never_begins() -> None:
    go, begun = threading.Event(), list[str]()

    async def body(executor: AsyncDeviceExecutor) -> None:
        first = asyncio.ensure_future(executor.run(go.wait, LIMIT_S))
        second = asyncio.ensure_future(executor.run(begun.append, "second"))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go.set()
        assert await first
        await executor.run(begun.append, "third")

    run(body, 1)
    assert begun == ["third"]


def test_closing_waits_for_what_was_given_up() -> None:
    done = list[int]()

    def slow() -> None:
        time.sleep(0.05)
        done.append(1)

    async def main() -> None:
        executor = AsyncDeviceExecutor("cpu", 1)
        task = asyncio.ensure_future(executor.run(slow))
        await until(lambda: executor.stats.num_in_flight == 1)
        task.cancel()
        await executor.close()
        assert done == [1]
        await executor.close()
        with pytest.raises(RuntimeError, match="closed"):
            await executor.run(slow)

    asyncio.run(main())


def test_modes_and_context_are_the_callers() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")

    async def body(executor: AsyncDeviceExecutor) -> None:
        name.set("mine")
        assert await executor.run(name.get) == "mine"
        w = torch.ones(2, requires_grad=True)
        assert (await executor.run(torch.mul, w, 2)).requires_grad
        with torch.no_grad():
            assert not (await executor.run(torch.mul, w, 2)).requires_grad
        with torch.inference_mode():
            assert (await executor.run(torch.ones, 2)).is_inference()

    run(body)


def test_wrong_devices_and_sizes_are_refused() -> None:
    with pytest.raises(DeviceError):
        AsyncDeviceExecutor("cuda:77")
    with pytest.raises(ValueError, match="num_streams"):
        AsyncDeviceExecutor("cpu", 0)

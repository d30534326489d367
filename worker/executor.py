"""Run your own torch functions on a device from asyncio, several at a time, each on a stream of its own.

Knows threads and streams; does not know kernels, batches or the broker: it works without them.

    import asyncio, torch
    from penstock.worker.executor import AsyncDeviceExecutor

    async def main() -> None:
        async with AsyncDeviceExecutor() as executor:
            x = torch.ones(1024, 1024, device=executor.device)
            y = await executor.run(torch.matmul, x, x)
            a, b = await executor.run_batch([(torch.sin, x), (torch.cos, x)])
            print(y.sum().item(), (a * a + b * b).mean().item(), executor.stats)

    asyncio.run(main())
"""

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from penstock.worker import devices

T = TypeVar("T")
Op = Callable[[], Any] | tuple[Any, ...]
"""A function without arguments, or a function and its arguments."""


@dataclass(frozen=True, slots=True)
class ExecutorStats:
    """Counts since the start. `busy_s`: seconds that functions ran, the device's part included, summed over streams."""

    num_submitted: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_in_flight: int = 0
    max_in_flight: int = 0
    busy_s: float = 0.0


class AsyncDeviceExecutor:
    """Runs functions of tensors on one device, at most `num_streams` at once; further ones wait in their `await`.

    On cuda each function runs in a thread of its own under a stream of its own, which first waits for what the caller's
    current stream has to do; its result is complete when the await returns, and belongs to the caller's current stream. On
    mps and cpu the threads are all there is. A function that blocks its thread holds up nobody else but its stream.

    Cancelling an await gives up the result, not the work: a function that has begun runs to its end, and what it uses
    stays alive until the device is done with it. One that has not begun does not begin.

    Args:
        device: a torch device or its name; None = the best there is (cuda:0, mps, cpu).
        num_streams: 1 or more.
    Raises:
        DeviceError: there is no such device.
    """

    def __init__(self, device: torch.device | str | None = None, num_streams: int = 4) -> None:
        if num_streams < 1:
            raise ValueError(f"num_streams must be 1 or more, not {num_streams}")
        self.device = devices.choose("auto" if device is None else str(device))
        self.num_streams = num_streams
        self._threads = ThreadPoolExecutor(num_streams, thread_name_prefix=f"penstock-{self.device.type}")
        self._places = asyncio.Semaphore(num_streams)
        self._streams: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(num_streams):
            is_cuda = self.device.type == "cuda"
            self._streams.put(torch.cuda.Stream(self.device) if is_cuda else None)  # type: ignore[no-untyped-call]
        self._running: set[asyncio.Future[Any]] = set()
        self._stats = ExecutorStats()
        self._lock = threading.Lock()
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    @property
    def stats(self) -> ExecutorStats:
        """The counts now."""
        return replace(self._stats, num_in_flight=len(self._running))

    async def run(self, op: Callable[..., T], *args: Any) -> T:
        """`op(*args)`, computed. Raises whatever `op` raises, and what its work on the device meets.

        Gradients and inference mode are as they are for the caller. Raises RuntimeError after `close`.
        """
        if not callable(op):
            raise TypeError(f"run() takes a function and its arguments, not a {type(op).__name__} first")
        self._require_open()
        try:
            await self._places.acquire()
        except asyncio.CancelledError:
            self._count(num_cancelled=1)
            raise
        return await self._begin(op, args)

    async def run_batch(self, ops: Iterable[Op]) -> list[Any]:
        """The results of several `ops`, in their order, run as streams are free.

        If one raises, its exception is raised here; those that have not begun do not begin, the others are given up.
        """
        tasks = [asyncio.ensure_future(self.run(*(op if isinstance(op, tuple) else (op,)))) for op in ops]
        if not tasks:
            return []
        try:
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        failed = [task for task in tasks if task in done and not task.cancelled() and task.exception() is not None]
        return [task.result() for task in failed[:1] or tasks]

    async def close(self) -> None:
        """Wait for what runs, and end the threads. Once more does nothing."""
        self._is_closed = True
        while self._running:  # those that were given up, too
            await asyncio.wait(set(self._running))
        self._threads.shutdown(wait=False)

    def _require_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this executor is closed")

    async def _begin(self, op: Callable[..., T], args: tuple[Any, ...]) -> T:
        """Run in a thread; a place has been taken, and is free again when the thread is through, awaited or not."""
        loop = asyncio.get_running_loop()
        try:
            self._require_open()
            work = _Work(op, args, self.device)
            self._count(num_submitted=1)
            began = self._threads.submit(self._run_in_thread, work)
        except BaseException:
            self._places.release()
            raise
        # Not the future of `run_in_executor`: that one ends when its await is cancelled, before the thread does.
        through: asyncio.Future[None] = loop.create_future()
        self._running.add(through)
        with self._lock:
            self._stats = replace(self._stats, max_in_flight=max(self._stats.max_in_flight, len(self._running)))

        def end() -> None:
            self._running.discard(through)
            self._places.release()
            through.set_result(None)

        began.add_done_callback(lambda _: loop.call_soon_threadsafe(end))
        try:
            await asyncio.shield(through)
        except asyncio.CancelledError:
            self._count(num_cancelled=1)
            raise
        result: T = began.result()
        work.hand_over(result)
        return result

    def _run_in_thread(self, work: "_Work") -> Any:
        stream = self._streams.get()
        began = time.perf_counter()
        try:
            result = work.run(stream)
        except BaseException:
            self._count(num_failed=1, busy_s=time.perf_counter() - began)
            raise
        finally:
            self._streams.put(stream)
        self._count(num_completed=1, busy_s=time.perf_counter() - began)
        return result

    def _count(self, **more: float) -> None:
        with self._lock:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})


class _Work:
    """One call, with what it takes over from the thread that asked for it."""

    def __init__(self, op: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> None:
        self._op = op
        self._args = args
        self._context = contextvars.copy_context()
        self._is_inference = torch.is_inference_mode_enabled()
        self._has_grad = torch.is_grad_enabled()
        self._of_caller: Any = None
        self._is_asked: Any = None
        if device.type == "cuda":
            self._of_caller = torch.cuda.current_stream(device)
            self._is_asked = self._of_caller.record_event()

    def run(self, stream: Any) -> Any:
        """The result; on cuda the stream is through when this returns, whether well or with an exception."""
        if stream is None:
            return self._call()
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(self._is_asked)
            try:
                return self._call()
            finally:
                done.record(stream)
                done.synchronize()

    def _call(self) -> Any:
        grad: AbstractContextManager[Any] = torch.inference_mode() if self._is_inference else nullcontext()
        with grad, torch.set_grad_enabled(self._has_grad):
            return self._context.run(self._op, *self._args)

    def hand_over(self, result: Any) -> None:
        """The caller's stream uses the result from now on: its memory must not go back to the other one's before."""
        if self._of_caller is not None:
            for x in _tensors_of(result):
                x.record_stream(self._of_caller)


def _tensors_of(result: Any) -> Iterable[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        if result.is_cuda:
            yield result
    elif isinstance(result, dict | list | tuple):
        for item in result.values() if isinstance(result, dict) else result:
            yield from _tensors_of(item)

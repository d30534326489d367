"""`AsyncClient`: the verbs of `Client`, awaited.

Knows how a verb becomes runs on the line; conversion, sessions and stacking are shared with `client.py`.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Mapping
from typing import Any, Literal

from penstock.broker import protocol
from penstock.broker.address import Address
from penstock.broker.protocol import Code
from penstock.client import options as options_
from penstock.client.aio_line import AsyncLine
from penstock.client.catalog import FIRST_PAUSE_S, MAX_PAUSE_S, Catalog
from penstock.client.client import configure, own_name, values_of
from penstock.client.config import ClientConfig
from penstock.client.convert import Plan
from penstock.client.errors import DeadlineExceeded, InvalidInput, PenstockError, from_wire
from penstock.client.outputs import decode
from penstock.client.progress import Counter
from penstock.client.rows import RowsInput, Stack
from penstock.client.run import CLOSED, SENT, Bundler, Options, Part, Run, deadline_of
from penstock.client.session import Session
from penstock.client.task import BaseTask, next_chunk


class AsyncTask(BaseTask):
    """One task that was submitted; `await task` gives its value."""

    __slots__ = ("_line",)

    def __init__(self, line: AsyncLine, run: Run, row: int) -> None:
        super().__init__(run, row)
        self._line = line

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    def done(self) -> bool:
        return self._run.slots[self._row] is not None

    async def result(self, timeout: float | None = None) -> Any:
        """Its value: the array if the only output is called "out", else a dict.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; it goes on.
            PenstockError: how it failed.
        """
        return self._value(await self._outcome(timeout))

    async def exception(self, timeout: float | None = None) -> PenstockError | None:
        """How it failed, or None. Raises TimeoutError as `result` does."""
        return self._error(await self._outcome(timeout))

    async def _outcome(self, timeout: float | None) -> Part:
        if self._run.slots[self._row] is None:
            try:
                await asyncio.wait_for(self._line.end_of(self._run, self._row), timeout)
            except TimeoutError:
                raise TimeoutError(f"{self!r} has not ended after {timeout} s; it goes on") from None
        part = self._run.slots[self._row]
        assert part is not None
        return part

    def ask_cancel(self) -> None:
        """Ask for its end without waiting; asking again changes nothing."""
        wanted = (self._row, self._row + 1)
        if self._run.slots[self._row] is None and wanted not in self._run.cancels:
            self._line.check_usable()
            self._line.session.cancel(self._run, *wanted, time.monotonic())
            self._line.turn()

    async def cancel(self) -> bool:
        """Ask for its end and wait for it: True if it ended as cancelled, False if something else came first."""
        self.ask_cancel()
        part = await self._outcome(None)
        return part.error is not None and part.error.code == Code.CANCELLED

    async def accepted(self, timeout: float | None = None) -> None:
        """Wait until the broker has taken it; for a durable task, until that is on disk.

        Raises:
            TimeoutError: as `result` does.
            PenstockError: it was refused.
        """
        run = self._run
        if not self._was_accepted():
            if run.options.is_durable:
                self._line.flush_soon()
                await self._line.wait(self._was_accepted, timeout)
            else:
                await self._ask(timeout)
                run.accepted = True
        part = run.slots[self._row]
        if part is not None and part.error is not None:
            raise from_wire(part.error)
        if not self._was_accepted():
            raise TimeoutError(f"{self!r} has not been accepted after {timeout} s")

    async def status(self, timeout: float | None = 5.0) -> dict[str, Any]:
        """The broker's word on its submission, with `state` as this client sees it; it alone once the task has ended."""
        if self._run.slots[self._row] is not None:
            return {"state": self.state}
        body = await self._ask(timeout)
        return {**body, "state": body.get("state", self.state)}

    async def _ask(self, timeout: float | None) -> dict[str, Any]:
        line, run = self._line, self._run
        line.session.flush()
        if not await line.wait(lambda: run.state in (SENT, CLOSED), timeout):
            raise TimeoutError(f"{self!r} still waits in the client")
        try:
            return (await line.ask(lambda number: protocol.Status(request=number, id=run.id), timeout)).body
        except PenstockError:
            if run.slots[self._row] is None:
                raise
            return {}

    def add_done_callback(self, callback: Callable[["AsyncTask"], object]) -> None:
        """Call `callback(task)` in the event loop once it has ended."""
        if not self._line.session.watch(self._run, self._row, lambda: callback(self)):
            asyncio.get_running_loop().call_soon(callback, self)


class AsyncStream(AsyncIterator[Any]):
    """The partial answers of a streaming task, as `Stream` gives them."""

    def __init__(self, line: AsyncLine, run: Run) -> None:
        self.task = AsyncTask(line, run, 0)
        self._line = line
        self._run = run
        self._next_part = 0

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Any:
        run = self._run
        while True:
            chunk = next_chunk(run, self._next_part)
            if chunk is not None:
                self._next_part = chunk.part + 1
                return decode(chunk, 0, run.shape.is_torch)
            if run.slots[0] is not None:
                if run.slots[0].error is not None:
                    raise from_wire(run.slots[0].error)
                raise StopAsyncIteration
            await self._line.wait(lambda: bool(run.chunks) or run.slots[0] is not None, None)

    async def result(self, timeout: float | None = None) -> Any:
        """The whole answer, once the task has ended."""
        return await self.task.result(timeout)

    async def aclose(self) -> None:
        """Cancel the task unless it has ended; does not wait."""
        self._line.abandon(self._run)

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self._line.abandon(self._run)


class AsyncVerbs:
    """What can be done on a line with certain options; see `Verbs`."""

    def __init__(self, line: AsyncLine, catalog: Catalog, config: ClientConfig, options: Options) -> None:
        self._line = line
        self._catalog = catalog
        self._config = config
        self._options = options

    async def call(self, kernel: str, /, **inputs: Any) -> Any:
        """Run one task and wait for its value; cancelling the await cancels the task."""
        run, row = await self._submit(kernel, inputs)
        try:
            await self._line.end_of(run, row)
        except asyncio.CancelledError:
            AsyncTask(self._line, run, row).ask_cancel()
            raise
        part = run.slots[row]
        assert part is not None
        if part.error is not None:
            raise from_wire(part.error)
        return decode(part, row, run.shape.is_torch)

    async def submit(self, kernel: str, /, **inputs: Any) -> AsyncTask:
        """Start one task. Waits at the first use of a kernel, and while `max_waiting` tasks wait in the client."""
        run, row = await self._submit(kernel, inputs)
        return AsyncTask(self._line, run, row)

    async def _submit(self, kernel: str, inputs: Mapping[str, Any]) -> tuple[Run, int]:
        row = (await self._plan(kernel)).row(inputs)
        line, session, options = self._line, self._line.session, self._options
        if not session.has_room(1, row.nbytes) and not await line.wait(
            lambda: session.has_room(1, row.nbytes), options.timeout
        ):
            raise DeadlineExceeded("the time limit is over; too many tasks wait in the client")
        run, index = session.submit(row, options, time.monotonic())
        line.flush_soon()
        return run, index

    async def stream(self, kernel: str, /, **inputs: Any) -> AsyncStream:
        """Start one task: `async for chunk in await ps.stream(...)`.

        Raises:
            InvalidInput: the kernel does not stream, or the arguments do not fit.
        """
        plan = await self._plan(kernel)
        if not plan.can_stream:
            raise InvalidInput(f"kernel {kernel!r} does not stream; use call or submit")
        run = Run(self._line.session.draw_id(), (row := plan.row(inputs)).shape, self._options, 0.0, True)
        run.deadline = deadline_of(self._options, time.monotonic())
        run.add(row)
        await self._line.send(run)
        return AsyncStream(self._line, run)

    async def map(
        self,
        kernel: str,
        items: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        /,
        *,
        progress: bool = False,
        ordered: bool = True,
        window: int = 1024,
        return_exceptions: bool = False,
    ) -> AsyncIterator[Any]:
        """As `Client.map`: `async for value in ps.map(...)`; the items may come asynchronously too."""
        if self._options.key is not None:
            raise InvalidInput("an idempotency_key names one task; it cannot be used with map")
        plan = await self._plan(kernel)
        session = self._line.session
        max_rows = min(session.max_rows_per_run, max(1, window))
        bundler = Bundler(self._options, max_rows, session.max_run_bytes, session.draw_id)
        runs, num_rows, source = deque[Run](), 0, bundles(plan, bundler, _as_async(items), self._config.flush_s)
        has_more = True
        with Counter(items, kernel, progress) as counter:
            try:
                while has_more or runs:
                    while has_more and num_rows < window and not (runs and not runs[0].num_open):
                        run = await anext(source, None)
                        if run is None:
                            has_more = False
                        else:
                            runs.append(run)
                            num_rows += run.num_rows
                            await self._line.send(run)
                    if not runs:
                        return
                    run = await self._next_ended(runs, ordered)
                    num_rows -= run.num_rows
                    for value in values_of(run, return_exceptions):
                        yield value
                        counter.count()
            finally:
                for run in runs:
                    self._line.abandon(run)

    async def _next_ended(self, runs: deque[Run], ordered: bool) -> Run:
        if ordered:
            await self._line.wait(lambda: not runs[0].num_open, None)
            return runs.popleft()
        await self._line.wait(lambda: any(not r.num_open for r in runs), None)
        run = next(r for r in runs if not r.num_open)
        runs.remove(run)
        return run

    async def map_rows(self, kernel: str, /, **inputs: Any) -> Any:
        """As `Client.map_rows`."""
        if self._options.key is not None:
            raise InvalidInput("an idempotency_key names one task; it cannot be used with map_rows")
        rows = RowsInput(await self._plan(kernel), inputs)
        session = self._line.session
        max_rows = min(self._config.max_rows_per_array, max(1, session.window_rows // 2))
        max_bytes = min(self._config.max_run_bytes, max(1, session.window_bytes // 2))
        runs: deque[tuple[Run, int]] = deque()
        first, stack = 0, None
        try:
            for row in rows.cut(max_rows, max_bytes):
                run = Run(session.draw_id(), row.shape, self._options, deadline_of(self._options, time.monotonic()))
                run.add(row)
                runs.append((run, first))
                await self._line.send(run)
                first += row.num_rows
            while runs:
                run, first = runs[0]
                await self._line.wait(lambda run=run: not run.num_open, None)  # type: ignore[misc]
                runs.popleft()
                stack = stack or Stack(rows.num_rows, run.shape.is_torch)
                stack.add(run, first)
        finally:
            for run, _ in runs:
                self._line.abandon(run)
        return (stack or Stack(0, False)).result()

    def options(
        self,
        *,
        priority: int | Literal["high", "medium", "low"] | None = None,
        timeout: float | None = options_.UNCHANGED,
        durable: bool | None = None,
        idempotency_key: str | bytes | None = None,
    ) -> "AsyncVerbs":
        """The same verbs with other options; see `Client.options`."""
        changed = options_.change(self._options, priority, timeout, durable, idempotency_key)
        return AsyncVerbs(self._line, self._catalog, self._config, self._line.session.intern(changed))

    async def as_completed(self, tasks: Iterable[AsyncTask]) -> AsyncIterator[AsyncTask]:
        """The tasks in the order in which they end: `async for task in ps.as_completed(tasks)`."""
        queue: asyncio.Queue[AsyncTask] = asyncio.Queue()
        waiting = list(tasks)
        for task in waiting:
            task.add_done_callback(queue.put_nowait)
        self._line.flush_soon()
        for _ in waiting:
            yield await queue.get()

    async def cancel(self, tasks: AsyncTask | Iterable[AsyncTask]) -> int:
        """Cancel tasks and wait until they have ended; how many of them ended as cancelled comes back."""
        tasks = [tasks] if isinstance(tasks, AsyncTask) else list(tasks)
        for task in tasks:
            task.ask_cancel()
        return sum([await task.cancel() for task in tasks])

    async def status(self, *, timeout: float | None = 5.0) -> dict[str, Any]:
        """The broker's state: its queues, workers and kernels."""
        return (await self._line.ask(lambda number: protocol.Status(request=number), timeout)).body

    async def kernels(self, *, timeout: float | None = 5.0) -> dict[str, Mapping[str, Any]]:
        """The kernels on offer now: name -> spec (`inputs`, `modes`, ...)."""
        version = self._line.session.specs_version
        self._catalog.update(await self.status(timeout=timeout), version)
        return dict(self._catalog.specs)

    async def _plan(self, kernel: str) -> Plan:
        self._line.check_usable()
        plan = self._catalog.get(kernel, self._line.session.specs_version)
        return plan if plan is not None else await self._learn(kernel)

    async def _learn(self, kernel: str) -> Plan:
        await self._line.connect()
        until, pause = deadline_of(self._options, time.monotonic()), FIRST_PAUSE_S
        why = "the broker has not said which kernels it has"
        while True:
            version = self._line.session.specs_version
            try:
                body = await self.status(timeout=None if self._options.timeout is None else until - time.monotonic())
            except TimeoutError:
                raise DeadlineExceeded(f"the time limit is over; {why}") from None
            self._catalog.update(body, version)
            plan = self._catalog.get(kernel, version)
            if plan is not None:
                return plan
            self._catalog.check_coming(kernel, body)
            why = f"no worker offers kernel {kernel!r} yet"
            left = until - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(f"the time limit is over; {why}")
            await asyncio.sleep(min(pause, left))
            pause = min(MAX_PAUSE_S, pause * 2)


class AsyncClient(AsyncVerbs):
    """A connection to a broker for one event loop; arguments as `Client`'s. `async with AsyncClient() as ps:`."""

    def __init__(
        self,
        address: str | None = None,
        *,
        name: str | None = None,
        timeout: float | None = options_.UNCHANGED,
        connect_timeout: float | None = None,
        config: ClientConfig | None = None,
    ) -> None:
        config = configure(config, name=name, timeout=timeout, connect_timeout=connect_timeout)
        found = Address.find(address)
        session = Session(config, own_name(config), os.urandom)
        line = AsyncLine(session, found.front, found.url, config.connect_timeout, config.linger_s)
        super().__init__(line, Catalog(), config, Options(timeout=config.timeout))

    async def close(self) -> None:
        """Cancel what is open and disconnect. May be called twice."""
        self._line.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def bundles(
    plan: Plan, bundler: Bundler, items: AsyncIterator[Mapping[str, Any]], flush_s: float
) -> AsyncIterator[Run]:
    """The items as runs; one that has begun does not wait longer than `flush_s` while items keep coming."""
    async for arguments in items:
        now = time.monotonic()
        run = bundler.add(plan.row(arguments), now)
        if run is None and now - bundler.started > flush_s:
            run = bundler.flush()
        if run is not None:
            yield run
    run = bundler.flush()
    if run is not None:
        yield run


async def _as_async(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item

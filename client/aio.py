"""`AsyncClient`: the verbs of `Client`, awaited.

Knows when a verb awaits. What it puts on the line is `verbs.py`'s business, as for `Client`.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from penstock.broker.ways import find_ways
from penstock.client.aio_line import AsyncLine
from penstock.client.aio_task import AsyncStream, AsyncTask
from penstock.client.bundler import Window
from penstock.client.catalog import Catalog, Search
from penstock.client.config import ClientConfig, configure
from penstock.client.errors import from_wire
from penstock.client.jobs import AsyncJobs
from penstock.client.options import UNCHANGED
from penstock.client.outputs import decode, values_of
from penstock.client.plan import Plan
from penstock.client.progress import Counter
from penstock.client.run import Options, Row, Run
from penstock.client.session import Session
from penstock.client.verbs import no_room


class AsyncVerbs(AsyncJobs):
    """What can be done on a line with certain options; see `Verbs`."""

    # --- one task --------------------------------------------------------------------------------------------------

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
        line, options = self._line, self._options
        backlog = line.session.backlog
        if not backlog.has_room(1, row.nbytes) and not await line.wait(
            lambda: backlog.has_room(1, row.nbytes), options.timeout
        ):
            raise no_room()
        run, index = line.session.submit(row, options, time.monotonic())
        line.flush_soon()
        return run, index

    async def stream(self, kernel: str, /, **inputs: Any) -> AsyncStream:
        """Start one task: `async for chunk in await ps.stream(...)`.

        Raises:
            InvalidInput: the kernel does not stream, or the arguments do not fit.
        """
        run = self._one_run(await self._plan(kernel), inputs)
        await self._line.send(run)
        return AsyncStream(self._line, run)

    # --- many tasks ------------------------------------------------------------------------------------------------

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
        self._refuse_key("map")
        runs = self._bundler(window).runs_of(_rows(await self._plan(kernel), items))
        line, under_way = self._line, Window(max(1, window), ordered)
        try:
            with Counter(items, kernel, progress) as counter:
                while True:
                    while under_way.wants_more and (run := await anext(runs, None)) is not None:
                        await line.send(run)
                        under_way.add(run)
                    if not under_way:
                        return
                    await line.wait(under_way.has_ended, None)
                    for value in values_of(under_way.pop(), return_exceptions):
                        yield value
                        counter.count()
        finally:
            for run in under_way:
                line.abandon(run)

    async def map_rows(self, kernel: str, /, **inputs: Any) -> Any:
        """As `Client.map_rows`."""
        self._refuse_key("map_rows")
        line, sent = self._line, deque[Run]()
        runs, stack = self._stacked(await self._plan(kernel), inputs)
        try:
            for run in runs:
                await line.send(run)
                sent.append(run)
            while sent:
                await line.wait(lambda: not sent[0].num_open, None)
                stack.add(sent.popleft())
        finally:
            for run in sent:
                line.abandon(run)
        return stack.result()

    # --- about tasks and the broker --------------------------------------------------------------------------------

    def options(
        self,
        *,
        priority: int | Literal["high", "medium", "low"] | None = None,
        timeout: float | None = UNCHANGED,
        durable: bool | None = None,
        idempotency_key: str | bytes | None = None,
    ) -> "AsyncVerbs":
        """The same verbs with other options; see `Client.options`."""
        changed = self._changed(priority, timeout, durable, idempotency_key)
        return AsyncVerbs(self._line, self._catalog, self._config, changed)

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

    async def _plan(self, kernel: str) -> Plan:
        self._line.check_usable()
        plan = self._catalog.get(kernel, self._line.session.specs_version)
        return plan if plan is not None else await self._learn(kernel)

    async def _learn(self, kernel: str) -> Plan:
        """Ask for the specs until the kernel is among them; raises as `Search` does."""
        await self._line.connect()
        search = Search(self._catalog, kernel, self._options, time.monotonic())
        while True:
            version = self._line.session.specs_version
            try:
                body = await self.status(timeout=search.time_left(time.monotonic()))
            except TimeoutError:
                raise search.time_is_over() from None
            plan = search.look(body, version)
            if plan is not None:
                return plan
            await asyncio.sleep(search.pause(time.monotonic()))


class AsyncClient(AsyncVerbs):
    """A connection to a broker for one event loop; arguments as `Client`'s. `async with AsyncClient() as ps:`."""

    def __init__(
        self,
        address: str | Sequence[str] | None = None,
        *,
        name: str | None = None,
        timeout: float | None = UNCHANGED,
        connect_timeout: float | None = None,
        key: str | Path | Sequence[str | Path] | None = None,
        config: ClientConfig | None = None,
    ) -> None:
        keys = [key] if isinstance(key, Path) else key
        config = configure(config, name=name, timeout=timeout, connect_timeout=connect_timeout, key=keys)
        ways = find_ways(address, config.key, config.url)
        session = Session(config, config.shown_name, os.urandom)
        line = AsyncLine(session, ways, config.connect_timeout, config.linger_s)
        super().__init__(line, Catalog(session.memory.place), config, Options(timeout=config.timeout))

    async def close(self) -> None:
        """Cancel what is open and disconnect. May be called twice."""
        self._line.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _rows(plan: Plan, items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Row]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield plan.row(item)
    else:
        for item in items:
            yield plan.row(item)

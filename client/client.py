"""`Client`: the verbs that people type, for threads that wait.

Knows how a verb becomes runs on the line. Conversion is `convert.py`'s, waiting `line.py`'s business.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from penstock.broker import protocol, settings
from penstock.broker.address import Address
from penstock.client import options as options_
from penstock.client.catalog import FIRST_PAUSE_S, MAX_PAUSE_S, Catalog
from penstock.client.config import ClientConfig
from penstock.client.convert import Plan
from penstock.client.errors import DeadlineExceeded, InvalidInput, from_wire
from penstock.client.line import Line
from penstock.client.outputs import decode, decode_rows
from penstock.client.progress import Counter
from penstock.client.rows import RowsInput, Stack
from penstock.client.run import PENDING, Bundler, Options, Run, deadline_of, same_part
from penstock.client.session import Session
from penstock.client.task import Stream, Task, as_completed


def configure(config: ClientConfig | None, **overrides: Any) -> ClientConfig:
    """Arguments > environment > penstock.toml > default; a whole `config` instead is taken as it is."""
    if config is not None:
        return config
    timeout = overrides.pop("timeout")
    loaded = settings.load(ClientConfig, "client", overrides=overrides)
    if timeout is options_.UNCHANGED:
        return loaded
    values = {name: getattr(loaded, name) for name in ClientConfig.__dataclass_fields__}
    return ClientConfig(**{**values, "timeout": options_.check_timeout(timeout)})


def own_name(config: ClientConfig) -> str:
    return (config.name or Path(sys.argv[0] or "python").name or "python")[:64]


class Verbs:
    """What can be done on a line with certain options. `Client.options(...)` makes another one.

    Arguments of a kernel are given by keyword and become what the kernel's spec says (see `convert.py`; `outputs.py` for
    results). The first use of a kernel asks the broker for its spec and waits, at most the task's time limit, while
    workers are still starting.
    """

    def __init__(self, line: Line, catalog: Catalog, config: ClientConfig, options: Options) -> None:
        self._line = line
        self._catalog = catalog
        self._config = config
        self._options = options

    # --- one task --------------------------------------------------------------------------------------------------

    def call(self, kernel: str, /, **inputs: Any) -> Any:
        """Run one task and wait: the array if the kernel's only output is "out", else a dict of its outputs.

        Raises:
            InvalidInput: before anything is sent, if the arguments do not fit the kernel.
            PenstockError: how the task failed.
        """
        row = self._plan(kernel).row(inputs)
        line, session = self._line, self._line.session
        with line.lock:
            run, index = session.submit(row, self._options, time.monotonic())
            session.flush()
            slots = run.slots
            line.wait(lambda: slots[index] is not None, None)
        if session.changed:
            line.call_back()
        part = slots[index]
        if part is None:
            raise RuntimeError("the client was closed by another thread")
        if part.error is not None:
            raise from_wire(part.error)
        return decode(part, index, run.shape.is_torch)

    def submit(self, kernel: str, /, **inputs: Any) -> Task:
        """Start one task; the handle comes back at once, unless this is the first use of the kernel or
        `max_waiting` tasks wait in the client already: then it blocks, the time limit already running."""
        row = self._plan(kernel).row(inputs)
        line, session, options = self._line, self._line.session, self._options
        with line.lock:
            if not session.has_room(1, row.nbytes):
                until = deadline_of(options, time.monotonic())
                line.wait(lambda: session.has_room(1, row.nbytes), options.timeout)
                if time.monotonic() >= until:
                    raise DeadlineExceeded("the time limit is over; too many tasks wait in the client")
            run, index = session.submit(row, options, time.monotonic())
            if index == 0 or run.state != PENDING:  # else it rides along with a run that is looked after
                line.settle()
        if session.changed:
            line.call_back()
        return Task(line, run, index)

    def stream(self, kernel: str, /, **inputs: Any) -> Stream:
        """Start one task and iterate over its partial answers as they come.

        Raises:
            InvalidInput: the kernel does not stream, or the arguments do not fit.
        """
        plan = self._plan(kernel)
        if not plan.can_stream:
            raise InvalidInput(f"kernel {kernel!r} does not stream; use call or submit")
        run = Run(self._line.session.draw_id(), (row := plan.row(inputs)).shape, self._options, 0.0, True)
        run.deadline = deadline_of(self._options, time.monotonic())
        run.add(row)
        self._line.send(run)
        return Stream(self._line, run)

    # --- many tasks ------------------------------------------------------------------------------------------------

    def map(
        self,
        kernel: str,
        items: Iterable[Mapping[str, Any]],
        /,
        *,
        progress: bool = False,
        ordered: bool = True,
        window: int = 1024,
        return_exceptions: bool = False,
    ) -> Iterator[Any]:
        """One task per item, a dict of arguments each; yields their values.

        At most `window` tasks are under way. The first failure is raised and the rest cancelled, unless
        `return_exceptions`, which yields the errors in their places. `ordered=False` yields what ends first.
        """
        self._refuse_key("map")
        values = self._map(self._plan(kernel), iter(items), ordered, max(1, window), return_exceptions)
        return _counted(values, Counter(items, kernel, True)) if progress else values

    def _map(
        self, plan: Plan, items: Iterator[Mapping[str, Any]], ordered: bool, window: int, return_exceptions: bool
    ) -> Iterator[Any]:
        line, session, clock, runs = self._line, self._line.session, time.monotonic, deque[Run]()
        bundler = Bundler(self._options, min(session.max_rows_per_run, window), session.max_run_bytes, session.draw_id)
        flush_s, num_rows, has_more = self._config.flush_s, 0, True
        try:
            while True:
                while has_more and num_rows < window and not (runs and not runs[0].num_open):
                    run = None
                    for arguments in items:
                        now = clock()
                        run = bundler.add(plan.row(arguments), now)
                        if run is None and now - bundler.started > flush_s:
                            run = bundler.flush()
                        if run is not None:
                            break
                    else:
                        has_more, run = False, bundler.flush()
                    if run is not None:
                        runs.append(run)
                        num_rows += run.num_rows
                        line.send(run)
                if not runs:
                    if has_more:
                        continue
                    return
                run = self._next_ended(runs, ordered)
                num_rows -= run.num_rows
                yield from values_of(run, return_exceptions)
        finally:
            for run in runs:
                line.abandon(run)

    def _next_ended(self, runs: deque[Run], ordered: bool) -> Run:
        if ordered:
            first = runs[0]
            if first.num_open:
                self._line.wait_for(lambda: not first.num_open, None)
            return runs.popleft()
        self._line.wait_for(lambda: any(not r.num_open for r in runs), None)
        run = next(r for r in runs if not r.num_open)
        runs.remove(run)
        return run

    def map_rows(self, kernel: str, /, **inputs: Any) -> Any:
        """One task per row of the arguments: arrays `[N, ...]` for tensors, lists of N for texts and bytes, arrays or
        lists `[N]` or one number for row numbers, settings as they are.

        The outputs come stacked, `[N, ...]` (a list where rows differ in shape, and for texts): the array if the only
        output is "out", else a dict. The arrays are sent as they lie in memory: do not change them meanwhile.

        Raises:
            InvalidInput: before anything is sent, if the arguments do not fit the kernel.
            PenstockError: of the first row that failed; the other tasks are cancelled.
        """
        self._refuse_key("map_rows")
        line, session = self._line, self._line.session
        rows = RowsInput(self._plan(kernel), inputs)
        max_rows = min(self._config.max_rows_per_array, max(1, session.window_rows // 2))
        max_bytes = min(self._config.max_run_bytes, max(1, session.window_bytes // 2))
        runs: deque[tuple[Run, int]] = deque()
        pieces, first, stack = rows.cut(max_rows, max_bytes), 0, None
        try:
            for row in pieces:
                run = Run(session.draw_id(), row.shape, self._options, deadline_of(self._options, time.monotonic()))
                run.add(row)
                line.send(run)
                runs.append((run, first))
                first += row.num_rows
            while runs:
                run, first = runs[0]
                self._line.wait_for(lambda run=run: not run.num_open, None)  # type: ignore[misc]
                runs.popleft()
                stack = stack or Stack(rows.num_rows, run.shape.is_torch)
                stack.add(run, first)
        finally:
            for run, _ in runs:
                line.abandon(run)
        return (stack or Stack(0, False)).result()

    def _refuse_key(self, verb: str) -> None:
        if self._options.key is not None:
            raise InvalidInput(f"an idempotency_key names one task; it cannot be used with {verb}")

    # --- about tasks and the broker --------------------------------------------------------------------------------

    def options(
        self,
        *,
        priority: int | Literal["high", "medium", "low"] | None = None,
        timeout: float | None = options_.UNCHANGED,
        durable: bool | None = None,
        idempotency_key: str | bytes | None = None,
    ) -> "Verbs":
        """The same verbs with other options; what is not given stays.

        Args:
            priority: 0 (soonest) to 9, or high (1), medium (5), low (8).
            timeout: seconds until the task ends as DeadlineExceeded, waiting included; None: no limit.
            durable: the broker keeps it on disk before it is accepted.
            idempotency_key: the same key again is the same task; for one `call`, `submit` or `stream`.
        """
        changed = options_.change(self._options, priority, timeout, durable, idempotency_key)
        interned = self._line.session.intern(changed)
        return Verbs(self._line, self._catalog, self._config, interned)

    def as_completed(self, tasks: Iterable[Task], timeout: float | None = None) -> Iterator[Task]:
        """The tasks in the order in which they end; see `as_completed`."""
        return as_completed(tasks, timeout)

    def cancel(self, tasks: Task | Iterable[Task]) -> int:
        """Cancel tasks and wait until they have ended; how many of them ended as cancelled comes back."""
        tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
        for task in tasks:
            task.ask_cancel()
        return sum(task.cancel() for task in tasks)

    def status(self, *, timeout: float | None = 5.0) -> dict[str, Any]:
        """The broker's state: its queues, workers and kernels."""
        return self._line.ask(lambda number: protocol.Status(request=number), timeout).body

    def kernels(self, *, timeout: float | None = 5.0) -> dict[str, Mapping[str, Any]]:
        """The kernels on offer now: name -> spec (`inputs`, `modes`, ...)."""
        version = self._line.session.specs_version
        self._catalog.update(self.status(timeout=timeout), version)
        return dict(self._catalog.specs)

    def _plan(self, kernel: str) -> Plan:
        line = self._line
        if line.is_forked or line.session.error is not None:
            line.check_usable()
        plan = self._catalog.get(kernel, line.session.specs_version)
        return plan if plan is not None else self._learn(kernel)

    def _learn(self, kernel: str) -> Plan:
        """Ask for the specs until the kernel is among them.

        Raises:
            UnknownKernel: it is not, and no worker is still starting.
            DeadlineExceeded: nor is it known within the time limit.
        """
        self._line.connect()
        until, pause = deadline_of(self._options, time.monotonic()), FIRST_PAUSE_S
        why = "the broker has not said which kernels it has"
        while True:
            version = self._line.session.specs_version
            try:
                body = self.status(timeout=None if self._options.timeout is None else until - time.monotonic())
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
            time.sleep(min(pause, left))
            pause = min(MAX_PAUSE_S, pause * 2)


class Client(Verbs):
    """A connection to a broker, for any number of threads.

    Args:
        address: the broker's URL; else PENSTOCK_URL, the connection file, or the default ipc folder.
        name: shown by the broker; the program's name by default.
        timeout: time limit of tasks in seconds (60 by default), None: none. `options(timeout=...)` overrides it.
        connect_timeout: seconds to wait for a broker at first use (5 by default).
        config: all settings at once, instead of the arguments above and other sources.

    Nothing is connected before the first use. Close it, or use it as a context manager: closing ends its open tasks.
    A client does not survive `fork`: make a new one in the child.
    """

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
        line = Line(session, found.front, found.url, config.connect_timeout, config.linger_s)
        super().__init__(line, Catalog(), config, Options(timeout=config.timeout))

    def close(self) -> None:
        """Cancel what is open and disconnect. May be called twice."""
        self._line.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def values_of(run: Run, return_exceptions: bool) -> Iterator[Any]:
    """The values of a closed run's rows; an error is raised, or yielded."""
    row, slots, is_torch = 0, run.slots, run.shape.is_torch
    while row < run.num_rows:
        part, stop = slots[row], same_part(slots, row)
        assert part is not None
        if part.error is None:
            yield from decode_rows(part, row, stop, is_torch)
        elif return_exceptions:
            for _ in range(row, stop):
                yield from_wire(part.error)
        else:
            raise from_wire(part.error)
        row = stop


def _counted(values: Iterator[Any], counter: Counter) -> Iterator[Any]:
    with counter:
        for value in values:
            yield value
            counter.count()

"""`Client`: the verbs that people type, for threads that wait.

Knows when a verb waits. What it puts on the line is `verbs.py`'s business, conversion `plan.py`'s and waiting `line.py`'s.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from penstock.broker.ways import find_ways
from penstock.client import completed
from penstock.client.bundler import Window
from penstock.client.catalog import Catalog, Search
from penstock.client.config import ClientConfig, configure
from penstock.client.errors import from_wire
from penstock.client.jobs import Jobs
from penstock.client.line import Line
from penstock.client.options import UNCHANGED
from penstock.client.outputs import decode, values_of
from penstock.client.plan import Plan
from penstock.client.progress import Counter
from penstock.client.run import PENDING, Options, Run, deadline_of
from penstock.client.session import Session
from penstock.client.task import Stream, Task
from penstock.client.verbs import no_room


class Verbs(Jobs):
    """What can be done on a line with certain options. `Client.options(...)` makes another one.

    Arguments of a kernel are given by keyword and become what the kernel's spec says (see `inputs.py`; `outputs.py` for
    results). The first use of a kernel asks the broker for its spec and waits, at most the task's time limit, while
    workers are still starting.
    """

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
        if session.news.changed:
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
        backlog = session.backlog
        with line.lock:
            if not backlog.has_room(1, row.nbytes):
                until = deadline_of(options, time.monotonic())
                line.wait(lambda: backlog.has_room(1, row.nbytes), options.timeout)
                if time.monotonic() >= until:
                    raise no_room()
            run, index = session.submit(row, options, time.monotonic())
            if index == 0 or run.state != PENDING:  # else it rides along with a run that is looked after
                line.settle()
        if session.news.changed:
            line.call_back()
        return Task(line, run, index)

    def stream(self, kernel: str, /, **inputs: Any) -> Stream:
        """Start one task and iterate over its partial answers as they come.

        Raises:
            InvalidInput: the kernel does not stream, or the arguments do not fit.
        """
        run = self._one_run(self._plan(kernel), inputs)
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
        runs = self._bundler(window).runs(map(self._plan(kernel).row, items))
        values = self._map(runs, Window(max(1, window), ordered), return_exceptions)
        return _counted(values, Counter(items, kernel, True)) if progress else values

    def _map(self, runs: Iterator[Run], window: Window, return_exceptions: bool) -> Iterator[Any]:
        line = self._line
        try:
            while True:
                while window.wants_more and (run := next(runs, None)) is not None:
                    line.send(run)
                    window.add(run)
                if not window:
                    return
                if not window.has_ended():
                    line.wait_for(window.has_ended, None)
                yield from values_of(window.pop(), return_exceptions)
        finally:
            for run in window:
                line.abandon(run)

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
        line, sent = self._line, deque[Run]()
        runs, stack = self._stacked(self._plan(kernel), inputs)
        try:
            for run in runs:
                line.send(run)
                sent.append(run)
            while sent:
                line.wait_for(lambda: not sent[0].num_open, None)
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
    ) -> "Verbs":
        """The same verbs with other options; what is not given stays.

        Args:
            priority: 0 (soonest) to 9, or high (1), medium (5), low (8).
            timeout: seconds until the task ends as DeadlineExceeded, waiting included; None: no limit.
            durable: the broker keeps it on disk before it is accepted.
            idempotency_key: the same key again is the same task; for one `call`, `submit` or `stream`.
        """
        changed = self._changed(priority, timeout, durable, idempotency_key)
        return Verbs(self._line, self._catalog, self._config, changed)

    def as_completed(self, tasks: Iterable[Task], timeout: float | None = None) -> Iterator[Task]:
        """The tasks in the order in which they end; see `as_completed`."""
        return completed.as_completed(tasks, timeout)

    def cancel(self, tasks: Task | Iterable[Task]) -> int:
        """Cancel tasks and wait until they have ended; how many of them ended as cancelled comes back."""
        tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
        for task in tasks:
            task.ask_cancel()
        return sum(task.cancel() for task in tasks)

    def _plan(self, kernel: str) -> Plan:
        line = self._line
        if line.is_forked or line.session.error is not None:
            line.check_usable()
        plan = self._catalog.get(kernel, line.session.specs_version)
        return plan if plan is not None else self._learn(kernel)

    def _learn(self, kernel: str) -> Plan:
        """Ask for the specs until the kernel is among them; raises as `Search` does."""
        self._line.connect()
        search = Search(self._catalog, kernel, self._options, time.monotonic())
        while True:
            version = self._line.session.specs_version
            try:
                body = self.status(timeout=search.time_left(time.monotonic()))
            except TimeoutError:
                raise search.time_is_over() from None
            plan = search.look(body, version)
            if plan is not None:
                return plan
            time.sleep(search.pause(time.monotonic()))


class Client(Verbs):
    """A connection to a broker, for any number of threads.

    Args:
        address: the broker's URL; else PENSTOCK_URL, `url` of [client] in penstock.toml, the connection file, or the default
            ipc folder. Several, as a list or with commas, are tried in their order; one is used at a time (docs/faults.md).
        name: shown by the broker; the program's name by default.
        timeout: time limit of tasks in seconds (60 by default), None: none. `options(timeout=...)` overrides it.
        connect_timeout: seconds to wait for a broker at first use (5 by default).
        key: a key file, for a broker on tcp that wants one, or one for each address; else what PENSTOCK_KEY names.
        config: all settings at once, instead of the arguments above and other sources.

    Raises:
        AddressError, KeyProblem: an address or a key file cannot be used.

    Nothing is connected before the first use. Close it, or use it as a context manager: closing ends its open tasks.
    A client does not survive `fork`: make a new one in the child.
    """

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
        line = Line(session, ways, config.connect_timeout, config.linger_s)
        super().__init__(line, Catalog(session.memory.place), config, Options(timeout=config.timeout))

    @property
    def where(self) -> str:
        """The addresses that it uses, with commas."""
        return self._line.where

    def close(self) -> None:
        """Cancel what is open and disconnect. May be called twice."""
        self._line.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _counted(values: Iterator[Any], counter: Counter) -> Iterator[Any]:
    with counter:
        for value in values:
            yield value
            counter.count()

"""What the verbs of `Client` and `AsyncClient` have in common: everything but waiting.

Knows options, and how the arguments of a verb become runs; does not know how a line waits, nor which line it is.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Generic, Protocol, TypeVar

from penstock.broker import protocol
from penstock.client import options as options_
from penstock.client.bundler import Bundler
from penstock.client.catalog import Catalog
from penstock.client.config import ClientConfig
from penstock.client.errors import DeadlineExceeded, InvalidInput
from penstock.client.plan import Plan
from penstock.client.rows import RowsInput
from penstock.client.run import Options, Run, deadline_of
from penstock.client.session import Session
from penstock.client.stack import Stack

MIN_RUNS: Final = 8


class AnyLine(Protocol):
    session: Session


LineT = TypeVar("LineT", bound=AnyLine)


class BaseVerbs(Generic[LineT]):
    """A line, and the options of what is put on it."""

    def __init__(self, line: LineT, catalog: Catalog, config: ClientConfig, options: Options) -> None:
        self._line = line
        self._catalog = catalog
        self._config = config
        self._options = options

    def _changed(
        self, priority: int | str | None, timeout: float | None, durable: bool | None, key: str | bytes | None
    ) -> Options:
        changed = options_.change(self._options, priority, timeout, durable, key)
        return self._line.session.backlog.intern(changed)

    def _one_run(self, plan: Plan, inputs: Mapping[str, Any]) -> Run:
        """The run of a single task that streams."""
        if not plan.can_stream:
            raise InvalidInput(f"kernel {plan.kernel!r} does not stream; use call or submit")
        row, session = plan.row(inputs), self._line.session
        deadline = deadline_of(self._options, time.monotonic())
        run = Run(session.submissions.draw_id(), row.shape, self._options, deadline, wants_partials=True)
        run.add(row)
        return run

    def _bundler(self, window: int) -> Bundler:
        """What puts the tasks of `map` into runs."""
        session = self._line.session
        # Several messages have to be under way, or the line is idle while one is being made.
        max_rows, max_bytes = min(session.backlog.max_rows, max(1, window // MIN_RUNS)), session.backlog.max_bytes
        return Bundler(self._options, max_rows, max_bytes, session.submissions.draw_id, self._config.flush_s)

    def _stacked(self, plan: Plan, inputs: Mapping[str, Any]) -> tuple[Iterator[Run], Stack]:
        """The runs of `map_rows`, made as they are asked for, and where their results go in the same order."""
        rows = RowsInput(plan, inputs)
        return self._array_runs(rows), Stack(rows.num_rows, rows.is_torch)

    def _array_runs(self, rows: RowsInput) -> Iterator[Run]:
        session, config = self._line.session, self._config
        window = session.submissions.credit
        max_rows = min(config.max_rows_per_array, max(1, window.window_rows // 2))
        max_bytes = min(config.max_run_bytes, max(1, window.window_bytes // 2))
        for row in rows.cut(max_rows, max_bytes):
            run = Run(session.submissions.draw_id(), row.shape, self._options, deadline_of(self._options, time.monotonic()))
            run.add(row)
            yield run

    def _refuse_key(self, verb: str) -> None:
        if self._options.key is not None:
            raise InvalidInput(f"an idempotency_key names one task; it cannot be used with {verb}")


def no_room() -> DeadlineExceeded:
    return DeadlineExceeded("the time limit is over; too many tasks wait in the client")


def ask_status(number: int) -> protocol.Status:
    """The question for the broker's whole state."""
    return protocol.Status(request=number)


def ask_tasks(number: int) -> protocol.Status:
    """The question for the reports of all open submissions."""
    return protocol.Status(request=number, what="tasks")


def ask_task(id_: bytes) -> Callable[[int], protocol.Status]:
    """The question for the report of one submission."""
    return lambda number: protocol.Status(request=number, id=id_)


def ask_jobs(is_dead: bool) -> Callable[[int], protocol.Status]:
    """The question for the durable tasks, or for those that failed."""
    return lambda number: protocol.Status(request=number, what="dead" if is_dead else "jobs")


def ask_job(id_: bytes | None, key: bytes | None) -> Callable[[int], protocol.Status]:
    """The question for one durable task."""
    return lambda number: protocol.Status(request=number, what="jobs", id=id_, key=key)


def ask_to_fetch(id_: bytes | None, key: bytes | None, take: bool) -> Callable[[int], protocol.Fetch]:
    """The wish for the outcomes of a durable task."""
    return lambda number: protocol.Fetch(request=number, id=id_, key=key, take=take)


def ask_about_job(op: str, id_: bytes | None, key: bytes | None) -> Callable[[int], protocol.Control]:
    """The wish that a durable task is cancelled, requeued or dropped."""
    return lambda number: protocol.Control(request=number, op=op, id=id_, key=key)


def ask_to_back_up(folder: str) -> Callable[[int], protocol.Control]:
    """The wish for a copy of the journal in a new folder."""
    return lambda number: protocol.Control(request=number, op="backup", target=folder)


def ask_to_reload(number: int) -> protocol.Control:
    """The wish that the broker reads its configuration again."""
    return protocol.Control(request=number, op="reload")


def ask_to_drain(worker: str) -> Callable[[int], protocol.Control]:
    """The wish that a worker finishes what it holds, and ends."""
    return lambda number: protocol.Control(request=number, op="drain", target=worker)

"""Runs: the tasks of one submission, held together from the first row to the last outcome.

Knows how rows gather, become a block, travel and get their outcomes. Does not know sessions, sockets, numpy or clocks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from penstock.broker.columns import Block, Stored, pack
from penstock.broker.layout import Column, Layout, Lengths
from penstock.broker.protocol import DEFAULT_PRIORITY, Error, Outcome, Submit

PENDING: Final = 0
"""Rows may still be added."""
WAITING: Final = 1
"""Sealed; waits for credit or for the broker."""
SENT: Final = 2
CLOSED: Final = 3
"""Every row has its outcome."""

MAX_HEADER_VALUES: Final = 4000
"""Lengths and scalars that a run may put into its header: 9 bytes each must stay well within 64 KiB."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `options(...)` says of tasks. `timeout` is seconds or None; priority 0 is soonest, 9 last."""

    priority: int = DEFAULT_PRIORITY
    timeout: float | None = 60.0
    is_durable: bool = False
    key: bytes | None = None


class Shape:
    """What rows of one run have in common. Compared by identity: `Plan` makes one object per combination."""

    __slots__ = ("columns", "is_torch", "kernel", "layout", "max_rows", "scalars", "statics")

    def __init__(
        self, kernel: str, columns: tuple[Column, ...], statics: bytes, scalars: tuple[str, ...], is_torch: bool
    ) -> None:
        self.kernel = kernel
        self.columns = columns
        self.layout = Layout.of(columns)
        self.statics = statics
        self.scalars = scalars
        self.is_torch = is_torch
        num_per_row = len(scalars) + sum(c.is_ragged for c in columns)
        self.max_rows = MAX_HEADER_VALUES // num_per_row if num_per_row else MAX_HEADER_VALUES


@dataclass(slots=True)
class Row:
    """The converted inputs of one task, or of `num_rows` tasks that lie one after another.

    Per column of `shape`: the buffers of its rows, and their lengths if it is ragged. `scalars` holds per scalar name
    one value per row.
    """

    shape: Shape
    buffers: Sequence[Sequence[Stored]]
    lengths: Sequence[Lengths]
    scalars: Sequence[Sequence[float]]
    nbytes: int
    num_rows: int = 1


class Part:
    """One outcome for rows of one run, from `start` on: rows of `block` from `base` on, or `error` for all of them."""

    __slots__ = ("attempt", "base", "block", "decoder", "error", "part", "queue_ms", "start", "timings")

    def __init__(
        self,
        start: int,
        base: int = 0,
        block: Block | None = None,
        error: Error | None = None,
        queue_ms: float | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        self.start = start
        self.base = base
        self.block = block
        self.error = error
        self.queue_ms = queue_ms
        self.timings = None if outcome is None else outcome.timings
        self.part = 0 if outcome is None else outcome.part
        self.attempt = 0 if outcome is None else outcome.attempt
        self.decoder: Any = None  # made by `outputs.decode`, shared by all rows


@dataclass(frozen=True, slots=True)
class Rest:
    """The broker had no room for a run: for the `num_refused`-th time, and it shall not leave again before `until`."""

    num_refused: int
    until: float
    error: Error


class Watcher(Protocol):
    """Is told of a run whenever something happens to it; called under the line's lock, so it only notes it."""

    def append(self, run: "Run", /) -> object: ...


class Run:
    """One submission: `num_rows` tasks that differ in their rows only.

    `slots` has per row its `Part`, or None while the task is open. `deadline` is monotonic seconds. `cancels` are the
    row ranges that somebody wants ended. `chunks` collects partial answers of a streaming task. `rest` tells of the
    last refusal, if there was one; `place` is the run's among those of its priority.
    """

    __slots__ = (
        "__weakref__", "accepted", "block", "callbacks", "cancels", "chunks", "deadline", "entry", "id", "is_again",
        "key", "nbytes", "num_open", "num_rows", "options", "pieces", "place", "rest", "scalars", "shape", "slots", "state",
        "wants_partials", "watchers",
    )  # fmt: skip

    def __init__(self, id_: bytes, shape: Shape, options: Options, deadline: float, wants_partials: bool = False) -> None:
        self.id = id_
        self.shape = shape
        self.options = options
        self.deadline = deadline
        self.wants_partials = wants_partials
        self.pieces: list[Row] = []
        self.slots: list[Part | None] = []
        self.num_rows = 0
        self.num_open = 0
        self.nbytes = 0
        self.state = PENDING
        self.key: Any = None
        self.block: Block | None = None
        self.scalars: dict[str, Any] = {}
        self.entry: list[Any] | None = None
        self.is_again = False
        self.accepted = False
        self.rest: Rest | None = None
        self.place = 0
        self.cancels: list[tuple[int, int]] = []
        self.chunks: list[Part] = []
        self.watchers: list[Watcher] | None = None
        self.callbacks: dict[int, list[Callable[[], object]]] | None = None

    @classmethod
    def fetched(cls, id_: bytes, kernel: str, num_rows: int) -> "Run":
        """A durable submission that the broker has: known by its outcomes alone, which say what their columns are."""
        run = cls(id_, Shape(kernel, (), b"", (), False), Options(timeout=None, is_durable=True), math.inf)
        run.num_rows = run.num_open = num_rows
        run.slots = [None] * num_rows
        run.state, run.accepted = SENT, True
        return run

    @property
    def can_be_sent(self) -> bool:
        """Whether what it is made of is here: not of one that was fetched."""
        return self.block is not None

    def add(self, row: Row) -> int:
        """Take in one more piece; its first row's number comes back."""
        first = self.num_rows
        self.pieces.append(row)
        self.num_rows = first + row.num_rows
        self.num_open += row.num_rows
        self.nbytes += row.nbytes
        if row.num_rows == 1:
            self.slots.append(None)
        else:
            self.slots.extend([None] * row.num_rows)
        return first

    def fill(self, rows: list[Row], nbytes: int) -> None:
        """Take in all its rows at once: one task each, `nbytes` together."""
        self.pieces, self.nbytes = rows, nbytes
        self.num_rows = self.num_open = len(rows)
        self.slots = [None] * len(rows)

    def seal(self) -> None:
        """No more rows: lay them out as the block that travels."""
        pieces, shape = self.pieces, self.shape
        if shape.layout.is_plain:
            buffers: list[Any] = [buffer for piece in pieces for buffer in piece.buffers[0]]
            frame = buffers[0] if len(buffers) == 1 else b"".join(buffers)
            self.block = Block(self.num_rows, shape.layout, shape.layout.no_lengths, [frame])
        else:
            self.block = pack(
                [
                    (
                        column,
                        [n for piece in pieces for n in piece.lengths[i] or ()] if column.is_ragged else None,
                        [buffer for piece in pieces for buffer in piece.buffers[i]],
                    )
                    for i, column in enumerate(shape.columns)
                ],
                self.num_rows,
            )
        for i, name in enumerate(shape.scalars):
            values = [value for piece in pieces for value in piece.scalars[i]]
            self.scalars[name] = values[0] if values.count(values[0]) == len(values) else values
        self.pieces = []

    def settle(self, start: int, stop: int, part: Part) -> int:
        """Give the rows [start, stop) that are still open their outcome; how many those were comes back."""
        slots, count = self.slots, stop - start
        if self.num_open == self.num_rows or not any(slots[start:stop]):
            slots[start:stop] = [part] * count
        else:
            open_rows = [i for i in range(start, stop) if slots[i] is None]
            for i in open_rows:
                slots[i] = part
            count = len(open_rows)
        self.num_open -= count
        return count

    def close(self) -> None:
        """Every row has its outcome: let the payload go."""
        self.state = CLOSED
        self.block = None
        self.pieces = []


def submit_message(run: Run, ack: int, now: float) -> Submit:
    """A sealed run as it travels, with what remains of its time limit."""
    options, shape, block = run.options, run.shape, run.block
    assert block is not None
    return Submit(
        id=run.id, kernel=shape.kernel, block=block, statics=shape.statics, scalars=run.scalars,
        priority=options.priority, timeout_ms=None if run.deadline == math.inf else (run.deadline - now) * 1000.0,
        wants_partials=run.wants_partials, is_durable=options.is_durable, wants_accepted=options.is_durable,
        is_again=run.is_again, key=options.key, ack=ack,
    )  # fmt: skip


def same_part(slots: Sequence[Part | None], row: int) -> int:
    """The end of the rows from `row` on that got their outcome together."""
    part, stop = slots[row], len(slots)
    if slots.count(part) == stop - row:
        return stop
    return next((i for i in range(row, stop) if slots[i] is not part), stop)


def deadline_of(options: Options, now: float) -> float:
    return math.inf if options.timeout is None else now + options.timeout

"""Runs, pieces and leases: the objects that the ledger moves. They know their own rows and nothing else.

A *run* is a submission of n rows. Its rows that have no outcome yet are covered by *pieces*, ranges of rows in one state,
split as batches and cancels need it, so that bookkeeping costs per range and not per row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.broker.columns import Block
from penstock.broker.spec import Cost

if TYPE_CHECKING:
    from penstock.broker.journal import Entry
    from penstock.broker.scheduling.accounts import Account
    from penstock.broker.scheduling.batch import Batch
    from penstock.broker.scheduling.lanes import BatchQueue, Lane
    from penstock.broker.sessions import ClientSession, WorkerSession

QUEUED, LEASED = "queued", "leased"
DONE, FAILED, EXPIRED, CANCELLED, DEAD = "done", "failed", "expired", "cancelled", "dead"

MOVES = {
    QUEUED: frozenset((LEASED, DONE, FAILED, EXPIRED, CANCELLED, DEAD)),  # DONE, DEAD: with the run that holds the same key
    LEASED: frozenset((QUEUED, DONE, FAILED, EXPIRED, CANCELLED, DEAD)),
}
"""Every move that a row may make. The other states are outcomes: nothing leaves them."""


@dataclass(slots=True)
class Saved:
    """What a row can go on from: a block that its kernel made under the version `digest`, and the number of its next partial.

    `num_acquitted`: how often deaths before it were made to count no more. `number` is that of its record on disk, 0: none.
    """

    digest: bytes
    block: Block
    part: int
    num_acquitted: int = 0
    number: int = 0


class Piece:
    """Rows [start, stop) of a run in one state. `entry` is its place in its `lane` while queued, `lease` who holds it.

    `alone_ms` is what its rows are predicted to take one by one, `cell` the class of the longest; the policy sets them.
    `evidence` has a line per worker that was lost while running it, a single row, alone; `saved` is of a single row, too.
    """

    __slots__ = (
        "alone_ms", "cell", "deaths", "entry", "evidence", "is_isolated", "lane", "lease", "run", "saved", "start", "state",
        "stop",
    )  # fmt: skip

    def __init__(self, run: "Run", start: int, stop: int, state: str = QUEUED) -> None:
        self.run = run
        self.start = start
        self.stop = stop
        self.state = state
        self.entry: tuple[float, int, int, int, Piece] | None = None
        self.lane: Lane | None = None
        self.alone_ms = 0.0
        self.cell = 0
        self.lease: Lease | None = None
        self.deaths = 0
        self.evidence: tuple[str, ...] = ()
        self.is_isolated = False
        self.saved: Saved | None = None

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def split(self, at: int) -> "Piece":
        """Cut off and return rows [at, stop); both parts stay in this state, under this lease."""
        tail = Piece(self.run, at, self.stop, self.state)
        tail.lease, tail.deaths, tail.is_isolated = self.lease, self.deaths, self.is_isolated
        self.stop = at
        self.run.pieces.append(tail)
        if self.lease is not None:
            pieces = self.lease.pieces
            pieces.insert(pieces.index(self) + 1, tail)
        return tail


class Run:
    """A submission: what is common to its rows, and the pieces without an outcome."""

    __slots__ = (
        "account", "after", "alone_ms", "arrived", "before", "block", "client", "cost_ms", "deadline", "entry", "expected_s",
        "followers", "has_own_end", "id", "is_durable", "is_known", "kernel", "key", "num_bytes", "num_open", "num_rows",
        "number", "overdue_at", "pieces", "priority", "queue", "request", "scalars", "seq", "session", "spread", "started",
        "traceparent", "wants_partials",
    )  # fmt: skip

    def __init__(self, session: "ClientSession", run_id: bytes, kernel: str, num_rows: int, seq: int, arrived: float) -> None:
        self.session = session
        self.client = session.name
        """Who submitted it, whoever has it now."""
        self.before: Run | None = None
        self.after: Run | None = None
        self.id = run_id
        self.kernel = kernel
        self.num_rows = self.num_open = num_rows
        self.seq = seq
        self.arrived = arrived
        self.deadline = float("inf")
        self.priority = 5
        self.wants_partials = False
        self.traceparent: str | None = None
        self.key: bytes | None = None
        self.entry: Entry | None = None
        """What is remembered of it; of the run that it follows, if that is another."""
        self.has_own_end = False
        """Whether a row of it ended otherwise than with that of the run that it follows."""
        self.is_durable = False
        self.number = 0
        """Of its records, if it is durable."""
        self.started: list[tuple[int, int]] = []
        """Rows that an earlier broker gave to a worker."""
        self.block: Block | None = None
        self.scalars: Mapping[str, Any] = {}
        self.account: Account = session.account
        self.cost_ms: Cost = 0.0
        """Declared by the kernel, of one row alone; `alone_ms` is predicted, its q95 `spread` times as much."""
        self.alone_ms: Cost = 0.0
        self.spread = 1.0
        self.is_known = False
        """Whether that is more than a guess."""
        self.overdue_at = arrived
        self.expected_s: float | None = None
        """The wait that was predicted for its last rows when it was taken."""
        self.num_bytes = 0
        self.queue: BatchQueue | None = None
        self.request: Any = None
        self.followers: dict[Run, None] | None = None
        self.pieces: list[Piece] = [Piece(self, 0, num_rows)]

    def alone(self, start: int, stop: int) -> tuple[float, float]:
        """What rows [start, stop) are predicted to take one by one, in ms: all of them, and the longest."""
        if isinstance(self.alone_ms, list):
            rows = self.alone_ms[start:stop]
            return sum(rows), max(rows)
        return self.alone_ms * (stop - start), self.alone_ms

    def overlapping(self, start: int, stop: int) -> Iterator[Piece]:
        """Pieces with rows in [start, stop), cut to it."""
        for piece in list(self.pieces):
            if piece.start < stop and start < piece.stop:
                yield piece

    def cut_out(self, start: int, stop: int) -> Iterator[Piece]:
        """Pieces with rows in [start, stop) and no others; only before they are in a queue."""
        for piece in self.overlapping(start, stop):
            if piece.start < start:
                piece = piece.split(start)
            if piece.stop > stop:
                piece.split(stop)
            yield piece

    def keep_only(self, ended: Sequence[tuple[int, int]], deaths: Sequence[tuple[int, int, int]]) -> None:
        """Before it is opened: rows that have an outcome, in order, are none of its pieces; suspects have died so often, which
        is said again as it changes."""
        at, self.pieces = 0, []
        for start, stop in [*ended, (self.num_rows, self.num_rows)]:
            if at < start:
                self.pieces.append(Piece(self, at, start))
            at = max(at, stop)
        for start, stop, count in deaths:
            for piece in self.cut_out(start, stop):
                piece.deaths, piece.is_isolated = count, True
        self.num_open = sum(piece.num_rows for piece in self.pieces)

    def follow(self, entry: "Entry") -> None:
        """Share the outcomes of an open run."""
        leader, self.entry = entry.run, entry
        assert leader is not None
        if leader.followers is None:
            leader.followers = {}
        leader.followers[self] = None

    def unfollow(self) -> None:
        """Go on alone, or no more."""
        leader = self.entry.run if self.entry is not None else None
        if leader is not None and leader is not self and leader.followers is not None:
            del leader.followers[self]
        self.entry = None

    def release(self) -> None:
        """Drop what only an open run needs: payloads, and the references that would form cycles."""
        self.block = self.queue = self.request = self.followers = None
        self.pieces.clear()


class Lease:
    """A batch in the hands of one worker session. `token` is the fence: no answer under another one counts."""

    __slots__ = (
        "assigned_at", "attempt", "batch", "began_at", "is_cancelled", "is_unshared", "lent", "mode", "num_answered",
        "num_bytes", "num_failed", "num_rows", "part", "pieces", "queue", "token", "worker",
    )  # fmt: skip

    def __init__(self, token: int, worker: "WorkerSession", batch: "Batch", pieces: list[Piece], now: float) -> None:
        self.token = token
        self.worker = worker
        self.batch = batch
        self.queue = queue = batch.queue
        self.mode = queue.mode
        self.pieces = pieces
        self.num_rows = sum(p.stop - p.start for p in pieces)
        self.num_bytes = 0
        self.num_answered = self.num_failed = 0
        self.part = 0
        self.attempt = 1 + max(p.deaths for p in pieces)
        self.assigned_at = now
        self.began_at: float | None = now
        """When its worker turned to it, as far as the broker can tell; None while it waits behind another batch there."""
        self.is_cancelled = self.is_unshared = False
        self.lent: list[Block] | None = None
        """What its worker reads in shared memory: not given back before the lease ends, whatever becomes of the tasks."""

    def left_ms(self, now: float) -> float:
        """How long it is predicted to go on."""
        predicted_ms = self.batch.predicted_ms
        return predicted_ms if self.began_at is None else max(predicted_ms - 1000.0 * (now - self.began_at), 0.0)

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """(piece, first row, last row + 1 of it in the lease) for the pieces that meet rows [start, stop) of the lease."""
        at = 0
        for piece in list(self.pieces):
            end = at + piece.num_rows
            if at < stop and start < end:
                yield piece, at, end
            at = end

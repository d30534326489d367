"""A batch as decided: the rows, what they were predicted to take, and who is charged for it; and the filling of it.

Knows budgets and predictions. Does not know why this lane goes first.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from heapq import heappop, heappush, heapreplace

from penstock.broker.protocol import NUM_PRIORITIES
from penstock.broker.scheduling.accounts import Account
from penstock.broker.scheduling.bins import Grid
from penstock.broker.scheduling.lanes import BatchQueue, Entry, Kind, Lane
from penstock.broker.scheduling.prediction import BatchLoad
from penstock.broker.spec import Cost
from penstock.broker.tasks import Piece, Run
from penstock.broker.wire import record

Opened = tuple[int, Entry, Iterator[Entry]]
UNBOUNDED = 1 << 62
MAX_ASIDE = 64
"""Pieces that are looked at and left aside for one batch."""
INF = float("inf")


@record
class Offer:
    """What a worker could take now: its kinds, and how many bytes fit its credit.

    `is_idle`: it holds nothing; `is_busy`: it holds a batch. `num_workers` are ready; `num_slow` of the others run a slow
    batch just now.
    """

    kinds: Collection[Kind]
    max_bytes: int
    is_idle: bool
    worker: str = ""
    is_busy: bool = False
    num_workers: int = 1
    num_slow: int = 0


class Batch:
    """Rows of one queue for one worker: `picked` are (piece, number of rows from its front).

    `has_company`: enough waited in its queue to fill it, had they been of one bin.
    """

    __slots__ = (
        "alone_ms", "cells", "charges", "first", "grid", "has_company", "is_known", "is_slow", "label", "limit",
        "load_bytes", "load_ms", "num_rows", "picked", "predicted_ms", "queue", "row_ms", "worker",
    )  # fmt: skip

    def __init__(self, queue: BatchQueue, worker: str, limit: int) -> None:
        self.queue = queue
        self.worker = worker
        self.limit = limit
        self.picked: list[tuple[Piece, int]] = []
        self.cells: list[tuple[int, int]] = []
        self.charges: list[tuple[Account, int, float, float]] = []
        self.num_rows = 0
        self.alone_ms = self.predicted_ms = self.row_ms = 0.0
        self.load_ms = self.load_bytes = 0.0
        self.label = "all"
        self.is_slow = False
        self.is_known = True
        self.has_company = True
        self.grid: Grid | None = None
        self.first = INF

    @property
    def soonest_ms(self) -> float:
        """When it may be over already: rows that run side by side may take no longer than one, whatever was predicted."""
        return min(self.predicted_ms, self.row_ms) if self.queue.is_max else self.predicted_ms

    def part(self, num_rows: int, alone_ms: float) -> float:
        """Which share of its time rows account for that take so long alone."""
        return alone_ms / self.alone_ms if self.alone_ms > 0.0 else num_rows / self.num_rows

    @property
    def is_full(self) -> bool:
        return self.num_rows >= self.limit

    def load(self) -> BatchLoad:
        """What it is to the predictor."""
        queue, spec = self.queue, self.queue.spec
        return BatchLoad(spec.name, queue.context, spec.combine, self.num_rows, self.load_ms, self.load_bytes)


class Filling:
    """Takes rows in the order it is given, while the count, cost and byte budgets last.

    Pieces that cannot finish within their time limit any more are left aside, in `hopeless`. Without `now` the times are
    not known well enough to say so.
    """

    __slots__ = (
        "batch", "bytes_left", "cost_ms", "deadline", "hopeless", "is_cost_bounded", "is_idle", "longest_ms",
        "now", "num_aside", "queue", "slowness",
    )  # fmt: skip

    def __init__(self, batch: Batch, offer: Offer, now: float | None, slowness: float = 1.0) -> None:
        self.batch = batch
        self.queue = batch.queue
        self.is_idle = offer.is_idle
        self.is_cost_bounded = batch.queue.max_batch_cost_ms < INF
        self.bytes_left = offer.max_bytes if batch.queue.mode == "batch" else UNBOUNDED  # slots use no credit
        self.now = now
        self.slowness = slowness
        self.deadline = INF
        self.num_aside = 0
        self.longest_ms = self.cost_ms = 0.0
        self.hopeless: list[Piece] = []

    def take(self, account: Account, entries: Iterable[Entry]) -> bool:
        """Fill from one account; whether there is room left."""
        batch, before = self.batch, (self.batch.num_rows, self.batch.alone_ms)
        has_room = True
        for entry in entries:
            if not self._take_piece(entry[-1]):
                has_room = False
                break
        num_rows, alone_ms = batch.num_rows - before[0], batch.alone_ms - before[1]
        if num_rows:
            batch.charges.append((account, num_rows, alone_ms, alone_ms * self.queue.share))
        return has_room

    def _take_piece(self, piece: Piece) -> bool:
        batch, run = self.batch, piece.run
        picked = batch.picked
        if piece.is_isolated and (picked or not self.is_idle):
            return False  # a suspect gets a worker to itself: only then does the worker's end tell whose fault it was
        rows = piece.stop - piece.start
        if self.now is not None and run.is_known and not self._is_in_time(piece, rows, self.now):
            return self.num_aside < MAX_ASIDE
        num_rows = min(batch.limit - batch.num_rows, rows)
        if self.bytes_left < run.num_bytes or self.is_cost_bounded:
            num_rows = self._rows_within(piece, num_rows)
        if num_rows == 0:
            if picked or not self.is_idle:
                return False
            num_rows = 1  # past the credit all alone: it has to run some time
        self.bytes_left -= num_rows * (run.num_bytes // run.num_rows)
        picked.append((piece, num_rows))
        batch.cells.append((piece.cell, num_rows))
        batch.num_rows += num_rows
        batch.alone_ms += piece.alone_ms if num_rows == rows else piece.alone_ms * num_rows / rows
        if run.arrived < batch.first:
            batch.first = run.arrived
        if not run.is_known:
            batch.is_known = False
        self._load(run, piece.start, num_rows)
        return num_rows == rows and batch.num_rows < batch.limit and not piece.is_isolated

    def _is_in_time(self, piece: Piece, rows: int, now: float) -> bool:
        """Whether a piece can finish within its time limit, and lets the others do so; if not, it is left aside."""
        run, alone_ms = piece.run, self.slowness * piece.alone_ms / rows
        longest_ms, deadline = max(self.longest_ms, run.spread * alone_ms), min(self.deadline, run.deadline)
        if run.deadline < now + 0.001 * alone_ms:
            self.hopeless.append(piece)
        elif self.batch.picked and deadline < now + 0.001 * longest_ms:
            pass  # together one of them would be late: not in this batch
        else:
            self.longest_ms, self.deadline = longest_ms, deadline
            return True
        self.num_aside += 1
        return False

    def _load(self, run: Run, start: int, num_rows: int) -> None:
        """What the batch is, to the predictor: the largest of its rows, or their sum."""
        batch, cost, row_bytes, is_max = self.batch, run.cost_ms, run.num_bytes / run.num_rows, self.queue.is_max
        if isinstance(cost, list):
            cost = (max if is_max else sum)(cost[start : start + num_rows])
        elif not is_max:
            cost *= num_rows
        if not is_max:
            batch.load_ms += cost
            batch.load_bytes += row_bytes * num_rows
            return
        if cost > batch.load_ms:
            batch.load_ms = cost
        if row_bytes > batch.load_bytes:
            batch.load_bytes = row_bytes

    def _rows_within(self, piece: Piece, most: int) -> int:
        """Rows from the front of a piece that the byte and cost budgets allow."""
        run = piece.run
        row_bytes = run.num_bytes // run.num_rows if run.block is not None else 0
        if row_bytes:
            most = min(most, max(self.bytes_left // row_bytes, 0))  # an idle worker may have got more than its credit
        if not self.is_cost_bounded:
            return most
        fitting, spent = 0, self.cost_ms
        for row in range(piece.start, piece.start + most):
            alone = row_ms(run.alone_ms, row)
            after = max(spent, alone) if self.queue.is_max else spent + alone
            if after > self.queue.max_batch_cost_ms and spent > 0.0:
                break  # but the first row of a batch always fits
            spent, fitting = after, fitting + 1
        self.cost_ms = spent
        return fitting


def row_ms(cost: Cost, row: int) -> float:
    return cost[row] if isinstance(cost, list) else cost


def in_order(lanes: Mapping[tuple[int, int], Lane], low: int, high: int) -> Iterator[Entry]:
    """The pieces of an account's lanes in a bin, class by class, the earliest time limit first.

    A lane is opened only when its first piece is due: a batch rarely gets to most of them.
    """
    opened = list[Opened]()
    for priority, first, entries in sorted(
        (p, lane.pieces[0], iter(lane.pieces)) for (c, p), lane in lanes.items() if low <= c < high
    ):
        yield from _merged(opened, priority, first)
        heappush(opened, (priority, next(entries), entries))
    yield from _merged(opened, NUM_PRIORITIES, None)


def _merged(opened: list[Opened], priority: int, first: Entry | None) -> Iterator[Entry]:
    """What is due before `first` in the lanes opened so far."""
    while opened and (first is None or opened[0][:2] < (priority, first)):
        least, entry, entries = opened[0]
        yield entry
        following = next(entries, None)
        if following is None:
            heappop(opened)
        else:
            heapreplace(opened, (least, following, entries))

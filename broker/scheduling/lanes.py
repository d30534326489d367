"""Where queued pieces wait: per batch key a queue, in it a lane per account, cell of predicted time, and class.

Knows order inside a lane and sums. Does not know who goes next.
"""

from typing import Any

from sortedcontainers import SortedList

from penstock.broker.scheduling.accounts import Account, Head
from penstock.broker.scheduling.bins import BinPlan, Histogram
from penstock.broker.scheduling.prediction import Estimate
from penstock.broker.spec import Cost, Spec
from penstock.broker.tasks import Piece

Kind = tuple[str, bytes, str]
"""(kernel, spec digest, mode): what a worker offers to run."""
Entry = tuple[float, int, int, int, Piece]
"""(time limit, seq of its run, first row when it was queued, a number of its own, piece): the order inside a lane."""
FIRST_SHARE = 0.125
MEMO_USES = 8
SMOOTHING = 0.1
LATE_FROM_S = 0.02
"""Waits much shorter than this are all the same."""
MIN_LATENESS, MAX_LATENESS = 1.2, 4.0


class Lane:
    """Pieces of one batch key, account, cell and class: earliest time limit first, then in order of arrival."""

    __slots__ = ("account", "cell", "num_rows", "pieces", "place", "priority", "queue")

    def __init__(self, queue: "BatchQueue", account: Account, cell: int, priority: int) -> None:
        self.queue = queue
        self.account = account
        self.cell = cell
        self.priority = priority
        self.num_rows = 0
        self.pieces: SortedList[Entry] = SortedList()
        self.place: Head | None = None


class Memo:
    """The last estimate of a queue, good for a few runs like it; none if its rows differ."""

    __slots__ = ("cost_ms", "guess", "is_known", "num_left", "row_bytes")

    def __init__(self, cost_ms: Cost, row_bytes: float, guess: Estimate, is_known: bool) -> None:
        self.cost_ms = cost_ms
        self.row_bytes = row_bytes
        self.guess = guess
        self.is_known = is_known
        self.num_left = 0 if isinstance(cost_ms, list) else MEMO_USES


class BatchQueue:
    """What waits under one batch key.

    `alone_ms` is the predicted time of its rows one by one; `share` the part of that which they take in full batches,
    measured; `lateness` how much longer than predicted rows wait, its q99. `cells` counts rows per cell.
    """

    __slots__ = (
        "_measured_ms", "_num_shares", "_predicted_ms", "alone_ms", "cells", "context", "histogram", "is_binned",
        "is_max", "key", "kind", "lanes", "lateness", "learned_at", "limit", "max_batch_cost_ms", "max_batch_size",
        "memo", "mode", "num_measured", "num_rows", "plan", "share", "spec",
    )  # fmt: skip

    def __init__(self, key: tuple[Any, ...], spec: Spec, mode: str, plan: BinPlan, context: bytes) -> None:
        self.key = key
        self.spec = spec
        self.mode = mode
        self.plan = plan
        self.context = context
        self.kind: Kind = (spec.name, spec.digest, mode)
        self.max_batch_size = 1 if mode == "stream" else spec.max_rows(key[4])
        self.max_batch_cost_ms = (spec.max_batch_cost_ms if mode == "batch" else None) or float("inf")
        self.is_max = spec.combine == "max"
        self.is_binned = mode == "batch"
        self.lanes: dict[Account, dict[tuple[int, int], Lane]] = {}
        self.cells: dict[int, int] = {}
        self.histogram: Histogram | None = None
        self.learned_at = float("-inf")
        self.num_rows = self.num_measured = self._num_shares = 0
        self.limit = self.max_batch_size
        self.memo: Memo | None = None
        self.lateness = MIN_LATENESS
        self._measured_ms = self._predicted_ms = 0.0
        self.alone_ms = 0.0
        self.share = FIRST_SHARE if self.is_max and self.max_batch_size > 1 else 1.0

    @property
    def statics(self) -> bytes:
        statics: bytes = self.key[3]
        return statics

    @property
    def work_ms(self) -> float:
        """Predicted device time of what waits here."""
        return self.alone_ms * self.share

    def learn_share(self, measured_ms: float, alone_ms: float) -> None:
        """A full batch of rows that take `alone_ms` one by one has taken so long."""
        self._num_shares += 1
        keep = 1.0 - max(SMOOTHING, 1.0 / self._num_shares)
        self._measured_ms = keep * self._measured_ms + measured_ms
        self._predicted_ms = keep * self._predicted_ms + alone_ms
        if self._predicted_ms > 0.0:
            self.share = self._measured_ms / self._predicted_ms

    def learn_lateness(self, waited_s: float, expected_s: float) -> None:
        """Rows began after this wait, or gave up, and had been expected to after that: track the q99 of the ratio."""
        ratio = (waited_s + LATE_FROM_S) / (expected_s + LATE_FROM_S)
        step = 0.99 * SMOOTHING if ratio > self.lateness else -0.01 * SMOOTHING
        self.lateness = min(max(self.lateness * (1.0 + step), MIN_LATENESS), MAX_LATENESS)

    def lane(self, account: Account, cell: int, priority: int) -> Lane:
        lanes = self.lanes.get(account)
        if lanes is None:
            lanes = self.lanes[account] = {}
        lane = lanes.get((cell, priority))
        if lane is None:
            lane = lanes[cell, priority] = Lane(self, account, cell, priority)
        return lane

    def forget(self, lane: Lane) -> None:
        """A lane without pieces."""
        lanes = self.lanes[lane.account]
        del lanes[lane.cell, lane.priority]
        if not lanes:
            del self.lanes[lane.account]

    def count(self, cell: int, num_rows: int, alone_ms: float) -> None:
        """So many rows more, or fewer, in a cell."""
        self.num_rows += num_rows
        self.alone_ms = self.alone_ms + alone_ms if self.num_rows else 0.0
        left = self.cells.get(cell, 0) + num_rows
        if left:
            self.cells[cell] = left
        else:
            del self.cells[cell]

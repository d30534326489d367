"""Where work waits: queues by batch key, in them lanes, and the sums that admission and estimates need.

Knows accounts, predicted times and cells. Does not know which lane goes next, workers or batches.
"""

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

from sortedcontainers import SortedList

from penstock.broker.scheduling.accounts import Account, Accounts
from penstock.broker.scheduling.bins import BinPlan, FixedGrid, Grid, LogGrid
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.lanes import BatchQueue, Kind, Lane, Memo
from penstock.broker.scheduling.prediction import Predictor
from penstock.broker.spec import Spec
from penstock.broker.tasks import Piece, Run

MIN_QUEUES = 1024
INF = float("inf")


class Queues:
    """All queued pieces. `work_ms` is the predicted device time of them, `alone_ms` what they would take one by one."""

    def __init__(self, config: SchedulingConfig, predictor: Predictor) -> None:
        self.config = config
        self.predictor = predictor
        self.accounts = Accounts()
        self.num_rows = 0
        self.work_ms = self.alone_ms = 0.0
        self.kind_rows: dict[Kind, int] = {}
        """Queued rows of each kind that has any, and their predicted device time."""
        self.kind_ms: dict[Kind, float] = {}
        self._grid: Grid = grid_of(config)
        self._first_plan = BinPlan(self._grid, config.max_bins)
        self._budgets_s = config.class_budgets_s()
        self._queues: dict[tuple[Any, ...], BatchQueue] = {}
        self._max_queues = MIN_QUEUES
        self._next_place = 0

    def queue(self, key: tuple[Any, ...], spec: Spec, mode: str) -> BatchQueue:
        """The queue of a batch key, made on first use."""
        found = self._queues.get(key)
        if found is None:
            if len(self._queues) >= self._max_queues:  # empty ones are kept for the next task, but not without end
                self._queues = {k: q for k, q in self._queues.items() if q.num_rows}
                self._max_queues = max(MIN_QUEUES, 2 * len(self._queues))
            context = hashlib.blake2b(repr(key[3:6]).encode(), digest_size=8).digest()
            found = self._queues[key] = BatchQueue(key, spec, mode, self._first_plan, context)
        return found

    def estimate(self, run: Run) -> None:
        """Predict how long each row of a run takes alone."""
        assert run.queue is not None
        queue = run.queue
        row_bytes, memo = run.num_bytes / run.num_rows, queue.memo
        if memo is not None and memo.num_left and memo.cost_ms == run.cost_ms and memo.row_bytes == row_bytes:
            memo.num_left -= 1
        else:
            guess = self.predictor.estimate(queue.spec.name, queue.context, run.cost_ms, row_bytes)
            memo = queue.memo = Memo(run.cost_ms, row_bytes, guess, self.predictor.is_known(queue.spec.name))
        run.alone_ms, run.is_known = memo.guess.mean_ms, memo.is_known
        # The same for all rows of a kernel, so it parts them no better; and as long as it is a guess it will change soon.
        run.spread = memo.guess.q95 if memo.is_known else 1.0

    def overdue_at(self, run: Run) -> float:
        """Until when a task of its class should be served; the order between classes."""
        return run.arrived + self._budgets_s[run.priority]

    def cuts(self, piece: Piece) -> list[int]:
        """The rows at which a piece must be cut before `push`, so that the rows of each part share a cell."""
        run = piece.run
        assert run.queue is not None
        if not isinstance(run.alone_ms, list) or not run.queue.is_binned:
            return []
        cell, spread = self._grid.cell, run.spread
        cells = [cell(ms * spread) for ms in run.alone_ms[piece.start : piece.stop]]
        if max(cells) == min(cells):
            return []
        return [piece.start + i for i in range(1, len(cells)) if cells[i] != cells[i - 1]]

    def push(self, piece: Piece) -> None:
        """Put a queued piece where its run's account, class, predicted time and deadline say."""
        run = piece.run
        assert run.queue is not None and piece.entry is None
        queue = run.queue = self._queues.setdefault(run.queue.key, run.queue)
        if queue.plan.grid is not self._grid:  # it was empty, and not kept, when the grid changed
            queue.plan, queue.histogram = self._first_plan, None
        piece.alone_ms, longest_ms = run.alone(piece.start, piece.stop)
        piece.cell = self._grid.cell(longest_ms * run.spread) if queue.is_binned else 0
        lane = queue.lane(run.account, piece.cell, run.priority)
        limit = run.deadline if run.deadline < INF else run.arrived + self.config.no_limit_s
        run.overdue_at = self.overdue_at(run)
        self._next_place += 1
        piece.entry = (limit, run.seq, piece.start, self._next_place, piece)
        piece.lane = lane
        lane.pieces.add(piece.entry)
        self._count(lane, piece.stop - piece.start, piece.alone_ms)
        if lane.pieces[0] is piece.entry:
            self._place(lane)

    def remove(self, piece: Piece) -> None:
        """Take a piece out, whatever its place."""
        lane = piece.lane
        assert lane is not None and piece.entry is not None
        was_head = lane.pieces[0] is piece.entry
        if was_head and len(lane.pieces) == 1:
            lane.pieces.clear()
        else:
            lane.pieces.remove(piece.entry)
        piece.entry = piece.lane = None
        self._count(lane, piece.start - piece.stop, -piece.alone_ms)
        if was_head:
            self._place(lane)

    def trim(self, piece: Piece, start: int, stop: int) -> None:
        """Shrink a queued piece to rows [start, stop), at the place it has."""
        lane = piece.lane
        assert lane is not None
        left_ms, _ = piece.run.alone(start, stop)
        self._count(lane, (stop - start) - piece.num_rows, left_ms - piece.alone_ms)
        piece.start, piece.stop, piece.alone_ms = start, stop, left_ms

    def _count(self, lane: Lane, num_rows: int, alone_ms: float) -> None:
        """So many rows more, or fewer, in a lane."""
        account, queue = lane.account, lane.queue
        before = account.num_rows
        account.num_rows = after = before + num_rows
        lane.num_rows += num_rows
        self.num_rows += num_rows
        queue.count(lane.cell, num_rows, alone_ms)
        self._count_kind(queue.kind, num_rows, alone_ms * queue.share)
        if self.num_rows:
            self.alone_ms += alone_ms
            self.work_ms += alone_ms * queue.share
            account.alone_ms = account.alone_ms + alone_ms if after else 0.0
        else:  # what is left is rounding
            self.alone_ms = self.work_ms = account.alone_ms = 0.0
        account.class_ms[lane.priority] = account.class_ms[lane.priority] + alone_ms if after else 0.0
        if before == 0:
            self.accounts.join(account)
        elif after == 0:
            self.accounts.leave(account)

    def _count_kind(self, kind: Kind, num_rows: int, work_ms: float) -> None:
        left = self.kind_rows.get(kind, 0) + num_rows
        if left:
            self.kind_rows[kind] = left
            self.kind_ms[kind] = self.kind_ms.get(kind, 0.0) + work_ms
        else:
            self.kind_rows.pop(kind, None)
            self.kind_ms.pop(kind, None)

    def _place(self, lane: Lane) -> None:
        """Keep the account's heads true after the head of a lane has changed."""
        heads = lane.account.heads.get(lane.queue.kind)
        if heads is None:
            heads = lane.account.heads[lane.queue.kind] = SortedList()
        if lane.place is not None:
            heads.remove(lane.place)
            lane.place = None
        if lane.pieces:
            _, seq, start, number, piece = lane.pieces[0]
            lane.place = (piece.run.overdue_at, seq, start, number, lane)
            heads.add(lane.place)
            return
        lane.queue.forget(lane)
        if not heads:
            del lane.account.heads[lane.queue.kind]

    def _take_out(self, lane: Lane, pieces: list[Piece]) -> None:
        """Take out pieces in the order of their lane, mostly its first ones."""
        num_pieces = len(pieces)
        if num_pieces == len(lane.pieces):
            lane.pieces.clear()
        elif lane.pieces[num_pieces - 1] is pieces[-1].entry:
            del lane.pieces[:num_pieces]
        else:  # a hopeless one is among them
            for piece in pieces:
                lane.pieces.remove(piece.entry)
        num_rows, alone_ms = 0, 0.0
        for piece in pieces:
            num_rows += piece.stop - piece.start
            alone_ms += piece.alone_ms
            piece.entry = piece.lane = None
        self._count(lane, -num_rows, -alone_ms)
        self._place(lane)

    def rebuild(self, config: SchedulingConfig) -> list[Piece]:
        """Go by another grid of cells; all pieces are taken out, to be cut and pushed again."""
        pieces = list(self.pieces())
        for piece in pieces:
            self.remove(piece)
        self._grid = grid_of(config)
        self._first_plan = BinPlan(self._grid, config.max_bins)
        for queue in self._queues.values():
            queue.plan, queue.histogram = self._first_plan, None
        return pieces

    def pieces(self) -> Iterator[Piece]:
        """Every queued piece, in no order."""
        for queue in self._queues.values():
            for lanes in queue.lanes.values():
                for lane in lanes.values():
                    for entry in lane.pieces:
                        yield entry[-1]

    def queues(self) -> Iterator[BatchQueue]:
        """The queues with work."""
        return (q for q in self._queues.values() if q.num_rows)

    def known_queues(self) -> Iterator[BatchQueue]:
        """All queues that are kept, empty ones too."""
        return iter(self._queues.values())

    def label(self, piece: Piece) -> str:
        """The bin of a queued piece, as bins are when there is enough work."""
        queue = piece.run.queue
        assert queue is not None
        return self._label(queue, piece.cell)

    def _label(self, queue: BatchQueue, cell: int) -> str:
        plan = queue.plan
        return plan.label(*plan.range(cell, plan.num_bins)) if queue.is_binned else "all"

    def stale(self, current: Collection[tuple[str, bytes]]) -> list[BatchQueue]:
        """Queues with work whose (kernel, digest) is not among the current ones."""
        return [q for q in self._queues.values() if q.num_rows and q.kind[:2] not in current]

    def check(self) -> None:
        """Every invariant of the queues; for tests."""
        total, per_account = 0, dict[Account, int]()
        for queue in self._queues.values():
            cells = dict[int, int]()
            for account, lanes in queue.lanes.items():
                for (cell, priority), lane in lanes.items():
                    pieces = [entry[-1] for entry in lane.pieces]
                    assert pieces and (lane.account, lane.cell, lane.priority, lane.queue) == (account, cell, priority, queue)
                    assert lane.num_rows == sum(p.num_rows for p in pieces)
                    for p in pieces:
                        assert p.lane is lane and p.entry is not None and p.num_rows > 0 and p.run.queue is queue
                    _, seq, start, number, first = lane.pieces[0]
                    assert lane.place == (first.run.overdue_at, seq, start, number, lane), (
                        "a head that is not the first piece's"
                    )
                    assert lane.place in account.heads[queue.kind], "a lane with work that no head leads to"
                    cells[cell] = cells.get(cell, 0) + lane.num_rows
                    per_account[account] = per_account.get(account, 0) + lane.num_rows
            assert queue.cells == cells and queue.num_rows == sum(cells.values())
            total += queue.num_rows
        assert total == self.num_rows == sum(self.kind_rows.values())
        assert all(a.num_rows == per_account.get(a, 0) for a in self.accounts)
        assert {entry[-1] for entry in self.accounts.backlogged} == set(per_account)
        assert sum(len(h) for a in self.accounts for h in a.heads.values()) == sum(
            len(lanes) for q in self._queues.values() for lanes in q.lanes.values()
        )
        assert abs(self.work_ms - sum(q.work_ms for q in self._queues.values())) < 1e-3 * (1.0 + self.work_ms)


def grid_of(config: SchedulingConfig) -> Grid:
    return LogGrid() if config.max_bins > 1 and not config.boundaries_ms else FixedGrid(config.boundaries_ms)

"""Which rows go next, and into which batch: pull batching per batch key by priority, then deadline, then arrival.

Knows queues and batch budgets. Does not know workers, leases or sessions: it is asked for a batch that fits an `Offer`.
Everything is O(log n) in the number of queued runs.
"""

from collections.abc import Collection
from typing import Any

from sortedcontainers import SortedList

from penstock.broker.columns import Block
from penstock.broker.spec import Cost, Spec
from penstock.broker.tasks import Piece
from penstock.broker.wire import record

MIN_QUEUES = 1024
UNBOUNDED = 1 << 62

Kind = tuple[str, bytes, str]
"""(kernel, spec digest, mode): what a worker offers to run."""


class BatchQueue:
    """Queued pieces of one batch key, most urgent first."""

    __slots__ = ("key", "kind", "max_batch_cost_ms", "max_batch_size", "mode", "num_rows", "pieces", "place", "spec")

    def __init__(self, key: tuple[Any, ...], spec: Spec, mode: str) -> None:
        self.key = key
        self.spec = spec
        self.mode = mode
        self.kind: Kind = (spec.name, spec.digest, mode)
        self.max_batch_size = 1 if mode == "stream" else spec.max_rows(key[4])
        self.max_batch_cost_ms = (spec.max_batch_cost_ms if mode == "batch" else None) or float("inf")
        self.pieces: SortedList[tuple[Any, ...]] = SortedList()
        self.num_rows = 0
        self.place: tuple[Any, ...] | None = None

    @property
    def statics(self) -> bytes:
        statics: bytes = self.key[3]
        return statics


@record
class Offer:
    """What a worker could take now: its kinds, whether batches fit its credit, and how many bytes do."""

    kinds: Collection[Kind]
    max_bytes: int
    is_idle: bool


class PullPolicy:
    """Queues of pieces by batch key. `push` and `remove` keep them; `take` forms a batch, late, for a worker that asks."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._queues: dict[tuple[Any, ...], BatchQueue] = {}
        self._heads: dict[Kind, SortedList[tuple[Any, ...]]] = {}
        self._next_place = 0
        self._max_queues = MIN_QUEUES

    def queue(self, key: tuple[Any, ...], spec: Spec, mode: str) -> BatchQueue:
        """The queue of a batch key, made on first use."""
        found = self._queues.get(key)
        if found is None:
            if len(self._queues) >= self._max_queues:
                self._forget_empty()
            found = self._queues[key] = BatchQueue(key, spec, mode)
        return found

    def _forget_empty(self) -> None:
        """Empty queues are kept for the next task of their key, but not without end."""
        self._queues = {k: q for k, q in self._queues.items() if q.pieces}
        self._heads = {k: h for k, h in self._heads.items() if h}
        self._max_queues = max(MIN_QUEUES, 2 * len(self._queues))

    def push(self, piece: Piece) -> None:
        """Put a queued piece where its run's priority, deadline and arrival say."""
        run = piece.run
        assert run.queue is not None and piece.entry is None
        queue = run.queue = self._queues.setdefault(run.queue.key, run.queue)
        self._next_place += 1
        piece.entry = (run.priority, run.deadline, run.seq, piece.start, self._next_place, piece)
        queue.pieces.add(piece.entry)
        self._count(queue, piece.num_rows)
        if queue.pieces[0] is piece.entry:
            self._place(queue)

    def remove(self, piece: Piece) -> None:
        """Take a piece out, whatever its place."""
        queue = piece.run.queue
        assert queue is not None and piece.entry is not None
        was_head = queue.pieces[0] is piece.entry
        queue.pieces.remove(piece.entry)
        piece.entry = None
        self._count(queue, -piece.num_rows)
        if was_head:
            self._place(queue)

    def trim(self, piece: Piece, start: int, stop: int) -> None:
        """Shrink a queued piece to rows [start, stop), at the place it has."""
        queue = piece.run.queue
        assert queue is not None and piece.entry is not None
        self._count(queue, (stop - start) - piece.num_rows)
        piece.start, piece.stop = start, stop

    def take(self, offer: Offer) -> tuple[BatchQueue, list[tuple[Piece, int]]] | None:
        """The next batch for a worker: (piece, number of rows from its front) of one queue, within every budget.

        The caller leases them with `remove` or `trim`.
        """
        best: tuple[Any, ...] | None = None
        for kind, heads in self._heads.items():
            if heads and kind in offer.kinds and (best is None or heads[0] < best):
                best = heads[0]
        if best is None:
            return None
        queue: BatchQueue = best[-1]
        picked = _fill(queue, offer)
        return (queue, picked) if picked else None

    def stale(self, current: Collection[tuple[str, bytes]]) -> list[BatchQueue]:
        """Queues with work whose (kernel, digest) is not among the current ones."""
        return [q for q in self._queues.values() if q.num_rows and q.kind[:2] not in current]

    def position(self, piece: Piece) -> int:
        """How many rows of the same batch key stand before this piece, at least."""
        queue = piece.run.queue
        return queue.pieces.index(piece.entry) if queue is not None and piece.entry is not None else 0

    def occupancy(self) -> list[dict[str, Any]]:
        """Queued rows per kernel and mode, for status."""
        rows: dict[tuple[str, str], list[int]] = {}
        for heads in self._heads.values():
            for entry in heads:
                queue = entry[-1]
                seen = rows.setdefault((queue.spec.name, queue.mode), [0, 0])
                seen[0] += queue.num_rows
                seen[1] += 1
        return [{"kernel": k, "mode": m, "queued": n, "batch_keys": q} for (k, m), (n, q) in sorted(rows.items())]

    def check(self) -> None:
        """Every invariant of the queues; for tests."""
        total = 0
        for queue in self._queues.values():
            pieces = [entry[-1] for entry in queue.pieces]
            assert all(p.entry is not None and p.run.queue is queue and p.num_rows > 0 for p in pieces)
            assert queue.num_rows == sum(p.num_rows for p in pieces)
            assert (queue.place is not None) == bool(pieces)
            if queue.place is not None:
                assert queue.place in self._heads[queue.kind]
                assert queue.place[:4] == queue.pieces[0][:4], "the head's place is not its most urgent piece's"
            total += queue.num_rows
        assert total == self.num_rows
        assert sum(map(len, self._heads.values())) == sum(bool(q.pieces) for q in self._queues.values())

    def _count(self, queue: BatchQueue, num_rows: int) -> None:
        queue.num_rows += num_rows
        self.num_rows += num_rows

    def _place(self, queue: BatchQueue) -> None:
        """Keep `_heads` true after the head of a queue has changed."""
        heads = self._heads.get(queue.kind)
        if heads is None:
            heads = self._heads[queue.kind] = SortedList()
        if queue.place is not None:
            heads.remove(queue.place)
            queue.place = None
        if queue.pieces:
            self._next_place += 1
            queue.place = (*queue.pieces[0][:4], self._next_place, queue)
            heads.add(queue.place)


def _fill(queue: BatchQueue, offer: Offer) -> list[tuple[Piece, int]]:
    """Rows from the head of one queue, in order, while the count, cost and byte budgets last; suspects stay alone."""
    picked = list[tuple[Piece, int]]()
    rows_left, cost = queue.max_batch_size, 0.0
    bytes_left = offer.max_bytes if queue.mode == "batch" else UNBOUNDED  # slots use no credit
    for entry in queue.pieces:
        piece: Piece = entry[-1]
        if piece.is_isolated and (picked or not offer.is_idle):
            break  # a suspect gets a worker to itself: only then does the worker's end tell whose fault it was
        most = min(rows_left, piece.num_rows)
        num_rows, cost, bytes_left = _rows_within(piece, most, queue, cost, bytes_left)
        if not picked and num_rows == 0 and offer.is_idle:
            return [(piece, 1)]  # past the credit all alone: it has to run some time
        if num_rows == 0:
            break
        picked.append((piece, num_rows))
        rows_left -= num_rows
        if rows_left == 0 or num_rows < piece.num_rows or piece.is_isolated:
            break
    return picked


def _rows_within(piece: Piece, most: int, queue: BatchQueue, cost: float, bytes_left: int) -> tuple[int, float, int]:
    """(rows of the piece that fit, the batch's cost with them, bytes left after them)."""
    run = piece.run
    budget, is_sum = queue.max_batch_cost_ms, queue.spec.combine == "sum"
    block: Block | None = run.block
    row_bytes = run.num_bytes // run.num_rows if block is not None else 0
    if row_bytes:
        most = min(most, max(bytes_left // row_bytes, 0))  # an idle worker may have got more than its credit
    if budget == float("inf"):
        return most, cost, bytes_left - most * row_bytes
    fitting = 0
    for row in range(piece.start, piece.start + most):
        alone = _row_cost(run.cost_ms, row)
        after = cost + alone if is_sum else max(cost, alone)
        if after > budget and cost > 0.0:
            break  # but the first row of a batch always fits
        cost, fitting = after, fitting + 1
    return fitting, cost, bytes_left - fitting * row_bytes


def _row_cost(cost: Cost, row: int) -> float:
    return cost[row] if isinstance(cost, list) else cost


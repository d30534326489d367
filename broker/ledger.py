"""The task table: every open run, its rows' states, leases and deadlines. The one place where a row changes state.

Knows what moves are legal and keeps the counts. Does not know who is told of an outcome, nor workers' credit.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from itertools import chain, pairwise

from sortedcontainers import SortedList

from penstock.broker.scheduling.batch import Batch
from penstock.broker.scheduling.lanes import BatchQueue
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.sessions import WorkerSession
from penstock.broker.tasks import LEASED, MOVES, QUEUED, Lease, Piece, Run, Saved

STORY_LENGTH = 2000
Parts = tuple[dict[bytes, Run], ...]


def _parts() -> Parts:
    """A table in 256 parts by the id's first byte: a dict of a million entries stops the loop whenever it grows."""
    return tuple({} for _ in range(256))


class IllegalMove(AssertionError):
    """A bug of ours: a move that `MOVES` does not have. Carries the task's history."""


class Ledger:
    """Open runs and leases.

    Args:
        epoch: of this broker; its leases never collide with another epoch's.
    """

    def __init__(self, policy: PullPolicy, epoch: int) -> None:
        self.policy = policy
        self.num_rows = {QUEUED: 0, LEASED: 0}
        self.num_open = self.open_bytes = self.saved_bytes = self.num_fleeting = 0
        """Rows, their bytes, those of checkpoints among them, and the submissions that are not durable: they end with us."""
        self.leases: dict[int, Lease] = {}
        self.outcomes = Counter[str]()
        self._runs: defaultdict[str, Parts] = defaultdict(_parts)
        self._deadlines: SortedList[tuple[float, int, Run]] = SortedList()
        self._story: deque[tuple[Run, int, int, str, str]] = deque(maxlen=STORY_LENGTH)
        self._next_token = epoch << 32

    # --- runs ------------------------------------------------------------------------------------------------------

    def find(self, principal: str, run_id: bytes) -> Run | None:
        return self._runs[principal][run_id[0]].get(run_id)

    def runs(self) -> Iterator[Run]:
        return chain.from_iterable(part.values() for parts in self._runs.values() for part in filter(None, parts))

    def runs_of(self, principal: str) -> Iterator[Run]:
        return chain.from_iterable(part.values() for part in self._runs.get(principal, ()))

    def open(self, run: Run) -> None:
        """Take in a new run; its rows are queued, in no queue yet."""
        self._runs[run.session.principal][run.id[0]][run.id] = run
        run.session.runs.add(run)
        self.num_rows[QUEUED] += run.num_open
        self.num_open += run.num_open
        self.num_fleeting += not run.is_durable
        self.open_bytes += run.num_bytes
        run.account.num_open += run.num_open
        run.account.open_bytes += run.num_bytes
        if run.deadline != float("inf"):
            self._deadlines.add((run.deadline, run.seq, run))

    def enqueue(self, run: Run, queue: BatchQueue) -> None:
        """Put what is queued of a run into a queue, in pieces of about equal predicted time."""
        run.queue = queue
        for piece in list(run.pieces):
            if piece.state == QUEUED:
                self.push(piece)

    def push(self, piece: Piece) -> None:
        """Put a piece where the policy wants it, cut as the policy wants it."""
        parts = [piece, *(piece.split(at) for at in reversed(self.policy.cuts(piece)))]
        for part in sorted(parts, key=_start) if len(parts) > 1 else parts:
            self.policy.push(part)

    def next_deadline(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None

    def overdue(self, now: float) -> Run | None:
        """A run whose deadline has come, the earliest first."""
        return self._deadlines[0][2] if self._deadlines and self._deadlines[0][0] <= now else None

    # --- moves -----------------------------------------------------------------------------------------------------

    def move(self, piece: Piece, state: str) -> None:
        """The only assignment to `Piece.state`."""
        old = piece.state
        if state not in MOVES[old]:
            story = [f"[{s},{e}) {a}->{b}" for run, s, e, a, b in self._story if run is piece.run]
            raise IllegalMove(f"{piece.run.id.hex()} [{piece.start},{piece.stop}) {piece.state}->{state}; {'; '.join(story)}")
        num_rows = piece.stop - piece.start
        self._story.append((piece.run, piece.start, piece.stop, old, state))
        self.num_rows[old] -= num_rows
        if state in MOVES:
            self.num_rows[state] += num_rows
        piece.state = state

    def lease(self, batch: Batch, worker: WorkerSession, now: float) -> Lease:
        """Give the rows of a batch to a worker."""
        pieces: list[Piece] = []
        num_bytes = 0
        for piece, num_rows in batch.picked:
            num_bytes += num_rows * (piece.run.num_bytes // piece.run.num_rows)
            if piece.entry is not None:  # only its first rows were picked
                rest, piece = piece, Piece(piece.run, piece.start - num_rows, piece.start)
                piece.deaths, piece.is_isolated = rest.deaths, rest.is_isolated
                rest.run.pieces.append(piece)
            pieces.append(piece)
        self._next_token += 1
        lease = Lease(self._next_token, worker, batch, pieces, now)
        batch.picked = []
        lease.num_bytes = num_bytes
        for piece in pieces:
            self.move(piece, LEASED)
            piece.lease = lease
        self.leases[lease.token] = lease
        worker.hold(lease)
        return lease

    def close(self, lease: Lease) -> None:
        """The lease is over: answered in full, or lost."""
        del self.leases[lease.token]
        lease.worker.give_up(lease)
        for piece in lease.pieces:
            piece.lease = None
        lease.pieces = []
        lease.lent = None

    def requeue(self, piece: Piece) -> None:
        """A leased piece goes back to its queue."""
        self.move(piece, QUEUED)
        piece.lease = None
        self.policy.push(piece)

    def save(self, piece: Piece, saved: Saved | None) -> None:
        """The only assignment to `Piece.saved`. Its bytes count as the run's own do, until its row ends."""
        num_more = (saved.block.nbytes if saved else 0) - (piece.saved.block.nbytes if piece.saved else 0)
        self.saved_bytes += num_more
        self.open_bytes += num_more
        piece.run.account.open_bytes += num_more
        piece.saved = saved

    def end(self, piece: Piece, start: int, stop: int, state: str) -> None:
        """Rows [start, stop) of a piece have their outcome."""
        if start > piece.start and stop < piece.stop:
            self._cut(piece, stop)
        if start > piece.start:
            piece = self._cut(piece, start)
        elif stop < piece.stop:
            self._cut(piece, stop)
        if piece.entry is not None:
            self.policy.remove(piece)
        if piece.saved is not None:
            self.save(piece, None)
        self.move(piece, state)
        run = piece.run
        run.pieces.remove(piece)
        run.num_open -= piece.num_rows
        self.num_open -= piece.num_rows
        run.account.num_open -= piece.num_rows
        self.outcomes[state] += piece.num_rows
        if run.num_open == 0:
            self._forget(run)

    def _cut(self, piece: Piece, at: int) -> Piece:
        """Split a piece in its place, queued or leased; the tail comes back."""
        if piece.entry is None:
            return piece.split(at)
        stop = piece.stop
        self.policy.trim(piece, piece.start, at)
        tail = Piece(piece.run, at, stop)
        tail.deaths, tail.is_isolated = piece.deaths, piece.is_isolated
        piece.run.pieces.append(tail)
        self.policy.push(tail)
        return tail

    def _forget(self, run: Run) -> None:
        del self._runs[run.session.principal][run.id[0]][run.id]
        run.session.runs.remove(run)
        self.open_bytes -= run.num_bytes
        self.num_fleeting -= not run.is_durable
        run.account.open_bytes -= run.num_bytes
        if run.deadline != float("inf"):
            self._deadlines.remove((run.deadline, run.seq, run))
        run.release()

    # --- invariants ------------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Every invariant of the table; tests call it after every event."""
        counts = Counter[str]()
        num_bytes = saved_bytes = 0
        for run in self.runs():
            rows = sorted((p.start, p.stop) for p in run.pieces)
            assert all(a[1] <= b[0] for a, b in pairwise(rows)), "pieces overlap"
            assert sum(b - a for a, b in rows) == run.num_open > 0, "a row without piece or outcome"
            assert run.deadline > now, "an open task past its deadline"
            assert self.find(run.session.principal, run.id) is run
            num_bytes += run.num_bytes
            for piece in run.pieces:
                assert piece.run is run and piece.state in MOVES
                counts[piece.state] += piece.num_rows
                if piece.saved is not None:
                    assert piece.num_rows == 1, "rows with one checkpoint"
                    saved_bytes += piece.saved.block.nbytes
                is_leased = piece.state == LEASED
                assert (piece.lease is not None) == is_leased and not (is_leased and piece.entry)
                if piece.lease is not None:
                    assert piece in piece.lease.pieces and self.leases[piece.lease.token] is piece.lease
        assert counts == Counter(self.num_rows) and sum(counts.values()) == self.num_open, "queued + leased = open"
        assert saved_bytes == self.saved_bytes and num_bytes + saved_bytes == self.open_bytes
        assert self.num_fleeting == sum(not r.is_durable for r in self.runs())
        assert len(self._deadlines) == sum(r.deadline != float("inf") for r in self.runs())
        for lease in self.leases.values():
            assert lease.worker.leases[lease.token] is lease
            for queue in (p.run.queue for p in lease.pieces if p.state == LEASED):  # rebound since, or of one key
                if queue is not None and queue.spec is lease.queue.spec:
                    assert queue.key == lease.queue.key, "keys mixed"
        self.policy.check()


def _start(piece: Piece) -> int:
    return piece.start

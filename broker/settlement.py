"""Rows that end together: closing them one by one, and cutting their common answer to what each client is told.

Knows credit, idempotency keys and runs that share an answer. Does not know addresses, nor why the rows ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from penstock.broker.columns import Block, gather
from penstock.broker.fitting import MAX_PORTION_BYTES, SPAN_BYTES, row_bytes
from penstock.broker.journal import Entry
from penstock.broker.protocol import Outcome
from penstock.broker.sessions import ClientSession
from penstock.broker.state import BrokerState
from penstock.broker.tasks import CANCELLED, EXPIRED, Piece, Run
from penstock.broker.wire import MAX_ROWS

Span = tuple[bytes, int, int, int, float]
"""(run, start, stop, first row in the answer, milliseconds in the queue)."""
UNKNOWN = "unknown"


class Settlement:
    """Closes rows one by one and gathers what each session will be told."""

    def __init__(self, state: BrokerState, outcome: str, answer: Outcome, now: float) -> None:
        self.num_rows = 0
        self.spans: dict[ClientSession, list[Span]] = {}
        self.finished: dict[ClientSession, dict[bytes, Entry | None]] = {}
        """Submissions of which that was the last, and whose outcomes the session has then, if they are kept for it."""
        self.durable: set[ClientSession] = set()
        """Sessions that are told of a durable task's outcome."""
        self._state = state
        self._outcome = outcome
        self._answer = answer
        self._now = now

    def end(self, piece: Piece, start: int, stop: int, at: int) -> None:
        """Close rows, and with them those of the runs that follow theirs."""
        run, num_rows = piece.run, stop - start
        session, followers, entry = run.session, run.followers, run.entry
        has_all = entry is not None and (entry.run is run or not run.has_own_end)
        assigned_at = self._now if piece.lease is None else piece.lease.assigned_at
        span = (run.id, start, stop, at, 1000.0 * (assigned_at - run.arrived))
        self._count(run, num_rows, assigned_at, is_leased=piece.lease is not None)
        if piece.saved is not None:
            self._state.journal.unsave(piece.saved)
        self._state.ledger.end(piece, start, stop, self._outcome)
        self.num_rows += num_rows
        spans = self.spans.get(session)
        if spans is None:
            self.spans[session] = [span]
        else:
            spans.append(span)
        session.returned_rows += num_rows
        if entry is not None:
            self._note(run, entry, span)
        if run.num_open == 0:
            session.returned_bytes += run.num_bytes
            self.finished.setdefault(session, {})[run.id] = entry if has_all and entry is not None and entry.number else None
        if followers:
            self._pass_on(list(followers), start, stop, at, is_final=bool(run.number))

    def _count(self, run: Run, num_rows: int, assigned_at: float, is_leased: bool) -> None:
        metrics, arrived = self._state.metrics, run.arrived
        queue_s = assigned_at - arrived if is_leased else None
        kernel = run.kernel if run.queue is not None else UNKNOWN  # what nobody offers is a name that a client made up
        metrics.rows_ended(kernel, self._outcome, run.session.name, num_rows, self._now - arrived, queue_s)
        if self._outcome == CANCELLED:
            metrics.cancelled("running" if is_leased else "queued", num_rows)
        elif self._outcome == EXPIRED:
            metrics.deadline_missed("running" if is_leased else "queued", num_rows)

    def _note(self, run: Run, entry: Entry, span: Span) -> None:
        """Remember the outcome of rows that were the first with their key."""
        if entry.number:
            self.durable.add(run.session)
        if entry.run is not run:
            if run.num_open == 0:
                run.unfollow()
            return
        journal = self._state.journal
        if self._outcome in (CANCELLED, EXPIRED) and not run.number:
            journal.forget(run)
            return
        outcome = self.outcome([span])
        if outcome.block is not None and outcome.block.has_shared:  # a worker lends it for a moment, not for the window
            outcome = replace(outcome, block=outcome.block.copied())
        journal.record(run, [outcome], self._now)
        if run.num_open == 0:
            journal.close(run, self._now)

    def _pass_on(self, followers: Sequence[Run], start: int, stop: int, at: int, is_final: bool) -> None:
        """Runs with the same idempotency key wait for these rows: they share an answer. `is_final`: and an end without one.

        A durable task is one task, whoever submitted it. What is not goes on alone where the first was cancelled or expired.
        """
        if self._outcome in (CANCELLED, EXPIRED) and not is_final:
            for follower in followers:
                follower.unfollow()
                self._state.kernels.park(follower)  # until the turn, if the kernel is there
            return
        for follower in followers:
            for piece in follower.overlapping(start, stop):
                first = max(start, piece.start)
                self.end(piece, first, min(stop, piece.stop), at + first - start)

    def portions(self, spans: list[Span]) -> Iterator[list[Span]]:
        """The spans in portions whose outcome fits a header, and a block; mostly just one."""
        per_row = row_bytes(self._answer.block)
        if self.num_rows <= MAX_ROWS and SPAN_BYTES * len(spans) + per_row * self.num_rows <= MAX_PORTION_BYTES:
            yield spans
            return
        portion, num_rows, num_bytes = list[Span](), 0, 0
        for run_id, start, stop, at, queue_ms in spans:
            while start < stop:
                room = MAX_PORTION_BYTES - num_bytes - SPAN_BYTES
                fitting = min(stop - start, MAX_ROWS - num_rows, room // per_row if per_row else MAX_ROWS * (room > 0))
                if fitting <= 0:
                    yield portion
                    portion, num_rows, num_bytes = [], 0, 0
                    continue
                portion.append((run_id, start, start + fitting, at, queue_ms))
                num_rows, num_bytes = num_rows + fitting, num_bytes + SPAN_BYTES + fitting * per_row
                start, at = start + fitting, at + fitting
        yield portion

    def outcome(self, spans: Sequence[Span]) -> Outcome:
        """The answer, cut to the rows of these spans."""
        answer = self._answer
        block = answer.block
        if block is not None:
            block = gather(_joined([(block, at, at + stop - start) for _, start, stop, at, _ in spans]))
        rows, queue_ms = [span[:3] for span in spans], [span[4] for span in spans]
        return Outcome(rows, block, answer.error, queue_ms, answer.timings, answer.part, answer.attempt)


def _joined(pieces: list[tuple[Block, int, int]]) -> list[tuple[Block, int, int]]:
    """Neighbouring ranges of a block as one, so that a block taken whole is handed on as it came."""
    joined = [pieces[0]]
    for block, start, stop in pieces[1:]:
        last = joined[-1]
        if last[2] == start:
            joined[-1] = (block, last[1], stop)
        else:
            joined.append((block, start, stop))
    return joined

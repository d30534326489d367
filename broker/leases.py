"""Leases: what is sent with one, what becomes of its answers, and of its rows when they do not come.

Knows the fence, redelivery and what makes a task dead. Does not know sessions, credit, nor who gets a batch next.
"""

from collections.abc import Sequence
from typing import Any

from penstock.broker.checkpoints import Checkpoints
from penstock.broker.clients import Clients
from penstock.broker.columns import Block, any_shared, gather
from penstock.broker.dispatch import Dispatch
from penstock.broker.protocol import (
    Answer,
    Assign,
    CancelLease,
    Checkpoint,
    Code,
    Error,
    Outcome,
    WorkerFinal,
    WorkerPartial,
)
from penstock.broker.sessions import WorkerSession
from penstock.broker.sharing import Unshared
from penstock.broker.spec import Spec
from penstock.broker.state import BACK, BrokerState
from penstock.broker.tasks import DEAD, DONE, FAILED, LEASED, Lease, Piece

TOLD_MS = 100.0
"""What is predicted to take less is not worth telling: a worker grants every batch seconds."""
MAX_PREDICTED_MS = 1e12


class Leases:
    """All leases, from their assignment to their last row."""

    def __init__(self, state: BrokerState, clients: Clients) -> None:
        self.state = state
        self.dispatch: Dispatch
        """Is told what becomes of leases; set by whoever made both."""
        self._absent, self._outcomes = clients.absent, clients.outcomes
        self._checkpoints = Checkpoints(state)

    def assign(self, lease: Lease) -> None:
        """Send a lease to its worker."""
        queue, first, worker = lease.queue, lease.pieces[0].run, lease.worker
        if not queue.spec.is_idempotent:
            for piece in lease.pieces:
                self.state.journal.started(piece)
        blocks = _blocks(lease.pieces)
        if any_shared(blocks):
            blocks = self.state.sharing.readable_batch(blocks, worker)
            lease.lent = [b for b in blocks if b.has_shared]
        saved = self._checkpoints.of(lease) if lease.mode == "stream" else None
        assign = Assign(
            lease=lease.token, kernel=queue.spec.name, digest=queue.spec.digest, mode=lease.mode, statics=queue.statics,
            blocks=blocks, scalars=_scalars(lease.pieces), attempt=lease.attempt,
            principal=first.session.principal if queue.spec.is_scoped else "", traceparent=first.traceparent,
            is_unshared=worker.sharer is not None and not _is_readable(lease.pieces, worker),
            predicted_ms=min(lease.batch.predicted_ms, MAX_PREDICTED_MS) if lease.batch.predicted_ms > TOLD_MS else 0.0,
            checkpoint=None if saved is None else saved.block, part=0 if saved is None else saved.part,
        )  # fmt: skip
        # What must not run twice leaves only when it is on disk that it may have run.
        may_not_start_twice = not queue.spec.is_idempotent and any(piece.run.number for piece in lease.pieces)
        self.state.send(BACK, worker.route, assign, is_promise=may_not_start_twice)

    def cancel(self, lease: Lease) -> None:
        """Tell the worker that nobody waits for this lease."""
        self.state.send(BACK, lease.worker.route, CancelLease(lease=lease.token))

    def _find(self, worker: WorkerSession, token: int) -> Lease | None:
        lease = worker.leases.get(token)
        if lease is None:
            self.state.counters["late_answers"] += 1
        return lease

    def final(self, worker: WorkerSession, m: WorkerFinal, now: float) -> None:
        """Answers to rows of a lease."""
        answers = self._adopt(worker, m.answers)
        lease = self._find(worker, m.lease)
        if lease is None:
            return
        worker.progress_at = now
        timings = {**m.timings, "batch_size": lease.num_rows, "bin": lease.batch.label, "worker": worker.name}
        for answer in answers:
            if answer.error is not None and answer.error.code == Code.UNSHARED:
                lease.is_unshared = True
            else:
                self._answer(lease, answer, timings, now)
            lease.num_answered += answer.stop - answer.start
        if lease.num_answered >= lease.num_rows:
            held = [p for p in lease.pieces if p.state == LEASED]
            self.state.ledger.close(lease)
            self.dispatch.completed(lease, m.timings, now)
            if held and lease.is_unshared:
                self._share_no_more(worker, held, lease.queue.spec, now)
            elif held:  # the worker counted some rows twice and left others out
                self._leave_out(held, lease.queue.spec, now)

    def _adopt(self, worker: WorkerSession, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Take what a worker answers in its memory on loan; what cannot be read there counts as not answered."""
        if not any_shared([a.block for a in answers]):
            return answers
        adopted = list[Answer]()
        for answer in answers:
            if answer.block is not None:
                try:
                    self.state.sharing.adopt(worker, [answer.block], self.state.config)
                except Unshared as e:
                    answer = Answer(answer.start, answer.stop, error=Error(Code.UNSHARED, str(e)))
            adopted.append(answer)
        return adopted

    def _share_no_more(self, worker: WorkerSession, pieces: list[Piece], spec: Spec, now: float) -> None:
        """Worker and broker cannot read each other's memory after all: the rows go again, from now on in frames."""
        if worker.sharer is not None:
            worker.sharer.is_on = False
        self.state.counters["workers_unshared"] += 1
        if not spec.is_idempotent:
            self._leave_out(pieces, spec, now)
            return
        for piece in pieces:
            self.state.ledger.requeue(piece)
        self.rebind(now)

    def _leave_out(self, pieces: list[Piece], spec: Spec, now: float) -> None:
        """A worker says that it is done with a lease, but these rows have no answer."""
        self.state.counters["unanswered"] += sum(p.num_rows for p in pieces)
        if not spec.is_idempotent:
            text = f"the worker left it out of its answer; {spec.name!r} is not idempotent, so it was not run again"
            self._end(pieces, FAILED, Error(Code.WORKER_LOST, text), now)
            return
        for piece in pieces:
            piece.deaths += 1
            self.state.journal.died(piece)
            piece.run.expected_s = None
            if piece.deaths < self.state.config.max_attempts:
                self.state.ledger.requeue(piece)
            else:
                text = f"{piece.deaths} times the worker left it out of its answer"
                self._end([piece], FAILED, Error(Code.FAILED, text), now)
        self.rebind(now)

    def _answer(self, lease: Lease, answer: Answer, timings: dict[str, Any], now: float) -> None:
        ends = list[tuple[Piece, int, int, int]]()
        for piece, first, last in lease.overlapping(answer.start, answer.stop):
            start, stop = max(first, answer.start), min(last, answer.stop)
            if piece.state != LEASED:
                self.state.counters["late_answers"] += stop - start
                continue
            ends.append((piece, piece.start + start - first, piece.start + stop - first, start - answer.start))
        if not ends:
            return
        num_rows = sum(stop - start for _, start, stop, _ in ends)
        if answer.error is None:
            lease.worker.num_done += num_rows
        else:
            lease.worker.num_failed += num_rows
            lease.num_failed += num_rows if answer.error.code == Code.FAILED else 0
        outcome = Outcome((), answer.block, answer.error, (), timings, attempt=lease.attempt)
        self._outcomes.settle(ends, DONE if answer.error is None else FAILED, outcome, now)

    def partial(self, worker: WorkerSession, m: WorkerPartial, now: float) -> None:
        """A piece of a streaming answer."""
        if any_shared([m.block]):
            try:
                self.state.sharing.adopt(worker, [m.block], self.state.config)
            except Unshared:
                return  # its final brings it once more
        lease = self._find(worker, m.lease)
        if lease is None or m.block.num_rows != 1:
            return
        worker.progress_at = now
        piece = lease.pieces[0]
        if piece.state != LEASED:
            self.state.counters["late_answers"] += 1
            return
        span = (piece.run.id, piece.start, piece.start + 1)
        self._outcomes.deliver_partial(piece, Outcome([span], m.block, part=m.part, attempt=lease.attempt))

    def checkpoint(self, worker: WorkerSession, m: Checkpoint, now: float) -> None:
        """What a streaming row can go on from, whatever becomes of its worker."""
        lease = worker.leases.get(m.lease)
        if lease is None:
            self.state.counters["late_checkpoints"] += 1
        else:
            self._checkpoints.keep(lease, m, now)

    def recover(
        self, lease: Lease, reason: str, now: float, is_suspect: bool, is_alone: bool = False, may_have_begun: bool = True
    ) -> None:
        """A lease will not be answered. Suspects return in halves and alone, so that one that kills is found."""
        pieces = [p for p in lease.pieces if p.state == LEASED]
        self.state.ledger.close(lease)
        self.dispatch.abandoned(lease)
        if not pieces:
            return
        num_rows = sum(p.num_rows for p in pieces)
        if not lease.queue.spec.is_idempotent and may_have_begun:
            text = f"{reason}; {lease.queue.spec.name!r} is not idempotent, so it was not run again"
            self._end(pieces, FAILED, Error(Code.WORKER_LOST, text), now)
            return
        # Not the last one left of a batch: what was cancelled or ran out of time while it was held ran as well.
        if is_suspect and is_alone and num_rows == 1 and lease.num_rows - lease.num_answered <= 1:
            suspect = pieces[0]
            suspect.deaths += 1
            suspect.evidence = (*suspect.evidence, _evidence(suspect, lease, reason, now))
            if suspect.deaths >= self.state.config.max_attempts:
                text = f"{suspect.deaths} workers were lost while running this task alone"
                self._end(pieces, DEAD, Error(Code.DEAD, text, detail="\n".join(suspect.evidence)), now)
                return
        half = (num_rows + 1) // 2
        for piece in pieces:
            self.state.counters["redelivered"] += piece.num_rows
            piece.run.expected_s = None  # nobody foresaw this
            parts = [piece]
            if is_suspect:
                piece.is_isolated = True
                if piece.num_rows > half:  # whoever shares a batch with others' rows is halved with it, not after it
                    parts.append(piece.split(piece.start + half))
            for part in parts:
                if is_suspect:
                    self.state.journal.died(part)
                self.state.ledger.requeue(part)

    def _end(self, pieces: list[Piece], state: str, error: Error, now: float) -> None:
        self._outcomes.end_pieces([(p, p.start, p.stop) for p in pieces], state, error, now)

    def rebind(self, now: float) -> None:
        """Move what waits for a version that nobody offers any more to the current one."""
        for queue in self.state.policy.stale(self.state.kernels.current()):
            runs = {entry[-1].run: None for lanes in queue.lanes.values() for lane in lanes.values() for entry in lane.pieces}
            self._absent.bind_late(list(runs), now)


def _is_readable(pieces: Sequence[Piece], worker: WorkerSession) -> bool:
    """Whether everybody who waits for these rows can read this worker's memory."""
    if worker.sharer is None or not worker.sharer.is_on:
        return False
    for piece in pieces:
        session = piece.run.session
        if session.sharer is None or not session.sharer.is_on or session.principal != worker.principal:
            return False
    return True


def _evidence(suspect: Piece, lease: Lease, reason: str, now: float) -> str:
    """One line about a worker's end: when, after how long with the task, which one, and why."""
    age_s, held_s = now - suspect.run.arrived, now - lease.assigned_at
    worker = f"pid {lease.worker.pid}, {lease.worker.device}"
    return f"{age_s:.1f} s after the task was taken, {held_s:.1f} s after it was assigned: {reason} ({worker})"


def _blocks(pieces: Sequence[Piece]) -> list[Block]:
    """The pieces' rows, joined where their columns are equal."""
    groups = list[list[tuple[Block, int, int]]]()
    for piece in pieces:
        block = piece.run.block
        assert block is not None
        if not groups or groups[-1][0][0].columns != block.columns:
            groups.append([])
        groups[-1].append((block, piece.start, piece.stop))
    return [gather(group) for group in groups]


def _scalars(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Row scalars over the whole batch: one number when all rows have it, else one per row."""
    names = pieces[0].run.scalars
    made = dict[str, Any]()
    for name in names:
        values = [p.run.scalars[name] for p in pieces]
        if not isinstance(values[0], list) and all(v == values[0] for v in values):
            made[name] = values[0]
            continue
        rows = made[name] = []
        for piece, value in zip(pieces, values, strict=True):
            rows += value[piece.start : piece.stop] if isinstance(value, list) else [value] * piece.num_rows
    return made

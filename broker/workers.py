"""The worker side of the core: sessions, credit, leases and their answers, and workers that vanish.

Knows what a worker holds and when it is lost. Does not know who gets a batch next, nor how clients are told.
"""

from collections.abc import Collection, Sequence
from typing import Any

from penstock.broker.clients import Clients
from penstock.broker.columns import Block, any_shared, gather
from penstock.broker.dispatch import Dispatch
from penstock.broker.protocol import (
    Answer,
    Assign,
    CancelLease,
    Code,
    Drain,
    Error,
    Fault,
    Goodbye,
    Heartbeat,
    Outcome,
    Pull,
    Ready,
    Resident,
    Share,
    Welcome,
    WorkerFinal,
    WorkerHeartbeat,
    WorkerHello,
    WorkerPartial,
)
from penstock.broker.sessions import Route, WorkerSession
from penstock.broker.sharing import Unshared
from penstock.broker.spec import Spec, parse
from penstock.broker.state import BACK, BrokerState
from penstock.broker.tasks import DEAD, DONE, FAILED, LEASED, Lease, Piece
from penstock.broker.wire import Message

TOLD_MS = 100.0
"""What is predicted to take less is not worth telling: a worker grants every batch seconds."""
MAX_PREDICTED_MS = 1e12


class Workers:
    """All worker sessions and their leases."""

    def __init__(self, state: BrokerState, clients: Clients) -> None:
        self.state = state
        self.by_route: dict[Route, WorkerSession] = {}
        self.by_secret = state.workers
        self.changed_at = state.started_at
        self.dispatch: Dispatch
        """Is told what becomes of leases; set by whoever made both."""
        self._clients = clients

    # --- messages --------------------------------------------------------------------------------------------------

    def receive(self, route: Route, principal: str, m: Message, now: float, pid: int = 0) -> None:
        """Act on one message from the back socket. `pid` is the peer's process as the kernel knows it, or 0."""
        if isinstance(m, WorkerHello):
            self._enter(route, principal, m, now, pid)
            return
        if isinstance(m, WorkerHeartbeat):
            self._heartbeat(route, principal, m, now)
            return
        worker = self.by_route.get(route)
        if worker is None or (principal and principal != worker.principal):
            self.state.counters["unattached"] += 1
            self._send_unattached(route)
            return
        worker.last_seen = now
        match m:
            case WorkerFinal():
                self._final(worker, m, now)
            case WorkerPartial():
                self._partial(worker, m, now)
            case Pull():
                self._grant(worker, m.credit)
            case Ready():
                self._ready(worker, m, now)
            case Resident():
                worker.resident[m.kernel] = m.state
                if m.state == "ready":
                    self.state.metrics.loaded(m.kernel, m.load_ms)
                worker.progress_at = now
            case Drain():
                self.drain(worker)
            case Share():
                self.state.sharing.share(worker, m, pid)
            case Goodbye():
                self.lose(worker, m.reason or "it said goodbye", now, is_suspect=m.is_fault)

    def _send_unattached(self, route: Route) -> None:
        error = Error(Code.UNATTACHED, "this address has no worker session: say hello, then ready")
        self.state.send(BACK, route, Fault(error=error))

    # --- sessions --------------------------------------------------------------------------------------------------

    def _enter(self, route: Route, principal: str, m: WorkerHello, now: float, pid: int) -> None:
        worker = self.by_secret.get(m.secret)
        is_resumed = worker is not None and worker.principal == principal
        if worker is None or not is_resumed:
            if worker is not None or len(self.by_secret) >= self.state.config.max_workers:
                error = Error(Code.OVERLOADED, f"the broker has {len(self.by_secret)} workers, or this secret is another's")
                self.state.send(BACK, route, Fault(error=error))
                return
            worker = self.by_secret[m.secret] = WorkerSession(principal, self._free_name(m.name), m.secret, route, now)
            self.changed_at = now
        self.lose_route(route)  # whoever was at this address is not there any more
        if worker.route is not None:
            self.lose_route(worker.route)
        worker.route, worker.last_seen, worker.progress_at = route, now, now
        worker.pid, worker.device, worker.is_ready = pid or m.pid, m.device, False
        self.by_route[route] = worker
        config = self.state.config
        shared = self.state.sharing.offer(worker, config, pid)
        welcome = Welcome(epoch=self.state.epoch, heartbeat_ms=config.heartbeat_ms, is_resumed=is_resumed, shared=shared)
        self.state.send(BACK, route, welcome)

    def _free_name(self, wanted: str) -> str:
        taken = {w.name for w in self.by_secret.values()}
        names = (wanted if n == 1 else f"{wanted[:58]}-{n}" for n in range(1, len(taken) + 2))
        return next(n for n in names if n not in taken)

    def _ready(self, worker: WorkerSession, m: Ready, now: float) -> None:
        specs = [parse(wire) for wire in m.specs]
        held = set(m.leases)
        lost = [lease for token, lease in worker.leases.items() if token not in held]
        for lease in lost:
            self.state.counters["leases_lost_on_the_way"] += 1
            self._recover(lease, f"worker {worker.name} reconnected without it", now, is_suspect=False)
        worker.turn_to_next(now)
        worker.assigned_batches, worker.assigned_bytes = worker.batches, 0
        worker.credit_batches, worker.credit_bytes = m.credit
        worker.facts, worker.resident = m.device, {k: str(v) for k, v in m.resident.items()}
        worker.device = str(m.device.get("device", worker.device))[:64]
        worker.is_ready = True
        self.dispatch.arrived(worker, now)
        self.state.kernels.offer(worker, specs)
        for spec in specs:
            self._clients.bind_late(self.state.kernels.unpark(spec.name), now)
        self.rebind(now)

    def rebind(self, now: float) -> None:
        """Move what waits for a version that nobody offers any more to the current one."""
        for queue in self.state.policy.stale(self.state.kernels.current()):
            runs = {entry[-1].run: None for lanes in queue.lanes.values() for lane in lanes.values() for entry in lane.pieces}
            self._clients.bind_late(list(runs), now)

    def _heartbeat(self, route: Route, principal: str, m: WorkerHeartbeat, now: float) -> None:
        worker = self.by_secret.get(m.session)
        if worker is None or worker.principal != principal or worker.route is None:
            self._send_unattached(route)
            return
        worker.last_seen, worker.memory = now, m.memory
        if m.progress != worker.progress:
            worker.progress, worker.progress_at = m.progress, now
        self.state.send(BACK, route, Heartbeat())

    def drain(self, worker: WorkerSession) -> None:
        """Assign nothing more, and say so."""
        worker.is_draining = True
        self.state.send(BACK, worker.route, Drain())

    def lose_route(self, route: Route) -> None:
        """The address is gone; the session has until its liveness ends to come back."""
        worker = self.by_route.pop(route, None)
        if worker is not None:
            worker.route = None

    def lose_process(self, pid: int, now: float) -> None:
        """The kernel says that this process has ended."""
        for worker in [w for w in self.by_secret.values() if w.pid == pid]:
            self.lose(worker, f"its process {pid} has ended", now)

    def lose(self, worker: WorkerSession, reason: str, now: float, is_suspect: bool = True) -> None:
        """The session is over; its leases return."""
        del self.by_secret[worker.secret]
        if worker.route is not None:
            self.by_route.pop(worker.route, None)
        worker.route = None
        self.state.sharing.leave(worker)
        self.changed_at = now
        self.state.counters["workers_lost" if is_suspect else "workers_left"] += 1
        self.state.kernels.withdraw(worker)
        self.dispatch.left(worker)
        is_alone = len(worker.leases) == 1
        for lease in list(worker.leases.values()):
            self._recover(lease, f"worker {worker.name}: {reason}", now, is_suspect, is_alone)
        self.rebind(now)

    def expel(self, principals: Collection[str], now: float) -> None:
        """Their keys are allowed no more: what they hold goes to others."""
        for worker in [w for w in self.by_secret.values() if w.principal in principals]:
            self.state.counters["expelled"] += 1
            error = Error(Code.NOT_AUTHORISED, "this key is not allowed any more")
            self.state.send(BACK, worker.route, Fault(error=error))
            self.lose(worker, "its key was revoked", now, is_suspect=False)

    def sweep(self, now: float) -> None:
        """Lose workers that are silent, or that hold work and make no progress."""
        config = self.state.config
        for worker in list(self.by_secret.values()):
            if now - worker.last_seen > config.liveness_s:
                self.lose(worker, f"silent for {now - worker.last_seen:.1f} s", now)
            elif worker.leases and now - worker.progress_at > config.progress_s:
                self.lose(worker, f"no progress for {now - worker.progress_at:.0f} s", now)

    def forgive(self, pause_s: float, now: float) -> None:
        """The broker itself stood still: nobody else is to blame for it."""
        for worker in self.by_secret.values():
            worker.last_seen = min(worker.last_seen + pause_s, now)
            worker.progress_at = min(worker.progress_at + pause_s, now)

    # --- leases ----------------------------------------------------------------------------------------------------

    def _grant(self, worker: WorkerSession, credit: Sequence[int]) -> None:
        worker.credit_batches = max(worker.credit_batches, credit[0])
        worker.credit_bytes = max(worker.credit_bytes, credit[1])

    def assign(self, lease: Lease) -> None:
        """Send a lease to its worker."""
        for piece in lease.pieces:
            self.state.journal.started(piece)
        queue, first, worker = lease.queue, lease.pieces[0].run, lease.worker
        blocks = _blocks(lease.pieces)
        if any_shared(blocks):
            blocks = self.state.sharing.readable_batch(blocks, worker)
            lease.lent = [b for b in blocks if b.has_shared]
        assign = Assign(
            lease=lease.token, kernel=queue.spec.name, digest=queue.spec.digest, mode=lease.mode, statics=queue.statics,
            blocks=blocks, scalars=_scalars(lease.pieces), attempt=lease.attempt,
            principal=first.session.principal if queue.spec.is_scoped else "", traceparent=first.traceparent,
            is_unshared=worker.sharer is not None and not _is_readable(lease.pieces, worker),
            predicted_ms=min(lease.batch.predicted_ms, MAX_PREDICTED_MS) if lease.batch.predicted_ms > TOLD_MS else 0.0,
        )  # fmt: skip
        # What must not run twice leaves only when it is on disk that it may have run.
        is_promise = not queue.spec.is_idempotent and any(piece.run.number for piece in lease.pieces)
        self.state.send(BACK, worker.route, assign, is_promise)

    def cancel(self, lease: Lease) -> None:
        """Tell the worker that nobody waits for this lease."""
        self.state.send(BACK, lease.worker.route, CancelLease(lease=lease.token))

    def _find(self, worker: WorkerSession, token: int) -> Lease | None:
        lease = worker.leases.get(token)
        if lease is None:
            self.state.counters["late_answers"] += 1
        return lease

    def _final(self, worker: WorkerSession, m: WorkerFinal, now: float) -> None:
        self._grant(worker, m.credit)
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
        self._clients.settle(ends, DONE if answer.error is None else FAILED, outcome, now)

    def _partial(self, worker: WorkerSession, m: WorkerPartial, now: float) -> None:
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
        self._clients.deliver_partial(piece, Outcome([span], m.block, part=m.part, attempt=lease.attempt))

    def _recover(self, lease: Lease, reason: str, now: float, is_suspect: bool, is_alone: bool = False) -> None:
        """A lease will not be answered. Suspects return in halves and alone, so that one that kills is found."""
        pieces = [p for p in lease.pieces if p.state == LEASED]
        self.state.ledger.close(lease)
        self.dispatch.abandoned(lease)
        if not pieces:
            return
        num_rows = sum(p.num_rows for p in pieces)
        if not lease.queue.spec.is_idempotent:  # whoever held it may have begun, however politely it left
            text = f"{reason}; {lease.queue.spec.name!r} is not idempotent, so it was not run again"
            self._end(pieces, FAILED, Error(Code.WORKER_LOST, text), now)
            return
        # Not the last one left of a batch: what was cancelled or ran out of time while it was held ran as well.
        if is_suspect and is_alone and lease.num_rows - lease.num_answered <= 1:
            suspect = pieces[0]
            suspect.deaths += 1
            suspect.evidence = (*suspect.evidence, _evidence(suspect, lease, reason, now))
            self.state.journal.died(suspect)
            if suspect.deaths >= self.state.config.max_attempts:
                text = f"{suspect.deaths} workers were lost while running this task alone"
                self._end(pieces, DEAD, Error(Code.DEAD, text, detail="\n".join(suspect.evidence)), now)
                return
        for piece in pieces:
            self.state.counters["redelivered"] += piece.num_rows
            piece.run.expected_s = None  # nobody foresaw this
            if is_suspect:
                piece.is_isolated = True
            if is_suspect and piece.num_rows == num_rows > 1:
                self.state.ledger.requeue(piece.split(piece.start + num_rows // 2))
            self.state.ledger.requeue(piece)

    def _end(self, pieces: list[Piece], state: str, error: Error, now: float) -> None:
        self._clients.end_pieces([(p, p.start, p.stop) for p in pieces], state, error, now)

    def report(self) -> list[dict[str, Any]]:
        """One row per worker, for status."""
        return [
            {
                "name": w.name, "pid": w.pid, "device": w.device, "state": w.state, "leases": len(w.leases),
                "done": w.num_done, "failed": w.num_failed, "memory": dict(w.memory), "resident": dict(w.resident),
                "kernels": sorted({name for name, _ in w.specs}),
            }
            for w in sorted(self.by_secret.values(), key=lambda w: w.name)
        ]  # fmt: skip


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

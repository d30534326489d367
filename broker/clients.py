"""The client side of the core: sessions, admission, outcomes.

Knows what a client may do and what it is told. Does not know how batches are made or who runs them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgpack

from penstock.broker.columns import view
from penstock.broker.journal import Entry, digest_of
from penstock.broker.protocol import (
    ID_BYTES,
    Accepted,
    Ack,
    Attach,
    Cancel,
    Code,
    Control,
    Error,
    Fault,
    Goodbye,
    Heartbeat,
    Hello,
    Outcome,
    Refused,
    Reply,
    Status,
    Submit,
    Welcome,
)
from penstock.broker.sessions import ClientSession, Route
from penstock.broker.settlement import Settlement, Span
from penstock.broker.spec import InputError
from penstock.broker.state import FRONT, BrokerState
from penstock.broker.tasks import CANCELLED, DONE, EXPIRED, FAILED, LEASED, QUEUED, Lease, Piece, Run
from penstock.broker.wire import Message

MAX_CLOSED_PER_TURN = 500
MAX_REPORT_BYTES = 60 * 1024
MAX_REPLAYED = 32
"""Remembered outcomes per message: each has a header of its own."""


class Refusal(Exception):
    """A submission is not taken; the error travels."""

    def __init__(self, code: str, message: str, retry_after_ms: float | None = None) -> None:
        super().__init__(message)
        self.error = Error(code, message, retry_after_ms)


class Clients:
    """All client sessions.

    Args:
        on_unwanted: called with a lease when nobody waits for any of its rows any more.
        is_settled: whether no kernel is still to be expected; then an unknown one is refused.
        report: the body of a `status` reply; control: performs an operator's wish.
    """

    def __init__(
        self,
        state: BrokerState,
        on_unwanted: Callable[[Lease], None],
        is_settled: Callable[[float], bool],
        report: Callable[[float], dict[str, Any]],
        control: Callable[[str, str], Error | None],
    ) -> None:
        self.state = state
        self.by_route: dict[Route, ClientSession] = {}
        self._by_secret: dict[tuple[str, bytes], ClientSession] = {}
        self._closing: deque[ClientSession] = deque()
        self._next_seq = 0
        self._now = 0.0
        self._on_unwanted = on_unwanted
        self._is_settled = is_settled
        self._report = report
        self._control = control

    def __len__(self) -> int:
        return len(self._by_secret)

    # --- messages --------------------------------------------------------------------------------------------------

    def receive(self, route: Route, principal: str, m: Message, now: float) -> None:
        """Act on one message from the front socket."""
        if isinstance(m, Hello | Attach):
            self._enter(route, principal, m, now)
            return
        session = self.by_route.get(route)
        if session is None:
            self.state.counters["unattached"] += 1
            self._send_fault(route, Code.UNATTACHED, "this address has no session: say hello, or attach")
            return
        session.last_seen = self._now = now
        match m:
            case Submit():
                self._submit(session, m, now)
            case Heartbeat():
                session.acknowledge(m.ack)
                self.state.send(FRONT, route, Heartbeat())
            case Ack():
                session.acknowledge(m.seq)
            case Cancel():
                self._cancel(session, m, now)
            case Status():
                self._answer_status(session, m, now)
            case Control():
                error = self._control(m.op, m.target)
                self.state.send(FRONT, route, Reply(request=m.request, error=error))
            case Goodbye():
                self._leave(session)

    def _send_fault(self, route: Route, code: str, text: str) -> None:
        self.state.send(FRONT, route, Fault(error=Error(code, text)))

    # --- sessions --------------------------------------------------------------------------------------------------

    def _enter(self, route: Route, principal: str, m: Hello | Attach, now: float) -> None:
        key = (principal, m.secret)
        session = self._by_secret.get(key)
        if session is None and len(self._by_secret) >= self.state.config.max_clients:
            self.state.counters["refused_sessions"] += 1
            self._send_fault(route, Code.OVERLOADED, f"the broker has {len(self._by_secret)} clients, which is its limit")
            return
        is_resumed = session is not None and (isinstance(m, Hello) or m.epoch == self.state.epoch)
        if session is None:
            session = self._by_secret[key] = ClientSession(principal, m.name, m.secret, route, now)
        self.lose_route(route)  # whoever was at this address is not there any more
        if session.route is not None:
            self.lose_route(session.route)
        session.route, session.last_seen = route, now
        self.by_route[route] = session
        unknown = self._unknown(session, m.open) if isinstance(m, Attach) else b""
        config = self.state.config
        limits = {
            "max_rows_per_run": config.max_rows_per_run, "max_message_bytes": config.max_message_bytes,
            "window_rows": config.window_rows, "window_bytes": config.window_bytes,
        }  # fmt: skip
        welcome = Welcome(
            epoch=self.state.epoch, heartbeat_ms=config.heartbeat_ms, is_resumed=is_resumed, limits=limits,
            credit=self._credit(session), unknown=unknown,
        )  # fmt: skip
        self.state.send(FRONT, route, welcome)
        if isinstance(m, Attach):
            session.acknowledge(m.received if is_resumed else 0)
            for message in session.outbox:
                self.state.send(FRONT, route, message)

    def _unknown(self, session: ClientSession, open_ids: bytes) -> bytes:
        ids = [open_ids[i : i + ID_BYTES] for i in range(0, len(open_ids), ID_BYTES)]
        return b"".join(i for i in ids if self._find(session, i) is None and i not in session.finished)

    def _find(self, session: ClientSession, run_id: bytes) -> Run | None:
        """An open run, if it is this session's."""
        run = self.state.ledger.find(session.principal, run_id)
        return run if run is not None and run.session is session else None

    def lose_route(self, route: Route) -> None:
        """The address is gone; the session waits for an attach."""
        session = self.by_route.pop(route, None)
        if session is not None:
            session.leave_route()

    def _leave(self, session: ClientSession) -> None:
        """The session ends; its open runs are cancelled a few per turn."""
        del self._by_secret[session.principal, session.secret]
        if session.route is not None:
            del self.by_route[session.route]
        session.route = None
        session.is_closed = True
        session.outbox.clear()
        self._closing.append(session)

    def forgive(self, pause_s: float, now: float) -> None:
        """The broker itself stood still: nobody else is to blame for it."""
        for session in self._by_secret.values():
            session.last_seen = min(session.last_seen + pause_s, now)

    def sweep(self, now: float) -> None:
        """Drop silent sessions, and go on with closing those that ended."""
        ttl_s = self.state.config.session_ttl_s
        for session in [s for s in self._by_secret.values() if now - s.last_seen > ttl_s]:
            self.state.counters["lost_clients"] += 1
            self._leave(session)

    def close_some(self, now: float) -> None:
        """Cancel what clients that left had open, up to a bound per turn."""
        budget = MAX_CLOSED_PER_TURN
        while self._closing and budget > 0:
            session = self._closing[0]
            if not session.runs:
                self._closing.popleft()
                continue
            budget -= 1
            run = next(iter(session.runs))
            self.end_run(run, CANCELLED, Error(Code.CANCELLED, "the client left"), now)

    @property
    def is_closing(self) -> bool:
        return bool(self._closing)

    # --- admission -------------------------------------------------------------------------------------------------

    def _credit(self, session: ClientSession) -> tuple[int, int]:
        config = self.state.config
        return session.returned_rows + config.window_rows, session.returned_bytes + config.window_bytes

    def _submit(self, session: ClientSession, m: Submit, now: float) -> None:
        session.acknowledge(m.ack)
        num_rows, num_bytes = m.block.num_rows, m.block.nbytes
        try:
            if self._is_repeat(session, m):
                return
            self._admit(session, m, num_rows, num_bytes)
            entry = self._remembered(session, m, now)
            if entry is not None and entry.run is None:
                self._replay(session, m, entry, num_rows, num_bytes)
                return
            run = self._open(session, m, num_bytes, now)
        except Refusal as refusal:
            self.state.counters[f"refused_{refusal.error.code}"] += 1
            self.state.send(FRONT, session.route, Refused(id=m.id, error=refusal.error))
            return
        if entry is not None and entry.run is not None:
            entry.run.followers = [*(entry.run.followers or ()), run]
        elif run.queue is None:
            self.state.kernels.park(run)
        else:
            self.state.ledger.enqueue(run, run.queue)
        self.state.counters["accepted"] += num_rows
        if m.wants_accepted:
            self.state.send(FRONT, session.route, Accepted(id=m.id))
        if entry is not None and entry.run is not None:
            self._catch_up(run, entry, now)

    def _catch_up(self, follower: Run, entry: Entry, now: float) -> None:
        """Give a run the outcomes that its twin, still open, has had already."""
        for outcome in list(entry.outcomes):
            for _, start, stop in outcome.spans:
                ends = [(p, s, e, s - start) for p, s, e in _within(follower, start, stop)]
                self.settle(ends, DONE if outcome.error is None else FAILED, outcome, now)

    def _is_repeat(self, session: ClientSession, m: Submit) -> bool:
        """The same id again: nothing to do if it is the same submission."""
        run = self.state.ledger.find(session.principal, m.id)
        if run is None and m.id not in session.finished:
            return False
        if run is not None and (run.session is not session or not _is_same(run.request, m)):
            raise Refusal(Code.CONFLICT, "this id belongs to another submission: draw 16 random bytes for each")
        self.state.counters["repeated"] += 1
        if run is None:
            seq = session.finished[m.id]
            for message in session.outbox:
                if message.seq == seq:
                    self.state.send(FRONT, session.route, message)
        elif m.wants_accepted:
            self.state.send(FRONT, session.route, Accepted(id=m.id))
        return True

    def _admit(self, session: ClientSession, m: Submit, num_rows: int, num_bytes: int) -> None:
        config, ledger = self.state.config, self.state.ledger
        if self.state.is_draining:
            raise Refusal(Code.UNAVAILABLE, "the broker is stopping")
        if m.is_durable and not self.state.journal.is_durable:
            raise Refusal(Code.INVALID, "this broker keeps its tasks in memory: submit with durable=False")
        if not 1 <= num_rows <= config.max_rows_per_run:
            raise Refusal(Code.INVALID, f"a run has 1 to {config.max_rows_per_run} rows, not {num_rows}")
        if m.timeout_ms is not None and m.timeout_ms <= 0:
            raise Refusal(Code.DEADLINE, "the time limit was over before the task arrived")
        if num_bytes > min(config.window_bytes, config.max_queue_bytes):
            most = min(config.window_bytes, config.max_queue_bytes)
            raise Refusal(Code.INVALID, f"{num_bytes:,} payload bytes are too large: this broker takes at most {most:,}")
        window_rows, window_bytes = self._credit(session)
        if session.used_rows + num_rows > window_rows or session.used_bytes + num_bytes > window_bytes:
            raise self._overloaded("the session's credit is used up", num_rows)
        if session.num_unacked_bytes > config.max_result_bytes:
            raise self._overloaded("the session's results wait for its acknowledgement", num_rows)
        if ledger.num_open + num_rows > config.max_queue_rows:
            raise self._overloaded(f"the queue is full ({config.max_queue_rows} tasks)", num_rows)
        if ledger.open_bytes + num_bytes > config.max_queue_bytes:
            raise self._overloaded(f"the queue is full ({config.max_queue_bytes >> 20} MiB)", num_rows)

    def _overloaded(self, reason: str, num_rows: int) -> Refusal:
        """With the time in which as many rows ended lately."""
        per_s = self.state.finish_rate.at(self._now)
        retry_ms = 1000.0 * num_rows / per_s if per_s > 0 else 1000.0
        return Refusal(Code.OVERLOADED, reason, min(max(retry_ms, 20.0), 30_000.0))

    def _remembered(self, session: ClientSession, m: Submit, now: float) -> Entry | None:
        """What the journal has under the idempotency key."""
        if m.key is None:
            return None
        entry = self.state.journal.find(session.principal, m.key, now)
        if entry is None:
            return None
        if entry.digest != digest_of(m):
            raise Refusal(Code.CONFLICT, "this idempotency key was used with other content")
        if entry.is_gone:
            raise Refusal(Code.RESULT_GONE, "this submission was done; its result is no longer kept")
        return entry

    def _open(self, session: ClientSession, m: Submit, num_bytes: int, now: float) -> Run:
        """Make the run, bound to its kernel unless that is still to come."""
        kernel = self.state.kernels.known.get(m.kernel)
        if kernel is None and self._is_settled(now):
            known = ", ".join(sorted(self.state.kernels.known)) or "none: no worker has come yet"
            raise Refusal(Code.UNKNOWN_KERNEL, f"no worker offers {m.kernel!r}; known kernels: {known}")
        self._next_seq += 1
        run = Run(session, m.id, m.kernel, m.block.num_rows, self._next_seq, now)
        run.priority, run.scalars, run.traceparent = m.priority, m.scalars, m.traceparent
        run.wants_partials, run.key, run.request, run.num_bytes = m.wants_partials, m.key, m, num_bytes
        if m.timeout_ms is not None:
            run.deadline = now + m.timeout_ms / 1000.0
        if kernel is not None:
            try:
                self.bind(run)
            except Refusal:
                run.release()  # run and pieces know each other, and nobody collects cycles here
                raise
        session.used_rows += run.num_rows
        session.used_bytes += num_bytes
        self.state.ledger.open(run)
        if m.key is not None and self.state.journal.find(session.principal, m.key, now) is None:
            self.state.journal.accept(session.principal, m.key, digest_of(m), run)
        return run

    def bind(self, run: Run) -> None:
        """Give a run its batch key under the current version of its kernel.

        Raises:
            Refusal: the kernel does not take it.
        """
        spec = self.state.kernels.known[run.kernel]
        m: Submit = run.request
        if m.is_again and not spec.is_idempotent:
            raise Refusal(Code.UNAVAILABLE, f"{run.kernel!r} may have started under an earlier broker and is not idempotent")
        try:
            binding = spec.bind(m, run.session.principal)
        except InputError as e:
            raise Refusal(Code.INVALID, str(e)) from e
        run.block, run.cost_ms = binding.block, binding.cost_ms
        run.queue = self.state.policy.queue(binding.key, spec, binding.mode)

    def bind_late(self, runs: Iterable[Run], now: float) -> None:
        """Bind runs that are open already, because their kernel came or changed; what it does not take ends here."""
        for run in runs:
            if not run.num_open:  # it shared the outcome of one before it
                continue
            queued = [p for p in run.pieces if p.state == QUEUED]
            for piece in queued:
                if piece.entry is not None:
                    self.state.policy.remove(piece)
            try:
                self.bind(run)
            except Refusal as refusal:
                self.end_pieces([(p, p.start, p.stop) for p in queued], "failed", refusal.error, now)
                continue
            for piece in queued:
                self.state.policy.push(piece)

    def _replay(self, session: ClientSession, m: Submit, entry: Entry, num_rows: int, num_bytes: int) -> None:
        """Answer a submission whose twin is over with the twin's outcomes."""
        session.used_rows += num_rows
        session.used_bytes += num_bytes
        self._give_back(session, num_rows, num_bytes)
        if m.wants_accepted:
            self.state.send(FRONT, session.route, Accepted(id=m.id))
        outcomes = [replace(o, spans=[(m.id, s, e) for _, s, e in o.spans]) for o in entry.outcomes]
        for at in range(0, len(outcomes), MAX_REPLAYED):
            self._deliver(session, outcomes[at : at + MAX_REPLAYED], [m.id])
        self.state.counters["replayed"] += num_rows

    def _give_back(self, session: ClientSession, num_rows: int, num_bytes: int) -> None:
        session.returned_rows += num_rows
        session.returned_bytes += num_bytes

    # --- outcomes --------------------------------------------------------------------------------------------------

    def _cancel(self, session: ClientSession, m: Cancel, now: float) -> None:
        run = self._find(session, m.id)
        if run is None:
            self.state.counters["cancelled_too_late"] += 1
            return
        error = Error(Code.CANCELLED, "cancelled by its client")
        self.end_pieces(_within(run, m.start, m.stop), CANCELLED, error, now)

    def expire(self, now: float) -> None:
        """End runs whose deadline has come, up to a bound per turn."""
        for _ in range(MAX_CLOSED_PER_TURN):
            run = self.state.ledger.overdue(now)
            if run is None:
                return
            has_started = any(p.state == LEASED for p in run.pieces)
            text = "the time limit was over while it was " + ("running" if has_started else "waiting")
            self.end_run(run, EXPIRED, Error(Code.DEADLINE, text), now)

    def end_run(self, run: Run, state: str, error: Error, now: float) -> None:
        """Give every row of a run that has no outcome yet this one."""
        self.end_pieces(_within(run, 0, run.num_rows), state, error, now)

    def end_pieces(self, ends: Sequence[tuple[Piece, int, int]], state: str, error: Error, now: float) -> None:
        self.settle([(p, s, e, 0) for p, s, e in ends], state, Outcome((), error=error), now)

    def settle(self, ends: Sequence[tuple[Piece, int, int, int]], state: str, answer: Outcome, now: float) -> None:
        """Rows have their outcome: close them, return credit, tell their clients.

        Args:
            ends: (piece, start, stop, first row in the answer's block).
            answer: what the outcomes have in common; its spans are filled in here.
        """
        unwanted: list[Lease] = []
        if state in (CANCELLED, EXPIRED):
            unwanted = list({p.lease: None for p, *_ in ends if p.lease is not None})
        settlement = Settlement(self.state, state, answer, now)
        for piece, start, stop, at in ends:
            settlement.end(piece, start, stop, at)
        self.state.finish_rate.add(settlement.num_rows, now)
        for session, spans in settlement.spans.items():
            if not session.is_closed:
                finished = settlement.finished.get(session, ())
                for portion in settlement.portions(spans):
                    self._deliver(session, [settlement.outcome(portion)], _among(finished, portion, spans))
        for lease in unwanted:
            if not lease.is_cancelled and not any(p.state == LEASED for p in lease.pieces):
                lease.is_cancelled = True
                self._on_unwanted(lease)

    def _deliver(self, session: ClientSession, outcomes: Sequence[Outcome], finished: Iterable[bytes]) -> None:
        results = session.add_result(outcomes, self._credit(session))
        for run_id in finished:
            session.finished[run_id] = results.seq
        self.state.send(FRONT, session.route, results)

    def deliver_partial(self, piece: Piece, outcome: Outcome) -> None:
        """A piece of a streaming answer, if its client wants them."""
        session = piece.run.session
        if piece.run.wants_partials and not session.is_closed:
            partial = session.add_partial(outcome)
            if partial is not None:
                self.state.send(FRONT, session.route, partial)

    # --- status ----------------------------------------------------------------------------------------------------

    def _answer_status(self, session: ClientSession, m: Status, now: float) -> None:
        body = _fitting(self._report(now)) if m.id is None else self._task_report(session, m.id, now)
        self.state.send(FRONT, session.route, Reply(request=m.request, body=body))

    def _task_report(self, session: ClientSession, run_id: bytes, now: float) -> dict[str, Any]:
        run = self._find(session, run_id)
        if run is None:
            return {"state": "finished" if run_id in session.finished else "unknown"}
        queued = [p for p in run.pieces if p.state == QUEUED]
        leased = sum(p.num_rows for p in run.pieces if p.state == LEASED)
        ahead = self.state.policy.position(min(queued, key=lambda p: p.start)) if queued else 0
        return {
            "state": "running" if leased else "queued", "kernel": run.kernel, "rows": run.num_rows, "leased": leased,
            "queued": sum(p.num_rows for p in queued), "done": run.num_rows - run.num_open, "ahead": ahead,
            "age_ms": 1000.0 * (now - run.arrived), "priority": run.priority,
            "workers": sorted({p.lease.worker.name for p in run.pieces if p.lease is not None}),
            "is_waiting_for_kernel": run.queue is None,
        }  # fmt: skip


def _among(finished: Sequence[bytes], portion: list[Span], spans: list[Span]) -> Iterable[bytes]:
    """The finished runs of which this portion tells."""
    if len(portion) == len(spans):
        return finished
    told = {span[0] for span in portion}
    return [run_id for run_id in finished if run_id in told]


def _fitting(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its longest parts, by name in `left_out`, where they do not fit a message."""
    left_out = list[str]()
    for part in ("kernels", "workers", "queues", "counters"):
        if len(msgpack.packb(report)) <= MAX_REPORT_BYTES:
            break
        left_out.append(part)
        report = {**report, part: type(report[part])(), "left_out": left_out}
    return report


def _within(run: Run, start: int, stop: int) -> list[tuple[Piece, int, int]]:
    return [(p, max(start, p.start), min(stop, p.stop)) for p in run.overlapping(start, stop)]


def _is_same(first: Submit, again: Submit) -> bool:
    """Whether two submissions under one id are the same, byte for byte."""
    a, b = first.block, again.block
    return (
        (first.kernel, first.statics, first.scalars, a.columns, a.num_rows)
        == (again.kernel, again.statics, again.scalars, b.columns, b.num_rows)
        and list(a.lengths) == list(b.lengths)
        and all(view(x) == view(y) for x, y in zip(a.frames, b.frames, strict=True))
    )

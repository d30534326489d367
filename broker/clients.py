"""The client side of the core: sessions, submissions, outcomes.

Knows what a client may do and what it is told. Does not know how batches are made or who runs them.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from penstock.broker import reports
from penstock.broker.admission import Admission, Refusal, is_same
from penstock.broker.durable import DurableJournal
from penstock.broker.jobs import OPS, Jobs
from penstock.broker.journal import Entry
from penstock.broker.kept import Kept
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
    Fetch,
    Goodbye,
    Heartbeat,
    Hello,
    Outcome,
    Partial,
    Refused,
    Reply,
    Results,
    Share,
    Status,
    Submit,
    Welcome,
)
from penstock.broker.scheduling.accounts import Account
from penstock.broker.sessions import ClientSession, Route
from penstock.broker.settlement import Settlement, Span
from penstock.broker.sharing import Unshared
from penstock.broker.state import FRONT, BrokerState
from penstock.broker.tasks import CANCELLED, DONE, EXPIRED, FAILED, LEASED, QUEUED, Lease, Piece, Run
from penstock.broker.wire import Message

MAX_CLOSED_PER_TURN = 250
MAX_REPLAYED = 32
"""Remembered outcomes per message: each has a header of its own."""


class Clients:
    """All client sessions.

    Args:
        on_unwanted: called with a lease when nobody waits for any of its rows any more.
        is_settled: whether no kernel is still to be expected; then an unknown one is refused.
        report: the body of a `status` reply; control: performs an operator's wish, given who asks.
        may_operate: whether a principal may act on the broker as a whole.
    """

    def __init__(
        self,
        state: BrokerState,
        on_unwanted: Callable[[Lease], None],
        is_settled: Callable[[float], bool],
        report: Callable[[float], dict[str, Any]],
        control: Callable[[str, str, str, float], Error | None],
        may_operate: Callable[[str], bool] = lambda principal: False,
    ) -> None:
        self.state = state
        self.by_route: dict[Route, ClientSession] = {}
        self._by_secret: dict[tuple[str, bytes], ClientSession] = {}
        self._closing: deque[ClientSession] = deque()
        self._absent: dict[tuple[str, str], ClientSession] = {}
        self._on_unwanted = on_unwanted
        self._admission = Admission(state, is_settled)
        self.jobs = Jobs(state, self, self._admission, may_operate)
        self._report = report
        self._control = control

    def __len__(self) -> int:
        return len(self._by_secret)

    def sessions(self) -> Iterable[ClientSession]:
        return self._by_secret.values()

    # --- messages --------------------------------------------------------------------------------------------------

    def receive(self, route: Route, principal: str, m: Message, now: float, pid: int = 0) -> None:
        """Act on one message from the front socket. `pid` is the peer's process as the kernel knows it, or 0."""
        if isinstance(m, Hello | Attach):
            self._enter(route, principal, m, now, pid)
            return
        session = self.by_route.get(route)
        if session is None or (principal and principal != session.principal):
            self.state.counters["unattached"] += 1
            self._send_fault(route, Code.UNATTACHED, "this address has no session: say hello, or attach")
            return
        session.last_seen = now
        match m:
            case Submit():
                self._submit(session, m, now)
            case Heartbeat():
                self._acknowledge(session, m.ack, now)
                self.state.send(FRONT, route, Heartbeat())
            case Ack():
                self._acknowledge(session, m.seq, now)
            case Cancel():
                self._cancel(session, m, now)
            case Status():
                self._answer_status(session, m, now)
            case Fetch():
                self.jobs.receive(session, m, now)
            case Control() if m.op in OPS:
                self.jobs.receive(session, m, now)
            case Control():
                error = self._control(session.principal, m.op, m.target, now)
                self.state.send(FRONT, route, Reply(request=m.request, error=error))
            case Share():
                self.state.sharing.share(session, m, pid)
            case Goodbye():
                self._leave(session)

    def _send_fault(self, route: Route, code: str, text: str) -> None:
        self.state.send(FRONT, route, Fault(error=Error(code, text)))

    # --- sessions --------------------------------------------------------------------------------------------------

    def _enter(self, route: Route, principal: str, m: Hello | Attach, now: float, pid: int) -> None:
        key = (principal, m.secret)
        session = self._by_secret.get(key)
        if session is None and len(self._by_secret) >= self.state.config.max_clients:
            self.state.counters["refused_sessions"] += 1
            self._send_fault(route, Code.OVERLOADED, f"the broker has {len(self._by_secret)} clients, which is its limit")
            return
        is_resumed = session is not None and (isinstance(m, Hello) or m.epoch == self.state.epoch)
        if session is None:
            account = self.account_of(principal, m.name)
            account.num_sessions += 1
            session = self._by_secret[key] = ClientSession(principal, m.name, m.secret, route, now, account)
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
            credit=self._admission.credit(session), unknown=unknown, shared=self.state.sharing.offer(session, config, pid),
        )  # fmt: skip
        self.state.send(FRONT, route, welcome)
        if isinstance(m, Attach):
            self._acknowledge(session, m.received if is_resumed else 0, now)
            for message in session.outbox:
                self._send_again(session, message)

    def _send_again(self, session: ClientSession, message: Results | Partial) -> None:
        """All in frames: perhaps it is asked for again because shared memory could not be read."""
        readable = self.state.sharing.readable_message(message, session, is_inlined=True)
        self.state.send(FRONT, session.route, readable, is_promise=True)

    def _unknown(self, session: ClientSession, open_ids: bytes) -> bytes:
        ids = [open_ids[i : i + ID_BYTES] for i in range(0, len(open_ids), ID_BYTES)]
        unknown = [i for i in ids if self._find(session, i) is None and i not in session.finished]
        told = {span[0] for m in session.outbox for o in m.outcomes for span in o.spans} if unknown else set()
        return b"".join(i for i in unknown if i not in told)  # what another client has taken over it will be told

    def _acknowledge(self, session: ClientSession, seq: int, now: float) -> None:
        for run_id in session.acknowledge(seq):
            self.state.journal.acknowledged(session.principal, run_id, now)

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
        session.account.num_sessions -= 1
        session.outbox.clear()
        for run in [run for run in session.runs if run.number]:
            self.hand_over(run, self._nobody(session.principal, session.name, session.last_seen))
        self.state.sharing.leave(session)
        self._closing.append(session)

    def expel(self, principals: Collection[str]) -> None:
        """Their keys are allowed no more: their sessions and what is open in them end."""
        for session in [s for s in self._by_secret.values() if s.principal in principals]:
            self.state.counters["expelled"] += 1
            if session.route is not None:
                self._send_fault(session.route, Code.NOT_AUTHORISED, "this key is not allowed any more")
            self._leave(session)

    def lose_process(self, pid: int) -> None:
        """The kernel says that this process has ended: with it go the sessions that share its memory."""
        for session in [s for s in self._by_secret.values() if s.sharer is not None and s.sharer.pid == pid]:
            self.state.counters["lost_clients"] += 1
            self._leave(session)

    # --- durable tasks without a client ----------------------------------------------------------------------------

    def _nobody(self, principal: str, name: str, now: float) -> ClientSession:
        """Who holds the durable tasks of a client that is not there. It is told nothing: the journal keeps the outcomes."""
        session = self._absent.get((principal, name))
        if session is None:
            account = self.account_of(principal, name)
            session = self._absent[principal, name] = ClientSession(principal, name, b"", None, now, account)
            session.is_closed = True
        return session

    def account_of(self, principal: str, name: str) -> Account:
        """Whom the work of a client is charged to."""
        name = self.state.quotas.account_name(principal, name)
        return self.state.policy.accounts.get(principal, name, self.state.quotas.rules(name).weight)

    @staticmethod
    def hand_over(run: Run, session: ClientSession) -> None:
        """A run becomes another session's."""
        before = run.session
        before.runs.remove(run)
        before.returned_rows += run.num_open
        before.returned_bytes += run.num_bytes
        session.runs.add(run)
        session.used_rows += run.num_open
        session.used_bytes += run.num_bytes
        run.session = session

    def restore(self, journal: DurableJournal, kept: Kept, now: float) -> Run:
        """A durable task that is not over, of an earlier broker or begun again, goes on as nobody's."""
        arrived = min(journal.monotonic(kept.accepted_at), now)
        deadline = float("inf") if kept.deadline is None else journal.monotonic(kept.deadline)
        run = self._admission.reopen(self._nobody(kept.principal, kept.client, arrived), kept, arrived, deadline)
        self.state.kernels.park(run)
        journal.reopen(kept, run)
        return run

    def _end_started(self, run: Run, now: float) -> None:
        """What an earlier broker gave to a worker runs again only if it may."""
        spec = self.state.kernels.known[run.kernel]
        for start, stop in run.started if not spec.is_idempotent else ():
            text = f"it may have run under an earlier broker; {run.kernel!r} is not idempotent, so it was not run again"
            self.end_pieces(_within(run, start, stop), FAILED, Error(Code.WORKER_LOST, text), now)
        run.started = []

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

    def _submit(self, session: ClientSession, m: Submit, now: float) -> None:
        self._acknowledge(session, m.ack, now)
        num_rows, num_bytes = m.block.num_rows, m.block.nbytes
        try:
            if m.block.layout.num_framed:
                self._adopt(session, m)
            if self._is_repeat(session, m):
                return
            entry = self._admission.remembered(session, m, now)
            if entry is not None and entry.run is None:  # it is over: that takes no room in window, queue or disk
                self._admission.check_outbox(session, num_rows, now)
                self._replay(session, m, entry, num_rows, num_bytes)
                return
            self._admission.check(session, m, num_rows, num_bytes, now)
            run = self._admission.open(session, m, num_bytes, now, entry is not None)
        except Refusal as refusal:
            self.state.counters[f"refused_{refusal.error.code}"] += 1
            self.state.metrics.refused(refusal.error.code, refusal.short_of, num_rows)
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
            self.state.send(FRONT, session.route, Accepted(id=m.id), run.is_durable)
        if entry is not None and entry.run is not None:
            self._catch_up(run, entry, now)

    def _adopt(self, session: ClientSession, m: Submit) -> None:
        try:
            self.state.sharing.adopt(session, [m.block], self.state.config)
        except Unshared as e:
            raise Refusal(Code.UNSHARED, str(e)) from None

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
        if run is not None and not (run.session in (session, self._absent.get(_name(run))) and is_same(run.request, m)):
            if run.number and is_same(run.request, m):
                raise Refusal(Code.CONFLICT, "another client has this task now: fetch it by its id")
            raise Refusal(Code.CONFLICT, "this id belongs to another submission: draw 16 random bytes for each")
        self.state.counters["repeated"] += 1
        if run is not None and run.session is not session:
            self._rejoin(session, run)
        if run is None:
            seq = session.finished[m.id]
            for message in session.outbox:
                if message.seq == seq:
                    self._send_again(session, message)
        elif m.wants_accepted:
            self.state.send(FRONT, session.route, Accepted(id=m.id), run.is_durable)
        return True

    def _rejoin(self, session: ClientSession, run: Run) -> None:
        """The client of a durable task is there again: it hears what it missed."""
        self.hand_over(run, session)
        num_over = run.num_rows - run.num_open
        session.used_rows += num_over
        session.returned_rows += num_over
        entry = self.state.journal.entry(run)
        self.tell_again(session, entry.outcomes if entry is not None else [], ())

    def bind_late(self, runs: Iterable[Run], now: float) -> None:
        """Bind runs that are open already, because their kernel came or changed; what it does not take ends here."""
        for run in runs:
            if run.started and run.kernel in self.state.kernels.known:
                self._end_started(run, now)
            if not run.num_open:  # it shared the outcome of one before it
                continue
            queued = [p for p in run.pieces if p.state == QUEUED]
            for piece in queued:
                if piece.entry is not None:
                    self.state.policy.remove(piece)
            try:
                self._admission.bind(run)
            except Refusal as refusal:
                self.end_pieces([(p, p.start, p.stop) for p in queued], "failed", refusal.error, now)
                continue
            for piece in queued:
                self.state.ledger.push(piece)

    def _replay(self, session: ClientSession, m: Submit, entry: Entry, num_rows: int, num_bytes: int) -> None:
        """Answer a submission whose twin is over with the twin's outcomes."""
        session.used_rows += num_rows
        session.used_bytes += num_bytes
        self._give_back(session, num_rows, num_bytes)
        if m.wants_accepted:
            self.state.send(FRONT, session.route, Accepted(id=m.id), bool(entry.number))
        if entry.number:
            self.state.journal.also_known_as(session.principal, m.id, entry.number)
        outcomes = [replace(o, spans=[(m.id, s, e) for _, s, e in o.spans]) for o in entry.outcomes]
        self.tell_again(session, outcomes, [m.id], bool(entry.number))
        self.state.counters["replayed"] += num_rows

    def tell_again(
        self, session: ClientSession, outcomes: Sequence[Outcome], finished: Iterable[bytes], is_promise: bool = True
    ) -> None:
        """Outcomes that were recorded before; `finished` are submissions of which nothing else will come."""
        for at in range(0, len(outcomes), MAX_REPLAYED):
            self._deliver(session, outcomes[at : at + MAX_REPLAYED], finished, is_promise)

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
            self.state.policy.expired(run, now)
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
                is_durable = session in settlement.durable
                for portion in settlement.portions(spans):
                    self._deliver(session, [settlement.outcome(portion)], _among(finished, portion, spans), is_durable)
        for lease in unwanted:
            if not lease.is_cancelled and not any(p.state == LEASED for p in lease.pieces):
                lease.is_cancelled = True
                self._on_unwanted(lease)

    def _deliver(
        self, session: ClientSession, outcomes: Sequence[Outcome], finished: Iterable[bytes], is_promise: bool = False
    ) -> None:
        results = session.add_result(outcomes, self._admission.credit(session))
        for run_id in finished:
            session.finished[run_id] = results.seq
        self.state.send(FRONT, session.route, self.state.sharing.readable_message(results, session), is_promise)

    def deliver_partial(self, piece: Piece, outcome: Outcome) -> None:
        """A piece of a streaming answer, if its client wants them."""
        session = piece.run.session
        if piece.run.wants_partials and not session.is_closed:
            partial = session.add_partial(outcome)
            if partial is not None:
                self.state.send(FRONT, session.route, self.state.sharing.readable_message(partial, session))

    # --- status ----------------------------------------------------------------------------------------------------

    def _answer_status(self, session: ClientSession, m: Status, now: float) -> None:
        if m.what in ("jobs", "dead"):
            self.jobs.receive(session, m, now)
            return
        if m.what not in ("", "tasks"):
            error = Error(Code.INVALID, f"unknown status {m.what!r}; there are: '', tasks, jobs, dead")
            self.state.send(FRONT, session.route, Reply(request=m.request, error=error))
            return
        if m.what == "tasks":
            body = reports.of_tasks(self.state, self.state.ledger.runs_of(session.principal), now)
        elif m.id is not None:
            body = self._task_report(session, m.id, now)
        else:
            body = reports.fitting(self._report(now))
        self.state.send(FRONT, session.route, Reply(request=m.request, body=body))

    def _task_report(self, session: ClientSession, run_id: bytes, now: float) -> dict[str, Any]:
        """Of any run of the same principal: whoever may submit as it may also ask."""
        run = self.state.ledger.find(session.principal, run_id)
        if run is None:
            return {"state": "finished" if run_id in session.finished else "unknown"}
        return reports.of_task(self.state, run, now)


def _among(finished: Sequence[bytes], portion: list[Span], spans: list[Span]) -> Iterable[bytes]:
    """The finished runs of which this portion tells."""
    if len(portion) == len(spans):
        return finished
    told = {span[0] for span in portion}
    return [run_id for run_id in finished if run_id in told]


def _name(run: Run) -> tuple[str, str]:
    return run.session.principal, run.session.name


def _within(run: Run, start: int, stop: int) -> list[tuple[Piece, int, int]]:
    return [(p, max(start, p.start), min(stop, p.stop)) for p in run.overlapping(start, stop)]

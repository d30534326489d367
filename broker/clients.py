"""The client side of the core: sessions, submissions, cancels, questions.

Knows what a client may do. Does not know what it is told of its rows' ends (`outcomes.py`), what becomes of durable tasks
without it (`absent.py`), how batches are made or who runs them.
"""

import functools
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from penstock.broker import reports
from penstock.broker.absent import Absent
from penstock.broker.admission import Admission, Refusal, is_same
from penstock.broker.jobs import OPS, Jobs
from penstock.broker.journal import Entry
from penstock.broker.outcomes import Outcomes, within
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
    Partial,
    Refused,
    Reply,
    Results,
    Share,
    Status,
    Submit,
    Welcome,
)
from penstock.broker.scheduling.quotas import may_have_more
from penstock.broker.sessions import ClientSession, Route
from penstock.broker.sharing import Unshared
from penstock.broker.state import FRONT, BrokerState
from penstock.broker.tasks import CANCELLED, Lease, Run
from penstock.broker.wire import Message, ProtocolError

MAX_CLOSED_PER_TURN = 250
MAX_OPEN_IDS = 65_536
"""Of one `attach`, unless the window is larger: each is looked up."""


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
        self._num_of = Counter[str]()
        self._closing: deque[tuple[ClientSession, Error]] = deque()
        self._admission = Admission(state, is_settled)
        self.outcomes = Outcomes(state, self._admission, on_unwanted)
        self.absent = Absent(state, self._admission, self.outcomes)
        self.jobs = Jobs(state, self.absent, self.outcomes, self._admission, may_operate)
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
        if isinstance(m, Attach) and len(m.open) > ID_BYTES * max(MAX_OPEN_IDS, 2 * self.state.config.window_rows):
            raise ProtocolError("more open submissions than a session may have")
        key = (principal, m.secret)
        session = self._by_secret.get(key)
        num_own, num_all, limit = self._num_of[principal], len(self._by_secret), self.state.config.max_clients
        if session is None and not may_have_more(num_own, num_all, limit):
            self.state.counters["refused_sessions"] += 1
            text = f"the broker has {num_all} clients, {num_own} of them yours, and {limit} at most"
            self._send_fault(route, Code.OVERLOADED, text)
            return
        is_resumed = session is not None and (isinstance(m, Hello) or m.epoch == self.state.epoch)
        if session is None:
            account = self.absent.account_of(principal, m.name)
            account.num_sessions += 1
            self._num_of[principal] += 1
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
            self._accept_again(session, m.open)
            for message in session.outbox:
                self._send_again(session, message)

    def _accept_again(self, session: ClientSession, open_ids: bytes) -> None:
        """Acceptances that may have been lost with the connection, perhaps while they waited for the disk."""
        for run in map(functools.partial(self._find, session), _ids(open_ids)):
            if run is not None and run.request.wants_accepted:
                self._send_accepted(session, run.id, run.is_durable)

    def _send_again(self, session: ClientSession, message: Results | Partial) -> None:
        """All in frames: perhaps it is asked for again because shared memory could not be read."""
        readable = self.state.sharing.readable_message(message, session, is_inlined=True)
        self.state.send(FRONT, session.route, readable, is_promise=True)

    def _unknown(self, session: ClientSession, open_ids: bytes) -> bytes:
        unknown = [i for i in _ids(open_ids) if self._find(session, i) is None and i not in session.finished]
        told = {span[0] for m in session.outbox for o in m.outcomes for span in o.spans} if unknown else set()
        return b"".join(i for i in unknown if i not in told)  # what another client has taken over it will be told

    def _acknowledge(self, session: ClientSession, seq: int, now: float) -> None:
        for entry in session.acknowledge(seq):
            self.state.journal.acknowledged(entry, now)

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
        self._num_of[session.principal] -= 1
        session.outbox.clear()
        for run in [run for run in session.runs if run.number]:
            self.absent.hand_over(run, self.absent.session(session.principal, session.name, session.last_seen))
        self.state.sharing.leave(session)
        self.close(session, Error(Code.CANCELLED, "the client left"))

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

    def forgive(self, pause_s: float, now: float) -> None:
        """The broker itself stood still: nobody else is to blame for it."""
        for session in self._by_secret.values():
            session.last_seen = min(session.last_seen + pause_s, now)

    def sweep(self, now: float) -> None:
        """Drop sessions that were silent for long; what a client misses that is silent for a while waits for its attach."""
        config = self.state.config
        quiet_s = min(config.client_liveness_s, config.session_ttl_s)
        for session in [s for s in self._by_secret.values() if now - s.last_seen > quiet_s]:
            if now - session.last_seen > config.session_ttl_s:
                self.state.counters["lost_clients"] += 1
                self._leave(session)
            elif session.route is not None:
                self.state.counters["silent_clients"] += 1
                self.lose_route(session.route)
        self.absent.sweep()

    def close(self, session: ClientSession, error: Error) -> None:
        """What is open in a session that nobody is in any more ends so, a bounded part per turn."""
        self._closing.append((session, error))

    def close_some(self, now: float) -> None:
        """End what is open in closed sessions, up to a bound per turn."""
        budget = MAX_CLOSED_PER_TURN
        while self._closing and budget > 0:
            session, error = self._closing[0]
            if not session.runs:
                self._closing.popleft()
                continue
            budget -= 1
            run = next(iter(session.runs))
            self.outcomes.end_run(run, CANCELLED, error, now)

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
            self._admission.check(session, m, num_rows, num_bytes, now, entry)
            run = self._admission.open(session, m, num_bytes, now, entry)
        except Refusal as refusal:
            self.state.counters[f"refused_{refusal.error.code}"] += 1
            self.state.metrics.refused(refusal.error.code, refusal.short_of, num_rows)
            self.state.send(FRONT, session.route, Refused(id=m.id, error=refusal.error))
            return
        if entry is None and run.queue is None:
            self.state.kernels.park(run)
        elif entry is None and run.queue is not None:
            self.state.ledger.enqueue(run, run.queue)
        self.state.counters["accepted"] += num_rows
        if m.wants_accepted:
            self._send_accepted(session, m.id, run.is_durable)
        if entry is not None:
            self.outcomes.catch_up(run, entry.outcomes, now)

    def _send_accepted(self, session: ClientSession, run_id: bytes, is_durable: bool) -> None:
        self.state.send(FRONT, session.route, Accepted(id=run_id, is_durable=is_durable), is_promise=is_durable)

    def _adopt(self, session: ClientSession, m: Submit) -> None:
        try:
            self.state.sharing.adopt(session, [m.block], self.state.config)
        except Unshared as e:
            raise Refusal(Code.UNSHARED, str(e)) from None

    def _is_repeat(self, session: ClientSession, m: Submit) -> bool:
        """The same id again: nothing to do if it is the same submission."""
        run = self.state.ledger.find(session.principal, m.id)
        if run is None and m.id not in session.finished:
            return False
        if run is not None and not ((run.session is session or self.absent.holds(run)) and is_same(run.request, m)):
            if run.number and is_same(run.request, m):
                raise Refusal(Code.CONFLICT, "another client has this task now: fetch it by its id")
            raise Refusal(Code.CONFLICT, "this id belongs to another submission: draw 16 random bytes for each")
        self.state.counters["repeated"] += 1
        if run is not None and run.session is not session:
            self.absent.rejoin(session, run)
        if run is None:
            seq = session.finished[m.id]
            for message in session.outbox:
                if message.seq == seq:
                    self._send_again(session, message)
        elif m.wants_accepted:
            self._send_accepted(session, m.id, run.is_durable)
        return True

    def _replay(self, session: ClientSession, m: Submit, entry: Entry, num_rows: int, num_bytes: int) -> None:
        """Answer a submission whose twin is over with the twin's outcomes."""
        session.used_rows += num_rows
        session.used_bytes += num_bytes
        self._give_back(session, num_rows, num_bytes)
        self.state.journal.also_known_as(entry, m.id)
        if m.wants_accepted:
            self._send_accepted(session, m.id, bool(entry.number))
        outcomes = [replace(o, spans=[(m.id, s, e) for _, s, e in o.spans]) for o in entry.outcomes]
        self.outcomes.tell_again(session, outcomes, {m.id: entry if entry.number else None}, bool(entry.number))
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
        self.outcomes.end_pieces(within(run, m.start, m.stop), CANCELLED, error, now)

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


def _ids(together: bytes) -> list[bytes]:
    return [together[i : i + ID_BYTES] for i in range(0, len(together), ID_BYTES)]

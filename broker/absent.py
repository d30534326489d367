"""Durable tasks whose client is not there: who holds them, how they come back after a restart, and who takes them over.

Knows sessions that nobody answers to. Does not know messages from clients, nor what is on disk.
"""

from collections.abc import Iterable

from penstock.broker.admission import Admission, Refusal
from penstock.broker.durable import DurableJournal
from penstock.broker.kept import Kept
from penstock.broker.outcomes import Outcomes, within
from penstock.broker.protocol import Code, Error
from penstock.broker.scheduling.accounts import Account
from penstock.broker.sessions import ClientSession
from penstock.broker.state import BrokerState
from penstock.broker.tasks import FAILED, QUEUED, Run


class Absent:
    """See the module."""

    def __init__(self, state: BrokerState, admission: Admission, outcomes: Outcomes) -> None:
        self._state = state
        self._admission = admission
        self._outcomes = outcomes
        self._sessions: dict[tuple[str, str], ClientSession] = {}

    def session(self, principal: str, name: str, now: float) -> ClientSession:
        """Who holds the durable tasks of a client that is not there. It is told nothing: the journal keeps the outcomes."""
        session = self._sessions.get((principal, name))
        if session is None:
            account = self.account_of(principal, name)
            session = self._sessions[principal, name] = ClientSession(principal, name, b"", None, now, account)
            session.is_closed = True
        return session

    def sessions(self) -> Iterable[ClientSession]:
        """Those who hold the tasks of clients that are not there."""
        return self._sessions.values()

    def account_of(self, principal: str, name: str) -> Account:
        """Whom the work of a client is charged to."""
        name = self._state.quotas.account_name(principal, name)
        return self._state.policy.accounts.get(principal, name, self._state.quotas.rules(name).weight)

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
        run = self._admission.reopen(self.session(kept.principal, kept.client, arrived), kept, arrived, deadline)
        self._state.kernels.park(run)
        journal.reopen(kept, run)
        return run

    def _end_started(self, run: Run, now: float) -> None:
        """What an earlier broker gave to a worker runs again only if it may."""
        spec = self._state.kernels.known[run.kernel]
        for start, stop in run.started if not spec.is_idempotent else ():
            text = f"it may have run under an earlier broker; {run.kernel!r} is not idempotent, so it was not run again"
            self._outcomes.end_pieces(within(run, start, stop), FAILED, Error(Code.WORKER_LOST, text), now)
        run.started = []

    def sweep(self) -> None:
        """Whoever has nothing open any more is forgotten."""
        for name in [name for name, session in self._sessions.items() if not session.runs]:
            del self._sessions[name]

    def holds(self, run: Run) -> bool:
        """Whether its client is not there."""
        return run.session is self._sessions.get((run.session.principal, run.session.name))

    def rejoin(self, session: ClientSession, run: Run) -> None:
        """The client of a durable task is there again: it hears what it missed."""
        self.hand_over(run, session)
        num_over = run.num_rows - run.num_open
        session.used_rows += num_over
        session.returned_rows += num_over
        entry = self._state.journal.entry(run)
        self._outcomes.tell_again(session, entry.outcomes if entry is not None else [], {})

    def bind_late(self, runs: Iterable[Run], now: float) -> None:
        """Bind runs that are open already, because their kernel came or changed; what it does not take ends here."""
        for run in runs:
            if run.started and run.kernel in self._state.kernels.known:
                self._end_started(run, now)
            if not run.num_open:  # it shared the outcome of one before it
                continue
            queued = [p for p in run.pieces if p.state == QUEUED]
            for piece in queued:
                if piece.entry is not None:
                    self._state.policy.remove(piece)
            try:
                self._admission.bind(run)
            except Refusal as refusal:
                self._outcomes.end_pieces([(p, p.start, p.stop) for p in queued], "failed", refusal.error, now)
                continue
            for piece in queued:
                self._state.ledger.push(piece)

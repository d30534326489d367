"""What clients are told of the ends of their rows, and how rows end that no worker answers.

Knows sessions' outboxes, and batches that nobody waits for any more. Does not know how a client asks for anything.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from penstock.broker.admission import Admission
from penstock.broker.fitting import messages
from penstock.broker.journal import Entry
from penstock.broker.protocol import Code, Error, Outcome
from penstock.broker.sessions import ClientSession
from penstock.broker.settlement import Settlement, Span
from penstock.broker.state import FRONT, BrokerState
from penstock.broker.tasks import CANCELLED, DONE, EXPIRED, FAILED, LEASED, Lease, Piece, Run

MAX_EXPIRED_PER_TURN = 250


class Outcomes:
    """See the module. `on_unwanted` is called with a lease when nobody waits for any of its rows any more."""

    def __init__(self, state: BrokerState, admission: Admission, on_unwanted: Callable[[Lease], None]) -> None:
        self._state = state
        self._admission = admission
        self._on_unwanted = on_unwanted

    def expire(self, now: float) -> None:
        """End runs whose deadline has come, up to a bound per turn."""
        for _ in range(MAX_EXPIRED_PER_TURN):
            run = self._state.ledger.overdue(now)
            if run is None:
                return
            self._state.policy.expired(run, now)
            has_started = any(p.state == LEASED for p in run.pieces)
            text = "the time limit was over while it was " + ("running" if has_started else "waiting")
            self.end_run(run, EXPIRED, Error(Code.DEADLINE, text), now)

    def end_run(self, run: Run, state: str, error: Error, now: float) -> None:
        """Give every row of a run that has no outcome yet this one."""
        self.end_pieces(within(run, 0, run.num_rows), state, error, now)

    def end_pieces(self, ends: Sequence[tuple[Piece, int, int]], state: str, error: Error, now: float) -> None:
        self.settle([(p, s, e, 0) for p, s, e in ends], state, Outcome((), error=error), now)

    def settle(
        self, ends: Sequence[tuple[Piece, int, int, int]], state: str, answer: Outcome, now: float, is_shared: bool = False
    ) -> None:
        """Rows have their outcome: close them, return credit, tell their clients.

        Args:
            ends: (piece, start, stop, first row in the answer's block).
            answer: what the outcomes have in common; its spans are filled in here.
            is_shared: the rows are of runs that follow another one, which had this outcome.
        """
        unwanted: list[Lease] = []
        if state in (CANCELLED, EXPIRED):
            unwanted = list({p.lease: None for p, *_ in ends if p.lease is not None})
        settlement = Settlement(self._state, state, answer, now)
        for piece, start, stop, at in ends:
            piece.run.has_own_end |= not is_shared
            settlement.end(piece, start, stop, at)
        self._state.finish_rate.add(settlement.num_rows, now)
        for session, spans in settlement.spans.items():
            if not session.is_closed:
                finished = settlement.finished.get(session, {})
                is_durable = session in settlement.durable
                for portion in settlement.portions(spans):
                    self.deliver(session, [settlement.outcome(portion)], _among(finished, portion, spans), is_durable)
        for lease in unwanted:
            if not lease.is_cancelled and not any(p.state == LEASED for p in lease.pieces):
                lease.is_cancelled = True
                self._on_unwanted(lease)

    def deliver(
        self, session: ClientSession, outcomes: Sequence[Outcome], finished: Mapping[bytes, Entry | None], is_promise: bool
    ) -> None:
        """Outcomes; `finished` are submissions of which nothing else will come, and what is kept until they have arrived."""
        results = session.add_result(outcomes, self._admission.credit(session))
        for run_id, entry in finished.items():
            session.finished[run_id] = results.seq
            if entry is not None:
                session.owed[run_id] = entry
        self._state.send(FRONT, session.route, self._state.sharing.readable_message(results, session), is_promise=is_promise)

    def deliver_partial(self, piece: Piece, outcome: Outcome) -> None:
        """A piece of a streaming answer, if its client wants them."""
        session = piece.run.session
        if piece.run.wants_partials and not session.is_closed:
            partial = session.add_partial(outcome)
            if partial is not None:
                self._state.send(FRONT, session.route, self._state.sharing.readable_message(partial, session))

    def catch_up(self, follower: Run, outcomes: Iterable[Outcome], now: float) -> None:
        """Give a run the outcomes that its twin, still open, has had already."""
        for outcome in list(outcomes):
            for _, start, stop in outcome.spans:
                ends = [(p, s, e, s - start) for p, s, e in within(follower, start, stop)]
                self.settle(ends, DONE if outcome.error is None else FAILED, outcome, now, is_shared=True)

    def tell_again(
        self, session: ClientSession, outcomes: Sequence[Outcome], finished: Mapping[bytes, Entry | None],
        is_promise: bool = True,
    ) -> None:  # fmt: skip
        """Outcomes that were recorded before; see `deliver`."""
        for fitting in messages(outcomes):
            self.deliver(session, fitting, finished, is_promise)


def _among(
    finished: Mapping[bytes, Entry | None], portion: list[Span], spans: list[Span]
) -> Mapping[bytes, Entry | None]:
    """The finished runs of which this portion tells."""
    if len(portion) == len(spans):
        return finished
    told = {span[0] for span in portion}
    return {run_id: entry for run_id, entry in finished.items() if run_id in told}


def within(run: Run, start: int, stop: int) -> list[tuple[Piece, int, int]]:
    """The pieces of a run that have rows in [start, stop), with the range of each."""
    return [(p, max(start, p.start), min(stop, p.stop)) for p in run.overlapping(start, stop)]

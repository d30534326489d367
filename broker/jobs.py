"""What can be done with durable tasks once they are taken: list, fetch, cancel, requeue and drop them, and back them all up.

Knows whose they are: a principal sees its own and no others. Does not know how tasks run, nor files.
"""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgpack

from penstock.broker.absent import Absent
from penstock.broker.admission import Admission, Refusal
from penstock.broker.durable import DurableJournal
from penstock.broker.journal import About, Entry
from penstock.broker.outcomes import Outcomes
from penstock.broker.protocol import Code, Control, Error, Fetch, Outcome, Reply, Status
from penstock.broker.reports import MAX_LOOKED_AT, MAX_REPORT_BYTES
from penstock.broker.sessions import ClientSession
from penstock.broker.state import FRONT, BrokerState
from penstock.broker.storage.records import Copy
from penstock.broker.tasks import CANCELLED, DEAD, DONE, EXPIRED, FAILED, LEASED, Run

MAX_JOBS = 100
MAX_ERRORS = 20
MAX_MESSAGE, MAX_DETAIL = 400, 2000
MAX_SPANS_TOLD = 256
OPS = ("requeue", "cancel", "drop", "backup")
_STATES = {Code.DEAD: DEAD, Code.DEADLINE: EXPIRED, Code.CANCELLED: CANCELLED}
_WORST_FIRST = (DEAD, FAILED, EXPIRED, CANCELLED, DONE)


class Jobs:
    """The durable tasks of every principal.

    Args:
        may_operate: whether a principal may act on the broker as a whole, and so may back up.
    """

    def __init__(
        self, state: BrokerState, absent: Absent, outcomes: Outcomes, admission: Admission, may_operate: Callable[[str], bool]
    ) -> None:
        self._state = state
        self._absent = absent
        self._outcomes = outcomes
        self._admission = admission
        self._may_operate = may_operate
        self._copies: dict[str, tuple[ClientSession, int]] = {}
        self._ops: dict[str, Callable[[ClientSession, Control, float], dict[str, Any]]] = {
            "requeue": self._requeue, "cancel": self._cancel, "drop": self._drop,
        }  # fmt: skip

    def receive(self, session: ClientSession, m: Status | Fetch | Control, now: float) -> None:
        """Act on a question or wish, and answer it."""
        try:
            if isinstance(m, Fetch):
                self._fetch(session, m, now)
            elif isinstance(m, Status):
                self._reply(session, Reply(request=m.request, body=self._report(session, m, now)))
            else:
                self._do(session, m, now)
        except Refusal as refusal:
            self._state.send(FRONT, session.route, Reply(request=m.request, error=refusal.error))

    def _do(self, session: ClientSession, m: Control, now: float) -> None:
        """Fulfil a wish, once, however often it comes: its answer may have been lost with a connection."""
        known = next((reply for reply in session.answered if reply.request == m.request), None)
        if known is not None:
            self._reply(session, known)
        elif m.op == "backup":
            self._back_up(session, m)
        else:
            session.answered.append(Reply(request=m.request, body=self._ops[m.op](session, m, now)))
            self._reply(session, session.answered[-1])

    def _reply(self, session: ClientSession, reply: Reply) -> None:
        """What is told has happened, so it must survive as well."""
        self._state.send(FRONT, session.route, reply, is_promise=True)

    def _journal(self) -> DurableJournal:
        journal = self._state.journal
        if not isinstance(journal, DurableJournal):
            raise Refusal(Code.INVALID, "this broker keeps its tasks in memory: there are no durable ones")
        return journal

    def _find(self, session: ClientSession, m: Status | Fetch | Control, now: float) -> Entry:
        if m.id is None and m.key is None:
            raise Refusal(Code.INVALID, "which task? give its id or its idempotency key")
        found = self._journal().locate(session.principal, m.id, m.key, now)
        if found is None:
            what = "id" if m.key is None else "idempotency key"
            raise Refusal(Code.UNKNOWN_TASK, f"no durable task of yours has this {what}, or it is kept no longer")
        return found

    # --- looking ---------------------------------------------------------------------------------------------------

    def _report(self, session: ClientSession, m: Status, now: float) -> dict[str, Any]:
        """One job with its errors; else those that have failed, or all: the oldest open ones, the last to end."""
        journal = self._journal()
        if m.id is not None or m.key is not None:
            entry = self._find(session, m, now)
            return {"jobs": [{**of_job(entry, now), "errors": _errors(entry)}]}
        is_dead = m.what == "dead"
        journal.expire(now)
        seen = () if is_dead else islice(self._state.ledger.runs_of(session.principal), MAX_LOOKED_AT)
        open_ones = [run.entry for run in sorted(seen, key=_seq) if run.number and run.entry is not None]
        over = list(islice(journal.over(session.principal, is_dead), MAX_LOOKED_AT))
        parts = [[of_job(entry, now) for entry in jobs[:MAX_JOBS]] for jobs in (open_ones, over)]
        while len(msgpack.packb(parts)) > MAX_REPORT_BYTES:
            parts = [part[: len(part) // 2] for part in parts]
        return {"jobs": [*parts[0], *parts[1]], "num_open": len(open_ones), "num_over": len(over)}

    # --- fetching --------------------------------------------------------------------------------------------------

    def _fetch(self, session: ClientSession, m: Fetch, now: float) -> None:
        """Say what it is; and, unless it stays with its client, send its outcomes so far, and all that will come."""
        entry = self._find(session, m, now)
        if entry.is_gone:
            raise Refusal(Code.RESULT_GONE, "this task was done; its result is no longer kept")
        run, owner = entry.run, None if entry.run is None else entry.run.session
        uses = (0, 0) if run is None else (run.num_open, run.num_bytes)
        is_handed = owner is None or owner is session or owner.is_closed or m.take
        body = {**of_job(entry, now), "is_handed": is_handed, "uses": uses}
        if is_handed:
            self._admission.check_outbox(session, uses[0], now)  # what was taken once needs no credit
        elif owner is not None:
            body["client"], body["seen_ms"] = owner.name, 1000.0 * (now - owner.last_seen)
        self._reply(session, Reply(request=m.request, body=body))
        if not is_handed:
            return
        self._state.counters["fetched"] += 1
        if run is not None and owner is not None and owner is not session:
            self._absent.hand_over(run, session)
            if not owner.is_closed:
                self._tell_taken(owner, run)
        self._outcomes.tell_again(session, entry.outcomes, {body["id"]: entry} if run is None else {})

    def _tell_taken(self, owner: ClientSession, run: Run) -> None:
        """The client that had it waits for nothing any more."""
        error = Error(Code.UNAVAILABLE, f"client {run.session.name!r} has taken this task over")
        spans = [(run.id, piece.start, piece.stop) for piece in run.pieces]
        for at in range(0, len(spans), MAX_SPANS_TOLD):
            self._outcomes.tell_again(owner, [Outcome(spans[at : at + MAX_SPANS_TOLD], error=error)], {})

    # --- changing --------------------------------------------------------------------------------------------------

    def _cancel(self, session: ClientSession, m: Control, now: float) -> dict[str, Any]:
        entry = self._find(session, m, now)
        if entry.run is None:
            raise Refusal(Code.INVALID, f"it has ended: {of_job(entry, now)['state']}")
        run_id = entry.run.id
        self._outcomes.end_run(entry.run, CANCELLED, Error(Code.CANCELLED, f"cancelled by client {session.name!r}"), now)
        return {"id": run_id}

    def _drop(self, session: ClientSession, m: Control, now: float) -> dict[str, Any]:
        """Forget its outcomes and its key."""
        entry = self._find(session, m, now)
        if entry.about is None:
            raise Refusal(Code.INVALID, "it has not ended: cancel it first")
        self._journal().drop(entry)
        self._state.counters["dropped"] += 1
        return {"id": entry.about.id}

    def _requeue(self, session: ClientSession, m: Control, now: float) -> dict[str, Any]:
        """The rows that failed run again, under a new id; the answer of one that has begun again already is the same."""
        entry = self._find(session, m, now)
        if entry.run is not None:
            return {"id": entry.run.id}
        if entry.is_gone:
            raise Refusal(Code.RESULT_GONE, "its content is no longer kept: submit it again")
        if entry.request is None or entry.about is None:
            raise Refusal(Code.INVALID, "nothing of it has failed")
        if self._state.is_draining:
            raise Refusal(Code.UNAVAILABLE, "the broker is stopping")
        journal, counts = self._journal(), _count(entry)
        num_rows = counts.total() - counts[DONE] - counts[CANCELLED]
        account = self._absent.account_of(session.principal, entry.about.client)
        self._admission.check_journal(session.principal, num_rows, now)
        self._admission.check_queue(account, num_rows, entry.request.block.nbytes, now)
        run = self._absent.restore(journal, journal.begin_again(entry, now), now)
        self._state.counters["requeued"] += num_rows
        return {"id": run.id}

    # --- backup ----------------------------------------------------------------------------------------------------

    def _back_up(self, session: ClientSession, m: Control) -> None:
        """Have the journal copied; the answer comes when it is done."""
        journal, waiting = self._journal(), self._copies.get(m.target)
        if not self._may_operate(session.principal):
            raise Refusal(Code.NOT_AUTHORISED, "only the broker's own user, and keys of the role admin, may back it up")
        if waiting is not None and waiting != (session, m.request):
            raise Refusal(Code.CONFLICT, f"a backup to {m.target} is under way")
        if waiting is None:
            self._copies[m.target] = (session, m.request)
            journal.writes.append(Copy(m.target))

    def copied(self, folder: str, error: str) -> None:
        """A backup has ended."""
        session, request = self._copies.pop(folder)
        answer = Error(Code.INVALID, f"no backup was made: {error}") if error else None
        session.answered.append(Reply(request=request, error=answer, body={"folder": folder}))
        self._reply(session, session.answered[-1])


def of_job(entry: Entry, now: float) -> dict[str, Any]:
    """What is known of a durable task, its errors left out."""
    (_, key), about = entry.key, entry.about
    if about is None:
        assert entry.run is not None
        about = About.of(entry.run)
    counts, run = _count(entry), entry.run
    if run is not None:
        state = "running" if any(piece.state == LEASED for piece in run.pieces) else "queued"
    else:
        state = "gone" if entry.is_gone else next(state for state in _WORST_FIRST if counts[state])
    return {
        "id": about.id, "key": None if key == about.id else key, "client": about.client, "kernel": about.kernel,
        "rows": about.num_rows, "state": state, **{name: counts[name] for name in _WORST_FIRST},
        "open": 0 if run is None else run.num_open, "age_ms": 1000.0 * (now - about.arrived), "bytes": entry.num_bytes,
        "expires_in_ms": 1000.0 * (entry.expires_at - now) if run is None else None, "is_acknowledged": entry.is_acked,
        "can_requeue": run is None and entry.request is not None,
    }  # fmt: skip


def _seq(run: Run) -> int:
    return run.seq


def _count(entry: Entry) -> Counter[str]:
    """How many rows have ended how."""
    counts = Counter[str]()
    for outcome in entry.outcomes:
        counts[_state_of(outcome)] += sum(stop - start for _, start, stop in outcome.spans)
    return counts


def _state_of(outcome: Outcome) -> str:
    return DONE if outcome.error is None else _STATES.get(outcome.error.code, FAILED)


def _errors(entry: Entry) -> list[dict[str, Any]]:
    """The first errors, with what is known of them, as many as fit a message."""
    failed = (outcome for outcome in entry.outcomes if outcome.error is not None)
    made = [_error(outcome) for outcome in islice(failed, MAX_ERRORS)]
    while len(msgpack.packb(made)) > MAX_REPORT_BYTES // 2:
        made = made[: len(made) // 2]
    return made


def _error(outcome: Outcome) -> dict[str, Any]:
    assert outcome.error is not None
    error = outcome.error
    return {
        "rows": [[start, stop] for _, start, stop in outcome.spans[:MAX_ERRORS]], "code": error.code,
        "message": error.message[:MAX_MESSAGE], "detail": error.detail[-MAX_DETAIL:],
    }  # fmt: skip

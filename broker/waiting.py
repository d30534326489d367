"""Where a queued task stands: how many rows go before it, when its outcome is to be expected, and why it waits.

Estimates for people, from the policy's own sums. Knows the order of decisions; decides nothing.
"""

from itertools import islice

from penstock.broker.scheduling.batch import row_ms
from penstock.broker.scheduling.events import duration_text
from penstock.broker.sessions import WorkerSession
from penstock.broker.state import BrokerState
from penstock.broker.tasks import QUEUED, Piece, Run
from penstock.broker.wire import record

MAX_COUNTED = 1000


@record
class Standing:
    """`position` counts rows of all batch keys; `eta_ms` is None while nothing can be foretold."""

    position: int
    eta_ms: float | None
    why: str


def standing(state: BrokerState, run: Run, now: float) -> Standing:
    """Of an open run: of its first queued rows, or of those that run now."""
    serving = [w for w in state.serving() if any(kind[0] == run.kernel for kind in w.kinds)]
    queued = [p for p in run.pieces if p.state == QUEUED]
    if not queued:
        left_ms = max((p.lease.left_ms(now) for p in run.pieces if p.lease is not None), default=0.0)
        names = ", ".join(sorted({p.lease.worker.name for p in run.pieces if p.lease is not None}))
        return Standing(0, left_ms, f"it runs on {names}")
    if run.queue is None:
        return Standing(0, None, f"no worker offers {run.kernel!r} yet")
    piece = min((p for p in queued if p.lane is not None), key=_place_in_run, default=None)
    if piece is None:
        return Standing(0, None, "it shares the outcome of an earlier submission with its idempotency key")
    position = rows_before(state, piece)
    if not serving:
        return Standing(position, None, f"no worker that offers {run.kernel!r} can take work: {_states(state)}")
    policy = state.policy
    work_ms = position * policy.work_ms / policy.num_rows
    free_ms = min(w.left_ms(now) for w in serving)
    eta_ms = work_ms / len(serving) + free_ms + row_ms(run.alone_ms, piece.start)
    return Standing(position, eta_ms, _reason(state, piece, position, serving, free_ms, now))


def rows_before(state: BrokerState, piece: Piece) -> int:
    """Rows expected to go before a queued piece: its account's more urgent ones, and what fair shares give to the others."""
    lane, account = piece.lane, piece.run.account
    assert lane is not None and piece.entry is not None
    index = lane.pieces.index(piece.entry)
    counted = sum(entry[-1].num_rows for entry in islice(lane.pieces, min(index, MAX_COUNTED)))
    own: int = counted if index <= MAX_COUNTED else round(counted * index / MAX_COUNTED)
    for heads in account.heads.values():
        own += sum(head[-1].num_rows for head in heads if head[-1] is not lane and head[0] < piece.run.overdue_at)
    others = 0.0
    backlogged = state.policy.accounts.backlogged
    for *_, other in islice(backlogged, MAX_COUNTED):
        if other is not account:
            others += min(other.num_rows, (own + 1) * other.weight / account.weight)
    return own + round(others * max(len(backlogged) / MAX_COUNTED, 1.0))


def _reason(state: BrokerState, piece: Piece, position: int, serving: list[WorkerSession], free_ms: float, now: float) -> str:
    run = piece.run
    retry_at = state.breakers.retry_at(run.kernel, [w.name for w in serving], now)
    if retry_at is not None:
        return f"{run.kernel!r} keeps failing on every worker; the next try is in {duration_text(retry_at - now)}"
    if piece.is_isolated:
        return "a worker was lost with it: it waits for a worker of its own"
    if position:
        num_clients = len(state.policy.accounts.backlogged)
        ahead = f"behind about {position:,} rows" + (f" of {num_clients} clients" if num_clients > 1 else "")
    else:
        ahead = "next in line"
    if free_ms > 0.0:
        names = ", ".join(w.name for w in serving[:3])
        return f"{ahead}; {names} {'is' if len(serving) == 1 else 'are'} busy for about {duration_text(0.001 * free_ms)} more"
    if state.policy.config.max_wait_ms and state.policy.wake_at is not None:
        return f"{ahead}; an incomplete batch is held for company"
    return ahead


def _states(state: BrokerState) -> str:
    return ", ".join(f"{w.name} is {w.state}" for w in state.workers.values()) or "there is none"


def _place_in_run(piece: Piece) -> int:
    return piece.start

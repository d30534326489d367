"""Every invariant of the broker's core: what must be true after any event followed by a turn. Tests and simulations ask.

Knows all parts of the core and looks only; nothing in production calls it.
"""

from collections.abc import Iterator

from penstock.broker.columns import Block
from penstock.broker.core import Core
from penstock.broker.tasks import QUEUED


def check(core: Core, now: float) -> None:
    """Raises AssertionError: something is wrong inside."""
    state = core.state
    state.ledger.check(now)
    _check_nothing_is_forgotten(core)
    state.sharing.check(_blocks(core))
    assert state.ledger.num_open <= state.config.max_queue_rows and state.ledger.open_bytes <= state.config.max_queue_bytes
    _check_clients(core)
    _check_workers(core)


def _check_clients(core: Core) -> None:
    for route, session in core.clients.by_route.items():
        assert session.route == route and not session.is_closed
    for session in {r.session for r in core.state.ledger.runs()}:
        window = session.used_rows - session.returned_rows
        assert window == sum(r.num_open for r in session.runs), "credit leaks"
        window -= sum(r.num_open for r in session.runs if r.number)  # one that was taken before comes back all the same
        assert window <= core.state.config.window_rows or session.is_closed


def _check_workers(core: Core) -> None:
    for route, worker in core.workers.by_route.items():
        assert worker.route == route
    for worker in core.workers.by_secret.values():
        batches = [lease for lease in worker.leases.values() if lease.mode == "batch"]
        assert len(batches) == worker.batches and worker.assigned_batches <= max(worker.credit_batches, worker.batches)
        assert worker.num_bytes == sum(lease.num_bytes for lease in worker.leases.values())
        for kind, count in worker.streams.items():
            leased = [le for le in worker.leases.values() if le.mode == "stream" and le.queue.kind[:2] == kind]
            assert len(leased) == count <= leased[0].queue.spec.max_batch_size
    assert all(lease.worker.secret in core.workers.by_secret for lease in core.state.ledger.leases.values())


def _blocks(core: Core) -> Iterator[Block]:
    """All payload that is held: of tasks, of leases, and of results that were not acknowledged."""
    ledger = core.state.ledger
    yield from (run.request.block for run in ledger.runs())
    yield from (block for lease in ledger.leases.values() for block in lease.lent or ())
    for session in core.clients.sessions():
        yield from (o.block for m in session.outbox for o in m.outcomes if o.block is not None)


def _check_nothing_is_forgotten(core: Core) -> None:
    """What is queued is in a queue that somebody serves, or waits for its kernel or for its twin."""
    state = core.state
    tables = state.kernels.parked, state.kernels.lasting
    waiting = {id(run) for table in tables for runs in table.values() for run in runs}
    for run in state.ledger.runs():
        waiting |= {id(follower) for follower in run.followers or ()}
    for run in state.ledger.runs():
        assert id(run) in waiting or not any(p.state == QUEUED and p.entry is None for p in run.pieces), "forgotten"
    assert not state.policy.stale(state.kernels.current()), "queued for a version that nobody offers any more"

"""The broker's core: events in, actions out. No socket, clock, thread or randomness inside.

`handle` takes one event at one time and returns what must be sent. Batches are formed at `Turn`, after everything that had
arrived was taken in, so that they are as full as they can be (late binding).
"""

from typing import Any

from penstock.broker.clients import Clients
from penstock.broker.config import BrokerConfig
from penstock.broker.journal import Journal, MemoryJournal
from penstock.broker.policy import PullPolicy
from penstock.broker.protocol import Code, Error, Fault, Goodbye
from penstock.broker.sessions import Route, WorkerSession
from penstock.broker.state import BACK, FRONT, BrokerState, Send
from penstock.broker.tasks import FAILED, QUEUED, Lease
from penstock.broker.wire import Message, ProtocolError, record
from penstock.broker.workers import Workers

SWEEP_S = 0.5
MAX_ASSIGNS_PER_TURN = 256


@record
class Received:
    """A message of the protocol. `pid` is the peer's process where the kernel vouches for it, else 0."""

    side: str
    route: Route
    principal: str
    message: Message
    pid: int = 0


@record
class Malformed:
    """Bytes that are no message."""

    side: str
    route: Route
    reason: str


@record
class PeerLost:
    """Nobody is at this address any more."""

    side: str
    route: Route


@record
class ProcessEnded:
    """The kernel says that a worker's process has ended."""

    pid: int


@record
class Turn:
    """Everything that had arrived is taken in: expire, sweep, form batches."""


@record
class Stop:
    """Take nothing new; what is open may finish."""


Event = Received | Malformed | PeerLost | ProcessEnded | Turn | Stop


class Core:
    """See the module. `epoch` is drawn by the shell: below 2**31, different at every start."""

    def __init__(
        self,
        config: BrokerConfig,
        epoch: int,
        now: float,
        policy: PullPolicy | None = None,
        journal: Journal | None = None,
        pid: int = 0,
    ) -> None:
        self.pid = pid
        journal = journal or MemoryJournal(config.dedup_window_s, config.dedup_bytes)
        self.state = BrokerState(config, epoch, now, policy or PullPolicy(), journal)
        self.clients = Clients(self.state, self._cancel_lease, self._is_settled, self.report, self._control)
        self.workers = Workers(self.state, self.clients)
        self._swept_at = self._turned_at = now
        self._has_more = False

    def handle(self, event: Event, now: float) -> list[Send]:
        """Take in one event; times are seconds of one monotonic clock."""
        match event:
            case Received():
                self._receive(event, now)
            case Turn():
                self._turn(now)
            case Malformed():
                self._refuse(event.side, event.route, event.reason)
            case PeerLost():
                self.state.counters["peers_lost"] += 1
                side = self.clients if event.side == FRONT else self.workers
                side.lose_route(event.route)
            case ProcessEnded():
                self.workers.lose_process(event.pid, now)
            case Stop():
                self._stop()
        actions, self.state.actions = self.state.actions, []
        return actions

    def _receive(self, event: Received, now: float) -> None:
        try:
            if event.side == FRONT:
                self.clients.receive(event.route, event.principal, event.message, now)
            else:
                self.workers.receive(event.route, event.principal, event.message, now, event.pid)
        except ProtocolError as e:
            self._refuse(event.side, event.route, str(e))

    def _refuse(self, side: str, route: Route, reason: str) -> None:
        self.state.counters["malformed"] += 1
        self.state.send(side, route, Fault(error=Error(Code.PROTOCOL, reason)))

    # --- turns -----------------------------------------------------------------------------------------------------

    def _turn(self, now: float) -> None:
        pause_s = now - self._turned_at - self.state.config.heartbeat_ms / 1000.0
        if pause_s > 1.0:
            self.clients.forgive(pause_s, now)
            self.workers.forgive(pause_s, now)
        self._turned_at = now
        self.clients.expire(now)
        self.clients.close_some(now)
        if self.state.kernels.parked:
            self._bind_parked(now)
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            self.clients.sweep(now)
            self.workers.sweep(now)
            self._refuse_unknown(now)
        self._has_more = self._dispatch(now)

    def _dispatch(self, now: float) -> bool:
        """Give batches to workers with room, the least loaded first; True if the bound per turn was met."""
        num_left = MAX_ASSIGNS_PER_TURN
        while num_left and self.state.policy.num_rows and self._assign_one(now):
            num_left -= 1
        return not num_left

    def _assign_one(self, now: float) -> bool:
        workers = list(self.workers.by_route.values())
        if len(workers) > 1:
            workers.sort(key=_num_leases)
        for worker in workers:
            offer = worker.offer()
            taken = self.state.policy.take(offer) if offer is not None else None
            if taken is not None:
                self.workers.assign(self.state.ledger.lease(*taken, worker, now))
                return True
        return False

    def _cancel_lease(self, lease: Lease) -> None:
        self.workers.cancel(lease)

    def _is_settled(self, now: float) -> bool:
        """No worker is still to be expected: some are ready and none is starting, or the grace time is over."""
        workers = self.workers.by_secret.values()
        if any(w.is_ready for w in workers) and all(w.is_ready for w in workers):
            return True
        return now - self.workers.changed_at > self.state.config.worker_grace_s

    def _bind_parked(self, now: float) -> None:
        """Queue what waited for another submission with its key, which has ended without an answer."""
        for name in [n for n in self.state.kernels.parked if n in self.state.kernels.known]:
            self.clients.bind_late(self.state.kernels.unpark(name), now)

    def _refuse_unknown(self, now: float) -> None:
        """End what waits for a kernel that will not come."""
        parked = self.state.kernels.parked
        if not parked or not self._is_settled(now):
            return
        known = ", ".join(sorted(self.state.kernels.known)) or "none: no worker has come"
        for name in list(parked):
            for run in self.state.kernels.unpark(name):
                error = Error(Code.UNKNOWN_KERNEL, f"no worker offers {name!r}; known kernels: {known}")
                self.clients.end_pieces([(p, p.start, p.stop) for p in run.pieces if p.state == QUEUED], FAILED, error, now)

    def next_deadline(self, now: float) -> float | None:
        """When `Turn` is due if nothing arrives before; `now` if there is more to do at once; None if never."""
        if self._has_more or self.clients.is_closing:
            return now
        first = self.state.ledger.next_deadline()
        if self.workers.by_secret or len(self.clients) or self.state.kernels.parked:
            sweep_at = self._swept_at + max(SWEEP_S, self.state.config.heartbeat_ms / 1000.0)
            return sweep_at if first is None else min(first, sweep_at)
        return first

    # --- operators -------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self.state.is_draining = True

    @property
    def is_idle(self) -> bool:
        """Nothing is open."""
        num_open: int = self.state.ledger.num_open
        return num_open == 0

    def farewell(self) -> list[Send]:
        """The last messages of a broker that stops."""
        goodbye = Goodbye(reason="the broker stops")
        return [Send(FRONT, r, goodbye) for r in self.clients.by_route] + [
            Send(BACK, r, goodbye) for r in self.workers.by_route
        ]

    def _control(self, op: str, target: str) -> Error | None:
        if op != "drain":
            return Error(Code.INVALID, f"unknown control {op!r}; there is: drain")
        for worker in self.workers.by_secret.values():
            if worker.name == target:
                self.workers.drain(worker)
                return None
        names = ", ".join(sorted(w.name for w in self.workers.by_secret.values())) or "none"
        return Error(Code.INVALID, f"no worker is called {target!r}; workers: {names}")

    def report(self, now: float) -> dict[str, Any]:
        """The body of `status`."""
        state = self.state
        return {
            "pid": self.pid,
            "epoch": state.epoch,
            "uptime_s": now - state.started_at,
            "is_ready": any(w.is_ready for w in self.workers.by_route.values()),
            "is_settled": self._is_settled(now),
            "is_draining": state.is_draining,
            "num_clients": len(self.clients),
            "tasks": {
                "open": state.ledger.num_open, "open_bytes": state.ledger.open_bytes,
                "queued": state.ledger.num_rows["queued"], "leased": state.ledger.num_rows["leased"],
                **state.ledger.outcomes,
            },
            "tasks_per_s": state.finish_rate.at(now),
            "queues": state.policy.occupancy(),
            "workers": self.workers.report(),
            "kernels": {name: dict(spec.wire) for name, spec in state.kernels.known.items()},
            "counters": dict(state.counters),
        }  # fmt: skip

    # --- invariants ------------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Every invariant of the broker; tests call it after every event followed by `Turn`."""
        state, config = self.state, self.state.config
        state.ledger.check(now)
        self._check_nothing_is_forgotten()
        assert state.ledger.num_open <= config.max_queue_rows and state.ledger.open_bytes <= config.max_queue_bytes
        for route, session in self.clients.by_route.items():
            assert session.route == route and not session.is_closed
        for session in {r.session for r in state.ledger.runs()}:
            window = session.used_rows - session.returned_rows
            assert window == sum(r.num_open for r in session.runs), "credit leaks"
            assert window <= config.window_rows
        for route, worker in self.workers.by_route.items():
            assert worker.route == route
        for worker in self.workers.by_secret.values():
            batches = [lease for lease in worker.leases.values() if lease.mode == "batch"]
            assert len(batches) == worker.batches and worker.assigned_batches <= max(worker.credit_batches, worker.batches)
            assert worker.num_bytes == sum(lease.num_bytes for lease in worker.leases.values())
            for kind, count in worker.streams.items():
                leased = [le for le in worker.leases.values() if le.mode == "stream" and le.queue.kind[:2] == kind]
                assert len(leased) == count <= leased[0].queue.spec.max_batch_size
        assert all(lease.worker.secret in self.workers.by_secret for lease in state.ledger.leases.values())

    def _check_nothing_is_forgotten(self) -> None:
        """What is queued is in a queue that somebody serves, or waits for its kernel or for its twin."""
        state = self.state
        waiting = {id(run) for runs in state.kernels.parked.values() for run in runs}
        for run in state.ledger.runs():
            waiting |= {id(follower) for follower in run.followers or ()}
        for run in state.ledger.runs():
            assert id(run) in waiting or not any(p.state == QUEUED and p.entry is None for p in run.pieces), "forgotten"
        assert not state.policy.stale(state.kernels.current()), "queued for a version that nobody offers any more"


def _num_leases(worker: WorkerSession) -> int:
    return len(worker.leases)

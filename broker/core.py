"""The broker's core: events in, actions out. No socket, clock, thread or randomness inside.

`handle` takes one event at one time and returns what must be sent. Batches are formed at `Turn`, after everything that had
arrived was taken in, so that they are as full as they can be (late binding). Knows the order in which things are done; what is
done is its parts' business.
"""

from collections import deque
from collections.abc import Collection, Iterable

from penstock.broker.clients import Clients
from penstock.broker.config import BrokerConfig
from penstock.broker.configuration import Configuration
from penstock.broker.dispatch import Dispatch
from penstock.broker.durable import DurableJournal
from penstock.broker.events import Copied, Event, Malformed, PeerLost, ProcessEnded, Received, Stop, Turn
from penstock.broker.journal import Journal
from penstock.broker.leases import Leases
from penstock.broker.metrics import Metrics, NoMetrics
from penstock.broker.operators import Operators
from penstock.broker.protocol import Code, Error, Fault, Goodbye
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.sessions import Route
from penstock.broker.sharing import HostMemory
from penstock.broker.state import BACK, FRONT, BrokerState, Send
from penstock.broker.storage.records import Put, Write
from penstock.broker.tasks import EXPIRED, FAILED, LEASED, QUEUED, Lease, Piece
from penstock.broker.wire import ProtocolError
from penstock.broker.workers import Workers

SWEEP_S = 0.5
MAX_BOUND_PER_TURN = 4096
"""Submissions that waited for a kernel, enough for the largest batch: after a restart there may be a million of them."""


class Core:
    """See the module. `epoch` is drawn by the shell: below 2**31, different at every start.

    `configuration` reads the settings again when asked to; without one there is nothing to reload. `operators` are the
    principals that may control the broker, beside those whose key has the role of an admin. `memory` opens what peers on this
    machine share; without it nothing is.
    """

    def __init__(
        self,
        config: BrokerConfig,
        epoch: int,
        now: float,
        policy: PullPolicy | None = None,
        journal: Journal | None = None,
        pid: int = 0,
        configuration: Configuration | None = None,
        metrics: Metrics | None = None,
        operators: Collection[str] = (),
        memory: HostMemory | None = None,
    ) -> None:
        if policy is None:
            policy = PullPolicy(configuration.current.scheduling if configuration is not None else None)
        journal = journal or Journal(config.dedup_window_s, config.dedup_bytes)
        self.state = BrokerState(config, epoch, now, policy, journal, metrics or NoMetrics(), memory)
        if configuration is not None:
            self.state.quotas.replace(configuration.current.clients)
        self.operators = Operators(self.state, operators, configuration, self._is_settled, pid)
        theirs = (self.operators.report, self.operators.control, self.operators.may_control)
        self.clients = Clients(self.state, self._cancel_lease, self._is_settled, *theirs)
        self.leases = Leases(self.state, self.clients)
        self.dispatch = Dispatch(self.state, self.leases.assign, self._give_up)
        self.leases.dispatch = self.dispatch
        self.workers = Workers(self.state, self.leases, self.dispatch)
        self.operators.clients, self.operators.workers = self.clients, self.workers
        self.operators.dispatch = self.dispatch
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
                self.clients.lose_process(event.pid)
            case Stop():
                self.state.is_draining = True
            case Copied():
                self.clients.jobs.copied(event.folder, event.error)
        actions, self.state.actions = self.state.actions, []
        return actions

    def _receive(self, event: Received, now: float) -> None:
        try:
            if event.side == FRONT:
                self.clients.receive(event.route, event.principal, event.message, now, event.pid)
            else:
                self.workers.receive(event.route, event.principal, event.message, now, event.pid)
        except ProtocolError as e:
            self._refuse(event.side, event.route, str(e))

    def _refuse(self, side: str, route: Route, reason: str) -> None:
        self.state.counters["malformed"] += 1
        self.state.send(side, route, Fault(error=Error(Code.PROTOCOL, reason)))

    def restore(self, puts: Iterable[Put], now: float) -> int:
        """Before the first event: take up the durable tasks of earlier brokers; how many of them are not over.

        Raises:
            Corrupt: a record cannot be understood.
        """
        journal = self.state.journal
        if not isinstance(journal, DurableJournal):
            return 0
        open_ones = deque(journal.restore(puts, now))
        num_open = len(open_ones)
        while open_ones:  # what was read goes as soon as it is taken up: a million need no place twice
            self.clients.absent.restore(journal, open_ones.popleft(), now)
        self.operators.disown(now)
        return num_open

    def take_writes(self) -> list[Write]:
        """What the journal asks to be made safe."""
        writes, self.state.journal.writes = self.state.journal.writes, []
        return writes

    # --- turns -----------------------------------------------------------------------------------------------------

    def _turn(self, now: float) -> None:
        pause_s = now - self._turned_at - self.state.config.heartbeat_ms / 1000.0
        if pause_s > 1.0:
            self.clients.forgive(pause_s, now)
            self.workers.forgive(pause_s, now)
        self._turned_at = now
        self.clients.outcomes.expire(now)
        self.clients.close_some(now)
        self._bind_parked(now)
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            self.clients.sweep(now)
            self.workers.sweep(now)
            self.state.journal.expire(now)
            self._refuse_unknown(now)
            regression = self.dispatch.maintain(now)
            if regression is not None:
                self.operators.roll_back(regression, now)
        self._has_more = not self._is_done_giving and self.dispatch.run(now)
        self.state.sharing.flush()

    def _give_up(self, piece: Piece, error: Error, now: float) -> None:
        self.clients.outcomes.end_pieces([(piece, piece.start, piece.stop)], EXPIRED, error, now)

    def _cancel_lease(self, lease: Lease) -> None:
        self.leases.cancel(lease)

    def _is_settled(self, now: float) -> bool:
        """No worker is still to be expected: some are ready and none is starting, or the grace time is over."""
        workers = self.workers.by_secret.values()
        if any(w.is_ready for w in workers) and all(w.is_ready for w in workers):
            return True
        return now - self.workers.changed_at > self.state.config.worker_grace_s

    def _bind_parked(self, now: float) -> None:
        """Queue what waited for its kernel, or for another submission with its key that has ended without an answer."""
        num_left = MAX_BOUND_PER_TURN
        for name in self.state.kernels.awaited():
            runs = self.state.kernels.unpark(name, num_left)
            num_left -= len(runs)
            self.clients.absent.bind_late(runs, now)

    def _refuse_unknown(self, now: float) -> None:
        """End what waits for a kernel that will not come."""
        parked = self.state.kernels.parked
        if not parked or not self._is_settled(now):
            return
        known = ", ".join(sorted(self.state.kernels.known)) or "none: no worker has come"
        for name in [name for name in parked if name not in self.state.kernels.known]:
            for run in self.state.kernels.give_up(name):
                error = Error(Code.UNKNOWN_KERNEL, f"no worker offers {name!r}; known kernels: {known}")
                queued = [(p, p.start, p.stop) for p in run.pieces if p.state == QUEUED]
                self.clients.outcomes.end_pieces(queued, FAILED, error, now)

    def next_deadline(self, now: float) -> float | None:
        """When `Turn` is due if nothing arrives before; `now` if there is more to do at once; None if never."""
        if self._has_more or self.clients.is_closing or self.state.kernels.awaited():
            return now
        wake_at = None if self._is_done_giving else self.state.policy.wake_at
        dues = [due for due in (self.state.ledger.next_deadline(), wake_at) if due is not None]
        first = min(dues, default=None)
        if self.workers.by_secret or len(self.clients) or self.state.kernels.parked or self.state.kernels.lasting:
            sweep_at = self._swept_at + max(SWEEP_S, self.state.config.heartbeat_ms / 1000.0)
            return sweep_at if first is None else min(first, sweep_at)
        return first

    # --- the end ---------------------------------------------------------------------------------------------------

    @property
    def _is_done_giving(self) -> bool:
        """It stops, and what still waits is durable: nothing is begun any more."""
        return self.state.is_draining and not self.state.ledger.num_fleeting

    @property
    def is_idle(self) -> bool:
        """Nothing is open but durable tasks that wait: those go on with the next broker."""
        ledger = self.state.ledger
        return not (ledger.num_fleeting or ledger.num_rows[LEASED])

    def farewell(self) -> list[Send]:
        """The last messages of a broker that stops."""
        goodbye = Goodbye(reason="the broker stops")
        return [Send(FRONT, r, goodbye) for r in self.clients.by_route] + [
            Send(BACK, r, goodbye) for r in self.workers.by_route
        ]

"""What both sides of the core share: the tables, the counters, and the actions to be performed."""

import math
from collections import Counter

from penstock.broker.config import BrokerConfig
from penstock.broker.journal import Journal
from penstock.broker.kernel_table import KernelTable
from penstock.broker.ledger import Ledger
from penstock.broker.metrics import Metrics
from penstock.broker.scheduling.breakers import Breakers
from penstock.broker.scheduling.events import EventLog
from penstock.broker.scheduling.overload import CoDel
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.scheduling.quotas import Quotas
from penstock.broker.sessions import ClientSession, Route, WorkerSession
from penstock.broker.sharing import HostMemory, Sharing
from penstock.broker.wire import Message, record

FRONT, BACK = "front", "back"
RATE_WINDOW_S = 5.0


@record
class Send:
    """The one action there is: a message to the peer at an address of one side. One that is a promise goes when all that the
    journal has been told is safe, and everything after it to the same address with it."""

    side: str
    route: Route
    message: Message
    is_promise: bool = False


class Rate:
    """Events per second over the last seconds, exponentially weighted."""

    def __init__(self, now: float) -> None:
        self._per_s = 0.0
        self._at = now

    def add(self, count: int, now: float) -> None:
        self._per_s = self.at(now) + count / RATE_WINDOW_S
        self._at = now

    def at(self, now: float) -> float:
        return self._per_s * math.exp(-(now - self._at) / RATE_WINDOW_S)


class BrokerState:
    """One per core. Holds no rules: `Clients`, `Workers` and `Dispatch` do."""

    def __init__(
        self,
        config: BrokerConfig,
        epoch: int,
        now: float,
        policy: PullPolicy,
        journal: Journal,
        metrics: Metrics,
        memory: HostMemory | None = None,
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.epoch = epoch
        self.started_at = now
        self.policy = policy
        self.journal = journal
        self.ledger = Ledger(policy, epoch)
        self.kernels = KernelTable()
        self.workers: dict[bytes, WorkerSession] = {}
        self.counters: Counter[str] = Counter()
        self.sharing = Sharing(memory, self._send_to)
        self.events = EventLog()
        self.breakers = Breakers()
        self.codel = CoDel(policy.config.wait_budgets_s())
        self.quotas = Quotas({})
        self.finish_rate = Rate(now)
        self.is_draining = False
        self.actions: list[Send] = []

    def serving(self) -> list[WorkerSession]:
        """The workers that may be given work."""
        return [w for w in self.workers.values() if w.is_serving]

    def _send_to(self, session: ClientSession | WorkerSession, message: Message) -> None:
        self.send(FRONT if isinstance(session, ClientSession) else BACK, session.route, message)

    def send(self, side: str, route: Route | None, message: Message, *, is_promise: bool = False) -> None:
        """Ask the shell to send; a peer that is away gets nothing."""
        if route is not None:
            self.actions.append(Send(side, route, message, is_promise))

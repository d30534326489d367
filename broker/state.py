"""What both sides of the core share: the tables, the counters, and the actions to be performed."""

import math
from collections import Counter

from penstock.broker.config import BrokerConfig
from penstock.broker.journal import Journal
from penstock.broker.kernel_table import KernelTable
from penstock.broker.ledger import Ledger
from penstock.broker.policy import PullPolicy
from penstock.broker.sessions import Route
from penstock.broker.wire import Message, record

FRONT, BACK = "front", "back"
RATE_WINDOW_S = 5.0


@record
class Send:
    """The one action there is: a message to the peer at an address of one side."""

    side: str
    route: Route
    message: Message


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
    """One per core. Holds no rules: `Clients` and `Workers` do."""

    def __init__(self, config: BrokerConfig, epoch: int, now: float, policy: PullPolicy, journal: Journal) -> None:
        self.config = config
        self.epoch = epoch
        self.started_at = now
        self.policy = policy
        self.journal = journal
        self.ledger = Ledger(policy, epoch)
        self.kernels = KernelTable()
        self.counters: Counter[str] = Counter()
        self.finish_rate = Rate(now)
        self.is_draining = False
        self.actions: list[Send] = []

    def send(self, side: str, route: Route | None, message: Message) -> None:
        """Ask the shell to send; a peer that is away gets nothing."""
        if route is not None:
            self.actions.append(Send(side, route, message))

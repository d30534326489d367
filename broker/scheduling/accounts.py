"""Fair shares between clients: the Virtual Token Counter (Sheng et al., OSDI 2024) in predicted device-milliseconds.

Knows accounts, their counters and which of them wait. Does not know batches, workers or predictions.
"""

from collections.abc import Collection, Iterator
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

from penstock.broker.protocol import NUM_PRIORITIES

if TYPE_CHECKING:
    from penstock.broker.scheduling.lanes import Entry, Kind, Lane

Head = tuple[float, int, int, int, "Lane"]
"""(when its first piece is overdue, and that piece's place in its lane; lane)."""
MAX_COMPARED = 16
MAX_IDLE_ACCOUNTS = 4096


class Account:
    """Who is charged for device time: a principal's client name. `counter` is its service, in ms over its weight.

    `heads` are its lanes with work, the most urgent first, by kind: what a worker cannot run is never looked at.
    """

    __slots__ = (
        "alone_ms", "charged_ms", "class_ms", "counter", "entry", "heads", "index", "last_batch", "name",
        "num_batches", "num_leased", "num_open", "num_rows", "num_sessions", "open_bytes", "principal", "weight",
    )  # fmt: skip

    def __init__(self, principal: str, name: str, weight: float, index: int) -> None:
        self.principal = principal
        self.name = name
        self.weight = weight
        self.index = index
        self.counter = self.alone_ms = self.charged_ms = 0.0
        self.num_rows = self.num_leased = self.num_batches = self.last_batch = self.num_sessions = 0
        self.num_open = self.open_bytes = 0
        self.class_ms = [0.0] * NUM_PRIORITIES
        self.heads: dict[Kind, SortedList[Head]] = {}
        self.entry: tuple[float, int, int, Account] | None = None

    def lanes(self, kinds: Collection["Kind"]) -> Iterator["Lane"]:
        """Its lanes of these kinds, the most urgent first."""
        heads = self.heads
        if len(heads) == 1:
            for kind, only in heads.items():
                return (entry[-1] for entry in only) if kind in kinds else iter(())
        return (entry[-1] for entry in merge(*(h for kind, h in heads.items() if kind in kinds)))

    def earliest(self, lane: "Lane", kinds: Collection["Kind"]) -> "Lane":
        """Of the lanes in this one's class, the one with the earliest time limit."""
        if len(self.heads) == 1 and all(len(heads) == 1 for heads in self.heads.values()):
            return lane
        peers = [other for other in islice(self.lanes(kinds), MAX_COMPARED) if other.priority == lane.priority]
        return min(peers, key=_first, default=lane)

    def lowest(self, kinds: Collection["Kind"]) -> "Lane | None":
        """The most urgent lane of its lowest class: what would starve first."""
        lanes = list(islice(self.lanes(kinds), 64))
        return max(lanes, key=_priority, default=None)  # the first of equals


def _first(lane: "Lane") -> "Entry":
    first: Entry = lane.pieces[0]
    return first


def _priority(lane: "Lane") -> int:
    return lane.priority


class Accounts:
    """All accounts, and those with queued work in the order of their counters.

    Two accounts that both wait never differ by more than twice the largest charge that one batch adds to one of them,
    whatever the sizes of their tasks.
    """

    def __init__(self) -> None:
        self.backlogged: SortedList[tuple[float, int, int, Account]] = SortedList()
        self._known: dict[tuple[str, str], Account] = {}
        self._max_known = MAX_IDLE_ACCOUNTS
        self._num_made = 0
        self._clock = self._weight_waiting = 0.0

    def get(self, principal: str, name: str, weight: float = 1.0) -> Account:
        """The account of a client, made on first use; its weight is the one given last."""
        account = self._known.get((principal, name))
        if account is None:
            if len(self._known) >= self._max_known:
                self._known = {k: a for k, a in self._known.items() if a.num_open or a.num_leased or a.num_sessions}
                self._max_known = max(MAX_IDLE_ACCOUNTS, 2 * len(self._known))
            self._num_made += 1
            account = self._known[principal, name] = Account(principal, name, weight, self._num_made)
        self.reweigh(account, weight)
        return account

    def __iter__(self) -> Iterator[Account]:
        return iter(self._known.values())

    def share(self, account: Account) -> float:
        """Of the devices, while everybody who waits now goes on waiting."""
        total = self._weight_waiting if account.entry is not None else self._weight_waiting + account.weight
        return min(account.weight / total, 1.0)

    def reweigh(self, account: Account, weight: float) -> None:
        """Its share is another one from now on."""
        if account.entry is not None:
            self._weight_waiting += weight - account.weight
        account.weight = weight

    def join(self, account: Account) -> None:
        """It has work again. What it did not use meanwhile is no credit: it starts level with those who wait."""
        least = self.backlogged[0][0] if self.backlogged else self._clock
        account.counter = max(account.counter, least)
        self._weight_waiting += account.weight
        self._enter(account)

    def leave(self, account: Account) -> None:
        """Nothing of it waits any more."""
        self.backlogged.remove(account.entry)
        account.entry = None
        self._weight_waiting = self._weight_waiting - account.weight if self.backlogged else 0.0

    def charge(self, account: Account, ms: float, num_rows: int, num_batches: int) -> None:
        """A batch takes so many of its queued rows, predicted to take so long."""
        self._clock = max(self._clock, account.counter)
        account.charged_ms += ms
        account.num_batches += 1
        account.last_batch = num_batches
        account.num_leased += num_rows
        account.counter += ms / account.weight
        if account.num_rows > num_rows:  # else it leaves at once
            self._move(account)

    def correct(self, account: Account, ms: float) -> None:
        """The charge was too small by so much, or too large."""
        account.charged_ms += ms
        account.counter += ms / account.weight
        if account.entry is not None:
            self._move(account)

    def _move(self, account: Account) -> None:
        if len(self.backlogged) == 1:
            self.backlogged.clear()
        else:
            self.backlogged.remove(account.entry)
        self._enter(account)

    def _enter(self, account: Account) -> None:
        # Of equals, who was served longest ago goes first.
        account.entry = (account.counter, account.last_batch, account.index, account)
        self.backlogged.add(account.entry)

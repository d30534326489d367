"""Messages that must not leave before the journal is safe: an acceptance, an outcome of a durable task.

Knows tickets and order: what follows a held message to the same address waits behind it, and what follows a lost one is lost
with it. Does not know messages or sockets.
"""

from collections import deque
from collections.abc import Callable

from penstock.broker.protocol import Reply
from penstock.broker.sessions import Route
from penstock.broker.state import Send
from penstock.broker.storage.records import Write
from penstock.broker.storage.store import Store

MAX_HELD = 32_768
"""Messages that one address may have waiting; a long reply counts as `REPLY_WEIGHT` of them."""
REPLY_WEIGHT = 64
LONG_PARTS = frozenset(("jobs", "tasks", "workers"))
"""Of the body of a reply: a report has one of them."""

Address = tuple[str, Route]


class Promises:
    """What was decided goes to `send`, at once or when the store is as far.

    Args:
        send: performs one action; False if nobody is there to take it.
        lose: is told who did not take a message, or whose have become too many while the disk was slow: it has to come again,
            and gets them then. Nothing that was decided before goes to that address any more: a gap would look like an answer.
    """

    def __init__(self, store: Store | None, send: Callable[[Send], bool], lose: Callable[[Send], None]) -> None:
        self._store = store
        self._send = send
        self._lose = lose
        self._ticket = 0
        self._held: dict[Address, Held] = {}

    def __len__(self) -> int:
        return sum(len(held.queue) for held in self._held.values())

    def perform(self, actions: list[Send], writes: list[Write]) -> None:
        """Hand the writes to the store, and send what need not wait. Raises StorageError if the store has failed."""
        store = self._store
        if writes and store is not None:
            self._ticket = store.append(writes)
        is_safe = store is None or self._ticket <= store.committed
        lost: set[Address] = set()  # never `set[Address]()` where it is hot: that builds the alias each time
        for action in actions:
            if lost and (action.side, action.route) in lost:
                continue
            is_taken = self._send(action) if is_safe and not self._held else self._send_or_hold(action, is_safe)
            if not is_taken:
                lost.add((action.side, action.route))
                self._let_go(action)

    def _send_or_hold(self, action: Send, is_safe: bool) -> bool:
        address = (action.side, action.route)
        held = self._held.get(address)
        if held is None and action.is_promise and not is_safe:
            held = self._held[address] = Held()
        if held is None:
            return self._send(action)
        return held.add(self._ticket if action.is_promise else 0, action)

    def _let_go(self, action: Send) -> None:
        self._held.pop((action.side, action.route), None)
        self._lose(action)

    def release(self) -> None:
        """The store has come further: send what waited for that. Raises StorageError if it has failed instead."""
        store = self._store
        if store is None:
            return
        store.clear()
        if store.failure is not None:
            raise store.failure
        for address, held in list(self._held.items()):
            while held.queue and held.queue[0][0] <= store.committed:
                action = held.take()
                if not self._send(action):
                    held.queue.clear()
                    self._let_go(action)
            if not held.queue and self._held.get(address) is held:
                del self._held[address]


class Held:
    """The messages to one address that wait, in order, each with the ticket that it waits for."""

    __slots__ = ("_weight", "queue")

    def __init__(self) -> None:
        self.queue: deque[tuple[int, Send]] = deque()
        self._weight = 0

    def add(self, ticket: int, action: Send) -> bool:
        """False if that is more than may wait."""
        self.queue.append((ticket, action))
        self._weight += _weight(action)
        return self._weight <= MAX_HELD

    def take(self) -> Send:
        _, action = self.queue.popleft()
        self._weight -= _weight(action)
        return action


def _weight(action: Send) -> int:
    return REPLY_WEIGHT if isinstance(action.message, Reply) and LONG_PARTS & action.message.body.keys() else 1

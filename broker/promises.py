"""Messages that must not leave before the journal is safe: an acceptance, an outcome of a durable task.

Knows tickets and order: what follows a held message to the same address waits behind it. Does not know messages or sockets.
"""

from collections import deque
from collections.abc import Callable

from penstock.broker.sessions import Route
from penstock.broker.state import Send
from penstock.broker.storage.records import Write
from penstock.broker.storage.store import Store


class Promises:
    """What was decided goes to `send`, at once or when the store is as far.

    Args:
        send: performs one action.
    """

    def __init__(self, store: Store | None, send: Callable[[Send], None]) -> None:
        self._store = store
        self._send = send
        self._ticket = 0
        self._held: dict[tuple[str, Route], deque[tuple[int, Send]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def perform(self, actions: list[Send], writes: list[Write]) -> None:
        """Hand the writes to the store, and send what need not wait. Raises StorageError if the store has failed."""
        store = self._store
        if store is None:
            for action in actions:
                self._send(action)
            return
        if writes:
            self._ticket = store.append(writes)
        is_safe = self._ticket <= store.committed
        for action in actions:
            address = (action.side, action.route)
            queue = self._held.get(address)
            if queue is not None:
                queue.append((self._ticket if action.is_promise else 0, action))
            elif action.is_promise and not is_safe:
                self._held[address] = deque([(self._ticket, action)])
            else:
                self._send(action)

    def release(self) -> None:
        """The store has come further: send what waited for that. Raises StorageError if it has failed instead."""
        store = self._store
        if store is None:
            return
        store.clear()
        if store.failure is not None:
            raise store.failure
        for address, queue in list(self._held.items()):
            while queue and queue[0][0] <= store.committed:
                self._send(queue.popleft()[1])
            if not queue:
                del self._held[address]

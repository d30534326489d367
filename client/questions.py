"""Questions to the broker: `status`, `fetch` and `control`, and their replies.

Knows who waits for which reply; does not know what is asked.
"""

from collections.abc import Callable, Iterator
from typing import Any

from penstock.broker.protocol import Error, Fetch
from penstock.broker.wire import Message
from penstock.client.errors import from_wire
from penstock.client.run import Run


class Request:
    """A question, and its reply once it came."""

    __slots__ = ("body", "error", "is_done", "message", "number", "run")

    def __init__(self, number: int, message: Message) -> None:
        self.number = number
        self.message = message
        self.is_done = False
        self.body: dict[str, Any] = {}
        self.error: Error | None = None
        self.run: Run | None = None
        """What a `fetch` has brought, if it was handed over."""

    def answer(self) -> dict[str, Any]:
        """The body of the reply; raises what the broker answered instead."""
        if self.error is not None:
            raise from_wire(self.error)
        return self.body


class Questions:
    """Those without a reply. They are asked again over a new connection."""

    def __init__(self) -> None:
        self._open: dict[int, Request] = {}
        self._num_asked = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, make: Callable[[int], Message]) -> Request:
        """`make(request number)` is the message."""
        self._num_asked += 1
        request = self._open[self._num_asked] = Request(self._num_asked, make(self._num_asked))
        return request

    def forget(self, request: Request) -> None:
        """Nobody waits for this reply any more."""
        self._open.pop(request.number, None)

    @property
    def has_fetch(self) -> bool:
        """A task is about to be handed over, or has been already and the reply was lost."""
        return any(type(request.message) is Fetch for request in self._open.values())

    def settle(self, number: int, error: Error | None, body: dict[str, Any]) -> Request | None:
        """A reply came; None if nobody waits for it."""
        request = self._open.pop(number, None)
        if request is not None:
            request.is_done, request.error, request.body = True, error, body
        return request

    def end(self, error: Error) -> None:
        """No replies will come."""
        for number in list(self._open):
            self.settle(number, error, {})

    def messages(self) -> Iterator[Message]:
        return (request.message for request in self._open.values())

"""Which of the broker's numbered messages have come, and which it knows to have come.

Knows sequence numbers, gaps and when an acknowledgement is due; does not know what is in the messages.
"""

from collections.abc import Sequence
from typing import Final

from penstock.broker.columns import Buffer

ACK_MESSAGES: Final = 16
ACK_BYTES: Final = 1 << 20
"""An `ack` goes out by itself once this much is unacknowledged; submissions and heartbeats carry it on the way."""
MAX_ASKED: Final = 8
"""So often the broker is asked for a missing message: it may be lost again, but one that cannot travel must not hold up all."""


class Receipts:
    """`received` is the last number that was acted upon; messages up to it are dropped when they come again."""

    __slots__ = ("_acked", "_held_from", "_num_asked", "_unacked_bytes", "received")

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A new session on the broker's side: it counts from 1 again."""
        self.received = self._acked = self._unacked_bytes = self._num_asked = 0
        self._held_from: int | None = None

    def note(self, seq: int, frames: Sequence[Buffer], is_shared: bool) -> None:
        """This message is acted upon; `is_shared`: some of it lay in memory that its owner waits for."""
        self.received, self._num_asked = seq, 0
        self._unacked_bytes += ACK_BYTES if is_shared else sum(map(len, frames))

    def asks_again(self) -> bool:
        """Something is missing after `received`: whether to ask for it once more."""
        self._num_asked += 1
        return self._num_asked <= MAX_ASKED

    def hold(self) -> None:
        """The last message is for somebody who is not there yet: it and what follows is not acknowledged before `release`."""
        if self._held_from is None:
            self._held_from = self.received

    def release(self) -> None:
        """Everything has found whom it was for."""
        self._held_from = None

    @property
    def ackable(self) -> int:
        """Up to here the broker may forget what it has sent."""
        return self.received if self._held_from is None else self._held_from - 1

    @property
    def must_ack(self) -> bool:
        num_new = self.ackable - self._acked
        return num_new >= ACK_MESSAGES or (num_new > 0 and self._unacked_bytes >= ACK_BYTES)

    @property
    def has_news(self) -> bool:
        """Something has come that the broker does not know to have come."""
        return self.ackable > self._acked

    def ack(self) -> int:
        """The number to acknowledge with the message that is being made."""
        self._acked, self._unacked_bytes = self.ackable, 0
        return self._acked

    def check(self) -> None:
        assert self._acked <= self.received

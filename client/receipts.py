"""Which of the broker's numbered messages have come, and which it knows to have come.

Knows sequence numbers, gaps and when an acknowledgement is due; does not know what is in the messages.
"""

from collections.abc import Sequence
from typing import Final

from penstock.broker.columns import Buffer

ACK_MESSAGES: Final = 16
ACK_BYTES: Final = 1 << 20
"""An `ack` goes out by itself once this much is unacknowledged; submissions and heartbeats carry it on the way."""


class Receipts:
    """`received` is the last number that was acted upon; messages up to it are dropped when they come again."""

    __slots__ = ("_acked", "_gap_at", "_unacked_bytes", "received")

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A new session on the broker's side: it counts from 1 again."""
        self.received = self._acked = self._unacked_bytes = self._gap_at = 0

    def note(self, seq: int, frames: Sequence[Buffer], is_shared: bool) -> None:
        """This message is acted upon; `is_shared`: some of it lay in memory that its owner waits for."""
        self.received = seq
        self._unacked_bytes += ACK_BYTES if is_shared else sum(map(len, frames))

    def is_first_gap(self) -> bool:
        """Something is missing after `received`: whether that is news. What stays missing is not asked for twice."""
        is_news, self._gap_at = self._gap_at != self.received + 1, self.received + 1
        return is_news

    @property
    def must_ack(self) -> bool:
        return self.received - self._acked >= ACK_MESSAGES or self._unacked_bytes >= ACK_BYTES

    def ack(self) -> int:
        """The number to acknowledge with the message that is being made."""
        self._acked, self._unacked_bytes = self.received, 0
        return self.received

    def check(self) -> None:
        assert self._acked <= self.received

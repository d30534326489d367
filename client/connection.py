"""How a session stands with its broker: greeting it, hearing from it, losing it and finding it again.

States: NEW -> GREETING (hello or attach is out) -> READY -> ENDED; any loss leads from READY back to GREETING. Knows
times in monotonic seconds; does not know runs.
"""

import logging
import math
from collections.abc import Callable
from typing import Final

from penstock.broker import protocol
from penstock.broker.wire import Message

log = logging.getLogger("penstock.client")

NEW: Final = "new"
GREETING: Final = "greeting"
READY: Final = "ready"
ENDED: Final = "closed"

SILENT_HEARTBEATS: Final = 3
FIRST_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 5.0


class Connection:
    """See the module. `draw`: n -> n random bytes."""

    def __init__(self, name: str, draw: Callable[[int], bytes]) -> None:
        self._name = name
        self._draw = draw
        self._secret = draw(protocol.SECRET_BYTES)
        self.state = NEW
        self.epoch: int | None = None
        self.must_greet = False
        self.must_reconnect = False
        """The broker does not answer on this socket."""
        self.last_sent = self.last_heard = 0.0
        self._last_beat = 0.0
        self._heartbeat_s = 1.0
        self._retry_at, self._retry_s = math.inf, FIRST_RETRY_S

    def greet(self, now: float) -> None:
        """Say hello, or attach, next; a random part of the pause keeps clients of one broker apart."""
        self.state, self.must_greet = GREETING, True
        jitter = self._jitter()
        self._retry_at = now + self._retry_s * (1 + jitter)
        self._retry_s *= 1 + 0.25 * jitter

    def greeting(self, received: int, open_ids: bytes, now: float) -> Message:
        """The message that is due."""
        self.must_greet = False
        self._retry_at = now + self._retry_s
        if self.epoch is None:
            return protocol.Hello(name=self._name, secret=self._secret)
        return protocol.Attach(name=self._name, secret=self._secret, epoch=self.epoch, received=received, open=open_ids)

    def welcome(self, m: protocol.Welcome, now: float) -> None:
        self.state, self.epoch, self._heartbeat_s = READY, m.epoch, max(0.01, m.heartbeat_ms / 1000)
        self._retry_s, self._retry_at = FIRST_RETRY_S, math.inf
        self._last_beat = now

    def lose(self, now: float) -> None:
        """The broker is about to be gone: greet the next one, after a moment."""
        self.state, self._retry_at = GREETING, now + self._retry_s * (1 + self._jitter())

    def _jitter(self) -> float:
        return self._draw(1)[0] / 255

    def end(self) -> None:
        self.state, self.must_greet, self.must_reconnect = ENDED, False, False

    def expect(self, now: float) -> None:
        """From now on there is something to hear of: silence counts from here."""
        self.last_heard = max(self.last_heard, now)

    def _beat_at(self, is_busy: bool) -> float:
        at = self.last_sent + self._heartbeat_s
        return min(at, max(self.last_heard, self._last_beat) + self._heartbeat_s) if is_busy else at

    def next_deadline(self, is_busy: bool, can_send: bool) -> float:
        """When `tick` has something to do."""
        if self.state == READY:
            due = self._beat_at(is_busy) if can_send else math.inf
            return min(due, self.last_heard + SILENT_HEARTBEATS * self._heartbeat_s) if is_busy else due
        return self._retry_at if self.state == GREETING else math.inf

    def tick(self, is_busy: bool, can_send: bool, now: float) -> bool:
        """Notice silence; True if a heartbeat shall be sent now."""
        if self.state == GREETING and now >= self._retry_at:
            self._retry_s = min(MAX_RETRY_S, self._retry_s * 2)
            self.must_reconnect = True
        if self.state != READY:
            return False
        if is_busy and now >= self.last_heard + SILENT_HEARTBEATS * self._heartbeat_s:
            log.warning("the broker has been silent for %.1f s; connecting again", now - self.last_heard)
            self.must_reconnect = True
            return False
        if not can_send or now < self._beat_at(is_busy):
            return False
        self.last_sent = self._last_beat = now
        return True

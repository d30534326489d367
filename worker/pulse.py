"""When a heartbeat is due, and when the broker counts as silent.

Knows one session at a time, in monotonic seconds; does not know sockets or threads. `heartbeat.py` drives it from a thread of
its own, while the data loop begins and pauses it: each attribute is written whole.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from penstock.broker.columns import Buffer
from penstock.broker.protocol import TO_WORKER, Code, Fault, Heartbeat, WorkerHeartbeat
from penstock.broker.wire import ProtocolError, decode, encode

log = logging.getLogger("penstock.worker")
MAX_SILENT: Final = 3


class Pulse:
    """See the module.

    Args:
        secret: the session's.

    Attributes:
        interval_s: between two beats; None: there is no session.
        num_sessions: grows with every `begin`.
        is_lost: the broker is silent, or does not know the session; to be taken back by who acts on it.
    """

    def __init__(self, secret: bytes) -> None:
        self.interval_s: float | None = None
        self.num_sessions = 0
        self.is_lost = False
        self._secret = secret
        self._asked_at: float | None = None  # of the first beat since the last answer

    def begin(self, interval_ms: float) -> None:
        """There is a session: beat from now on."""
        self._asked_at = None
        self.interval_s = max(interval_ms, 1.0) / 1e3
        self.num_sessions += 1
        self.is_lost = False

    def pause(self) -> None:
        """There is no session: no beats until the next `begin`."""
        self.interval_s = None

    def beat(self, progress: int, memory: Mapping[str, float], now: float) -> list[Buffer]:
        """The frames of a beat."""
        if self._asked_at is None:
            self._asked_at = now
        return encode(WorkerHeartbeat(session=self._secret, progress=progress, memory=memory))

    def receive(self, frames: Sequence[Buffer]) -> None:
        """Something has come for the heartbeats."""
        try:
            message = decode(TO_WORKER, frames)
        except ProtocolError as e:
            log.warning("ignored a malformed answer to a heartbeat: %s", e)
            return
        if isinstance(message, Heartbeat):
            self._asked_at = None
        elif isinstance(message, Fault) and message.error.code == Code.UNATTACHED:
            self._lose()

    def look(self, now: float) -> None:
        """At the broker's silence, which begins with a beat of ours: this process may have stood still."""
        interval, asked_at = self.interval_s, self._asked_at
        if interval is not None and asked_at is not None and now - asked_at > MAX_SILENT * interval:
            self._lose()

    def _lose(self) -> None:
        self.pause()
        self.is_lost = True

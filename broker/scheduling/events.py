"""What happened that an operator should know of, with its reason, and how long times are told to people.

Knows a bounded past. Does not know who reads it, nor wall-clock time.
"""

from collections import Counter, deque
from typing import Any

from penstock.broker.wire import record

MAX_EVENTS = 256


@record
class Event:
    """`at_s` is of the broker's monotonic clock; `subject` names the kernel, worker or client concerned."""

    at_s: float
    kind: str
    subject: str
    reason: str


class EventLog:
    """The last `MAX_EVENTS` events, and how many of each kind there ever were."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)

    def add(self, event: Event) -> None:
        self.counts[event.kind] += 1
        self._events.append(event)

    def recent(self, num_events: int = MAX_EVENTS) -> list[dict[str, Any]]:
        """The last ones, the newest first, as plain values."""
        newest = list(self._events)[::-1][:num_events]
        return [{"at_s": e.at_s, "kind": e.kind, "subject": e.subject, "reason": e.reason} for e in newest]


def duration_text(seconds: float) -> str:
    """'35 ms', '4.2 s', '12 min' or '3.5 h'."""
    if seconds < 0.9995:
        return f"{max(seconds, 0.0) * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

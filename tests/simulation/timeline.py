"""Virtual time: events in order of (time, number), one source of randomness, and what happened as text and as a hash.

Knows nothing of what the events are.
"""

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

START = 1000.0
NUM_LAST = 40


class Timeline:
    """`random` decides everything that is left to chance. `now` is seconds."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = START
        self.num_events = 0
        self.last: deque[tuple[float, str, Any]] = deque(maxlen=NUM_LAST)
        self.on_note: Callable[[str], None] | None = None
        self._hash = hashlib.sha256()
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_planned = 0

    def at(self, time: float, action: Callable[..., None], *args: Any) -> None:
        """Plan an event. Who no longer wants it lets it do nothing."""
        self._num_planned += 1
        heapq.heappush(self._heap, (max(time, self.now), self._num_planned, action, args))

    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        self.at(self.now + seconds, action, *args)

    def step(self) -> None:
        """Let the next event happen."""
        self.now, _, action, args = heapq.heappop(self._heap)
        self.num_events += 1
        action(*args)

    def note(self, who: str, what: Any, frames: Any = ()) -> None:
        """Write down what happened: `what` is shown when something fails, and hashed with the bytes of `frames`."""
        self.last.append((self.now, who, what))
        self._hash.update(f"{self.now:.9f} {who} {what if type(what) is str else type(what).__name__}".encode())
        for frame in frames:
            self._hash.update(frame)
        if self.on_note is not None:
            self.on_note(shown(*self.last[-1]))

    def digest(self) -> str:
        return self._hash.hexdigest()

    def story(self) -> list[str]:
        """The last things that happened."""
        return [shown(*item) for item in self.last]


def shown(at: float, who: str, what: Any) -> str:
    text = what if isinstance(what, str) else _short(what)
    return f"{at - START:10.6f}  {who:<22} {text}"


def _short(message: Any) -> str:
    """A message in one line, its long fields left out."""
    fields = []
    for name in getattr(message, "__slots__", ()):
        value = getattr(message, name, None)
        if value in (None, (), [], {}, b"", 0, False, "") or name in ("secret", "specs", "limits", "timings", "block"):
            continue
        fields.append(f"{name}={_value(value)}")
    return f"{type(message).__name__} {' '.join(fields)}"[:220]


def _value(value: Any) -> str:
    if isinstance(value, bytes):
        return value[:4].hex()
    if isinstance(value, list | tuple):
        return "[" + " ".join(_value(v) for v in value) + "]"
    if hasattr(value, "spans"):
        spans = " ".join(f"{i[:4].hex()}[{a}:{b}]" for i, a, b in value.spans)
        return f"{spans} {'done' if value.error is None else value.error.code + ': ' + value.error.message}"
    if hasattr(value, "num_rows"):
        return f"{value.num_rows} rows"
    if hasattr(value, "block"):
        return f"[{value.start}:{value.stop}] {'done' if value.error is None else value.error.code}"
    return str(value)

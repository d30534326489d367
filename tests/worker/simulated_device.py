"""A device in virtual time: streams run what they are given late, each at its own pace, in the order that events allow.

What a stream runs happens at the end of its time, so that a copy which did not wait for its source copies what was there
before. Nothing happens unless the host looks: asking an event lets some time pass, waiting for one as much as is needed.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class SimEvent:
    timeline: "SimTimeline"
    num_recorded: int = 0  # calls of `record`
    num_reached: int = 0  # of them, how many the stream has come past
    at_ms: float = 0.0

    def is_done(self) -> bool:
        for _ in range(self.timeline.random.randrange(4)):
            self.timeline.step()
        self.timeline.look()
        return self.num_reached == self.num_recorded

    def wait(self) -> None:
        while self.num_reached < self.num_recorded:
            assert self.timeline.step(), "the streams wait for one another"
            self.timeline.look()
        self.timeline.look()

    def ms_until(self, later: "SimEvent") -> float:
        assert min(self.num_reached, later.num_reached) > 0, "an event was read before it was reached"
        return later.at_ms - self.at_ms


@dataclass(eq=False)
class SimStream:
    timeline: "SimTimeline"
    name: str
    free_at_ms: float = 0.0
    ops: deque[tuple[str, Any, Any, float]] = field(default_factory=deque)

    def run(self, work: Callable[[], None]) -> None:
        self._add("run", work, self.timeline.duration_ms(self.name))

    def record(self, event: SimEvent) -> None:
        event.num_recorded += 1
        self._add("record", event, event.num_recorded)

    def wait(self, event: SimEvent) -> None:
        if event.num_recorded:
            self._add("wait", event, event.num_recorded)

    def finish(self) -> None:
        while self.ops:
            assert self.timeline.step(), "the streams wait for one another"
        self.timeline.look()

    def _add(self, kind: str, what: Any, more: Any) -> None:
        self.ops.append((kind, what, more, self.timeline.now_ms))

    def ends_at_ms(self) -> float | None:
        """When what is next in this queue ends; None if it cannot begin yet."""
        if not self.ops:
            return None
        kind, what, more, submitted_ms = self.ops[0]
        begins = max(self.free_at_ms, submitted_ms)
        if kind == "wait":
            return None if what.num_reached < more else max(begins, what.at_ms)
        return begins + (more if kind == "run" else 0.0)


class SimTimeline:
    """Args: `duration_ms`: what a step takes on the stream of a name, h2d, compute or d2h; random if not given.

    Attributes:
        log: (stream, begin, end) of everything that ran.
    """

    def __init__(self, seed: int = 0, duration_ms: Callable[[str], float] | None = None) -> None:
        self.random = random.Random(seed)
        self.now_ms = 0.0
        self.log: list[tuple[str, float, float]] = []
        self.error: Exception | None = None
        self.duration_ms = duration_ms or (lambda _: self.random.choice([0.0, 0.1, 1.0, self.random.expovariate(1.0)]))
        self._streams: list[SimStream] = []

    def compute_stream(self) -> SimStream:
        return self._made("compute")

    def stream(self) -> SimStream:
        return self._made("h2d" if not any(s.name == "h2d" for s in self._streams) else "d2h")

    def _made(self, name: str) -> SimStream:
        self._streams.append(SimStream(self, name))
        return self._streams[-1]

    def event(self) -> SimEvent:
        return SimEvent(self)

    def now_s(self) -> float:
        return self.now_ms / 1e3

    def look(self) -> None:
        """A broken context stays broken: every look at it says so."""
        if self.error is not None:
            raise self.error

    def step(self) -> bool:
        """What ends next, ends; False if nothing can."""
        ends = [(end, i) for i, stream in enumerate(self._streams) if (end := stream.ends_at_ms()) is not None]
        if not ends:
            return False
        end, i = min(ends)
        stream = self._streams[i]
        kind, what, more, _ = stream.ops.popleft()
        stream.free_at_ms = end
        self.now_ms = max(self.now_ms, end)
        if kind == "record":
            what.num_reached, what.at_ms = max(what.num_reached, more), end
        elif kind == "run":
            self.log.append((stream.name, end - more, end))
            if self.error is None:
                try:
                    what()
                except Exception as e:
                    self.error = e
        return True

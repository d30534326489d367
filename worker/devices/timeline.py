"""Streams and events, the only place that knows how a device has them: cuda's own, or a host that does all at once.

A stream runs what it is given in order; an event is a point in a stream that others can wait for. Knows nothing of what
runs. Tests have a third form, which delays everything as long as the rules allow.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream, once recorded; recording it again makes it another one."""

    def is_done(self) -> bool:
        """Whether the stream has come past it. Raises what the device has met meanwhile."""

    def wait(self) -> None:
        """Let this thread sleep until it is done. Raises what the device has met meanwhile."""

    def ms_until(self, later: Any) -> float:
        """Milliseconds from here to an event of the same device that came after; both are done."""


class Stream(Protocol):
    """A queue of a device. Nothing here waits, except `finish`."""

    def run(self, work: Callable[[], None]) -> None:
        """Submit `work`, which does nothing but enqueue on the current stream."""

    def record(self, event: Any) -> None: ...

    def wait(self, event: Any) -> None:
        """What is submitted from here on begins after the event."""

    def finish(self) -> None:
        """Wait until all that was submitted is done."""


class Timeline(Protocol):
    """Makes the streams and events of one device."""

    def compute_stream(self) -> Stream:
        """The current stream of this thread, where kernels run, their state was loaded, and memory is allocated."""

    def stream(self) -> Stream:
        """One more, beside it."""

    def event(self) -> Event: ...

    def now_s(self) -> float:
        """This process's clock, for spans of time."""


def timeline(device: torch.device) -> Timeline:
    """What `device` has: cuda its streams, a cpu the host's order. mps has neither: its one queue is not the host's."""
    return CudaTimeline(device) if device.type == "cuda" else HostTimeline()


class CudaTimeline:
    """Of a CUDA device, for the thread that makes it: that thread's current stream becomes one that kernels, models and
    the caching allocator have to themselves. The default stream would do for that, but orders some libraries' calls on it
    against all other streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        compute.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(compute)
        self._compute = CudaStream(compute)

    def compute_stream(self) -> Stream:
        return self._compute

    def stream(self) -> Stream:
        return CudaStream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def event(self) -> Event:
        return CudaEvent()

    def now_s(self) -> float:
        return time.perf_counter()


class CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self, event: "CudaEvent") -> None:
        event.event.record(self._stream)

    def wait(self, event: "CudaEvent") -> None:
        self._stream.wait_event(event.event)

    def finish(self) -> None:
        self._stream.synchronize()


class CudaEvent:
    """`blocking`: who waits for it sleeps instead of spinning."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def is_done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()

    def ms_until(self, later: "CudaEvent") -> float:
        return float(self.event.elapsed_time(later.event))


class HostTimeline:
    """Everything has happened when the call returns."""

    def compute_stream(self) -> Stream:
        return HostStream()

    def stream(self) -> Stream:
        return HostStream()

    def event(self) -> Event:
        return HostEvent()

    def now_s(self) -> float:
        return time.perf_counter()


class HostStream:
    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self, event: "HostEvent") -> None:
        event.at_s = time.perf_counter()

    def wait(self, event: "HostEvent") -> None:
        return

    def finish(self) -> None:
        return


class HostEvent:
    def __init__(self) -> None:
        self.at_s = 0.0

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def ms_until(self, later: "HostEvent") -> float:
        return (later.at_s - self.at_s) * 1e3

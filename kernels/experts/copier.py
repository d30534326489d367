"""Copies experts into slots, one after the other, beside whatever else runs.

Knows memory, streams and events; does not know experts. One thread copies: on the CPU straight from the mapped file; for
CUDA through two pinned buffers in turn, so that reading the next part overlaps the transfer of the last one.
"""

# mypy: disable-error-code="no-untyped-call"

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

Pairs = Callable[[], Sequence[tuple[torch.Tensor, torch.Tensor]]]
"""Gives (source in host memory, destination on the device), of equal shape and dtype, when it is their turn."""
Event = torch.cuda.Event
"""After which a copy is there; on the CPU there is none."""


class Copier:
    """A thread and, for CUDA, a stream.

    Args:
        max_part_bytes: no source is larger.
        observe: told the seconds of each copy, later.
    """

    def __init__(self, device: torch.device, max_part_bytes: int, observe: Callable[[float], None]) -> None:
        self._device = device
        self._observe = observe
        self._thread = ThreadPoolExecutor(1, "penstock-experts")
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._stream = torch.cuda.Stream(device)
            self._staging = deque((torch.empty(max_part_bytes, dtype=torch.uint8, pin_memory=True), Event()) for _ in range(2))
            self._timed: deque[tuple[Event, Event]] = deque()

    def submit(self, pairs: Pairs, after: Sequence[Event], ended: Callable[[bool], None]) -> Future[Event | None]:
        """Copies when its turn comes, on the device not before the events `after`.

        The future's result is the event after which the weights are there, None if they are there already. `ended` is
        told whether it went well before anybody who waits for the future is; it is not told of what is cancelled.
        """
        return self._thread.submit(self._run, pairs, after, ended)

    def close(self) -> None:
        """Ends the thread; what has not begun is cancelled."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._is_cuda:
            self._stream.synchronize()

    def _run(self, pairs: Pairs, after: Sequence[Event], ended: Callable[[bool], None]) -> Event | None:
        try:
            event = self._copy(pairs, after)
        except BaseException:
            ended(False)
            raise
        ended(True)
        return event

    @torch.inference_mode()  # the mode belongs to the thread, and slots made in it can only be written in it
    def _copy(self, pairs: Pairs, after: Sequence[Event]) -> Event | None:
        if self._is_cuda:
            return self._copy_cuda(pairs, after)
        start = time.perf_counter()
        for source, destination in pairs():
            destination.copy_(source)
        self._observe(time.perf_counter() - start)
        return None

    def _copy_cuda(self, pairs: Pairs, after: Sequence[Event]) -> Event:
        while self._timed and self._timed[0][1].query():
            begin, end = self._timed.popleft()
            self._observe(begin.elapsed_time(end) / 1e3)
        begin, end = Event(enable_timing=True), Event(enable_timing=True)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for event in after:
                self._stream.wait_event(event)
            begin.record(self._stream)
            for source, destination in pairs():
                staging, is_free = self._staging[0]
                self._staging.rotate(-1)
                is_free.synchronize()
                pinned = staging[: source.nbytes].view(source.dtype).view(source.shape)
                pinned.copy_(source)
                destination.copy_(pinned, non_blocking=True)
                is_free.record(self._stream)
            end.record(self._stream)
        self._timed.append((begin, end))
        return end

"""How long a call takes on a device: events and graphs on CUDA, the wall clock elsewhere; and the device's measured ceilings.

Knows time; does not know kernels. Calls that are compared are timed in turns, so that a slow moment meets all of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
FLUSH_BYTES = 256 << 20
"""Written between two timed calls on CUDA, so that none finds its inputs in the L2 cache."""
MAX_REPEATS = 1000


def _wall_ms(call: Call, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) * 1e3 / repeats


class HostClock:
    """Times by the wall clock; short calls several times in a row."""

    MIN_MS = 2.0

    def __init__(self) -> None:
        self._repeats: dict[int, int] = {}

    def prepare(self, call: Call, can_graph: bool) -> Call:
        """Warm up; returns what is to be timed."""
        once = min(_wall_ms(call, 1) for _ in range(3))
        self._repeats[id(call)] = min(max(int(self.MIN_MS / max(once, 1e-4)), 1), MAX_REPEATS)
        return call

    def ms(self, call: Call) -> float:
        return _wall_ms(call, self._repeats[id(call)])


class CudaClock:
    """Times by events; where it can, a captured graph is replayed, so that no launch is waited for."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def prepare(self, call: Call, can_graph: bool) -> Call:
        """Warm up, and capture if it is possible; returns what is to be timed."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        if not can_graph:
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def ms(self, call: Call) -> float:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended))


def clock_of(device: torch.device) -> HostClock | CudaClock:
    return CudaClock() if device.type == "cuda" else HostClock()


def in_turns(
    clock: HostClock | CudaClock, calls: Mapping[str, Call], can_graph: bool, num_rounds: int
) -> dict[str, list[float]]:
    """name -> milliseconds of each round; in every round each call once, in turn."""
    ready = {name: clock.prepare(call, can_graph) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for index in range(num_rounds):
        for name in sorted(ready, reverse=bool(index % 2)):
            times[name].append(clock.ms(ready[name]))
    return times


def speedup(ours: Sequence[float], other: Sequence[float]) -> float:
    """How many times as fast as the other: the median over rounds of their ratio."""
    return statistics.median(theirs / mine for mine, theirs in zip(ours, other, strict=True))


# --- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device reaches: `copy` in bytes/s (read + written), `<dtype>` in FLOP/s of a large matrix product, and on
    CUDA `h2d` and `d2h` in bytes/s of pinned copies."""
    is_cuda = device.type == "cuda"
    clock = clock_of(device)
    source = torch.randint(0, 100, ((1 << 30 if is_cuda else 1 << 27) // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)

    def best_ms(call: Call) -> float:
        return min(in_turns(clock, {"it": call}, False, 10)["it"])

    found = {"copy": 2e3 * source.nbytes / best_ms(lambda: target.copy_(source))}
    size = 8192 if is_cuda else 1024
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if is_cuda else (torch.float32,):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2e3 * size**3 / best_ms(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    if is_cuda:
        host = torch.empty(256 << 20, dtype=torch.uint8).pin_memory()
        there = torch.empty(host.shape, dtype=torch.uint8, device=device)
        found["h2d"] = 1e3 * host.nbytes / best_ms(lambda: there.copy_(host, non_blocking=True))
        found["d2h"] = 1e3 * host.nbytes / best_ms(lambda: host.copy_(there, non_blocking=True))
    return found

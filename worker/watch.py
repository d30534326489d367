"""What a worker does at this moment, and how long it may: one short write per change, into a page that its supervisor reads.

Knows the page, and what each kernel has taken so far; does not know processes, nor who acts when a limit is passed. The
page outlives the worker: the next one finds there how long its kernels took, so that it needs no patience for their first
run. A reader may see a write half done: it believes what it has seen twice.
"""

import hashlib
import math
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

SIZE: Final = 8192
STARTING, IDLE, TURNING, LOADING, RUNNING, ENDING = range(6)
IN_KERNEL: Final = (LOADING, RUNNING)
_ACTIVITY = struct.Struct("@qqqqq64s")
_TIMES = struct.Struct("@8sdd")  # hash of a name, its first run and its p99, in seconds
_TABLE: Final = 256
_NUM_SLOTS: Final = (SIZE - _TABLE) // _TIMES.size

FACTOR: Final = 5.0
"""A run may take so many times what is normal."""
TURN_FACTOR: Final = 6.0
"""A turn of the loop outside a kernel copies and sends: it may take so many times `hang_limit_s`."""
ENDING_S: Final = 30.0
MAX_LIMIT_S: Final = 7 * 86400.0
REFRESH: Final = 100
"""Runs after which a limit that sinks is worked out again."""
_QUANTILE: Final = 0.99
_STEP: Final = 0.25


@dataclass(frozen=True, slots=True)
class Activity:
    """What a worker does since `began_ns` (CLOCK_MONOTONIC), for at most `limit_ns`; `num_done`: runs that ended well."""

    state: int
    began_ns: int
    limit_ns: int
    num_done: int
    is_ready: bool
    name: str


class Page:
    """The shared page: an anonymous file, made by the supervisor and inherited by the worker."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = _make() if fd is None else fd
        self.memory = mmap.mmap(self.fd, SIZE)

    def begin(self, limit_s: float) -> None:
        """A worker is about to be started; what is known of its kernels stays."""
        _ACTIVITY.pack_into(self.memory, 0, STARTING, time.monotonic_ns(), round(limit_s * 1e9), 0, 0, b"")

    def read(self) -> Activity:
        state, began_ns, limit_ns, num_done, is_ready, name = _ACTIVITY.unpack_from(self.memory, 0)
        return Activity(state, began_ns, limit_ns, num_done, bool(is_ready), name.rstrip(b"\0").decode(errors="replace"))


def _make() -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("penstock-watch")
    else:
        with tempfile.TemporaryFile() as f:
            fd = os.dup(f.fileno())
    os.ftruncate(fd, SIZE)
    return fd


class Pace:
    """How long one kernel takes: its first run in a process, which may compile, and the 99th percentile of the others.

    The percentile is tracked by its logarithm, a step up for each longer time and a 99th of it down for each shorter one,
    so that it needs no memory and follows changes (stochastic approximation, Robbins and Monro 1951).
    """

    __slots__ = ("declared_s", "first_s", "has_run", "limit_ns", "name", "p99_s", "slot")

    def __init__(self, name: bytes, declared_s: float, slot: int | None) -> None:
        self.name = name
        self.declared_s = declared_s
        self.slot = slot
        self.first_s = 0.0  # 0: not known
        self.p99_s = 0.0
        self.has_run = False
        self.limit_ns = 0  # of runs that are predicted to be short; kept by `Watch`

    def limit_s(self, floor_s: float, first_s: float, predicted_s: float) -> float:
        """The longest that a run which was predicted to take `predicted_s` may take."""
        limit_s = max(floor_s, FACTOR * self.p99_s, FACTOR * predicted_s, self.declared_s)
        if not self.has_run:
            limit_s = max(limit_s, FACTOR * self.first_s if self.first_s else first_s)
        return min(limit_s, MAX_LIMIT_S)

    def measure(self, took_s: float) -> bool:
        """A run ended well; whether it changes the limit by more than a little."""
        if not self.has_run:
            self.has_run, self.first_s = True, max(took_s, 1e-6)
            return True
        if self.p99_s == 0.0:
            self.p99_s = max(took_s, 1e-6)
            return True
        is_longer = took_s > self.p99_s
        self.p99_s *= _UP if is_longer else _DOWN
        return is_longer


_UP: Final = math.exp(_STEP * _QUANTILE)
_DOWN: Final = math.exp(_STEP * (_QUANTILE - 1.0))


class Watch:
    """The worker's side: says what it does.

    Args:
        memory: the page's, or None where nobody watches.
        floor_s: no run is too long before this; first_s: nor a kernel's loading or first run before that.
    """

    def __init__(self, memory: mmap.mmap | None = None, floor_s: float = 10.0, first_s: float = 600.0) -> None:
        self._memory: mmap.mmap | bytearray = bytearray(SIZE) if memory is None else memory
        self._floor_s = floor_s
        self._first_s = first_s
        self._turn_ns = round(TURN_FACTOR * floor_s * 1e9)
        self._paces: dict[str, Pace] = {}
        self._known = dict(self._read_times())
        self._pace: Pace | None = None
        self._began_ns = 0
        self.num_done = 0
        self.is_ready = False

    def add(self, name: str, declared_s: float | None = None) -> None:
        """Something whose time is limited by what it took before: a kernel, its `open`, its `step`."""
        slot = len(self._paces) if len(self._paces) < _NUM_SLOTS else None
        pace = self._paces[name] = Pace(name.encode()[:64], declared_s or 0.0, slot)
        pace.first_s, pace.p99_s = self._known.get(_digest(name), (0.0, 0.0))
        pace.limit_ns = self._limit_ns(pace)

    def keep(self) -> None:
        """All have been added: the page's table is theirs now."""
        self._memory[_TABLE:SIZE] = bytes(SIZE - _TABLE)
        for pace in self._paces.values():
            self._write_times(pace)

    def start(self, name: str, predicted_ms: float = 0.0) -> None:
        """A run of what was added under this name begins."""
        pace = self._pace = self._paces[name]
        self._enter(RUNNING, self._limit_ns(pace, 1e-3 * predicted_ms) if predicted_ms else pace.limit_ns, pace.name)

    def stop(self, is_done: bool) -> None:
        """It has ended; only one that ended well teaches how long a run takes."""
        began_ns = self._began_ns
        self.num_done += is_done
        self._enter(TURNING, self._turn_ns)
        if not is_done:
            return
        pace = self._pace
        assert pace is not None
        if pace.measure(1e-9 * (self._began_ns - began_ns)) or not self.num_done % REFRESH:
            pace.limit_ns = self._limit_ns(pace)
            self._write_times(pace)

    def load(self, name: str) -> None:
        self._enter(LOADING, round(self._first_s * 1e9), name.encode()[:64])

    def turn(self) -> None:
        """The loop does something of its own."""
        self._enter(TURNING, self._turn_ns)

    def rest(self) -> None:
        """The loop waits, for as long as it likes."""
        self._enter(IDLE, 0)

    def end(self) -> None:
        self._enter(ENDING, round(ENDING_S * 1e9))

    def _enter(self, state: int, limit_ns: int, name: bytes = b"") -> None:
        self._began_ns = time.monotonic_ns()
        _ACTIVITY.pack_into(self._memory, 0, state, self._began_ns, limit_ns, self.num_done, self.is_ready, name)

    def _limit_ns(self, pace: Pace, predicted_s: float = 0.0) -> int:
        return round(1e9 * pace.limit_s(self._floor_s, self._first_s, predicted_s))

    def _write_times(self, pace: Pace) -> None:
        if pace.slot is not None:
            place = _TABLE + pace.slot * _TIMES.size
            _TIMES.pack_into(self._memory, place, _digest(pace.name.decode(errors="replace")), pace.first_s, pace.p99_s)

    def _read_times(self) -> Iterable[tuple[bytes, tuple[float, float]]]:
        for slot in range(_NUM_SLOTS):
            digest, first_s, p99_s = _TIMES.unpack_from(self._memory, _TABLE + slot * _TIMES.size)
            if first_s > 0.0 and math.isfinite(first_s) and 0.0 <= p99_s < math.inf:
                yield digest, (first_s, p99_s)


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode()[:64], digest_size=8).digest()

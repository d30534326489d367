"""Memory of this process that others on the machine may read: segments, cut into slots, lent and given back.

Knows which bytes are free. Does not know messages, sessions or what the bytes mean; used by clients for what they submit and by
workers for what they answer. Any thread may call it.
"""

import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np

from penstock.broker.segments import MAX_SEGMENTS, Segment, make
from penstock.broker.shared import MAX_SLOTS, SharedBytes

PAGE: Final = 4096
MIN_SEGMENT_BYTES: Final = 16 << 20
Slot = tuple[int, int]
"""(file descriptor, offset)."""


class Extents:
    """The free ranges of one segment, in order; the first that is large enough is taken."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.free: list[tuple[int, int]] = [(0, nbytes)]

    @property
    def is_empty(self) -> bool:
        """All of it is free."""
        return self.free == [(0, self.nbytes)]

    def take(self, nbytes: int) -> int | None:
        """The offset of `nbytes` that are free no more; None if there is no such range."""
        for i, (start, stop) in enumerate(self.free):
            if stop - start >= nbytes:
                if stop - start == nbytes:
                    del self.free[i]
                else:
                    self.free[i] = (start + nbytes, stop)
                return start
        return None

    def give(self, start: int, nbytes: int) -> None:
        """A range that was taken is free again, and one with its neighbours."""
        stop, i = start + nbytes, bisect_left(self.free, (start, 0))
        if i < len(self.free) and self.free[i][0] == stop:
            stop = self.free.pop(i)[1]
        if i and self.free[i - 1][1] == start:
            i -= 1
            start = self.free.pop(i)[0]
        self.free.insert(i, (start, stop))


class Arena:
    """See the module.

    A slot is free again when nobody here refers to its `SharedBytes` any more *and* nobody has it on loan. Both are counted:
    the broker gives back one loan for every descriptor that it was sent.

    Args:
        max_bytes: of all segments together.
        min_bytes: what is smaller than this is not worth it.
    Attributes:
        has_shrunk: segments were given up since somebody last looked: the broker should be told.
        num_full: how often there was no room; error: why no segment could be made, if so.
    """

    def __init__(self, max_bytes: int, min_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.min_bytes = min_bytes
        self.has_shrunk = False
        self.num_placed = self.num_full = 0
        self.error = ""
        self._segments: dict[int, tuple[Segment, Extents]] = {}
        self._taken: dict[Slot, int] = {}
        self._loans: Counter[Slot] = Counter()
        self._is_dropped: set[Slot] = set()
        self._drops: deque[Slot] = deque()  # from finalizers, which may run anywhere and so take no lock
        self._lock = threading.Lock()

    # --- the owner's side -------------------------------------------------------------------------------------------

    def place(self, array: "np.ndarray[Any, Any]") -> SharedBytes | None:
        """A copy of an array's bytes in C order that others may read; None if it is too small or there is no room."""
        nbytes = array.nbytes
        if nbytes < self.min_bytes:
            return None
        with self._lock:
            self._collect()
            found = self._take(-(-nbytes // PAGE) * PAGE) if len(self._taken) < MAX_SLOTS else None
            if found is None:
                self.num_full += 1
                return None
            segment, offset = found
            self.num_placed += 1
        slot = (segment.fd, offset)
        shared = SharedBytes((0, segment.fd, segment.inode), offset, nbytes, segment, partial(self._drops.append, slot))
        room = np.frombuffer(segment.map, np.uint8, nbytes, offset)
        np.copyto(room.view(array.dtype).reshape(array.shape), array)
        return shared

    def lend(self, frames: Iterable[object]) -> None:
        """These are about to be sent to the broker."""
        with self._lock:
            for frame in frames:
                if isinstance(frame, SharedBytes) and self.owns(frame):
                    self._loans[frame.place[1], frame.offset] += 1

    def owns(self, shared: SharedBytes) -> bool:
        """Whether these bytes are a slot of this arena, and not of one that was closed."""
        found = self._segments.get(shared.place[1])
        return found is not None and found[0] is shared.memory

    def take_back(self, slots: Iterable[Slot]) -> None:
        """The broker gives back one loan of each."""
        with self._lock:
            for slot in slots:
                if self._loans[slot] > 1:
                    self._loans[slot] -= 1
                else:
                    del self._loans[slot]
                    self._free_if_idle(slot)

    def reconcile(self, lent: Iterable[Slot]) -> None:
        """After a reconnect: the loans that the broker knows of, and no others."""
        with self._lock:
            self._loans = Counter(slot for slot in lent if slot in self._taken)
            for slot in list(self._is_dropped):
                self._free_if_idle(slot)

    def trim(self) -> None:
        """Give up the segments in which nothing is taken."""
        with self._lock:
            self._collect()
            self._give_up_empty()

    def inodes(self) -> list[int]:
        """Of its segments."""
        with self._lock:
            return [segment.inode for segment, _ in self._segments.values()]

    @property
    def num_bytes(self) -> int:
        return sum(segment.nbytes for segment, _ in list(self._segments.values()))

    @property
    def num_taken(self) -> int:
        """Slots in use."""
        with self._lock:
            self._collect()
            return len(self._taken)

    def close(self) -> None:
        """Make and give nothing more. What is still referred to stays until it is not."""
        with self._lock:
            self.max_bytes = 0
            self._segments.clear()
            self._taken.clear()
            self._loans.clear()
            self._is_dropped.clear()

    def forget_parent(self) -> None:
        """In a forked child: the memory is the parent's, and so may be the lock."""
        self._lock = threading.Lock()
        self.close()

    # --- with the lock ----------------------------------------------------------------------------------------------

    def _take(self, nbytes: int) -> tuple[Segment, int] | None:
        for segment, extents in self._segments.values():
            offset = extents.take(nbytes)
            if offset is not None:
                self._taken[segment.fd, offset] = nbytes
                return segment, offset
        return self._take(nbytes) if self._grow(nbytes) else None

    def _grow(self, nbytes: int) -> bool:
        """One more segment, as large as all that there are; at least large enough, if that is within the limit."""
        if nbytes > self.max_bytes or self.error:
            return False
        if self.num_bytes + nbytes > self.max_bytes or len(self._segments) >= MAX_SEGMENTS:
            self._give_up_empty()  # what is left of them may be too small for this one
        room = self.max_bytes - self.num_bytes
        if nbytes > room or len(self._segments) >= MAX_SEGMENTS:
            return False
        size = max(nbytes, min(room, max(MIN_SEGMENT_BYTES, self.num_bytes)))
        try:
            segment = make(size)
        except OSError as e:
            self.error = f"no segment of {size} bytes: {e.strerror}"
            return False
        self._segments[segment.fd] = (segment, Extents(size))
        return True

    def _collect(self) -> None:
        while self._drops:
            slot = self._drops.popleft()
            if slot in self._taken:
                self._is_dropped.add(slot)
                self._free_if_idle(slot)

    def _free_if_idle(self, slot: Slot) -> None:
        if slot in self._is_dropped and slot not in self._loans:
            self._is_dropped.discard(slot)
            self._segments[slot[0]][1].give(slot[1], self._taken.pop(slot))

    def _give_up_empty(self) -> None:
        for fd, (_, extents) in list(self._segments.items()):
            if extents.is_empty:
                del self._segments[fd]
                self.has_shrunk = True

    def check(self) -> None:
        """Assert what must hold between any two calls; tests call it."""
        with self._lock:
            taken = [(fd, offset, offset + n, "taken") for (fd, offset), n in self._taken.items()]
            free = [(fd, a, b, "free") for fd, (_, e) in self._segments.items() for a, b in e.free]
            ranges = sorted(taken + free)
            for fd, (segment, _) in self._segments.items():
                own = [r for r in ranges if r[0] == fd]
                assert own[0][1] == 0 and own[-1][2] == segment.nbytes
                assert all(a[2] == b[1] for a, b in pairwise(own)), "a hole, or an overlap"
                assert not any(a[3] == b[3] == "free" for a, b in pairwise(own)), "not joined"
            assert {r[0] for r in ranges} == set(self._segments)
            assert self._loans.keys() <= self._taken.keys() and self._is_dropped <= self._taken.keys()

"""A peer's half of the shared-memory path, the same for clients and workers: an arena of its own, and what it reads of others.

Knows when the broker's offer can be taken up. Does not know sockets, tasks or kernels.
"""

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from penstock.broker.arena import Arena, Slot
from penstock.broker.columns import Block, Stored, view
from penstock.broker.protocol import Release, Share
from penstock.broker.segments import IS_POSSIBLE, OpenSegments, Segment, SegmentError, open_segment
from penstock.broker.shared import SharedBytes

log = logging.getLogger("penstock")
_arenas: "weakref.WeakSet[Arena]" = weakref.WeakSet()
MAX_NUMBER: Final = 1 << 48
IDLE_S: Final = 30.0


class PeerMemory:
    """See the module.

    Args:
        max_bytes: of the own arena; 0: nothing is shared.
        is_writable: map what others lend for writing, which pinning it for a device needs.
    Attributes:
        arena: None until a broker has offered to share, and after it was found that it cannot be.
        is_ending: this process is about to be gone, so nothing more is placed in its memory.
    """

    def __init__(self, max_bytes: int, is_writable: bool = False) -> None:
        self._max_bytes = max_bytes if IS_POSSIBLE else 0
        self.arena: Arena | None = None
        self.is_on = False
        self.is_ending = False
        self.opened = OpenSegments(is_writable)
        self._is_off_for_good = False
        self._seen_placed, self._idle_since = 0, 0.0

    # --- what the broker says ---------------------------------------------------------------------------------------

    def welcome(self, offer: Any) -> list[Segment]:
        """Take up what a `welcome` offers if this process can read the broker's memory; what is read no more comes back."""
        closed = self.opened.clear()
        parsed = _parse(offer)
        self.is_on = parsed is not None and not self._is_off_for_good and self._max_bytes > 0 and _can_read(parsed[0])
        if parsed is None or not self.is_on:
            self._let_go()
            return closed
        _, min_bytes, max_bytes, held = parsed
        if self.arena is None:
            self.arena = Arena(min(self._max_bytes, max_bytes), min_bytes)
            _arenas.add(self.arena)
        self.arena.reconcile(held)
        return closed

    def share(self) -> Share:
        """What to say once an offer was taken up, and again after the arena has shrunk."""
        assert self.arena is not None
        self.arena.has_shrunk = False
        return Share(segments=self.arena.inodes())

    @property
    def must_tell(self) -> bool:
        """The broker should know that segments were given up."""
        return self.is_on and self.arena is not None and self.arena.has_shrunk

    def release(self, m: Release) -> list[Segment]:
        """Slots come back, and segments of others are gone: those that were open."""
        if self.arena is not None:
            self.arena.take_back(_slots(m.slots))
        return self.opened.forget(m.segments)

    def turn_off(self, why: str) -> None:
        """It cannot be shared after all, for as long as this process lives."""
        log.warning("nothing is shared through memory any more: %s", why)
        self._is_off_for_good, self.is_on = True, False
        self._let_go()

    def _let_go(self) -> None:
        if self.arena is not None:
            self.arena.close()
            self.arena = None

    def tick(self, now: float) -> None:
        """Give idle memory back after a while."""
        arena = self.arena
        if arena is not None and arena.num_bytes:
            if arena.num_placed != self._seen_placed or arena.num_taken:
                self._seen_placed, self._idle_since = arena.num_placed, now
            elif now - self._idle_since > IDLE_S:
                arena.trim()

    def close(self) -> list[Segment]:
        """Share nothing any more; what is read no more comes back."""
        self.is_on, self._is_off_for_good = False, True
        self._let_go()
        return self.opened.clear()

    # --- bytes ------------------------------------------------------------------------------------------------------

    def place(self, array: "np.ndarray[Any, Any]") -> SharedBytes | None:
        """A copy of an array's bytes that others may read, if it is worth it and there is room."""
        arena = self.arena
        return None if arena is None else arena.place(array)

    def lendable(self, block: Block) -> Block:
        """The block as it can be sent now: without references to an arena that was closed since."""
        if not block.layout.num_framed or not block.has_shared:
            return block
        arena = self.arena
        if arena is not None and all(arena.owns(f) for f in block.frames if isinstance(f, SharedBytes)):
            return block
        return block.copied()

    def lend(self, blocks: Iterable[Block]) -> None:
        """These are about to be sent."""
        if self.arena is not None:
            for block in blocks:
                if block.layout.num_framed:
                    self.arena.lend(block.frames)

    def place_rows(self, block: Block) -> Block:
        """The block with its large framed rows in the arena, as far as there is room."""
        if self.arena is None or self.is_ending or not block.layout.num_framed:
            return block
        frames = list[Stored](block.frames)
        for i in range(int(block.layout.has_packed), len(frames)):
            frame = frames[i]
            if len(frame) >= self.arena.min_bytes:
                frames[i] = self.arena.place(np.frombuffer(view(frame), np.uint8)) or frame
        return Block(block.num_rows, block.layout, block.lengths, frames)

    def take_out(self, block: Block) -> Block:
        """The block with its shared rows as copies of this process's own. Raises SegmentError or DescriptorError."""
        self.opened.attach(block.frames)
        frames = [_copy(f) if isinstance(f, SharedBytes) else f for f in block.frames]
        return Block(block.num_rows, block.layout, block.lengths, frames)


def _copy(shared: SharedBytes) -> memoryview:
    copy = np.empty(shared.nbytes, np.uint8)
    np.copyto(copy, np.frombuffer(shared.buffer, np.uint8))
    return copy.data


def _can_read(probe: tuple[int, int, int]) -> bool:
    try:
        open_segment(probe)
    except SegmentError as e:
        log.info("the broker's memory cannot be read here, so all goes through the socket: %s", e)
        return False
    return True


def _parse(offer: Any) -> tuple[tuple[int, int, int], int, int, list[Slot]] | None:
    """(probe, min_bytes, max_bytes, slots held) of an offer; None if it is none that this version understands."""
    probe, held = offer.get("probe"), offer.get("held", [])
    sizes = [offer.get("min_bytes"), offer.get("max_bytes")]
    if not (_are_numbers(probe) and _are_numbers(sizes) and _are_numbers(held) and len(probe) == 3):
        return None
    return (probe[0], probe[1], probe[2]), max(sizes[0], 1), sizes[1], _slots(held)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < MAX_NUMBER for v in values)


def _slots(numbers: Sequence[int]) -> list[Slot]:
    return list(zip(numbers[::2], numbers[1::2], strict=False))


def _after_fork() -> None:
    for arena in _arenas:
        arena.forget_parent()


os.register_at_fork(after_in_child=_after_fork)

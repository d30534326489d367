"""A pool of buffers: one piece of memory, taken at the start, lent out in blocks of powers of two.

Knows offsets, sizes and who has written to which bytes; does not know what is in them, nor streams: whoever lends a
buffer to a device gives it back when the device is done with it. Blocks are halves of halves, so that what comes back
grows together again and no mix of sizes wears the pool out (Knowlton 1965, buddy system); finer classes would waste less
of a block (a quarter on average), but would not join. Not thread-safe: one thread borrows and gives back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch

PAGE_BYTES = 4096
"""The smallest block."""

Fill = Callable[[torch.Tensor, int], None]
"""Sets every byte of a piece of the pool's memory, in the order of the stream that writes to it next."""


class Scrub(Enum):
    """What becomes of a client's bytes. ZERO: zeroed before anybody else has the block (at once is not needed: nobody can
    see them in between). POISON: overwritten with 0xFF, NaN in every float, when the buffer comes back: for finding who reads
    too late. NONE: left, where all clients are one person."""

    ZERO = "zero"
    POISON = "poison"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Refused:
    """The pool has no block of this size now; borrowing never waits."""

    num_bytes: int
    available_bytes: int


class Buffer:
    """Bytes on loan: `bytes`, uint8 `[num_bytes]`, until `give_back`."""

    __slots__ = ("_pool", "bytes", "offset", "owner", "size")

    def __init__(self, pool: "Pool", lent: torch.Tensor, offset: int | None, size: int, owner: str) -> None:
        self._pool: Pool | None = pool
        self.bytes = lent
        self.offset = offset  # None: not the pool's own memory
        self.size = size
        self.owner = owner  # whose bytes are in there at the end

    def give_back(self) -> None:
        """The end of the loan; once more is an error of ours (ValueError)."""
        if self._pool is None:
            raise ValueError("this buffer was given back already")
        pool, self._pool = self._pool, None
        pool._take_back(self)
        del self.bytes


CLEAN, MIXED = None, ""
"""Who has written to a free block, beside the name of one principal: nobody; several, or somebody without a name."""


class Pool:
    """Buffers of one kind of memory.

    Args:
        max_bytes: of the one allocation made here; whole pages of it are used.
        allocate: makes uint8 memory of a size: pinned, on a device, plain. Also for what does not fit the pool.
        fill: see `Fill`; None = at once, from the host.

    Attributes:
        num_borrowed, num_returned: loans begun and ended, of the pool's memory and beside it.
        num_allocated: loans for which memory had to be allocated because the pool was full or too small: 0, when all is well.
        high_bytes: the most that has been lent at once.
    """

    def __init__(
        self,
        max_bytes: int,
        allocate: Callable[[int], torch.Tensor],
        scrub: Scrub = Scrub.ZERO,
        fill: Fill | None = None,
    ) -> None:
        self.total_bytes = max_bytes // PAGE_BYTES * PAGE_BYTES
        self._allocate = allocate
        self._memory = allocate(self.total_bytes)
        self._scrub = scrub
        self._fill: Fill = fill or _fill_now
        self._fill(self._memory, 0)  # so that its pages exist
        # Size -> offset -> who has written there. The last one freed is the next one lent: its bytes are in a cache.
        self._free: dict[int, dict[int, str | None]] = {}
        offset = 0
        for bit in reversed(range(self.total_bytes.bit_length())):
            if self.total_bytes & 1 << bit:
                self._free[1 << bit] = {offset: CLEAN}
                offset += 1 << bit
        self.num_borrowed = self.num_returned = self.num_allocated = 0
        self.lent_bytes = self.high_bytes = 0

    @property
    def available_bytes(self) -> int:
        return self.total_bytes - self.lent_bytes

    def borrow(self, num_bytes: int, principal: str = "", *, will_fill: bool = False) -> Buffer | Refused:
        """`num_bytes` (1 or more) until they are given back.

        Args:
            principal: who will see them; "" is nobody in particular, and never the same as before.
            will_fill: the borrower writes every byte before anybody reads it, so that zeroing would be work done twice.
        """
        size = max(1 << (num_bytes - 1).bit_length(), PAGE_BYTES)
        found = self._split(size)
        if found is None:
            return Refused(num_bytes, self.available_bytes)
        offset, owner = found
        is_anothers = owner is not CLEAN and (owner != principal or not principal)
        if is_anothers and self._scrub is Scrub.ZERO and not will_fill:
            self._fill(self._memory[offset : offset + size], 0)
        self.num_borrowed += 1
        self.lent_bytes += size
        self.high_bytes = max(self.high_bytes, self.lent_bytes)
        # Behind the bytes that are filled the former owner's are still there.
        leaves = MIXED if is_anothers and will_fill else principal
        return Buffer(self, self._memory[offset : offset + num_bytes], offset, size, leaves)

    def borrow_or_allocate(self, num_bytes: int, principal: str = "", *, will_fill: bool = False) -> Buffer:
        """The same, with memory of its own where the pool refuses; that is counted."""
        lent = self.borrow(num_bytes, principal, will_fill=will_fill)
        if isinstance(lent, Buffer):
            return lent
        self.num_borrowed += 1
        self.num_allocated += 1
        made = self._allocate(num_bytes)
        if self._scrub is not Scrub.NONE and not will_fill:
            self._fill(made, 0)  # the allocator has its own ideas of what is in there
        return Buffer(self, made, None, num_bytes, principal)

    @contextmanager
    def lend(self, num_bytes: int, principal: str = "") -> Iterator[torch.Tensor]:
        """`borrow_or_allocate` for the time of a with block."""
        buffer = self.borrow_or_allocate(num_bytes, principal)
        try:
            yield buffer.bytes
        finally:
            buffer.give_back()

    def numbers(self, name: str) -> dict[str, float]:
        """For heartbeats, each with the pool's name in front."""
        return {
            f"{name}_available_bytes": self.available_bytes,
            f"{name}_high_bytes": self.high_bytes,
            f"{name}_borrowed": self.num_borrowed,
            f"{name}_returned": self.num_returned,
            f"{name}_allocated": self.num_allocated,
        }

    def check(self) -> None:
        """Every byte is in exactly one free block or on loan, and no two free halves wait to be joined. For tests."""
        spans = sorted((offset, size) for size, offsets in self._free.items() for offset in offsets)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(spans)), "free blocks overlap"
        assert sum(size for _, size in spans) == self.available_bytes, "bytes are lost"
        assert all(offset % size == 0 for offset, size in spans), "a block is not aligned"
        for size, offsets in self._free.items():
            assert not any(offset ^ size in offsets for offset in offsets), "two free halves are not joined"

    def _split(self, size: int) -> tuple[int, str | None] | None:
        """A free block of `size`, cut from the smallest that is large enough."""
        large = size
        while not self._free.get(large):
            large <<= 1
            if large > self.total_bytes:
                return None
        offset, owner = self._free[large].popitem()
        while large > size:
            large >>= 1
            self._free.setdefault(large, {})[offset + large] = owner
        return offset, owner

    def _take_back(self, buffer: Buffer) -> None:
        self.num_returned += 1
        offset, size = buffer.offset, buffer.size
        if offset is None:
            return
        self.lent_bytes -= size
        owner: str | None = buffer.owner
        if self._scrub is Scrub.POISON:
            self._fill(self._memory[offset : offset + size], 0xFF)
            owner = CLEAN
        while offset ^ size in self._free.get(size, {}):
            owner = _of_both(owner, self._free[size].pop(offset ^ size))
            offset &= ~size
            size <<= 1
        self._free.setdefault(size, {})[offset] = owner


def _of_both(one: str | None, other: str | None) -> str | None:
    """Who has written to two halves."""
    if one is CLEAN or one == other:
        return other
    return one if other is CLEAN else MIXED


def _fill_now(memory: torch.Tensor, byte: int) -> None:
    memory.fill_(byte)


def plain(num_bytes: int) -> torch.Tensor:
    """Ordinary host memory."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def pinned(num_bytes: int) -> torch.Tensor:
    """Host memory that a GPU copies from and to without the CPU's help. torch rounds it up to a power of two."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

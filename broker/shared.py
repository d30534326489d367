"""Bytes that do not travel: a descriptor of where they lie in the memory of another process on this machine.

Knows what a descriptor says and what it says on the wire. Does not know how memory is opened (`segments.py`) or handed out
(`arena.py`), nor who may read it.

A *segment* is an anonymous file in memory (memfd) that one process has made. Its *place* is (process, descriptor there,
inode): any process of the same user can open `/proc/<process>/fd/<descriptor>` and see by the inode that it is the one meant.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

Place = tuple[int, int, int]
"""(process, file descriptor in it, inode)."""
MAX_COUNT: Final = (1 << 48) - 1
MAX_PID: Final = (1 << 31) - 1
DESCRIPTOR_BYTES: Final = 40
"""That one takes in a header at most."""
MAX_SLOTS: Final = 1024
"""Of one arena at once, and descriptors of one message: they have to fit a header."""


class DescriptorError(ValueError):
    """A descriptor that cannot be; the text says why."""


class Memory(Protocol):
    """A segment as this process sees it."""

    nbytes: int

    def view(self, offset: int, nbytes: int) -> memoryview: ...


class SharedBytes:
    """`nbytes` bytes of a segment, in a block's frames instead of a frame.

    Args:
        place: where others find the segment.
        memory: the segment here; None until it has been opened.
        on_drop: called when nobody refers to this any more. Whoever lent the bytes has them back then, whatever became of
            the task that they were for: no end of a task can forget it.
    """

    __slots__ = ("memory", "nbytes", "offset", "on_drop", "place")

    def __init__(
        self, place: Place, offset: int, nbytes: int, memory: Memory | None = None, on_drop: Callable[[], None] | None = None
    ) -> None:
        self.place = place
        self.offset = offset
        self.nbytes = nbytes
        self.memory = memory
        self.on_drop = on_drop

    def __len__(self) -> int:
        return self.nbytes

    def __del__(self) -> None:
        if self.on_drop is not None:
            self.on_drop()

    def __repr__(self) -> str:
        return f"<SharedBytes {self.nbytes} at {self.offset} of {self.place}>"

    @property
    def buffer(self) -> memoryview:
        """The bytes themselves, uncopied. Raises DescriptorError: the segment has not been opened here."""
        if self.memory is None:
            raise DescriptorError("these bytes are in memory that was not opened")
        return self.memory.view(self.offset, self.nbytes)

    def attach(self, memory: Memory) -> None:
        """The segment has been opened. Raises DescriptorError: it is not that large."""
        if self.offset + self.nbytes > memory.nbytes:
            raise DescriptorError(f"bytes {self.offset} to {self.offset + self.nbytes} of a segment of {memory.nbytes}")
        self.memory = memory


def describe(frames: Sequence[Any]) -> list[list[int]]:
    """The header's form of what is shared among a block's frames: [index, process, descriptor, inode, offset, bytes] each."""
    return [[i, *f.place, f.offset, f.nbytes] for i, f in enumerate(frames) if isinstance(f, SharedBytes)]


def merge(described: Any, frames: Sequence[Any], first: int, num_frames: int) -> list[Any]:
    """A block's frames from those that came and the descriptors of the others; those before `first` cannot be shared.

    Raises:
        DescriptorError: that is not how they can be described.
    """
    if not isinstance(described, list) or not described or len(described) > num_frames:
        raise DescriptorError("shared frames are a list of one to as many descriptors as there are frames")
    shared = [_parse(item) for item in described]
    indices = [index for index, _ in shared]
    if indices != sorted(set(indices)) or not first <= indices[0] <= indices[-1] < num_frames:
        raise DescriptorError("descriptors name framed rows, in order")
    num_sent = num_frames - len(shared)
    if num_sent > len(frames):
        raise DescriptorError(f"{num_sent} payload frames expected, {len(frames)} came")
    merged = list(frames[:num_sent])
    for index, item in shared:
        merged.insert(index, item)
    return merged


def _parse(item: Any) -> tuple[int, SharedBytes]:
    if not (isinstance(item, list) and len(item) == 6 and all(type(v) is int and 0 <= v <= MAX_COUNT for v in item)):
        raise DescriptorError("a descriptor is [index, process, descriptor, inode, offset, bytes], counts all")
    index, pid, fd, inode, offset, nbytes = item
    if not nbytes or pid > MAX_PID or fd > MAX_PID:
        raise DescriptorError("a descriptor names at least one byte, and a process and a descriptor that can be")
    return index, SharedBytes((pid, fd, inode), offset, nbytes)

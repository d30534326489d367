"""Segments of memory that other processes have made: opened through /proc, checked, mapped for reading.

Knows memfds, seals and mappings. Does not know who may read what (`sharing.py`) nor how a segment's bytes are handed out
(`arena.py`). Linux only; elsewhere nothing is shared.

There are no names in /dev/shm: a memfd is gone when the last process that has it open is, however that ended. Its size is
sealed, so reading it can never hit a hole that the owner has cut (SIGBUS).
"""

import contextlib
import fcntl
import logging
import mmap
import os
import stat
import sys
from collections.abc import Iterable
from typing import Final

from penstock.broker.shared import Place, SharedBytes

log = logging.getLogger(__name__)

IS_POSSIBLE: Final = sys.platform == "linux" and hasattr(os, "memfd_create")
PROBE_BYTES: Final = 4096
MAX_SEGMENTS: Final = 16
"""Of one session. Each is a file descriptor in the broker."""


class SegmentError(Exception):
    """A segment that cannot be used; the text says why."""


class Segment:
    """An open segment, mapped when it is first read. Closes with the last reference, its mapping with the last view.

    Attributes:
        owner: the user whose memory it is, as the broker writes principals.
        place: where other processes find it: here.
    """

    __slots__ = ("_map", "fd", "inode", "is_pinned", "is_writable", "nbytes", "owner")

    def __init__(self, fd: int, is_writable: bool = False) -> None:
        self.fd = fd
        found = os.fstat(fd)
        self.inode, self.nbytes, self.owner = found.st_ino, found.st_size, f"uid:{found.st_uid}"
        self.is_writable = is_writable
        self.is_pinned = False
        self._map: mmap.mmap | None = None

    @property
    def place(self) -> Place:
        return os.getpid(), self.fd, self.inode

    @property
    def map(self) -> mmap.mmap:
        if self._map is None:
            access = mmap.PROT_READ | (mmap.PROT_WRITE if self.is_writable else 0)
            self._map = mmap.mmap(self.fd, self.nbytes, mmap.MAP_SHARED, access)
        return self._map

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes [offset, offset + nbytes), uncopied: another process may change them at any time, this one does not."""
        return memoryview(self.map)[offset : offset + nbytes].toreadonly()

    def __del__(self) -> None:
        if hasattr(self, "_map"):
            os.close(self.fd)


def make(nbytes: int) -> Segment:
    """A new segment of this process, all of its pages there and mapped for writing.

    Raises:
        OSError: no memory is left, or no file descriptor.
    """
    segment_fd = os.memfd_create("penstock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(segment_fd, 0o600)
        os.ftruncate(segment_fd, nbytes)
        os.posix_fallocate(segment_fd, 0, nbytes)  # a page that is not there would be found missing by a signal
        fcntl.fcntl(segment_fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        segment = Segment(segment_fd, is_writable=True)
    except BaseException:
        os.close(segment_fd)
        raise
    with contextlib.suppress(OSError, AttributeError):
        segment.map.madvise(mmap.MADV_HUGEPAGE)  # fewer faults, where the system does that for shared memory
    return segment


def open_segment(place: Place, is_writable: bool = False) -> Segment:
    """The segment of another process.

    Raises:
        SegmentError: this process may not see it, or it is not the one meant, or no segment.
    """
    pid, fd, inode = place
    try:
        looked = os.open(f"/proc/{pid}/fd/{fd}", os.O_PATH | os.O_CLOEXEC)  # opens nothing: it may be a pipe or a device
    except OSError as e:
        raise SegmentError(f"descriptor {fd} of process {pid}: {e.strerror}") from e
    try:
        found = os.fstat(looked)
        if not stat.S_ISREG(found.st_mode) or found.st_ino != inode:
            raise SegmentError(f"descriptor {fd} of process {pid} is something else")
        opened = os.open(f"/proc/self/fd/{looked}", (os.O_RDWR if is_writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as e:
        raise SegmentError(f"descriptor {fd} of process {pid}: {e.strerror}") from e
    finally:
        os.close(looked)
    try:
        if fcntl.fcntl(opened, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise SegmentError(f"descriptor {fd} of process {pid} may change its size")
    except OSError as e:
        os.close(opened)
        raise SegmentError(f"descriptor {fd} of process {pid} is no memory") from e
    except SegmentError:
        os.close(opened)
        raise
    return Segment(opened, is_writable)


_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_GROW", 0)


class OpenSegments:
    """The segments of others that this process has open, by inode. `forget` when their owner has none of them any more."""

    def __init__(self, is_writable: bool = False) -> None:
        self._is_writable = is_writable
        self._by_inode: dict[int, Segment] = {}

    def attach(self, frames: Iterable[object]) -> list[Segment]:
        """Open what the shared ones among the frames need: what was not open. Raises SegmentError or DescriptorError."""
        opened = list[Segment]()
        for frame in frames:
            if isinstance(frame, SharedBytes) and frame.memory is None:
                segment = self._by_inode.get(frame.place[2])
                if segment is None:
                    segment = self._by_inode[frame.place[2]] = open_segment(frame.place, self._is_writable)
                    opened.append(segment)
                frame.attach(segment)
        return opened

    def forget(self, inodes: Iterable[int]) -> list[Segment]:
        """Close these, as soon as nobody reads them; those that were open."""
        return [segment for inode in inodes if (segment := self._by_inode.pop(inode, None)) is not None]

    def clear(self) -> list[Segment]:
        return self.forget(list(self._by_inode))

    def __len__(self) -> int:
        return len(self._by_inode)


class HostMemory:
    """How the broker opens what its peers share, and the probe by which they see whether they can read what it holds."""

    def __init__(self) -> None:
        self._probe = make(PROBE_BYTES)

    @property
    def probe(self) -> Place:
        return self._probe.place

    def open(self, place: Place) -> Segment:
        """Raises SegmentError."""
        return open_segment(place)


def host_memory() -> HostMemory | None:
    """None where this system has no such memory."""
    try:
        return HostMemory() if IS_POSSIBLE else None
    except OSError as e:
        log.warning("nothing is shared through memory: %s", e)
        return None

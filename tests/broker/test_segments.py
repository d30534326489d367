"""Segments of other processes: only a sealed memfd of the process that is named, and nothing else that it has open."""

import fcntl
import os
import subprocess
import sys
import tempfile

import pytest

from penstock.broker import segments
from penstock.broker.segments import HostMemory, OpenSegments, Segment, SegmentError, make, open_segment
from penstock.broker.shared import DescriptorError, SharedBytes

pytestmark = pytest.mark.skipif(not segments.IS_POSSIBLE, reason="shared memory is for Linux")
NBYTES = 8192


def test_another_process_reads_what_was_written() -> None:
    segment = make(NBYTES)
    segment.map[100:105] = b"hello"
    program = (
        "from penstock.broker.segments import open_segment\n"
        f"s = open_segment({segment.place!r})\n"
        "print(bytes(s.view(100, 5)).decode(), s.nbytes, s.owner)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["hello", str(NBYTES), f"uid:{os.getuid()}"]


def test_a_reader_cannot_write_and_nobody_can_change_its_size() -> None:
    segment = make(NBYTES)
    opened = open_segment(segment.place)
    with pytest.raises(TypeError):
        opened.view(0, 5)[0] = 1
    for size in (1, NBYTES * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)


def test_what_is_no_segment_is_refused() -> None:
    me = os.getpid()
    read, write = os.pipe()
    with tempfile.TemporaryFile() as file, open("/dev/zero", "rb") as zero:
        file.truncate(NBYTES)
        for fd in (read, write, file.fileno(), zero.fileno()):
            with pytest.raises(SegmentError):
                open_segment((me, fd, os.fstat(fd).st_ino))
    os.close(read)
    os.close(write)


def test_a_segment_that_may_shrink_is_refused() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, NBYTES)
    with pytest.raises(SegmentError, match="change its size"):
        open_segment((os.getpid(), fd, os.fstat(fd).st_ino))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    assert open_segment((os.getpid(), fd, os.fstat(fd).st_ino)).nbytes == NBYTES
    os.close(fd)


def test_another_inode_another_process_or_none_is_refused() -> None:
    pid, fd, inode = make(NBYTES).place  # closed again at once
    kept = make(NBYTES)
    for place in ((pid, kept.fd, kept.inode + 1), (pid, 100_000, inode), (1 << 30, kept.fd, kept.inode), (0, fd, inode)):
        with pytest.raises(SegmentError):
            open_segment(place)


def test_descriptors_are_closed_with_the_last_reference() -> None:
    before = len(os.listdir("/proc/self/fd"))
    segment = make(NBYTES)
    view = segment.view(0, 10)
    opened = OpenSegments()
    frame = SharedBytes(segment.place, 0, 10)
    opened.attach([frame, b"bytes"])
    assert len(opened) == 1
    opened.clear()
    assert bytes(frame.buffer) == bytes(view)
    del segment, view, frame
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_frame_past_the_end_of_its_segment_is_refused() -> None:
    segment, opened = make(NBYTES), OpenSegments()
    for offset, nbytes in ((NBYTES, 1), (NBYTES - 3, 4), (0, NBYTES + 1), (1 << 47, 1)):
        with pytest.raises(DescriptorError):
            opened.attach([SharedBytes(segment.place, offset, nbytes)])


def test_a_failed_open_leaves_no_descriptor_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryFile() as file:
        for _ in range(20):
            with pytest.raises(SegmentError):
                open_segment((os.getpid(), file.fileno(), os.fstat(file.fileno()).st_ino))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_broker_shows_a_probe_that_can_be_opened() -> None:
    host = HostMemory()
    assert isinstance(host.open(host.probe), Segment)


def test_without_memory_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none)
    assert segments.host_memory() is None

"""A machine's memory in plain bytes: segments of several processes, which the broker under test opens by their place."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from penstock.broker import protocol as p
from penstock.broker.columns import Block, pack
from penstock.broker.layout import Column
from penstock.broker.segments import SegmentError
from penstock.broker.shared import Place, SharedBytes

BROKER_PID = 1
SLOT = 4096


class FakeSegment:
    """A segment of process `pid`; the broker shows it to others as one of its own."""

    def __init__(self, pid: int, fd: int, inode: int, nbytes: int, owner: str) -> None:
        self.real = (pid, fd, inode)
        self.place = (BROKER_PID, 1000 + fd, inode)
        self.nbytes = nbytes
        self.owner = owner
        self.data = bytearray(nbytes)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self.data)[offset : offset + nbytes].toreadonly()


class FakeHost:
    """All segments by inode, and which were opened."""

    probe: Place = (BROKER_PID, 3, 99)

    def __init__(self) -> None:
        self.segments: dict[int, FakeSegment] = {}
        self.opened = list[int]()

    def make(self, pid: int, owner: str = "uid:1", nbytes: int = 256 * SLOT) -> FakeSegment:
        number = 100 + len(self.segments)
        made = self.segments[number] = FakeSegment(pid, number, number, nbytes, owner)
        return made

    def open(self, place: Place) -> FakeSegment:
        segment = self.segments.get(place[2])
        if segment is None or segment.real != place:
            raise SegmentError(f"no segment at {place}")
        self.opened.append(place[2])
        return segment

    def read(self, message: Any) -> None:
        """As a peer does it: open what a message from the broker refers to."""
        for block in _blocks(message):
            for frame in block.frames:
                if isinstance(frame, SharedBytes):
                    segment = self.segments[frame.place[2]]
                    assert frame.place == segment.place, "a descriptor that only the broker can follow"
                    frame.attach(segment)


def _blocks(message: Any) -> Iterator[Block]:
    match message:
        case p.Assign():
            yield from message.blocks
        case p.Results() | p.Partial():
            yield from (o.block for o in message.outcomes if o.block is not None)


class Memory:
    """What a peer shares: slots of one segment, each used once."""

    def __init__(self, host: FakeHost, pid: int, owner: str = "uid:1") -> None:
        self.segment = host.make(pid, owner)
        self.lent = list[tuple[int, int]]()
        self._offsets = deque(range(0, self.segment.nbytes, SLOT))

    def place(self, data: bytes) -> SharedBytes:
        """A descriptor as its owner sends it."""
        offset = self._offsets.popleft()
        self.segment.data[offset : offset + len(data)] = data
        _, fd, inode = self.segment.real
        self.lent.append((fd, offset))
        return SharedBytes((0, fd, inode), offset, len(data), self.segment)

    def rows(self, rows: list[bytes], name: str = "x") -> Block:
        """Framed rows of one shape, all of them shared."""
        column = Column(name, "uint8", (len(rows[0]),), is_framed=True)
        return pack([(column, None, [self.place(row) for row in rows])], len(rows))

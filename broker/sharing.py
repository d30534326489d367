"""Who may read whose memory, and when it is read no more: the core's side of the shared-memory path.

Knows descriptors, loans and limits. Does not open anything itself: a `HostMemory` (`segments.py`) does. Bytes that are shared
count against every limit as if they had come in frames.

A loan is one `SharedBytes` that came in a message. It ends when nobody refers to that object any more: no queued run, no
lease, no result that waits for its acknowledgement. Then its owner gets the slot back, in a `release` at the end of the turn.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from penstock.broker.columns import Block, any_shared, frame_bytes
from penstock.broker.config import BrokerConfig
from penstock.broker.protocol import MAX_COUNTS, Outcome, Release, Results, Share
from penstock.broker.protocol import Partial as PartialResults
from penstock.broker.segments import MAX_SEGMENTS, SegmentError
from penstock.broker.sessions import ClientSession, WorkerSession
from penstock.broker.shared import MAX_SLOTS, DescriptorError, Place, SharedBytes
from penstock.broker.wire import Message, ProtocolError

Slot = tuple[int, int]
Session = ClientSession | WorkerSession
MAX_LOANS: Final = 2 * MAX_SLOTS
"""Of one session: what a `welcome` can list. An arena has no more than half as many slots."""
MAX_OPEN: Final = 256
"""Segments of all sessions: each takes a file descriptor that a connection may need."""
M = TypeVar("M", bound=Results | PartialResults)


class Unshared(Exception):
    """Bytes that the broker cannot read where they are said to lie. `reason` is one word, for statistics."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class OpenSegment(Protocol):
    """A segment that the shell has opened and checked."""

    nbytes: int
    owner: str

    @property
    def place(self) -> Place: ...

    def view(self, offset: int, nbytes: int) -> memoryview: ...


class HostMemory(Protocol):
    """The shell's: opens segments of processes on this machine. `probe` is a segment of the broker's own."""

    @property
    def probe(self) -> Place: ...

    def open(self, place: Place) -> OpenSegment:
        """Raises SegmentError."""
        ...


class Source:
    """An open segment, for as long as something refers to it; `readers` have been sent descriptors of it."""

    __slots__ = ("_closed", "_segment", "nbytes", "owner", "place", "readers")

    def __init__(self, segment: OpenSegment, closed: "list[Source.Closed]") -> None:
        self._segment = segment
        self._closed = closed
        self.nbytes, self.owner, self.place = segment.nbytes, segment.owner, segment.place
        self.readers: set[Sharer] = set()

    Closed = tuple[int, int, "set[Sharer]"]
    """(inode, bytes, who was told of it)."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        return self._segment.view(offset, nbytes)

    def __del__(self) -> None:
        self._closed.append((self.place[2], self.nbytes, self.readers))


class Sharer:
    """What the broker keeps of a session that shares. `held` counts its slots on loan; `is_on`: it may be lent to."""

    __slots__ = ("held", "is_on", "num_held", "pid", "sources")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.is_on = True
        self.num_held = 0
        self.held: Counter[Slot] = Counter()
        self.sources: dict[tuple[int, int], Source] = {}


class Sharing:
    """See the module.

    Args:
        memory: None if nothing can be shared here.
        send: takes a message to a session of either side.
    Attributes:
        num_rows: that came by descriptor since the start; row_bytes: theirs.
        num_segments: open now; num_bytes: theirs.
        fallbacks: rows that went through a socket, by reason: `no_room` in their owner's arena, a segment that the broker
            cannot `open`, of another `owner`, past a `limit` or its `range`; a `reader` that cannot read it.
    """

    def __init__(self, memory: HostMemory | None, send: Callable[[Session, Message], None]) -> None:
        self._memory = memory
        self._send = send
        self._sessions: dict[Sharer, Session] = {}
        self._dropped: list[tuple[Sharer, Slot]] = []
        self._closed: list[Source.Closed] = []
        self.num_bytes = self.num_segments = self.num_rows = self.row_bytes = 0
        self.fallbacks: Counter[str] = Counter()

    # --- sessions ---------------------------------------------------------------------------------------------------

    def offer(self, session: Session, config: BrokerConfig, pid: int) -> dict[str, Any]:
        """What a `welcome` says of it. A session that comes from another process has lost what it shared."""
        sharer = session.sharer
        if sharer is not None:
            sharer.is_on = False
            if sharer.pid != pid:
                self.leave(session)
        if self._memory is None or not config.shared_bytes or not pid:
            return {}
        held = [number for slot in session.sharer.held.elements() for number in slot] if session.sharer is not None else []
        return {
            "probe": list(self._memory.probe), "min_bytes": config.shared_min_bytes, "max_bytes": config.shared_bytes,
            "held": held,
        }  # fmt: skip

    def share(self, session: Session, m: Share, pid: int) -> None:
        """The peer can read shared memory."""
        if self._memory is None or not pid:
            raise ProtocolError("nothing can be shared on this connection")
        sharer = session.sharer
        if sharer is None:
            sharer = session.sharer = Sharer(pid)
            self._sessions[sharer] = session
        sharer.is_on = True
        sharer.sources = {key: source for key, source in sharer.sources.items() if key[1] in m.segments}

    def leave(self, session: Session) -> None:
        """The session is over, or its process: what others still read of it goes when they have done."""
        sharer, session.sharer = session.sharer, None
        if sharer is not None:
            del self._sessions[sharer]
            sharer.is_on = False
            sharer.sources.clear()

    # --- bytes that come --------------------------------------------------------------------------------------------

    def adopt(self, session: Session, blocks: Sequence[Block], config: BrokerConfig) -> None:
        """Take the shared rows of a message on loan.

        Raises:
            Unshared: one of them cannot be read, or is too much. The loans end with the message.
            ProtocolError: from a peer that never said that it shares.
        """
        frames = [f for block in blocks for f in block.frames if isinstance(f, SharedBytes)]
        sharer = session.sharer
        if not frames:
            if sharer is not None and sharer.is_on:
                large = sum(frame_bytes(f) >= config.shared_min_bytes for block in blocks for f in block.frames)
                self.fallbacks["no_room"] += large
            return
        if sharer is None:
            raise ProtocolError("a descriptor from a peer that has not said that it shares")
        sharer.num_held += len(frames)
        for frame in frames:
            slot = (frame.place[1], frame.offset)
            sharer.held[slot] += 1
            frame.on_drop = partial(self._dropped.append, (sharer, slot))
        try:
            if sharer.num_held > MAX_LOANS:
                raise Unshared("limit", f"more than {MAX_LOANS} slots at once")
            for frame in frames:
                source = self._source(session, sharer, frame.place, config)
                _attach(frame, source)
                frame.place = source.place
        except Unshared as e:
            sharer.is_on = False  # it will not do for what is sent there either
            self.fallbacks[e.reason] += len(frames)
            raise
        self.num_rows += len(frames)
        self.row_bytes += sum(map(len, frames))

    def _source(self, session: Session, sharer: Sharer, place: Place, config: BrokerConfig) -> Source:
        _, fd, inode = place
        source = sharer.sources.get((fd, inode))
        if source is not None:
            return source
        assert self._memory is not None
        if len(sharer.sources) >= MAX_SEGMENTS or self.num_segments >= MAX_OPEN:
            raise Unshared("limit", f"more than {MAX_SEGMENTS} segments of one session, or {MAX_OPEN} of all")
        try:
            segment = self._memory.open((sharer.pid, fd, inode))  # the process that the kernel names, not what the peer says
        except SegmentError as e:
            raise Unshared("open", str(e)) from None
        if segment.owner != session.principal:
            raise Unshared("owner", f"it belongs to {segment.owner}, not to {session.principal}")
        of_session = sum(s.nbytes for s in sharer.sources.values()) + segment.nbytes
        if of_session > config.shared_bytes or self.num_bytes + segment.nbytes > config.shared_total_bytes:
            raise Unshared("limit", "there is more shared memory than is allowed")
        source = sharer.sources[fd, inode] = Source(segment, self._closed)
        self.num_bytes += source.nbytes
        self.num_segments += 1
        return source

    # --- bytes that go ----------------------------------------------------------------------------------------------

    def readable(self, block: Block, session: Session) -> Block:
        """The block as this session can read it: by reference only what is its own user's."""
        if not block.layout.num_framed or not block.has_shared:
            return block
        sharer = session.sharer
        sources = {f.memory for f in block.frames if isinstance(f, SharedBytes)}
        if sharer is None or not sharer.is_on or any(s.owner != session.principal for s in _sources(sources)):
            self.fallbacks["reader"] += sum(isinstance(f, SharedBytes) for f in block.frames)
            return block.inlined()
        for source in _sources(sources):
            source.readers.add(sharer)
        return block

    def readable_batch(self, blocks: Sequence[Block], worker: WorkerSession) -> list[Block]:
        """The blocks of a lease as its worker can read them; in frames if there are more descriptors than a header holds."""
        if sum(len(b.frames) for b in blocks if b.layout.num_framed) > MAX_SLOTS:
            return [b.inlined() for b in blocks]
        return [self.readable(b, worker) for b in blocks]

    def readable_message(self, message: M, session: Session, is_inlined: bool = False) -> M:
        """Results as this session can read them; `is_inlined`: without any descriptor."""
        if not any_shared([o.block for o in message.outcomes]):
            return message
        outcomes = list[Outcome]()
        for outcome in message.outcomes:
            block = outcome.block
            if block is not None:
                block = block.inlined() if is_inlined else self.readable(block, session)
            outcomes.append(replace(outcome, block=block))
        return replace(message, outcomes=outcomes)

    # --- bytes that go back -----------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Tell owners which slots are theirs again, and readers which segments are gone. At the end of a turn."""
        if self._dropped:
            self._give_back()
        if self._closed:
            self._close()

    def _give_back(self) -> None:
        dropped, by_sharer = self._dropped[:], dict[Sharer, list[int]]()
        self._dropped.clear()
        for sharer, slot in dropped:
            sharer.held[slot] -= 1
            sharer.num_held -= 1
            if not sharer.held[slot]:
                del sharer.held[slot]
            by_sharer.setdefault(sharer, []).extend(slot)
        for sharer, slots in by_sharer.items():
            if sharer in self._sessions:  # one that is away hears of what is still held when it comes back
                for at in range(0, len(slots), MAX_COUNTS):
                    self._send(self._sessions[sharer], Release(slots=slots[at : at + MAX_COUNTS]))

    def _close(self) -> None:
        closed, by_sharer = self._closed[:], dict[Sharer, list[int]]()
        self._closed.clear()
        for inode, nbytes, readers in closed:
            self.num_bytes -= nbytes
            self.num_segments -= 1
            for sharer in readers:
                by_sharer.setdefault(sharer, []).append(inode)
        for sharer, inodes in by_sharer.items():
            if sharer in self._sessions:
                for at in range(0, len(inodes), MAX_COUNTS):
                    self._send(self._sessions[sharer], Release(segments=inodes[at : at + MAX_COUNTS]))

    # --- about it ---------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """For status."""
        return {
            "is_possible": self._memory is not None, "sessions": len(self._sessions), "segments": self.num_segments,
            "segment_bytes": self.num_bytes, "loans": sum(s.num_held for s in self._sessions),
            "rows": self.num_rows, "row_bytes": self.row_bytes, "fallbacks": dict(self.fallbacks),
        }  # fmt: skip

    def check(self, blocks: Iterable[Block]) -> None:
        """The loans are those frames that somebody refers to: `blocks` are all blocks that the core holds."""
        frames = {id(f): f for block in blocks for f in block.frames if isinstance(f, SharedBytes)}
        held: dict[Sharer, Counter[Slot]] = {}
        for frame in frames.values():
            assert isinstance(frame.on_drop, partial) and frame.memory is not None
            sharer, slot = frame.on_drop.args[0]
            held.setdefault(sharer, Counter())[slot] += 1
        for sharer, session in self._sessions.items():
            assert session.sharer is sharer and sharer.num_held == sum(sharer.held.values())
            assert sharer.held == held.get(sharer, Counter()), "a loan that nobody reads, or a reader without a loan"


def _attach(frame: SharedBytes, source: Source) -> None:
    try:
        frame.attach(source)
    except DescriptorError as e:
        raise Unshared("range", str(e)) from None


def _sources(memories: Iterable[Any]) -> Iterator[Source]:
    for memory in memories:
        assert isinstance(memory, Source)
        yield memory

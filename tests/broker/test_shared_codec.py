"""Descriptors on the wire: what is no descriptor is a protocol error, and what is one arrives as it was."""

from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.broker import protocol as p
from penstock.broker.columns import Block, pack
from penstock.broker.layout import Column
from penstock.broker.shared import MAX_COUNT, SharedBytes
from penstock.broker.wire import VERSION, ProtocolError, decode, encode

ROW = 10
FRAMED = Column("x", "uint8", (ROW,), is_framed=True)
PACKED = Column("k", "uint8", (3,))
NUMBERS = st.integers(0, MAX_COUNT)
PLACES = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), NUMBERS)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Rows of a framed column, some in frames and some shared, and perhaps a packed column before them."""
    rows = [
        draw(st.one_of(st.binary(min_size=ROW, max_size=ROW), st.builds(SharedBytes, PLACES, NUMBERS, st.just(ROW))))
        for _ in range(draw(st.integers(1, 5)))
    ]
    columns: list[Any] = [(FRAMED, None, rows)]
    if draw(st.booleans()):
        columns.append((PACKED, None, [b"abc"] * len(rows)))
    if draw(st.booleans()):
        lengths = [draw(st.integers(1, 4)) for _ in rows]
        ragged = Column("r", "uint8", (2,), True, True)
        columns.append((ragged, lengths, [SharedBytes((1, 2, 3), 0, 2 * n) if n % 2 else b"xy" * n for n in lengths]))
    return pack(columns, len(rows))


def flat(block: Block) -> list[Any]:
    return [(f.place, f.offset, f.nbytes) if isinstance(f, SharedBytes) else bytes(f) for f in block.frames]  # type: ignore[arg-type]


@given(blocks())
def test_a_block_arrives_as_it_was(block: Block) -> None:
    frames = encode(p.Submit(id=b"i" * 16, kernel="k", block=block))
    assert len(frames) == 2 + sum(not isinstance(f, SharedBytes) for f in block.frames)
    message = decode(p.FROM_CLIENT, frames)
    assert isinstance(message, p.Submit)
    assert flat(message.block) == flat(block) and message.block.nbytes == block.nbytes
    assert message.block.has_shared == any(isinstance(f, SharedBytes) for f in block.frames)


@given(blocks(), blocks())
def test_several_blocks_in_a_message_keep_their_frames_apart(first: Block, second: Block) -> None:
    message = decode(p.TO_WORKER, encode(p.Assign(lease=1, kernel="k", blocks=[first, second])))
    assert isinstance(message, p.Assign)
    assert [flat(b) for b in message.blocks] == [flat(first), flat(second)]


JUNK = st.one_of(st.none(), st.booleans(), st.integers(-5, 2**64 - 1), st.floats(), st.text(max_size=5), st.binary(max_size=5))
DESCRIPTORS = st.recursive(JUNK | st.just([0, 0, 5, 7, 0, ROW]), lambda inner: st.lists(inner, max_size=7), max_leaves=20)


@settings(max_examples=400)
@given(DESCRIPTORS, st.integers(0, 3))
@example([[0, 0, 5, 7, -1, ROW]], 1)
@example([[0, 0, 5, 7, 0, ROW], [0, 0, 5, 7, 0, ROW]], 0)
@example([[1, 0, 5, 7, 0, ROW], [0, 0, 5, 7, 0, ROW]], 0)
@example([[2, 0, 5, 7, 0, ROW]], 1)
@example([[0, 0, 5, 7, 1 << 48, ROW]], 1)
@example([[0, 0, 5, "../../etc/passwd", 0, ROW]], 1)
@example([[0, "../self", 5, 7, 0, ROW]], 1)
@example([[0, 0, 5, 7, 0, ROW - 1]], 1)
@example([[0, 0, 5, 7, 0, 0]], 1)
@example([[0, 0, True, 7, 0, ROW]], 1)
def test_anything_else_is_a_protocol_error(descriptors: Any, num_frames: int) -> None:
    """Whatever stands there: a message whose every descriptor is in range and of its row's size, or a ProtocolError."""
    block = pack([(FRAMED, None, [b"x" * ROW] * 2)], 2)
    header = {"type": "submit", "id": b"i" * 16, "kernel": "k", "block": [*block.content(), None, descriptors]}
    try:
        message = decode(p.FROM_CLIENT, [VERSION, msgpack.packb(header), *[b"x" * ROW] * num_frames])
    except ProtocolError:
        return
    assert isinstance(message, p.Submit)
    shared = [f for f in message.block.frames if isinstance(f, SharedBytes)]
    assert len(message.block.frames) == 2 and len(shared) == 2 - num_frames
    assert all(f.nbytes == ROW and all(0 <= n <= MAX_COUNT for n in (*f.place, f.offset)) for f in shared)


def test_a_packed_frame_cannot_be_shared() -> None:
    block = pack([(PACKED, None, [b"abc"]), (FRAMED, None, [b"x" * ROW])], 1)
    header = {"type": "submit", "id": b"i" * 16, "kernel": "k", "block": [*block.content(), None, [[0, 0, 5, 7, 0, 3]]]}
    with pytest.raises(ProtocolError, match="framed rows"):
        decode(p.FROM_CLIENT, [VERSION, msgpack.packb(header), b"x" * ROW])


def test_a_peer_without_shared_memory_sees_nothing_new() -> None:
    """A block in frames has the form that it had before descriptors were known."""
    block = pack([(FRAMED, None, [b"x" * ROW])], 1)
    assert block.describe() == [1, block.layout.packed]
    welcome = msgpack.unpackb(encode(p.Welcome(epoch=1, heartbeat_ms=1.0))[1])
    assert welcome == {"type": "welcome", "epoch": 1, "heartbeat_ms": 1.0}

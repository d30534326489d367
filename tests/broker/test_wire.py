"""The codec: every message survives the trip, and any other bytes are a ProtocolError and nothing else."""

import time
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import EVERY, NESTED, messages

from penstock.broker import protocol as p
from penstock.broker.columns import pack
from penstock.broker.layout import Column
from penstock.broker.wire import MAX_FRAMES, MAX_HEADER_BYTES, VERSION, Message, ProtocolError, VersionError, decode, encode

TABLES = (p.FROM_CLIENT, p.TO_CLIENT, p.FROM_WORKER, p.TO_WORKER)
BLOCK = pack([(Column("x", "uint8", (4,)), None, [b"abcd", b"efgh"])], 2)
SUBMIT = p.Submit(id=b"i" * 16, kernel="k", block=BLOCK)


def same(a: Any, b: Any) -> bool:
    """Equal in every field; blocks by what they describe and hold, sequences whatever their type."""
    if hasattr(a, "describe"):
        return bool(a.describe() == b.describe()) and [bytes(f) for f in a.frames] == [bytes(f) for f in b.frames]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Message | p.Outcome | p.Answer):
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in type(a).__dataclass_fields__)  # type: ignore[union-attr]
    return bool(a == b)


@pytest.mark.parametrize("which", EVERY, ids=" ".join)
@given(data=st.data())
@settings(max_examples=25)
def test_round_trip(which: tuple[str, str], data: st.DataObject) -> None:
    table, cls = EVERY[which]
    message = data.draw(messages(cls))
    frames = encode(message)
    assert same(message, decode(table, frames))
    received = [zmq.Frame(bytes(f)) for f in frames]
    assert same(message, decode(table, received)), "frames as the socket gives them"


def header(**fields: Any) -> list[bytes]:
    return [VERSION, msgpack.packb(fields)]


def refused(frames: list[Any], table: Any = p.FROM_CLIENT) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(table, frames)
    return str(caught.value)


def test_another_major_version_is_refused_with_both_named() -> None:
    with pytest.raises(VersionError, match=r"2\.7 met 1\.3"):
        decode(p.FROM_CLIENT, [b"PS\x02\x07", b"whatever it means there"])
    assert isinstance(decode(p.FROM_CLIENT, [b"PS\x01\x09", msgpack.packb({"type": "ack", "seq": 3})]), p.Ack)
    for wrong in (b"", b"PS\x01", b"XX\x01\x00", b"PS\x01\x00\x00", b"x" * 100_000):
        assert "not a Penstock version" in refused([wrong, b"\x80"])


def test_unknown_fields_are_ignored() -> None:
    message = decode(p.FROM_CLIENT, header(type="ack", seq=3, colour="red", nested={"a": [1, {"b": None}]}))
    assert message == p.Ack(seq=3)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"type": "fly"}, {"type": 5}, {"type": None}, {"type": ["ack"]}, {"type": "ack"}, {"type": "ack", "seq": -1},
        {"type": "ack", "seq": 1.0}, {"type": "ack", "seq": True}, {"type": "ack", "seq": (1 << 64) - 1},
        {"type": "ack", "seq": "1"},
        {"type": "hello", "name": "", "secret": b"s" * 16}, {"type": "hello", "name": "n", "secret": b"s" * 15},
        {"type": "hello", "name": "n", "secret": "s" * 16}, {"type": "hello", "name": "n" * 65, "secret": b"s" * 16},
        {"type": "cancel", "id": b"i" * 16, "start": 5000}, {"type": "final", "seq": 1, "outcomes": []},
        {"type": "control", "request": 1, "op": "x", "target": "t" * 4097},
    ],
)  # fmt: skip
def test_fields_out_of_their_bounds(fields: dict[str, Any]) -> None:
    refused(header(**fields))


@pytest.mark.parametrize("table", [p.TO_CLIENT, p.TO_WORKER], ids=["to client", "to worker"])
def test_a_fault_and_a_refusal_say_why(table: Any) -> None:
    """Whoever gets one looks at its error at once."""
    for type_name in {"error", "refused"} & table.keys():
        refused(header(type=type_name, id=b"i" * 16, error=None), table)
        assert decode(table, header(type=type_name, id=b"i" * 16, error=["failed", "why", None, ""])).error.code == "failed"


@pytest.mark.parametrize(
    "change",
    [
        {"timeout_ms": float("nan")}, {"timeout_ms": float("inf")}, {"priority": 10}, {"priority": -1}, {"priority": 2.0},
        {"scalars": {"a": "1"}}, {"scalars": {"a": [1, None]}}, {"scalars": {"a": True}}, {"scalars": [1]},
        {"statics": b"x" * 16385},
        {"key": b""}, {"key": b"k" * 129}, {"traceparent": "t" * 65}, {"is_again": 1}, {"block": None}, {"block": [2]},
        {"block": [3, BLOCK.describe()[1]]}, {"block": [-1, BLOCK.describe()[1]]}, {"block": [1 << 40, BLOCK.describe()[1]]},
        {"block": [2, b"nonsense"]}, {"block": [2, BLOCK.describe()[1], [[1, 1]]]}, {"block": [2, BLOCK.describe()[1], 5]},
    ],
)  # fmt: skip
def test_submits_out_of_their_bounds(change: dict[str, Any]) -> None:
    frames = encode(SUBMIT)
    fields = {**msgpack.unpackb(frames[1]), **change}
    refused([VERSION, msgpack.packb(fields), *frames[2:]])


LAYOUTS = [
    [["x", "uint8", [4], False, False], ["x", "uint8", [4], False, False]], [["x", "complex64", [4], False, False]],
    [["", "uint8", [4], False, False]], [["x" * 65, "uint8", [4], False, False]], [["x", "uint8", [-1], False, False]],
    [["x", "uint8", [1] * 9, False, False]], [["x", "uint8", 4, False, False]], [["x", "str", [4], True, False]],
    [["x", "bytes", [], False, False]], [["x", "uint8", [4], 0, False]], [["x", "uint8", [4], False]], "x", [5], {},
    [[5, "uint8", [4], False, False]], [["x", "uint8", [1 << 62] * 8, False, False]], [["x", "uint8", [4], False, True]],
    [[f"x{i}", "uint8", [], False, False] for i in range(65)],
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout)[:50])
def test_layouts_that_are_none(layout: Any) -> None:
    frames = encode(SUBMIT)
    fields = {**msgpack.unpackb(frames[1]), "block": [2, msgpack.packb(layout)]}
    refused([VERSION, msgpack.packb(fields), *frames[2:]])


def test_empty_rows_have_a_shape_that_an_array_can_have() -> None:
    """No byte need come for them, but whoever makes arrays of them counts their items."""
    fixed, ragged = ["x", "uint8", [0, 1 << 40, 1 << 40], False, False], ["x", "uint8", [0, 9], True, False]
    for column, lengths in ((fixed, []), (ragged, [[[1 << 47]]])):
        block = [1, msgpack.packb([column]), *lengths]
        fields = {**msgpack.unpackb(encode(SUBMIT)[1]), "block": block}
        assert "items" in refused([VERSION, msgpack.packb(fields), b""])
    block = [1, msgpack.packb([["x", "uint8", [0, 9], True, False]]), [[1000]]]
    decode(p.FROM_CLIENT, [VERSION, msgpack.packb({**msgpack.unpackb(encode(SUBMIT)[1]), "block": block}), b""])


def test_frames_missing_extra_or_of_another_size() -> None:
    frames = [bytes(f) for f in encode(SUBMIT)]
    for wrong in (frames[:2], [*frames, b"x"], [*frames[:2], b"abcdefg"], [*frames[:2], b"abcdefghi"], frames[:1], []):
        refused(wrong)
    refused([*frames[:2], *[b"x"] * MAX_FRAMES])


def test_a_key_twice_an_ext_type_and_other_msgpack_that_is_not_wanted() -> None:
    ack = b"\xa4type\xa3ack"
    for wrong in (
        b"\x83" + ack + b"\xa3seq\x01\xa3seq\x02", b"\x82" + ack + b"\xa3seq\xd4\x05\x00",
        b"\x82" + ack + b"\xa3seq\xd6\xff\x00\x00\x00\x00",
        b"\x82" + ack + b"\x01\x02", b"\x82" + ack + b"\xa3seq", b"\x82" + ack + b"\xa3seq\xa5\xff\xfe\xff\xfe\xff",
        b"\x81" + ack + b"\x00",
        b"\xc0", b"\x90", b"", b"\xc1", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    ):  # fmt: skip
        refused([VERSION, wrong])


def test_a_header_is_bounded_when_it_is_written_too() -> None:
    with pytest.raises(ProtocolError, match="at most 65536"):
        encode(p.Reply(request=1, body={"x": "y" * MAX_HEADER_BYTES}))
    refused([VERSION, msgpack.packb({"type": "ack", "seq": 1, "pad": "x" * MAX_HEADER_BYTES})])


BOMBS = {
    "deep arrays": b"\x91" * 60_000, "deep maps": b"\x81\xa1a" * 20_000, "wide arrays": b"\xdc\x20\x00" * 1000,
    "empty arrays": b"\xdc\x20\x00" + b"\x90" * 8192, "huge array": b"\xdd\x7f\xff\xff\xff",
    "huge map": b"\xdf\x7f\xff\xff\xff",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_header_bombs_are_cheap(bomb: bytes) -> None:
    started = time.perf_counter()
    refused([VERSION, b"\x82\xa4type\xa3ack\xa1x" + bomb])
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("num_columns", [1, 64])
def test_many_frames_are_cheap(num_columns: int) -> None:
    """The work for a message grows with its frames, not with their square."""
    num_rows = 8000 // num_columns if num_columns > 1 else 4096
    columns = [Column(f"c{i}", "uint8", (1,), is_framed=True) for i in range(num_columns)]
    block = pack([(c, None, [b"x"] * num_rows) for c in columns], num_rows)
    frames = encode(p.Submit(id=b"i" * 16, kernel="k", block=block))
    started = time.perf_counter()
    decode(p.FROM_CLIENT, frames)
    assert time.perf_counter() - started < 0.25


@given(frames=st.lists(st.binary(max_size=200), max_size=5))
@settings(max_examples=300)
def test_any_bytes_give_a_message_or_a_protocol_error(frames: list[bytes]) -> None:
    for table in TABLES:
        for attempt in (frames, [VERSION, *frames]):
            try:
                assert isinstance(decode(table, attempt), Message)
            except ProtocolError as e:
                assert str(e)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("which", EVERY, ids=" ".join)
@given(data=st.data())
@settings(max_examples=25)
def test_mutated_messages_give_a_message_or_a_protocol_error(which: tuple[str, str], data: st.DataObject) -> None:
    table, cls = EVERY[which]
    frames = [bytearray(f) for f in encode(data.draw(messages(cls)))]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = data.draw(st.sampled_from(frames))
        at = data.draw(st.integers(0, max(len(frame) - 1, 0)))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "drop frame", "add frame"]))
        if how == "set" and frame:
            frame[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del frame[at:]
        elif how == "insert":
            frame[at:at] = data.draw(st.binary(max_size=9))
        elif how == "drop frame" and len(frames) > 1:
            frames.remove(frame)
        elif how == "add frame":
            frames.append(bytearray(data.draw(st.binary(max_size=9))))
    try:
        message = decode(table, [bytes(f) for f in frames])
    except ProtocolError as e:
        assert str(e)  # noqa: PT017
        return
    encode(message)  # what was accepted is a message that can be sent


@pytest.mark.parametrize("which", EVERY, ids=" ".join)
@given(data=st.data())
@settings(max_examples=25)
def test_fields_of_any_kind_give_a_message_or_a_protocol_error(which: tuple[str, str], data: st.DataObject) -> None:
    table, cls = EVERY[which]
    frames = encode(data.draw(messages(cls)))
    fields = msgpack.unpackb(bytes(frames[1]))
    name = data.draw(st.sampled_from(sorted(n for n, _, _ in cls.FIELDS) or ["type"]))
    fields[name] = data.draw(NESTED)
    try:
        decode(table, [VERSION, msgpack.packb(fields), *frames[2:]])
    except ProtocolError as e:
        assert str(e)  # noqa: PT017

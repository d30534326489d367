"""msgpack from strangers: what honest peers pack comes through, and a few bytes never become much memory."""

import time
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import NESTED

from penstock.broker import packed
from penstock.broker.packed import PackedError, unpack

MB = 1 << 20


def wide(unit: bytes, most: int = 64_000) -> bytes:
    """Arrays of as many of these as go into one, side by side."""
    count = most // (3 + 8190 * len(unit))
    if not count:
        return b"\xdc" + (most // len(unit)).to_bytes(2, "big") + unit * (most // len(unit))
    return bytes((0x90 + count,)) + (b"\xdc\x1f\xfe" + unit * 8190) * count


BOMBS = {
    "nested large arrays": b"\xdc\x20\x00" * 1000, "few nested large arrays": b"\xdc\x20\x00" * 340,
    "nested large arrays, much of them": b"\xdc\x20\x00" * 21_000,
    "array 32": b"\xdd\x00\x00\x20\x00" * 1020, "both": b"\xdc\x20\x00\xdd\x00\x00\x1f\xff" * 500,
    "behind numbers": b"\xdc\x20\x00\xcc\xdc" * 600, "nested middling arrays": b"\xdc\x00\xff" * 1020,
    "with full ones in front": b"\x92" + b"\xdc\x20\x00" + b"\x01" * 8192 + b"\xdc\x20\x00" * 1000,
    "as long as is left": b"".join(b"\xdc" + (8192 - 3 * i).to_bytes(2, "big") for i in range(1020)) + b"\x01" * 8000,
    **{f"wide {unit.hex()}": wide(unit) for unit in (b"\x80", b"\x90", b"\x81\xa0\xc0", b"\x81\xa0\x80", b"\x91\x90", b"\xc4\x00")},
    "deep": b"\x91" * 64_000, "deep maps": b"\x81\xa0" * 32_000, "a map of billions": b"\xdf\xff\xff\xff\xff" + b"\xa0\x90" * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_small(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        unpack(bomb)
    except PackedError as e:
        assert str(e)  # noqa: PT017 - some are honest, and only large
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 4 * MB


def test_a_bomb_is_quick() -> None:
    began = time.thread_time()
    for _ in range(10):
        for bomb in BOMBS.values():
            try:
                unpack(bomb)
            except PackedError:
                continue
    assert time.thread_time() - began < 10 * len(BOMBS) * 0.05


@given(value=NESTED | st.lists(NESTED, max_size=20) | st.lists(st.binary(max_size=300), max_size=50))
@settings(max_examples=300)
def test_what_is_packed_is_unpacked(value: Any) -> None:
    data = msgpack.packb(value)
    packed._walk(data)  # the careful look finds nothing wrong either
    assert msgpack.packb(unpack(data)) == data


@given(data=st.binary(max_size=400))
@settings(max_examples=500)
def test_the_careful_look_refuses_nothing_that_is_msgpack(data: bytes) -> None:
    try:
        msgpack.unpackb(data, strict_map_key=False, ext_hook=packed._no_ext)
    except Exception:
        return
    packed._walk(data)


@pytest.mark.parametrize("byte", [0xDC, 0xDD])
def test_large_honest_headers_full_of_suspicious_bytes(byte: int) -> None:
    """Ids, lengths and texts may hold what looks like an array's beginning."""
    value = {
        "spans": [[bytes((byte, 0, 0, 0x20)) * 4, 0, 1] for _ in range(2000)], "lengths": [byte] * 4096,
        "other": [byte << 8 | 0x10] * 2000, "text": "\u071c" * 100, "floats": [1.5] * 100, "none": [None, True, False, -5, -200],
    }  # fmt: skip
    data = msgpack.packb(value)
    assert len(packed._LARGE.findall(data)) > packed.MAX_LARGE
    assert unpack(data) == value

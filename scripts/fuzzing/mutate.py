"""Changes to a message's frames: bits and bytes, whole frames, and values inside the header and what is packed in it.

Knows msgpack and frames, no message in particular. All randomness comes from the generator that it is given.
"""

import random
from collections.abc import Callable
from typing import Any, Final

import msgpack

Frames = list[bytes]
Path = tuple[Any, ...]
ODD: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    255,
    4095,
    4096,
    4097,
    1 << 31,
    (1 << 48) - 1,
    1 << 48,
    (1 << 63) - 1,
    (1 << 64) - 1,
    -(1 << 63),
    0.0,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e308,
    "",
    "x",
    "out",
    "\0",
    "x" * 65,
    "x" * 5000,
    "\ud7ff" * 40,
    b"",
    b"\0" * 16,
    b"x" * 200,
    [],
    [[]],
    [0],
    [0, 0],
    [1, 0],
    {},
    {"": None},
    {"a": {"b": {}}},
)
MAX_BOMB: Final = 60_000


def mutate(draw: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    """Another message: one to four changes to these frames."""
    made = list(frames)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        made = draw.choice(CHANGES)(draw, made, others) if len(made) >= 2 else list(draw.choice(others))
    return made


def _byte(draw: random.Random, frames: Frames, _: list[Frames]) -> Frames:
    at = draw.randrange(len(frames))
    data = bytearray(frames[at])
    for _ in range(draw.choice((1, 1, 2, 8))):
        where = draw.randrange(len(data) + 1)
        how = draw.randrange(5)
        if how == 0 and where < len(data):
            data[where] ^= 1 << draw.randrange(8)
        elif how == 1 and where < len(data):
            data[where] = draw.choice((0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xC7, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF, draw.randrange(256)))
        elif how == 2:
            del data[where : where + draw.choice((1, 1, 4, 1000))]
        elif how == 3:
            data[where:where] = draw.randbytes(draw.choice((1, 2, 9, 100)))
        else:
            data[where:where] = data[: draw.choice((1, 4, 64))]
    return [*frames[:at], bytes(data), *frames[at + 1 :]]


def _frame(draw: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    made, at = list(frames), draw.randrange(len(frames))
    how = draw.randrange(5)
    if how == 0:
        del made[at]
    elif how == 1:
        made.insert(at, draw.choice((b"", draw.randbytes(8), made[at])))
    elif how == 2:
        other = draw.randrange(len(made))
        made[at], made[other] = made[other], made[at]
    elif how == 3:
        made += [b""] * draw.choice((1, 10, 9000))
    else:
        made = [*made[:2], *draw.choice(others)[2:]]
    return made


def _bomb(draw: random.Random, frames: Frames, _: list[Frames]) -> Frames:
    """Much inside a small header: nested, or side by side."""
    unit = draw.choice(
        (b"\x91", b"\x81\xa1a", b"\x90", b"\x80", b"\x81\xa0\xc0", b"\x81\xa1k\x90", b"\xdc\x20\x00", b"\xa0", b"\xc4\x00")
    )
    count = draw.randrange(1, MAX_BOMB // len(unit))
    wide = b"\xdc" + (8192).to_bytes(2, "big")
    body = unit * count if draw.random() < 0.5 else b"".join(wide + unit * 8192 for _ in range(max(1, min(count // 8192, 7))))
    return [frames[0], b"\x82\xa4type" + draw.choice((b"\xa3ack", b"\xa6submit", b"\xa5final")) + b"\xa1x" + body, *frames[2:]]


def _value(draw: random.Random, frames: Frames, _: list[Frames]) -> Frames:
    """A value in the header, or in something that is packed inside the header, becomes another."""
    changed = _changed(draw, frames[1], 3)
    return [frames[0], changed, *frames[2:]] if changed is not None and len(changed) < 4 * MAX_BOMB else frames


def _changed(draw: random.Random, packed: bytes, depth: int) -> bytes | None:
    try:
        tree = msgpack.unpackb(packed, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    paths = list(_paths(tree))
    path = draw.choice(paths)
    old = _get(tree, path)
    if isinstance(old, bytes) and depth and draw.random() < 0.7:
        inner = _changed(draw, old, depth - 1)
        return None if inner is None else msgpack.packb(_put(tree, path, inner))
    try:
        return bytes(msgpack.packb(_put(tree, path, _other(draw, old, tree, paths))))
    except (ValueError, OverflowError, RecursionError):
        return None


def _other(draw: random.Random, old: Any, tree: Any, paths: list[Path]) -> Any:
    how = draw.random()
    if how < 0.2 and type(old) in (int, float):
        return old + draw.choice((1, -1, 0.5, 1000))
    if how < 0.4 and isinstance(old, list) and old:
        return draw.choice((old[:-1], old * 2, old * 100, [*old, draw.choice(ODD)], old[::-1]))
    if how < 0.4 and isinstance(old, dict):
        return {k: v for k, v in old.items() if draw.random() < 0.7} | {
            draw.choice(("x", "type", "id", "", "out")): draw.choice(ODD)
        }
    if how < 0.4 and isinstance(old, str | bytes):
        return draw.choice((old * 2, old[:-1], old * 1000, old[:0]))
    return draw.choice(ODD) if how < 0.8 else _get(tree, draw.choice(paths))


def _paths(tree: Any, path: Path = ()) -> Any:
    if len(path) < 12:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree[:64]) if isinstance(tree, list) else ()
        for key, value in items:
            yield (*path, key)
            yield from _paths(value, (*path, key))
    if not path:
        yield ()


def _get(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    made = dict(tree) if isinstance(tree, dict) else list(tree)
    made[path[0]] = _put(tree[path[0]], path[1:], value)
    return made


Change = Callable[[random.Random, Frames, list[Frames]], Frames]
CHANGES: Final[tuple[Change, ...]] = (_byte, _byte, _frame, _value, _value, _value, _value, _bomb)

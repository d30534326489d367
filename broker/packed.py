"""msgpack from strangers, within bounds: what a few bytes may grow to.

The decoder makes room for as many items as an array says it has, at each of 1,024 levels, before it has seen one of them: five
KiB of headers alone took 64 MiB. Every item takes a byte, though, so claims can be held against what is left.
"""

import re
from typing import Any, Final

import msgpack

MAX_ITEMS: Final = 8192
MAX_PAIRS: Final = 256
MAX_PARTS: Final = 32_768
"""Arrays and maps, empty ones included: each takes some hundred bytes."""
SMALL_BYTES: Final = 1024
"""Up to here claims within the length cost little, however deep."""
MAX_LARGE: Final = 16
_LARGE: Final = re.compile(rb"\xdc(?=[\x01-\x20])|\xdd(?=\0\0[\x01-\x20])")
"""Where an array of 256 to `MAX_ITEMS` items may begin; or a number or text that has these bytes."""
_ONE_BYTE: Final = re.compile(rb"[\x00-\x7f\xc0\xc2\xc3\xe0-\xff]*")
_PARTS: Final = bytes((*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF))
_SIZES: Final = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_LENGTHS: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_PER_ITEM: Final = {0xDC: 1, 0xDD: 1, 0xDE: 2, 0xDF: 2}


class PackedError(ValueError):
    """Bytes that are no msgpack that we take; the text says why."""


def unpack(data: bytes) -> Any:
    """The value: maps with keys of text or bytes, no extension types.

    Raises:
        PackedError: there is none, or it could take much more memory than its bytes.
    """
    if len(data) > SMALL_BYTES:
        _check_claims(data)
    most = min(MAX_ITEMS, len(data))
    try:
        return msgpack.unpackb(data, strict_map_key=True, ext_hook=_no_ext, max_array_len=most, max_map_len=MAX_PAIRS)
    except PackedError:
        raise
    except (ValueError, msgpack.UnpackException, RecursionError) as e:
        raise PackedError(f"not msgpack as it should be: {type(e).__name__}") from e


def _no_ext(code: int, data: bytes) -> Any:
    raise PackedError("extension types are not allowed")


def _check_claims(data: bytes) -> None:
    if len(data) > MAX_PARTS and len(data) - len(data.translate(None, _PARTS)) > MAX_PARTS:
        raise PackedError(f"more than {MAX_PARTS} arrays and maps")
    if data.count(0xDC) + data.count(0xDD) > MAX_LARGE and len(_LARGE.findall(data)) > MAX_LARGE:
        _walk(data)


def _walk(data: bytes) -> None:
    """Hold what is claimed against what is left, item by item."""
    at, owed = 0, 1
    while 0 < owed <= len(data) - at:
        if run := min(_ONE_BYTE.match(data, at).end() - at, owed):  # type: ignore[union-attr]
            at, owed = at + run, owed - run
            continue
        first = data[at]
        at, owed = at + 1, owed - 1
        if first <= 0x8F:
            owed += 2 * (first & 0x0F)
        elif first <= 0x9F:
            owed += first & 0x0F
        elif first <= 0xBF:
            at += first & 0x1F
        elif first in _LENGTHS:
            width = _LENGTHS[first]
            length = int.from_bytes(data[at : at + width], "big")
            at += width
            if first in _PER_ITEM:
                owed += _PER_ITEM[first] * length
            else:
                at += length
        elif first in _SIZES:
            at += _SIZES[first]
        else:
            raise PackedError("extension types are not allowed")
    if owed:
        raise PackedError("an array or a map has more items than there are bytes")

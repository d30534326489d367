"""A record: some frames that belong to a task, as bytes with a checksum; and what a store is asked to write.

Knows how frames become one string of bytes and back. Does not know messages, nor files.
"""

import struct
from collections.abc import Sequence
from zlib import crc32

from penstock.broker.columns import Buffer, view
from penstock.broker.wire import record

_HEAD = struct.Struct("<QBH")
_LENGTH_BYTES = 8
_CRC_BYTES = 4
_CRC_OF_ALL = 0x2144DF1C
"""The CRC32 of anything that its own CRC32 follows."""
MAX_FRAMES = 0xFFFF
KIND_AT = 9
"""Where the kind is in a packed record, counted from 1 as SQL does."""


class StorageError(RuntimeError):
    """The files cannot be used as they are, or can no longer be written; the text says which, and what to do."""


class Corrupt(StorageError):
    """What is on disk is not what was written."""


@record
class Put:
    """Add a record to a task. `kind` is a small number that the journal gives a meaning."""

    task: int
    kind: int
    frames: Sequence[Buffer]


@record
class Erase:
    """Forget the records of a task: those of some kinds, or all."""

    task: int
    kinds: Sequence[int] = ()


@record
class Copy:
    """Copy all that is safe by then to a new folder, beside other work."""

    folder: str


Write = Put | Erase | Copy


def pack(task: int, kind: int, frames: Sequence[Buffer]) -> bytes:
    """The record as bytes: head, lengths, frames, CRC32 of all that."""
    views = [view(frame) for frame in frames]
    lengths = struct.pack(f"<{len(views)}Q", *(v.nbytes for v in views))
    data = b"".join((_HEAD.pack(task, kind, len(views)), lengths, *views))
    return data + crc32(data).to_bytes(_CRC_BYTES, "little")


def unpack(data: bytes) -> Put:
    """The inverse of `pack`. Raises Corrupt: a byte is not as it was written."""
    return Put(*parts(data))


def parts(data: bytes) -> tuple[int, int, list[bytes]]:
    """Task, kind and frames of a packed record.

    Raises:
        Corrupt: a byte is not as it was written.
    """
    if len(data) < _HEAD.size + _CRC_BYTES or crc32(data) != _CRC_OF_ALL:
        raise Corrupt("a record's checksum is wrong")
    task, kind, num_frames = _HEAD.unpack_from(data)
    at = _HEAD.size + num_frames * _LENGTH_BYTES
    frames: list[bytes] = []
    for length in struct.unpack_from(f"<{num_frames}Q", data, _HEAD.size):
        frames.append(data[at : at + length])
        at += length
    return task, kind, frames


def is_erased(erase: Erase, data: bytes) -> bool:
    """Whether a packed record is to be forgotten."""
    task, kind, _ = _HEAD.unpack_from(data)
    return bool(task == erase.task and (not erase.kinds or kind in erase.kinds))


def checksum(data: bytes) -> int:
    """The CRC32 that a packed record ends with."""
    return int.from_bytes(data[-_CRC_BYTES:], "little")

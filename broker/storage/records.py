"""A record: some frames that belong to a task, as bytes with a checksum; and what a store is asked to write.

Knows how frames become one string of bytes and back. Does not know messages, nor files.
"""

import struct
from collections.abc import Sequence
from zlib import crc32

from penstock.broker.columns import Buffer, view
from penstock.broker.wire import record

_HEAD = struct.Struct("<QBH")
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
MAX_FRAMES = 0xFFFF


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
    """Forget a task and all of its records."""

    task: int


Write = Put | Erase


def pack(task: int, kind: int, frames: Sequence[Buffer]) -> bytes:
    """The record as bytes: head, lengths, frames, CRC32 of all that."""
    views = [view(frame) for frame in frames]
    parts = [_HEAD.pack(task, kind, len(views)), *(_LENGTH.pack(v.nbytes) for v in views), *views]
    data = b"".join(parts)
    return data + _CRC.pack(crc32(data))


def unpack(data: bytes) -> Put:
    """The inverse of `pack`; the frames are views of `data`.

    Raises:
        Corrupt: a byte is not as it was written.
    """
    if len(data) < _HEAD.size + _CRC.size or crc32(data[: -_CRC.size]) != checksum(data):
        raise Corrupt("a record's checksum is wrong")
    task, kind, num_frames = _HEAD.unpack_from(data)
    body = memoryview(data)
    at = _HEAD.size + num_frames * _LENGTH.size
    frames = list[Buffer]()
    for index in range(num_frames):
        (length,) = _LENGTH.unpack_from(data, _HEAD.size + index * _LENGTH.size)
        frames.append(body[at : at + length])
        at += length
    return Put(task, kind, frames)


def checksum(data: bytes) -> int:
    """The CRC32 that a packed record ends with."""
    (found,) = _CRC.unpack_from(data, len(data) - _CRC.size)
    return int(found)

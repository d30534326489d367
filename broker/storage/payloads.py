"""Large frames in files of their own, appended one after another; a row holds where they are and their checksum.

Knows files and places; does not know whose frames they are. A file is deleted when nothing in it is needed any more; files
that nothing names (a crash between their writing and the commit) are deleted after the records were read.
"""

import os
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

from penstock.broker.columns import Buffer, view
from penstock.broker.failpoints import ARMED, hit
from penstock.broker.storage.records import Corrupt

_PLACE = struct.Struct("<cQQQI")
INLINE, PLACED = b"i", b"p"
MAX_FILE_BYTES = 64 << 20


class Payloads:
    """The files in one folder. Not thread-safe: reading comes first, then one thread writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True, mode=0o700)
        self._num_live: Counter[int] = Counter()
        self._last = max((int(path.stem) for path in folder.glob("*.payload")), default=0)
        self._file: int | None = None
        self._at = 0
        self._is_dirty = False

    # --- frames as a record holds them -----------------------------------------------------------------------------

    @staticmethod
    def inline(frame: Buffer) -> bytes:
        """A small frame, in the record itself."""
        return INLINE + bytes(view(frame))

    def write(self, frame: Buffer) -> bytes:
        """Append a frame; what comes back is its place. Raises OSError."""
        data = view(frame)
        if self._file is None or self._at + data.nbytes > MAX_FILE_BYTES:
            self._begin_file()
        assert self._file is not None
        place = _PLACE.pack(PLACED, self._last, self._at, data.nbytes, crc32(data))
        rest = data.cast("B")
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._at += data.nbytes
        self._num_live[self._last] += 1
        self._is_dirty = True
        return place

    def resolve(self, frames: Sequence[bytes]) -> list[Buffer]:
        """The frames that a record's frames stand for. Raises Corrupt."""
        found: list[Buffer] = []
        for frame in frames:
            if frame[:1] == INLINE:
                found.append(frame[1:])
                continue
            _, number, at, length, crc = self._place(frame)
            payload = self._read(number, at, length)
            if len(payload) != length or crc32(payload) != crc:
                raise Corrupt(f"a payload in {self._path(number)} is not as it was written")
            self._num_live[number] += 1
            found.append(payload)
        return found

    def release(self, frames: Sequence[bytes]) -> None:
        """These are needed no more; a full file without any that is needed goes."""
        for frame in frames:
            if frame[:1] == PLACED:
                _, number, *_ = self._place(frame)
                self._num_live[number] -= 1
                if not self._num_live[number]:
                    del self._num_live[number]
                    if number != self._last:
                        self._path(number).unlink(missing_ok=True)
                        if ARMED:
                            hit("broker.payload.unlinked")

    def sweep(self) -> None:
        """Delete the files that no record named; after all were read."""
        for path in self._folder.glob("*.payload"):
            if int(path.stem) not in self._num_live:
                path.unlink()

    # --- files -----------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """What was written is on the disk. Raises OSError."""
        if self._is_dirty and self._file is not None:
            if ARMED:
                hit("broker.payload.written")
            os.fsync(self._file)
            self._is_dirty = False
            if ARMED:
                hit("broker.payload.synced")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012d}.payload"

    def _begin_file(self) -> None:
        self.sync()
        self.close()
        if self._last and not self._num_live[self._last]:
            self._path(self._last).unlink(missing_ok=True)
        self._last += 1
        self._file, self._at = os.open(self._path(self._last), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600), 0
        if ARMED:
            hit("broker.payload.begun")
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # the file's name has to outlive a loss of power as well
        finally:
            os.close(folder)

    def _read(self, number: int, at: int, length: int) -> bytes:
        try:
            with open(self._path(number), "rb") as f:
                f.seek(at)
                return f.read(length)
        except OSError as e:
            raise Corrupt(f"a payload file is missing: {e}") from e

    @staticmethod
    def _place(data: bytes) -> tuple[bytes, int, int, int, int]:
        if len(data) != _PLACE.size:
            raise Corrupt("a payload's place is not as it was written")
        found: tuple[bytes, int, int, int, int] = _PLACE.unpack(data)
        return found

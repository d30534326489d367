"""Something to poll that any thread, and any finalizer, can ring."""

import contextlib
import os


class Bell:
    """A pipe: `fileno` becomes readable once it has been rung, until it is silenced."""

    __slots__ = ("_read", "_write")

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe is loud enough
            os.write(self._write, b"!")

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def __del__(self) -> None:
        os.close(self._read)
        os.close(self._write)

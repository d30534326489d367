"""What the broker asks of a store, and the twin in memory that stands for a disk in tests and simulations.

A store takes writes in order and says later up to which of them all are safe; what was not safe may be lost in a crash, and
then a prefix of it is kept: never a later write without an earlier one.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from penstock.broker.storage.records import Erase, Put, StorageError, Write, is_erased, pack, unpack


class Store(Protocol):
    """See the module.

    Attributes:
        committed: all writes up to this ticket are safe.
        failure: why nothing can be written any more; then the broker must stop, and read what is safe at its next start.
    """

    @property
    def committed(self) -> int: ...

    @property
    def failure(self) -> StorageError | None: ...

    def load(self) -> Iterator[Put]:
        """Every record that is not erased, in the order of writing; once, before the first `append`."""
        ...

    def append(self, writes: Sequence[Write]) -> int:
        """Take in writes, which become safe together; the ticket grows with every call."""
        ...

    def fileno(self) -> int | None:
        """A descriptor that is readable when `committed` or `failure` may have changed; None: it never does by itself."""
        ...

    def clear(self) -> None:
        """Take note of the descriptor."""
        ...

    def take_copies(self) -> list[tuple[str, str]]:
        """Copies that have ended: folder, and why there is none or an empty text."""
        ...

    def has_room(self) -> bool:
        """Whether there is space for more tasks; what ends tasks may always be written."""
        ...

    def close(self) -> None:
        """Make everything safe, and let go of the files."""
        ...


class MemoryStore:
    """A disk in memory: writes become safe when `commit` is called. `crash` gives the store that a restart would find."""

    def __init__(self, kept: Sequence[bytes] = ()) -> None:
        self.committed = 0
        self.failure: StorageError | None = None
        self.is_full = False
        self._safe: list[bytes] = list(kept)
        self._waiting: list[tuple[int, Sequence[Write]]] = []
        self._last = 0
        self.copies: dict[str, MemoryStore] = {}
        self._copied: list[tuple[str, str]] = []

    def load(self) -> Iterator[Put]:
        return (unpack(data) for data in list(self._safe))

    def append(self, writes: Sequence[Write]) -> int:
        if self.failure is not None:
            raise self.failure
        self._last += 1
        self._waiting.append((self._last, [Put(w.task, w.kind, _copied(w)) if isinstance(w, Put) else w for w in writes]))
        return self._last

    def commit(self, num_groups: int | None = None) -> None:
        """The next groups of writes are safe; all of them by default."""
        done = self._waiting[:num_groups]
        del self._waiting[: len(done)]
        for ticket, writes in done:
            for write in writes:
                self._apply(write)
            self.committed = ticket

    def crash(self, num_kept: int = 0) -> "MemoryStore":
        """What a restart finds: what was safe, and perhaps the first of the groups that were not."""
        self.commit(num_kept)
        return MemoryStore(self._safe)

    def _apply(self, write: Write) -> None:
        if isinstance(write, Erase):
            self._safe = [data for data in self._safe if not is_erased(write, data)]
        elif isinstance(write, Put):
            self._safe.append(pack(write.task, write.kind, write.frames))
        else:
            error = "it exists" if write.folder in self.copies else ""
            self.copies.setdefault(write.folder, MemoryStore(self._safe))
            self._copied.append((write.folder, error))

    def fileno(self) -> None:
        return None

    def clear(self) -> None:
        return

    def take_copies(self) -> list[tuple[str, str]]:
        copied, self._copied = self._copied, []
        return copied

    def has_room(self) -> bool:
        return not self.is_full

    def close(self) -> None:
        self.commit()


def _copied(write: Put) -> list[bytes]:
    data = unpack(pack(write.task, write.kind, write.frames))
    return [bytes(frame) for frame in data.frames]  # type: ignore[arg-type]

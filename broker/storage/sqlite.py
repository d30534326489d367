"""The store on disk: SQLite with a write-ahead log, and one thread that commits in groups.

Whatever waits is committed as soon as the last commit has ended: no timer, and a group grows with the time that a commit
takes. One connection does everything, from one thread at a time, with an exclusive lock on the file. Frames too large for
a row go to payload files (`payloads.py`), which are synced before the row that names them is committed.

Rows carry a checksum each, and one row counts all of them, so that a damaged file is refused instead of read wrongly: SQLite
has checksums in its log, but none in its pages.
"""

import logging
import os
import shutil
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from penstock.broker.columns import Buffer, frame_bytes
from penstock.broker.failpoints import ARMED, hit, hit_records
from penstock.broker.storage.backup import back_up, let_go
from penstock.broker.storage.payloads import Payloads
from penstock.broker.storage.records import (
    KIND_AT,
    Copy,
    Corrupt,
    Erase,
    Put,
    StorageError,
    Write,
    checksum,
    pack,
    parts,
)

log = logging.getLogger("penstock.broker")
FORMAT = 1
APPLICATION_ID = 0x50535451  # "PSTQ"
LARGE_BYTES = 64 * 1024
DEFAULT_MIN_FREE_BYTES = 256 << 20
_WHAT_TO_DO = "restore a backup, or move its folder away to start anew"
_SCHEMA = """
CREATE TABLE records (seq INTEGER PRIMARY KEY, task INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX by_task ON records (task);
CREATE TABLE total (id INTEGER PRIMARY KEY CHECK (id = 0), num_records INTEGER NOT NULL, crc_sum INTEGER NOT NULL);
INSERT INTO total VALUES (0, 0, 0);
"""
_ERASE = f"DELETE FROM records WHERE task = ?1 AND (?2 = x'' OR instr(?2, substr(body, {KIND_AT}, 1))) RETURNING body"
_PRAGMAS = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "mmap_size=0", "wal_autocheckpoint=4000")


class SqliteStore:
    """See the module and `Store`.

    Args:
        folder: where the files are; made with mode 0700, the files with 0600.
        min_free_bytes: below this much space on the disk `has_room` is false.

    Raises:
        Corrupt: the files were damaged. StorageError: they cannot be opened, or another broker has them.
    """

    def __init__(self, folder: Path, min_free_bytes: int = DEFAULT_MIN_FREE_BYTES) -> None:
        self.committed = 0
        self.failure: StorageError | None = None
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            text = f"there can be no journal at {folder}: {e.strerror}; choose another state_dir, or journal = \"memory\""
            raise StorageError(text) from e
        self._path = folder / "journal.sqlite"
        self._db = _open(self._path)
        self._payloads = Payloads(folder / "payloads")
        let_go(folder)
        self._num_records, self._crc_sum = self._check_total()
        self._waiting: list[Write] = []
        self._last = 0
        self._wanted: deque[str] = deque()
        self._copied: deque[tuple[str, str]] = deque()
        self._is_closed = False
        self._news = threading.Condition()
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)
        self._thread: threading.Thread | None = None

    # --- reading, once ---------------------------------------------------------------------------------------------

    def _check_total(self) -> tuple[int, int]:
        try:
            [(num_records, crc_sum)] = self._db.execute("SELECT num_records, crc_sum FROM total")
        except (sqlite3.DatabaseError, ValueError) as e:
            raise self._corrupt(e) from e
        return num_records, crc_sum

    def load(self) -> Iterator[Put]:
        """See `Store`. Raises Corrupt at the first record that is not as it was written, or at the end if one is missing."""
        num_records = crc_sum = 0
        try:
            for task, body in self._db.execute("SELECT task, body FROM records ORDER BY seq"):
                if type(body) is not bytes:  # a damaged page may say that it is anything
                    raise Corrupt("a record is none")
                found, kind, frames = parts(body)
                if found != task:
                    raise Corrupt("a record stands under another task")
                num_records, crc_sum = num_records + 1, crc_sum + checksum(body)
                if ARMED:
                    hit("broker.restore.record")
                yield Put(task, kind, self._payloads.resolve(frames))
        except (sqlite3.DatabaseError, Corrupt) as e:
            raise self._corrupt(e) from e
        if (num_records, crc_sum) != (self._num_records, self._crc_sum):
            raise self._corrupt(f"{self._num_records} records were written, {num_records} are there")
        self._payloads.sweep()

    def _corrupt(self, why: object) -> Corrupt:
        return Corrupt(f"the journal {self._path} is damaged ({why}): {_WHAT_TO_DO}")

    # --- writing ---------------------------------------------------------------------------------------------------

    def append(self, writes: Sequence[Write]) -> int:
        """See `Store`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._commit_all, name="journal", daemon=True)
            self._thread.start()
        with self._news:
            if self.failure is not None:
                raise self.failure
            self._last += 1
            self._waiting += writes
            self._news.notify()
            return self._last

    def _commit_all(self) -> None:
        while self.failure is None:  # an fsync that failed once may seem to succeed the next time: nothing is written after it
            with self._news:
                while self._last == self.committed and not self._is_closed:
                    self._news.wait()
                if self._last == self.committed:
                    return
            self._commit_waiting()
            while self._wanted and self.failure is None:
                self._copy(self._wanted.popleft())

    def _commit_waiting(self) -> None:
        """Commit all that waits, as one group."""
        with self._news:
            writes, self._waiting = self._waiting, []
            ticket = self._last
        if ticket == self.committed:
            return
        self._wanted += [write.folder for write in writes if isinstance(write, Copy)]
        try:
            self._commit([write for write in writes if not isinstance(write, Copy)])
        except Exception as e:  # whatever it was, nothing more is safe, and everybody must know
            with self._news:
                self.failure = StorageError(f"the journal {self._path} cannot be written: {e or type(e).__name__}")
            self._wake()
            return
        self.committed = ticket
        self._wake()

    def _copy(self, folder: str) -> None:
        """Copy everything, and commit meanwhile; a copy that cannot be made is told, and harms nothing."""
        error = ""
        try:
            back_up(self._folder, self._db, Path(folder), self._min_free_bytes, self._go_on)
        except (sqlite3.Error, OSError, ValueError) as e:
            error = str(e) or type(e).__name__
        self._copied.append((folder, error))
        self._wake()

    def _go_on(self) -> None:
        self._commit_waiting()
        if self.failure is not None or self._is_closed:
            raise OSError("the broker stops")

    def _commit(self, writes: Sequence[Put | Erase]) -> None:
        rows, num_records, crc_sum = list[tuple[int, bytes]](), 0, 0
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        erased = list[bytes]()
        for write in writes:
            if isinstance(write, Put):
                body = pack(write.task, write.kind, [self._kept(frame) for frame in write.frames])
                rows.append((write.task, body))
                num_records, crc_sum = num_records + 1, crc_sum + checksum(body)
                continue
            if rows:  # a record of the same group may be what is erased
                db.executemany("INSERT INTO records (task, body) VALUES (?, ?)", rows)
                rows = []
            for (body,) in db.execute(_ERASE, (write.task, bytes(write.kinds))).fetchall():
                num_records, crc_sum = num_records - 1, crc_sum - checksum(body)
                erased.append(body)
        if rows:
            db.executemany("INSERT INTO records (task, body) VALUES (?, ?)", rows)
        self._num_records, self._crc_sum = self._num_records + num_records, self._crc_sum + crc_sum
        db.execute("UPDATE total SET num_records = ?, crc_sum = ?", (self._num_records, self._crc_sum))
        self._payloads.sync()
        if ARMED:
            hit_records("broker.committing", map(_kind, writes))
        db.execute("COMMIT")
        if ARMED:
            hit_records("broker.committed", map(_kind, writes))
        for body in erased:
            self._payloads.release(parts(body)[2])

    def _kept(self, frame: Buffer) -> Buffer:
        return self._payloads.write(frame) if frame_bytes(frame) > LARGE_BYTES else self._payloads.inline(frame)

    # --- for the broker's loop -------------------------------------------------------------------------------------

    def _wake(self) -> None:
        try:
            os.write(self._write_fd, b"!")
        except BlockingIOError:
            return  # full: it is readable

    def fileno(self) -> int:
        """See `Store`."""
        return self._read_fd

    def clear(self) -> None:
        """See `Store`."""
        try:
            while os.read(self._read_fd, 4096):
                continue
        except BlockingIOError:
            return

    def take_copies(self) -> list[tuple[str, str]]:
        """See `Store`."""
        return [self._copied.popleft() for _ in range(len(self._copied))]

    def has_room(self) -> bool:
        """See `Store`."""
        try:
            return shutil.disk_usage(self._folder).free >= self._min_free_bytes
        except OSError:  # the folder is gone: the next commit says so
            return False

    def close(self) -> None:
        """See `Store`."""
        with self._news:
            self._is_closed = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join()
        self._db.close()
        self._payloads.close()
        os.close(self._read_fd)
        os.close(self._write_fd)


def _kind(write: Put | Erase) -> int:
    return write.kind if isinstance(write, Put) else 0


def _open(path: Path) -> sqlite3.Connection:
    old_umask = os.umask(0o077)
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.0)
        for pragma in _PRAGMAS:
            db.execute(f"PRAGMA {pragma}")
        (application,), (version,) = *db.execute("PRAGMA application_id"), *db.execute("PRAGMA user_version")
        if (application, version) == (0, 0):
            script = f"BEGIN EXCLUSIVE; {_SCHEMA} PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={FORMAT}; COMMIT;"
            db.executescript(script)
        else:
            db.execute("BEGIN EXCLUSIVE")  # takes the lock for good
            db.execute("COMMIT")
    except sqlite3.OperationalError as e:
        reason = "another broker has it open" if "locked" in str(e) else str(e)
        raise StorageError(f"the journal {path} cannot be opened: {reason}") from e
    except sqlite3.DatabaseError as e:
        raise Corrupt(f"the journal {path} is damaged ({e}): {_WHAT_TO_DO}") from e
    finally:
        os.umask(old_umask)
    if (application, version) not in ((0, 0), (APPLICATION_ID, FORMAT)):
        raise StorageError(f"{path} is format {version} of application {application:#x}; this broker writes format {FORMAT}")
    return db

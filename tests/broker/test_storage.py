"""The stores of durable tasks: one set of rules for the disk and for its twin in memory, payload files, failing writes."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_rules import expected, plain, wait_committed

from penstock.broker.storage.payloads import Payloads
from penstock.broker.storage.records import Corrupt, Erase, Put, StorageError, Write, pack, unpack
from penstock.broker.storage.sqlite import LARGE_BYTES, SqliteStore
from penstock.broker.storage.store import MemoryStore

LARGE = bytes(range(256)) * (LARGE_BYTES // 256 + 1)


class Disk:
    """A folder with a store that is opened, closed and opened again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: SqliteStore | None = None

    def open(self) -> SqliteStore:
        self.close()
        self.store = SqliteStore(self.folder)
        return self.store

    def close(self) -> None:
        if self.store is not None:
            self.store.close()
            self.store = None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "journal")
    yield made
    made.close()


# --- records -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**63), st.integers(0, 255), st.lists(st.binary(max_size=300), max_size=5))
def test_a_record_comes_back(task: int, kind: int, frames: list[bytes]) -> None:
    put = unpack(pack(task, kind, frames))
    assert (put.task, put.kind, [bytes(memoryview(f)) for f in put.frames]) == (task, kind, frames)  # type: ignore[arg-type]


def test_no_byte_of_a_record_can_change_unseen() -> None:
    data = pack(7, 1, [b"some", b"", b"frames"])
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(Corrupt):
                unpack(bytes(damaged))
        with pytest.raises(Corrupt):
            unpack(data[:at])


# --- both stores -------------------------------------------------------------------------------------------------------

FRAMES = st.lists(st.sampled_from([b"", b"x", b"abc" * 40, LARGE]), max_size=3)
WRITES = st.lists(
    st.one_of(
        st.builds(Put, st.integers(1, 5), st.integers(0, 3), FRAMES),
        st.builds(Erase, st.integers(1, 5)),
        st.builds(Erase, st.integers(1, 5), st.lists(st.integers(0, 3), max_size=2)),
    ),
    max_size=6,
)


@given(groups=st.lists(WRITES, max_size=8), restart_at=st.integers(0, 8))
@settings(max_examples=40)
def test_the_disk_keeps_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[Write]], restart_at: int
) -> None:
    disk = Disk(tmp_path_factory.mktemp("store") / "journal")
    store = disk.open()
    assert plain(store) == []
    for index, group in enumerate(groups):
        if index == restart_at:
            store = disk.open()
            assert plain(store) == expected(groups[:index])
        ticket = store.append(group)
        wait_committed(store, ticket)
    assert plain(disk.open()) == expected(groups)
    disk.close()


@given(groups=st.lists(WRITES, max_size=8), num_safe=st.integers(0, 8), num_kept=st.integers(0, 8))
def test_the_twin_loses_a_tail_and_nothing_else(groups: list[list[Write]], num_safe: int, num_kept: int) -> None:
    store = MemoryStore()
    for group in groups:
        store.append(group)
    store.commit(num_safe)
    assert plain(store.crash(num_kept)) == expected(groups[: num_safe + num_kept])


def test_tickets_grow_and_are_reached_in_order(disk: Disk) -> None:
    store = disk.open()
    tickets = [store.append([Put(task, 0, [b"x"])]) for task in range(1, 200)]
    assert tickets == sorted(set(tickets))
    wait_committed(store, tickets[-1])
    store.clear()


def test_nothing_is_safe_before_it_is_committed() -> None:
    store = MemoryStore()
    ticket = store.append([Put(1, 0, [b"x"])])
    assert store.committed < ticket
    assert plain(store.crash()) == []


# --- the disk ----------------------------------------------------------------------------------------------------------


def test_only_one_broker_has_the_files(disk: Disk) -> None:
    disk.open()
    with pytest.raises(StorageError, match="another broker"):
        SqliteStore(disk.folder)


def test_a_folder_that_cannot_be_made_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match='journal = "memory"'):
        SqliteStore(tmp_path / "file" / "journal")


def test_files_are_for_their_owner_only(disk: Disk) -> None:
    store = disk.open()
    wait_committed(store, store.append([Put(1, 0, [LARGE])]))
    for path in [disk.folder, *disk.folder.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_payload_files_go_when_nothing_in_them_is_needed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.broker.storage.payloads.MAX_FILE_BYTES", 3 * len(LARGE))
    store = disk.open()
    ticket = store.append([Put(task, 0, [LARGE]) for task in range(1, 10)])
    wait_committed(store, ticket)
    files = disk.folder / "payloads"
    assert len(list(files.iterdir())) == 3
    wait_committed(store, store.append([Erase(task) for task in range(1, 10)]))
    wait_committed(store, store.append([Put(10, 0, [LARGE])]))
    assert len(list(files.iterdir())) == 1
    assert plain(disk.open()) == [(10, 0, [LARGE])]


def test_payloads_that_no_record_names_are_swept(disk: Disk) -> None:
    stray = disk.folder / "payloads" / "000000000001.payload"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"written before a crash")
    assert plain(disk.open()) == []
    assert not stray.exists()


def test_a_write_that_fails_ends_the_store(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()

    def fail(_: Payloads) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Payloads, "sync", fail)
    ticket = store.append([Put(1, 0, [b"x"])])
    limit = time.monotonic() + 20.0
    while store.failure is None:
        assert time.monotonic() < limit
        time.sleep(0.0005)
    assert store.committed < ticket
    with pytest.raises(StorageError, match="Input/output"):
        store.append([Put(2, 0, [b"x"])])
    monkeypatch.undo()
    assert plain(disk.open()) == []


def test_whatever_ends_the_commits_is_told(disk: Disk) -> None:
    """A record on the disk has changed: that it cannot be read comes up when it is erased, in the commit thread."""
    store = disk.open()
    wait_committed(store, store.append([Put(1, 1, [b"hello"])]))
    store._db.execute("UPDATE records SET body = zeroblob(40)")
    store.append([Erase(1)])
    limit = time.monotonic() + 10.0
    while store.failure is None:
        assert time.monotonic() < limit
        time.sleep(0.001)
    with pytest.raises(StorageError, match="cannot be written"):
        store.append([Put(2, 1, [b"more"])])


def test_another_format_is_refused(disk: Disk) -> None:
    disk.open()
    disk.close()
    db = sqlite3.connect(disk.folder / "journal.sqlite")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StorageError, match="format 99"):
        SqliteStore(disk.folder)

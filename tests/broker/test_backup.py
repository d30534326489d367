"""A backup is the journal at one instant, whole or not there, however much is written and erased meanwhile."""

import os
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.broker.storage import backup, payloads
from penstock.broker.storage.records import Copy, Erase, Put, Write
from penstock.broker.storage.sqlite import LARGE_BYTES, SqliteStore
from penstock.broker.storage.store import MemoryStore, Store

LIMIT_S = 20.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path / "journal", min_free_bytes=1)
    yield made
    made.close()


def content(store: Store) -> list[tuple[int, int, list[bytes]]]:
    return [(put.task, put.kind, [bytes(memoryview(frame)) for frame in put.frames]) for put in store.load()]  # type: ignore[arg-type]


def copied(store: SqliteStore) -> list[tuple[str, str]]:
    """The copies that have ended, once there are any."""
    limit = time.monotonic() + LIMIT_S
    while not (found := store.take_copies()):
        assert store.failure is None
        assert time.monotonic() < limit
        time.sleep(0.001)
    return found


def is_safe(store: SqliteStore, ticket: int) -> None:
    limit = time.monotonic() + LIMIT_S
    while store.committed < ticket:
        assert store.failure is None
        assert time.monotonic() < limit
        time.sleep(0.001)


def history(seed: int, num_groups: int) -> list[list[Write]]:
    """Groups of writes; a task's payload is large now and then, and tasks are erased again."""
    draw, live, groups = random.Random(seed), list[int](), list[list[Write]]()
    for task in range(1, num_groups + 1):
        frame = draw.randbytes(LARGE_BYTES + 1 if draw.random() < 0.2 else draw.randrange(2000))
        group: list[Write] = [Put(task, 1, [frame])]
        live.append(task)
        if draw.random() < 0.6:
            group.append(Erase(live.pop(draw.randrange(len(live)))))
        groups.append(group)
    return groups


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_journal_at_one_instant(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(backup, "PAGES_PER_STEP", 3)
    monkeypatch.setattr(backup, "STEP_BYTES", 8192)
    monkeypatch.setattr(payloads, "MAX_FILE_BYTES", 4 * LARGE_BYTES)
    groups = history(seed, 400)
    coming, go_on = iter(groups[200:]), store._go_on

    def between() -> None:
        """One more group is written at every step."""
        store.append(next(coming, []))
        go_on()

    monkeypatch.setattr(store, "_go_on", between)
    store.append([write for group in groups[:200] for write in group])
    store.append([Copy(str(tmp_path / "copy"))])
    assert copied(store) == [(str(tmp_path / "copy"), "")]
    num_meanwhile = 200 - len(rest := list(coming))
    assert num_meanwhile > 50
    for group in rest:
        is_safe(store, store.append(group))
    found = SqliteStore(tmp_path / "copy")
    restored = content(found)
    found.close()
    twin = MemoryStore()
    twin.append([write for group in groups[:200] for write in group])
    twin.commit()
    states = [content(twin)]
    for group in groups[200:]:
        twin.append(group)
        twin.commit()
        states.append(content(twin))
    assert restored in states[1 : num_meanwhile + 1]
    store.close()
    again = SqliteStore(tmp_path / "journal")
    assert content(again) == states[-1], "the journal itself has everything"
    again.close()
    assert not (tmp_path / "journal" / backup.HELD).exists()
    store.__init__(tmp_path / "journal")  # type: ignore[misc] # for the fixture to close


def test_what_is_written_meanwhile_does_not_wait_for_it(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_safe(store, store.append([Put(1, 1, [bytes(LARGE_BYTES + 1)])]))
    seen = list[int]()

    def copy_file(source: Path, path: Path, between: object) -> None:
        ticket = store.append([Put(2, 1, [b"meanwhile"])])
        between()  # type: ignore[operator]
        seen.append(store.committed - ticket)
        real(source, path, between)  # type: ignore[arg-type]

    real = backup._copy_file
    monkeypatch.setattr(backup, "_copy_file", copy_file)
    store.append([Copy(str(tmp_path / "copy"))])
    assert copied(store)[0][1] == ""
    assert seen == [0]


@pytest.mark.parametrize(
    ("name", "why"), [("there", "exists"), ("no/where", "No such file"), ("relative", "absolute"), ("nul\0", "null")]
)
def test_what_cannot_be_made_is_told_and_harms_nothing(store: SqliteStore, tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "there").mkdir()
    store.append([Copy(name if name == "relative" else str(tmp_path / name))])
    assert why in copied(store)[0][1]
    assert os.listdir(tmp_path / "there") == []
    is_safe(store, store.append([Put(1, 1, [b"x"])]))


def test_a_disk_that_is_almost_full_is_left_alone(store: SqliteStore, tmp_path: Path) -> None:
    store._min_free_bytes = 1 << 60
    store.append([Copy(str(tmp_path / "copy"))])
    assert "free" in copied(store)[0][1]
    assert not (tmp_path / "copy").exists()


def test_an_error_in_the_middle_leaves_nothing(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_file(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup, "_copy_file", copy_file)
    store.append([Put(1, 1, [bytes(LARGE_BYTES + 1)]), Copy(str(tmp_path / "copy"))])
    assert "No space left" in copied(store)[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    assert sorted(path.name for path in (tmp_path / "journal").iterdir() if path.is_dir()) == ["payloads"]


def test_a_broker_that_stops_does_not_wait_for_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(tmp_path / "journal", min_free_bytes=1)
    is_copying = list[bool]()

    def copy_file(source: Path, path: Path, between: object) -> None:
        is_copying.append(True)
        limit = time.monotonic() + LIMIT_S
        while time.monotonic() < limit:
            between()  # type: ignore[operator]
            time.sleep(0.001)

    monkeypatch.setattr(backup, "_copy_file", copy_file)
    store.append([Put(1, 1, [bytes(LARGE_BYTES + 1)]), Copy(str(tmp_path / "copy"))])
    limit = time.monotonic() + LIMIT_S
    while not is_copying:
        assert time.monotonic() < limit
        time.sleep(0.001)
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < LIMIT_S / 2
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_second_names_that_a_crash_left_are_removed(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "journal").close()
    (tmp_path / "journal" / backup.HELD).mkdir()
    (tmp_path / "journal" / backup.HELD / "000000000001.payload").write_bytes(b"x")
    SqliteStore(tmp_path / "journal").close()
    assert not (tmp_path / "journal" / backup.HELD).exists()


def test_the_copy_is_for_its_owner_only_and_a_whole_database(store: SqliteStore, tmp_path: Path) -> None:
    store.append([Put(1, 1, [bytes(LARGE_BYTES + 1)]), Copy(str(tmp_path / "copy"))])
    assert copied(store)[0][1] == ""
    files = {path.relative_to(tmp_path / "copy").as_posix(): path for path in (tmp_path / "copy").rglob("*")}
    assert sorted(files) == ["journal.sqlite", "payloads", "payloads/000000000001.payload"]
    assert {path.stat().st_mode & 0o777 for path in files.values() if path.is_file()} == {0o600}
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o700
    db = sqlite3.connect(files["journal.sqlite"])
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def test_what_a_broker_left_that_was_killed_is_in_nobodys_way(store: SqliteStore, tmp_path: Path) -> None:
    (tmp_path / "copy.penstock-part" / "payloads").mkdir(parents=True)
    store.append([Put(1, 1, [b"one"]), Copy(str(tmp_path / "copy"))])
    assert copied(store) == [(str(tmp_path / "copy"), "")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "journal"]

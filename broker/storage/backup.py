"""A copy of the journal's files as they are at one instant, made while the broker goes on.

Knows SQLite's backup and files; does not know records. Between any two small steps it lets its caller do other work: what
that writes until the database is copied is part of the copy, and payload files, which only grow, get a second name before
the caller may delete one.
"""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from penstock.broker.failpoints import ARMED, hit

HELD = "held"
PAGES_PER_STEP = 256
STEP_BYTES = 1 << 20


def back_up(source: Path, db: sqlite3.Connection, folder: Path, min_free_bytes: int, between: Callable[[], None]) -> None:
    """Copy `journal.sqlite` and `payloads/` of `source` to a folder that is there afterwards, whole, or not at all.

    Args:
        db: the open journal of `source`, used by this thread alone.
        min_free_bytes: what has to stay free on the disk of `folder`.
        between: called again and again.

    Raises:
        OSError, sqlite3.Error: there is no copy.
    """
    if not folder.is_absolute():
        raise OSError(f"{folder} is no absolute path")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a folder that does not")
    _check_space(source, db, folder.parent, min_free_bytes)
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(mode=0o700)
    try:
        if ARMED:
            hit("broker.backup.begun")
        (part / "payloads").mkdir(mode=0o700)
        _copy_database(db, part / "journal.sqlite", between)
        for path in _held(source):
            _copy_file(path, part / "payloads" / path.name, between)
        for path in (part / "payloads", part):
            _sync(path)
        if ARMED:
            hit("broker.backup.copied")
        part.rename(folder)
        if ARMED:
            hit("broker.backup.renamed")
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        let_go(source)


def _held(source: Path) -> list[Path]:
    """The payload files as they are now, under second names: whatever is deleted from now on stays here."""
    (source / HELD).mkdir(mode=0o700)
    for path in (source / "payloads").glob("*.payload"):
        os.link(path, source / HELD / path.name)
    return sorted((source / HELD).iterdir())


def let_go(source: Path) -> None:
    """Remove the second names, also those that a crash has left."""
    shutil.rmtree(source / HELD, ignore_errors=True)


def _check_space(source: Path, db: sqlite3.Connection, parent: Path, min_free_bytes: int) -> None:
    [(num_pages,)], [(page_bytes,)] = db.execute("PRAGMA page_count").fetchall(), db.execute("PRAGMA page_size").fetchall()
    needed = num_pages * page_bytes + sum(path.stat().st_size for path in (source / "payloads").glob("*.payload"))
    free = shutil.disk_usage(parent).free
    if free - needed < min_free_bytes:
        raise OSError(f"it needs {needed >> 20} MiB and {parent} has {free >> 20} MiB free, of which some must stay so")


def _copy_database(db: sqlite3.Connection, path: Path, between: Callable[[], None]) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    def go_on(status: int, num_left: int, num_pages: int) -> None:
        if num_left:  # after the last step a change would be in the journal and not in its copy
            between()

    with closing(sqlite3.connect(path, isolation_level=None)) as copy:
        db.backup(copy, pages=PAGES_PER_STEP, progress=go_on)
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _copy_file(source: Path, path: Path, between: Callable[[], None]) -> None:
    """As much as there is of it now; what comes later no row of the copy names."""
    num_left = source.stat().st_size
    with source.open("rb") as file, open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy:
        while num_left > 0:
            data = file.read(min(STEP_BYTES, num_left))
            if not data:
                raise OSError(f"{source} has become shorter")
            copy.write(data)
            num_left -= len(data)
            between()
        copy.flush()
        os.fsync(copy.fileno())


def _sync(folder: Path) -> None:
    """What is in a folder has its names on the disk."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

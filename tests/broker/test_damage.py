"""What damage does to a journal's files: a start finds what was committed, or a prefix of it, or refuses; never anything else.

The images are of a journal of 200 operations: as a crash leaves it (everything in the write-ahead log), and as a stop does
(everything in pages). `-m slow` tries every byte of both.
"""

import functools
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from journal_rules import Plain, expected, plain, wait_committed

from penstock.broker.storage.records import Erase, Put, StorageError, Write
from penstock.broker.storage.sqlite import SqliteStore

LARGE_BYTES = 200
"""Larger frames go to payload files in these journals, so that those are small."""
NUM_GROUPS = 20
LOG, PAGES, PAYLOADS = "journal.sqlite-wal", "journal.sqlite", "payloads/000000000001.payload"
FILES = [("crashed", PAGES), ("crashed", LOG), ("crashed", PAYLOADS), ("stopped", PAGES), ("stopped", PAYLOADS)]
SECTOR = 512
PER_PORTION = 2000
Image = dict[str, bytes]
Change = Callable[[bytes, int], bytes]


@functools.cache
def journal() -> tuple[dict[str, Image], list[Plain]]:
    """The images by name, each file by its path; and what is there after each group of operations, in order."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.broker.storage.sqlite.LARGE_BYTES", LARGE_BYTES)
        folder = Path(name, "live")
        store = SqliteStore(folder)
        assert plain(store) == []
        groups: list[list[Write]] = []
        for index in range(NUM_GROUPS):
            group: list[Write] = [Put(index * 10 + i, i % 3, [b"%d" % i, bytes([index]) * 50]) for i in range(7)]
            group += [Put(index * 10 + 7, 0, [bytes([index]) * 300]), Erase(index * 10), Erase(index * 10 - 5)]
            groups.append(group)
            wait_committed(store, store.append(group))
        crashed = image_of(folder)
        store.close()
        return {"crashed": crashed, "stopped": image_of(folder)}, [expected(groups[:n]) for n in range(NUM_GROUPS + 1)]


def image_of(folder: Path) -> Image:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def found_in(image: Image, folder: Path) -> Plain | None:
    """What a start finds in the files; None: it refuses them."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "payloads").mkdir(parents=True)
    for name, data in image.items():
        (folder / name).write_bytes(data)
    store: SqliteStore | None = None
    try:
        store = SqliteStore(folder)
        return plain(store)
    except StorageError as e:
        if str(folder) not in str(e):  # it says which file
            raise
        return None
    finally:
        if store is not None:
            store.close()


def is_right(found: Plain | None) -> bool:
    return found is None or found in journal()[1]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]


def torn(data: bytes, at: int) -> bytes:
    start = at - at % SECTOR
    return data[:start] + bytes(SECTOR) + data[start + SECTOR :]


def cut(data: bytes, at: int) -> bytes:
    return data[:at]


CHANGES = pytest.mark.parametrize("change", [flipped, torn, cut])


def test_the_images_are_whole(tmp_path: Path) -> None:
    images, states = journal()
    assert found_in(images["crashed"], tmp_path / "j") == found_in(images["stopped"], tmp_path / "j") == states[-1]
    assert len(images["crashed"][LOG]) > 50 * 4096
    assert LOG not in images["stopped"]


def wrong_at(image: str, file: str, change: Change, places: Iterable[int]) -> list[int]:
    """The places of a file where damage makes a start find what never was there."""
    files = journal()[0][image]
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        return [
            at for at in places if not is_right(found_in({**files, file: change(files[file], at)}, Path(folder, "journal")))
        ]


@CHANGES
@pytest.mark.parametrize(("image", "file"), FILES)
def test_damage_is_seen(image: str, file: str, change: Change) -> None:
    size = len(journal()[0][image][file])
    assert wrong_at(image, file, change, range(0, size, max(size // 60, 1) | 1)) == []


@given(
    image=st.sampled_from(["crashed", "stopped"]),
    damages=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1, exclude_max=True), st.binary(max_size=40)), min_size=1),
)
@example("crashed", [(1, 0.0, bytes(32))])
@settings(max_examples=300)
def test_damage_at_several_places_is_seen(image: str, damages: list[tuple[int, float, bytes]]) -> None:
    files = dict(journal()[0][image])
    for which, where, data in damages:
        name = sorted(files)[which % len(files)]
        at = int(where * len(files[name]))
        files[name] = files[name][:at] + (data + files[name][at + len(data) :] if data else b"")
    with tempfile.TemporaryDirectory() as folder:
        assert is_right(found_in(files, Path(folder, "journal")))


# --- every byte --------------------------------------------------------------------------------------------------------


def portions(change: Change) -> Iterator[tuple[str, str, Change, range]]:
    step = SECTOR if change is torn else 1
    for image, file in FILES:
        size = len(journal()[0][image][file])
        for start in range(0, size, PER_PORTION * step):
            yield image, file, change, range(start, min(start + PER_PORTION * step, size), step)


def try_portion(portion: tuple[str, str, Change, range]) -> tuple[Any, ...]:
    return *portion[:2], len(portion[3]), wrong_at(*portion)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@CHANGES
def test_every_damage_is_seen(change: Change) -> None:
    journal()
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        done = list(pool.imap_unordered(try_portion, portions(change)))
    wrong = {(image, file): places for image, file, _, places in done if places}
    num_tried = sum(count for _, _, count, _ in done)
    print(f"{num_tried} images tried")
    assert not wrong
    assert num_tried == sum(-(-len(journal()[0][i][f]) // (SECTOR if change is torn else 1)) for i, f in FILES)

"""One model of every store: what is written, erased, committed, copied, restarted and crashed, against a plain list."""

import shutil
import tempfile
import time
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from journal_rules import Plain, expected, plain, wait_committed

from penstock.broker.storage.records import Copy, Erase, Put, Write
from penstock.broker.storage.sqlite import LARGE_BYTES, SqliteStore
from penstock.broker.storage.store import MemoryStore, Store

SIZES = st.lists(st.sampled_from([0, 1, 200, LARGE_BYTES + 1]), max_size=3)
GROUPS = st.lists(st.tuples(st.integers(1, 6), st.none() | SIZES | SIZES), min_size=1, max_size=5)
"""(task, sizes of a record's frames, or None to erase it)."""


class StoreMachine(RuleBasedStateMachine):
    """`groups` are all that was appended, the first `num_safe` of them promised to survive."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[Write]] = []
        self.num_safe = self.ticket = self.num_copies = 0
        self.start()

    def start(self) -> None:
        raise NotImplementedError

    def crash(self, num_more: int) -> Plain:
        """Lose what a loss of power may lose, and start again; what is there."""
        raise NotImplementedError

    def copied(self) -> Plain:
        """What a copy that is made now has."""
        raise NotImplementedError

    @rule(described=GROUPS)
    def append(self, described: list[tuple[int, list[int] | None]]) -> None:
        group: list[Write] = [
            Erase(task) if sizes is None else Put(task, len(self.groups) % 200, [bytes([task]) * size for size in sizes])
            for task, sizes in described
        ]
        ticket = self.store.append(group)
        assert ticket > self.ticket, "tickets grow"
        self.ticket = ticket
        self.groups.append(group)

    @rule()
    def commit(self) -> None:
        wait_committed(self.store, self.ticket)
        self.num_safe = len(self.groups)

    @rule()
    def stop_and_start(self) -> None:
        self.store.close()
        self.num_safe, self.ticket = len(self.groups), 0
        self.start()
        assert plain(self.store) == expected(self.groups)

    @rule(num_more=st.integers(0, 3))
    def crash_and_start(self, num_more: int) -> None:
        found = self.crash(num_more)
        states = [expected(self.groups[:n]) for n in range(self.num_safe, len(self.groups) + 1)]
        assert found in states, "a promise was broken, or a later write kept without an earlier one"
        self.groups = self.groups[: self.num_safe + states.index(found)]
        self.num_safe, self.ticket = len(self.groups), 0

    @precondition(lambda self: self.num_copies < 3)
    @rule()
    def copy(self) -> None:
        self.num_copies += 1
        assert self.copied() == expected(self.groups)
        self.num_safe = len(self.groups)

    @invariant()
    def nothing_has_failed(self) -> None:
        assert self.store.failure is None and self.store.committed <= self.ticket


class MemoryMachine(StoreMachine):
    def start(self) -> None:
        kept = self.store.crash() if self.groups and isinstance(self.store, MemoryStore) else MemoryStore()
        self.store = kept

    def crash(self, num_more: int) -> Plain:
        assert isinstance(self.store, MemoryStore)
        self.store = self.store.crash(num_more)
        return plain(self.store)

    def copied(self) -> Plain:
        assert isinstance(self.store, MemoryStore)
        self.ticket = self.store.append([Copy(f"/copy{self.num_copies}")])
        self.store.commit()
        [(folder, error)] = self.store.take_copies()
        assert not error
        return plain(self.store.copies[folder])


class DiskMachine(StoreMachine):
    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="ps-store-"))
        self.folder = self.place / "journal0"
        self.num_starts = 0
        super().__init__()

    def start(self) -> None:
        self.store = SqliteStore(self.folder, min_free_bytes=0)
        if not self.groups:
            assert plain(self.store) == []

    def crash(self, num_more: int) -> Plain:
        """The files as they are between two commits: what is appended after that is lost with this broker."""
        wait_committed(self.store, self.ticket)
        self.num_starts += 1
        image = self.place / f"journal{self.num_starts}"
        shutil.copytree(self.folder, image)
        self.store.close()
        self.folder = image
        self.store = SqliteStore(image, min_free_bytes=0)
        return plain(self.store)

    def copied(self) -> Plain:
        target = self.place / f"copy{self.num_copies}"
        self.ticket = self.store.append([Copy(str(target))])
        limit = time.monotonic() + 20.0
        while not (done := self.store.take_copies()):
            assert time.monotonic() < limit
            time.sleep(0.0005)
        assert done == [(str(target), "")]
        copy = SqliteStore(target)
        found = plain(copy)
        copy.close()
        return found

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.place)


def test_the_twin_in_memory_is_what_the_model_says() -> None:
    run_state_machine_as_test(MemoryMachine, settings=settings(max_examples=60, stateful_step_count=20))  # type: ignore[no-untyped-call]


def test_the_disk_is_what_the_model_says() -> None:
    run_state_machine_as_test(DiskMachine, settings=settings(max_examples=25, stateful_step_count=12))  # type: ignore[no-untyped-call]

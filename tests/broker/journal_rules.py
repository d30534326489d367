"""What a store of durable tasks holds after some writes, said plainly."""

import time
from collections.abc import Iterable, Sequence

from penstock.broker.storage.records import Erase, Put, Write
from penstock.broker.storage.store import MemoryStore, Store

Plain = list[tuple[int, int, list[bytes]]]
"""(task, kind, frames) of every record."""


def plain(store: Store) -> Plain:
    return [plain_put(put) for put in store.load()]


def plain_put(put: Put) -> tuple[int, int, list[bytes]]:
    return put.task, put.kind, [bytes(memoryview(frame)) for frame in put.frames]  # type: ignore[arg-type]


def expected(groups: Iterable[Sequence[Write]]) -> Plain:
    """What is there after these."""
    kept: Plain = []
    for write in (write for group in groups for write in group):
        if isinstance(write, Erase):
            kept = [row for row in kept if row[0] != write.task or (write.kinds and row[1] not in write.kinds)]
        elif isinstance(write, Put):
            kept.append(plain_put(write))
    return kept


def wait_committed(store: Store, ticket: int) -> None:
    if isinstance(store, MemoryStore):
        store.commit()
    limit = time.monotonic() + 20.0
    while store.committed < ticket:
        assert store.failure is None
        assert time.monotonic() < limit
        time.sleep(0.0005)

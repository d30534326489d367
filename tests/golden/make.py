"""Writes the golden files beside it: `.venv/bin/python tests/golden/make.py NUMBER`, once per release that changes a format.

A journal with a durable task in every state a task can be in, what a restart has to find in it, and the bytes that a worker
and a client of that version send.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "broker"))

from broker_world import Peer, World, spec, tensor_rows  # noqa: E402
from journal_rules import wait_committed  # noqa: E402

from penstock.broker import protocol as p  # noqa: E402
from penstock.broker.columns import view  # noqa: E402
from penstock.broker.events import ProcessEnded, Received  # noqa: E402
from penstock.broker.storage.sqlite import SqliteStore  # noqa: E402
from penstock.broker.storage.store import MemoryStore  # noqa: E402
from penstock.broker.wire import Message, encode  # noqa: E402

PRINCIPAL = "loopback"
"""Who a client on loopback is without keys, so that a real broker's clients can fetch these."""
ECHO = spec("echo", max_batch_size=1)
ONCE = spec("once", max_batch_size=1, idempotent=False)


class Recording(MemoryStore):
    """Keeps the groups of writes, to be written to a disk as well."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[Any] = []

    def append(self, writes: Any) -> int:
        self.groups.append(list(writes))
        return super().append(writes)


def tasks() -> tuple[Recording, dict[str, Any]]:
    """A broker's life, and by key what is to be found after it."""
    store = Recording()
    w = World(store=store, max_attempts=2)
    client = w.client(principal=PRINCIPAL)
    found: dict[str, Any] = {}

    def take(name: str, state: str, rows: int = 1, **fields: Any) -> bytes:
        run: bytes = client.submit(rows, key=name.encode(), is_durable=True, wants_accepted=True, **fields)
        w.commit()
        found[name] = {"id": run.hex(), "rows": rows, "state": state}
        return run

    worker = w.worker(ECHO, principal="worker:gold")
    take("acked", "done")
    worker.finish()
    w.commit()
    client.send(p.Ack(seq=client.received))
    take("over", "done")
    worker.finish()
    take("failed", "failed")
    worker.finish(error=p.Error(p.Code.FAILED, "it broke", detail="a trace"))
    take("half", "open", rows=2)
    worker.finish()
    worker.send(p.Goodbye())
    worker.vanish()
    client.send(p.Cancel(id=take("cancelled", "cancelled", kernel="late")))
    for name, num_deaths in (("dead", 2), ("died", 1)):
        take(name, "dead" if num_deaths == 2 else "open", kernel=f"{name}-kernel")
        for pid in range(100, 100 + num_deaths):
            w.worker(spec(f"{name}-kernel"), principal="worker:gold", pid=pid)
            w.step(ProcessEnded(pid))
    take("queued", "open", rows=3, priority=7, kernel="later", traceparent="00-1-2-01")
    take("large", "open", kernel="later", block=tensor_rows(b"large".ljust(16, b"!"), 1, items=2000))
    take("started", "open", kernel="once")
    w.worker(ONCE, principal="worker:gold", name="busy")
    w.commit()
    assert not client.refused
    return store, found


def transcript() -> list[list[Any]]:
    """What a worker and a client send, as [side, route, principal, frames]: from hello to goodbye."""
    sent: list[list[Any]] = []
    make = Peer.event

    def record(self: Peer, message: Message) -> Received:
        frames = [bytes(view(frame)).hex() for frame in encode(message)]
        sent.append([self.side, self.route.decode(), self.principal, frames])
        return make(self, message)

    with patch.object(Peer, "event", record):
        w = World()
        client = w.client()
        worker = w.worker(spec(modes=["batch", "stream"], max_batch_size=4))
        worker.send(p.WorkerHeartbeat(session=worker.secret, progress=1))
        client.send(p.Heartbeat())
        client.submit(2)
        worker.finish()
        client.submit(1, wants_partials=True)
        token = worker.the_lease()
        worker.send(p.WorkerPartial(lease=token, part=0, block=tensor_rows(b"p" * 16, 1)))
        worker.finish(token)
        client.send(p.Ack(seq=client.received))
        client.send(p.Goodbye())
        worker.send(p.Goodbye())
    return sent


def main(version: str) -> None:
    folder = HERE / f"journal-{version}"
    if folder.exists():
        raise SystemExit(f"{folder} is there: what a released version wrote does not change")
    store, found = tasks()
    with patch("penstock.broker.storage.sqlite.LARGE_BYTES", 1024):
        disk = SqliteStore(folder)
        list(disk.load())
        for group in store.groups:
            wait_committed(disk, disk.append(group))
        disk.close()
    (HERE / f"journal-{version}.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / f"peers-{version}.json").write_text(json.dumps(transcript(), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

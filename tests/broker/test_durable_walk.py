"""Durable tasks in any order of wishes, crashes and commits, against what an observer can say: who is told what, and when."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from broker_world import FakeClient, FakeWorker, World, spec, tensor_rows

from penstock.broker import protocol as p
from penstock.broker.durable import DurableJournal
from penstock.broker.journal import Entry
from penstock.broker.retention import ENTRY_BYTES
from penstock.broker.sessions import ClientSession
from penstock.broker.settlement import Settlement
from penstock.broker.storage.store import MemoryStore

POISON = p.Error("kernel_failed", "no good", detail="Traceback: the end")
KEYS = (b"k0", b"k1", b"k2")
Told = bytes | str | None


class Observer(FakeClient):
    """A client that looks at the broker's disk and journal whenever it is told something of a durable task."""

    def __init__(self, walk: "Walk", name: str) -> None:
        self.walk = walk
        self.sent: set[bytes] = set()
        self.has_cancelled: set[bytes] = set()
        super().__init__(walk.world, name, "uid:1")

    def receive(self, message: Any) -> None:
        super().receive(message)
        for outcome in message.outcomes if isinstance(message, p.Results) else ():
            for run_id, start, stop in outcome.spans:
                if run_id in self.walk.key_of:
                    self.check(run_id, range(start, stop))

    def check(self, run_id: bytes, rows: range) -> None:
        """What is told is on the disk, and it is what anybody else would be told."""
        told = self.results(run_id, rows.stop)
        key = self.walk.key_of[run_id]
        entry = self.world.state.journal._entries.get(("uid:1", key))
        if key in self.walk.renewed or entry is None or not entry.number or entry.is_gone:
            return
        recorded = results_of(entry)
        for row in rows:
            if told[row] in ("unavailable", "cancelled"):
                continue  # another client took it over, or it was this submission alone
            assert not self.world.store._waiting, "told before it was safe"  # type: ignore[union-attr]
            assert told[row] == recorded.get(row), "told what was not recorded"

    def has_all(self, run_id: bytes, rows: int) -> bool:
        """Every row of a submission has come, and with the others that have its key."""
        told = self.results(run_id, rows)
        return None not in told and "unavailable" not in told and run_id not in self.has_cancelled


def results_of(entry: Entry) -> dict[int, Told]:
    """By row what a client is told: the payload, or the code of its error."""
    found = dict[int, Told]()
    for outcome in entry.outcomes:
        rows = [row for _, start, stop in outcome.spans for row in range(start, stop)]
        for at, row in enumerate(rows):
            found[row] = outcome.error.code if outcome.block is None and outcome.error else bytes(outcome.block.row(0, at))  # type: ignore[union-attr]
    return found


class Walk:
    """Random wishes, crashes and commits; the core checks itself after each, and a restart must read all that is written."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        kept = {"dedup_window_s": 10.0, "result_ttl_s": 20.0, "dedup_bytes": 200}
        self.world = World(
            store=MemoryStore(), max_attempts=2, window_rows=12, session_ttl_s=1e6, liveness_s=1e6, **kept
        )  # fmt: skip
        self.ids: list[bytes] = []
        self.key_of: dict[bytes, bytes] = {}
        self.renewed: set[bytes] = set()
        """Keys whose task was begun again or dropped: what was told before is another one's."""
        self.everybody: list[Observer] = []
        self.clients = [self.join() for _ in range(3)]
        self.workers: list[FakeWorker] = []
        self.num_pids = 100

    @property
    def journal(self) -> DurableJournal:
        journal: DurableJournal = self.world.state.journal
        return journal

    def join(self) -> Observer:
        self.everybody.append(Observer(self, f"c{self.random.randrange(3)}"))
        return self.everybody[-1]

    # --- steps -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        draw, client = self.random, self.random.choice(self.clients)
        which: dict[str, bytes] = {"key": draw.choice(KEYS)}
        if self.ids and draw.random() < 0.5:
            which = {"id": draw.choice(self.ids)}
        match draw.randrange(12):
            case 0 | 1:
                self.submit(client)
            case 2 | 3:
                self.work()
            case 4:
                client.send(p.Fetch(request=1, take=draw.random() < 0.5, **which))  # type: ignore[arg-type]
            case 5:
                self.control(client, draw.choice(["requeue", "requeue", "cancel", "drop"]), which)
            case 6 | 7:
                self.acknowledge(client)
            case 8 | 9:
                self.world.commit()
            case 10 if client.sent:
                run = draw.choice(sorted(client.sent))
                client.has_cancelled.add(run)
                client.send(p.Cancel(id=run, start=draw.randrange(2)))
            case 10:
                client.send(p.Status(request=1, what=draw.choice(["jobs", "dead"]), **draw.choice([which, {}])))
            case 11 if draw.random() < 0.3:
                self.clients.remove(client)
                client.send(p.Goodbye())
                self.clients.append(self.join())
            case 11 if draw.random() < 0.2:
                self.restart()
        self.ids += [m.body["id"] for m in client.take(p.Reply) if "id" in m.body]
        self.check_tables()

    def check_tables(self) -> None:
        """Each entry is in one place, and what is counted is there."""
        journal, kept = self.journal, self.journal.retained
        for entry in journal._entries.values():
            is_open, is_kept, is_known = entry.run is not None, entry in kept, entry.key in journal._known
            assert is_open + is_kept + is_known == 1
            assert entry.run is None or entry.run.entry is entry
            assert all(journal._index.named("uid:1", name) is not None for name in entry.names)
        assert len(kept) + len(journal._known) <= len(journal._entries)
        assert kept.num_bytes == sum(ENTRY_BYTES + entry.num_bytes for entry in kept)
        assert journal._num_bytes == sum(entry.num_bytes for entry in journal._known.values())

    def submit(self, client: Observer) -> None:
        """The same content under the same key, so that it is the same task."""
        draw = self.random
        key = draw.choice([None, *KEYS])
        rows = draw.randrange(1, 4) if key is None else 1 + KEYS.index(key)
        is_durable = draw.random() < 0.8
        block = None if key is None else tensor_rows(key.ljust(16), rows)
        run = client.submit(rows, block=block, is_durable=is_durable, key=key)
        self.ids.append(run)
        client.sent.add(run)
        if is_durable:
            self.key_of[run] = key or run

    def control(self, client: Observer, op: str, which: dict[str, bytes]) -> None:
        key = which.get("key") or self.key_of.get(which["id"]) or which["id"]
        if op != "cancel":
            entry = self.journal.locate("uid:1", which.get("id"), which.get("key"), self.world.now)
            self.renewed |= {key} if entry is None else {key, entry.key[1]}
        client.send(p.Control(request=1, op=op, **which))

    def acknowledge(self, client: Observer) -> None:
        """What it has, or a little less: the rest comes late."""
        lag = self.random.choice([0, 0, 1, 2])
        client.send(p.Ack(seq=max(client.received - lag, 0)))
        for entry in self.journal._known.values():
            if entry.number and not entry.is_gone:
                assert self.has_been_told(entry), "acknowledged, and nobody was told"
        is_served = not self.world.core.clients.by_route[client.route].outbox
        for run in client.sent if is_served else ():
            key = self.key_of.get(run, b"")
            entry = self.journal._entries.get(("uid:1", key))
            if entry is not None and entry in self.journal.retained and key not in self.renewed and entry.about is not None:
                assert not client.has_all(run, entry.about.num_rows), "it has all of it, and has said so"

    def has_been_told(self, entry: Entry) -> bool:
        """Whether some client was told all of it under one of its ids."""
        assert entry.about is not None
        recorded, rows = results_of(entry), entry.about.num_rows
        wanted = [recorded[row] for row in range(rows)]
        return any(client.results(run, rows) == wanted for client in self.everybody for run in {r for r, _ in client.got})

    def work(self) -> None:
        if not self.workers:
            self.num_pids += 1
            self.workers.append(self.world.worker(spec(max_batch_size=2), batches=2, pid=self.num_pids))
        worker = self.workers[0]
        match self.random.randrange(6):
            case 0:
                self.workers.clear()
                worker.crash()
            case 1 if worker.leases:
                worker.finish(next(iter(worker.leases)), error=POISON)
            case _ if worker.leases:
                worker.finish(next(iter(worker.leases)))

    def restart(self) -> None:
        self.world.restart(self.random.randrange(3))
        self.workers.clear()
        self.clients = [self.join() for _ in range(3)]

    # --- the end ---------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Whatever was done, all that is open can be done, fetched and forgotten, and then nothing is left."""
        w = self.world
        w.commit()
        w.restart()
        worker = w.worker(spec(max_batch_size=4), batches=1000)
        worker.finish_all()
        w.commit()
        client = w.client("last")
        client.send(p.Status(request=1, what="jobs"))
        for job in client.take(p.Reply)[0].body["jobs"]:
            assert job["state"] in ("done", "failed", "dead", "cancelled")
            client.send(p.Fetch(request=1, id=job["id"]))
            assert client.take(p.Reply)[0].body["is_handed"]
            assert all(client.row(job["id"], row).num_finals == 1 for row in range(job["rows"]))
        w.advance(31.0)
        w.commit()
        assert w.store is not None
        assert list(w.store.load()) == []
        journal = self.journal
        index = journal._index
        assert (journal.retained.num_bytes, journal._num_bytes, journal._entries, index._names) == (0, 0, {}, {})
        assert not any(index._over.values())
        assert not any(index._failed.values())
        assert not w.core.clients.absent._sessions


def walk_along(seed: int, num_steps: int = 120) -> None:
    walk = Walk(seed)
    for _ in range(num_steps):
        walk.step()
    walk.end()


@pytest.mark.parametrize("seed", range(30))
def test_any_order(seed: int) -> None:
    walk_along(seed)


# --- the walk finds what it is there for -------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def followers_hear_before_it_is_safe(patch: Patch) -> None:
    real = Settlement._note

    def note(self: Settlement, run: Any, entry: Entry, span: Any) -> None:
        before = set(self.durable)
        real(self, run, entry, span)
        if not run.number:
            self.durable = before

    patch.setattr(Settlement, "_note", note)


def followers_go_on_without_a_record(patch: Patch) -> None:
    real = Settlement._pass_on
    patch.setattr(Settlement, "_pass_on", lambda self, *args, is_final: real(self, *args, is_final=False))


def acknowledgements_go_by_the_key(patch: Patch) -> None:
    real = DurableJournal.acknowledged

    def acknowledged(self: DurableJournal, entry: Entry, now: float) -> None:
        real(self, self._entries.get(entry.key, entry), now)

    patch.setattr(DurableJournal, "acknowledged", acknowledged)


def followers_do_not_acknowledge(patch: Patch) -> None:
    real = ClientSession.acknowledge

    def acknowledge(self: ClientSession, seq: int) -> list[Entry]:
        return [entry for entry in real(self, seq) if entry.about is None or entry.about.client == self.name]

    patch.setattr(ClientSession, "acknowledge", acknowledge)


def fails(seed: int) -> bool:
    try:
        walk_along(seed)
    except AssertionError:
        return True
    return False


FAULTS = [
    followers_hear_before_it_is_safe, followers_go_on_without_a_record, acknowledgements_go_by_the_key,
    followers_do_not_acknowledge,
]  # fmt: skip


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_the_walk_finds(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    assert any(map(fails, range(60)))

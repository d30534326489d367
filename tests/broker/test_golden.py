"""What earlier versions wrote and sent: a journal, and the bytes of a worker and a client (`tests/golden/make.py`)."""

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import msgpack
import pytest
from broker_process import broker, wait_for
from broker_world import World, spec, tag
from plain_peer import PlainPeer
from ports import free_port

from penstock.broker import invariants
from penstock.broker import protocol as p
from penstock.broker.config import BrokerConfig
from penstock.broker.core import Core
from penstock.broker.durable import DurableJournal
from penstock.broker.events import Received, Turn
from penstock.broker.files import broker_folder
from penstock.broker.state import BACK, FRONT
from penstock.broker.storage.records import Corrupt, Put, StorageError
from penstock.broker.storage.sqlite import SqliteStore
from penstock.broker.storage.store import MemoryStore
from penstock.broker.wire import ProtocolError, decode, encode

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
VERSIONS = [path.stem.split("-")[1] for path in sorted(GOLDEN.glob("peers-*.json"))]
NOW = 2000.0
ERRORS = {"failed": "kernel_failed", "dead": "dead", "cancelled": "cancelled"}


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


@pytest.fixture(params=VERSIONS)
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of the files, and by key what is in them."""
    shutil.copytree(GOLDEN / f"journal-{request.param}", tmp_path / "journal")
    return tmp_path / "journal", read(f"journal-{request.param}.json")


def test_there_is_a_first_version() -> None:
    assert "1" in VERSIONS


def test_a_journal_of_before_is_restored_exactly(journal: tuple[Path, dict[str, Any]]) -> None:
    folder, wanted = journal
    store = SqliteStore(folder)
    kept = DurableJournal(1e12, 1 << 20, 1e12, 1 << 20, wall_offset_s=1e9)
    core = Core(BrokerConfig(), epoch=9, now=NOW, journal=kept)
    open_names = {name for name, task in wanted.items() if task["state"] == "open"}
    assert core.restore(store.load(), NOW) == len(open_names)
    store.close()
    invariants.check(core, NOW)
    runs = {run.key.decode(): run for run in core.state.ledger.runs() if run.key}
    assert {name: (run.id.hex(), run.num_rows) for name, run in runs.items()} == {
        name: (wanted[name]["id"], wanted[name]["rows"]) for name in open_names
    }
    assert runs["half"].num_open == 1 and runs["queued"].num_open == 3
    assert (runs["queued"].priority, runs["queued"].traceparent) == (7, "00-1-2-01")
    assert runs["started"].started == [(0, 1)] and runs["queued"].started == []
    [died] = runs["died"].pieces
    assert died.deaths == 1 and len(died.evidence) == 1 and died.is_isolated
    assert runs["large"].request.block.nbytes == 2000
    assert bytes(runs["large"].request.block.row(0, 0)).startswith(tag(b"large".ljust(16, b"!"), 0))
    for name, task in wanted.items():
        if task["state"] != "open":
            entry = kept.locate("loopback", bytes.fromhex(task["id"]), None, NOW)
            assert entry is not None, name
            assert entry.key == ("loopback", name.encode()) and entry.is_acked == (name == "acked")
            [outcome] = entry.outcomes
            assert (None if outcome.error is None else outcome.error.code) == ERRORS.get(task["state"])
    dead = kept.find("loopback", b"dead", NOW)
    assert dead is not None and dead.outcomes[0].error is not None
    assert dead.outcomes[0].error.detail.count("\n") >= 1, "a line per death"


def offer_all(worker: PlainPeer, kernels: list[str]) -> None:
    worker.send("hello", name="gold", secret=os.urandom(16), pid=os.getpid(), device="cpu")
    worker.receive("welcome")
    specs = [
        {
            "name": name, "version": "1", "digest": b"12345678", "modes": ["batch"], "combine": "max",
            "inputs": [["x", "tensor", {"dtypes": None, "rank": 1, "ragged": "exact"}]], "idempotent": name != "once",
            "scoped": False, "resident": False, "max_batch_size": 1, "max_batch_cost_ms": None,
            "cost": {"base_ms": 0.0, "per": {}},
        }
        for name in kernels
    ]  # fmt: skip
    worker.credit = [1, 1 << 40]
    worker.send("ready", specs=specs, credit=worker.credit)


def test_a_broker_goes_on_with_a_journal_of_before(journal: tuple[Path, dict[str, Any]], tmp_ipc: Path) -> None:
    folder, wanted = journal
    url = f"tcp://127.0.0.1:{free_port()}"
    place = broker_folder(tmp_ipc / "state", url) / "journal"
    place.parent.mkdir(parents=True)
    shutil.move(folder, place)
    place.chmod(0o700)
    with broker(tmp_ipc, url, "--state-dir", str(tmp_ipc / "state")) as running:
        client, worker = running.client(), running.peer("back")
        num_rows = sum(task["rows"] for name, task in wanted.items() if task["state"] == "open" and name != "started") - 1
        offer_all(worker, ["echo", "once", "later", "died-kernel"])
        assert sum(worker.work() for _ in range(num_rows)) == num_rows

        def num_open() -> int:
            client.send("status", request=1)
            return int(client.receive("reply")[0]["body"]["tasks"]["open"])

        wait_for(lambda: num_open() == 0)
        for name, task in wanted.items():
            if name == "acked":
                continue  # the window in which its key is remembered is long over
            client.send("fetch", request=2, key=name.encode())
            reply, _ = client.receive("reply")
            assert not reply.get("error"), (name, reply)
            rows: list[Any] = []
            while len(rows) < task["rows"]:
                rows += client.result()
            assert {row[0].hex() for row in rows} == {task["id"]}, name
            codes = {row[2][0] if isinstance(row[2], list) else None for row in rows}
            assert codes == {"worker_lost" if name == "started" else ERRORS.get(task["state"])}, name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("minor", [0, 1, 2, 9])
def test_peers_of_before_are_served(version: str, minor: int) -> None:
    w = World()
    told: list[Any] = []
    for side, route, principal, frames in read(f"peers-{version}.json"):
        raw = [bytes.fromhex(frame) for frame in frames]
        header = msgpack.unpackb(raw[1])
        if minor == 9:  # of the future: what we do not know is ignored
            header["more"] = [1, 2, 3]
        raw[:2] = [bytes((80, 83, 1, minor)), msgpack.packb(header)]
        message = decode(p.FROM_CLIENT if side == FRONT else p.FROM_WORKER, raw)
        for event in (Received(side, route.encode(), principal, message), Turn()):
            for action in w.core.handle(event, w.now):
                types = p.TO_CLIENT if action.side == FRONT else p.TO_WORKER
                told.append((action.side, decode(types, encode(action.message))))
        invariants.check(w.core, w.now)
    to_client = [m for side, m in told if side == FRONT]
    rows = [span for m in to_client if isinstance(m, p.Results) for o in m.outcomes if o.error is None for span in o.spans]
    assert sum(stop - start for _, start, stop in rows) == 3
    assert sum(isinstance(m, p.Partial) for m in to_client) == 1
    assert [type(m) for side, m in told if side == BACK].count(p.Assign) == 2
    assert not [m for _, m in told if isinstance(m, p.Fault | p.Refused)]
    assert len(w.core.clients) == 0 and w.state.ledger.num_open == 0 and not w.core.workers.by_secret


# --- of the future -----------------------------------------------------------------------------------------------------


def test_a_journal_of_a_later_format_is_refused_by_its_number(journal: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = journal
    db = sqlite3.connect(folder / "journal.sqlite")
    db.execute("PRAGMA user_version=2")
    db.close()
    with pytest.raises(StorageError, match=r"format 2 .*this broker writes format 1"):
        SqliteStore(folder)


def with_record(kind: int, change: Any) -> MemoryStore:
    """A store of one task, whose records of a kind are changed."""
    store = MemoryStore()
    w = World(store=store)
    w.client().submit(1, is_durable=True)
    w.commit()
    w.worker(spec(idempotent=False))
    w.commit()
    found = [Put(put.task, *change(put)) if put.kind == kind else put for put in store.load()]
    made = MemoryStore()
    made.append(found)
    made.commit()
    return made


def test_a_record_of_a_later_kind_is_refused_by_its_number() -> None:
    store = with_record(2, lambda put: (99, put.frames))
    with pytest.raises(Corrupt, match=r"task 1 .*kind 99.* later"):
        World(store=store)


def test_a_message_of_a_later_major_version_in_a_record_is_refused_by_its_number() -> None:
    store = with_record(1, lambda put: (1, [put.frames[0], b"PS\x02\x00", *put.frames[2:]]))
    with pytest.raises(Corrupt, match=r"protocol 2\.0 met 1\."):
        World(store=store)


def test_a_peer_of_a_later_major_version_is_refused_by_its_number() -> None:
    with pytest.raises(ProtocolError, match=r"protocol 2\.0 met 1\."):
        decode(p.FROM_CLIENT, [b"PS\x02\x00", msgpack.packb({"type": "heartbeat"})])

"""Principals in the core: every message is its sender's, keys that go take everything along, and control is for operators."""

from typing import Any

import pytest
from broker_world import World, spec

from penstock.broker import protocol as p
from penstock.broker.core import Core
from penstock.broker.events import Received
from penstock.broker.scheduling.quotas import Quotas, parse_rules
from penstock.broker.settings import SettingsError
from penstock.broker.storage.store import MemoryStore


class KeyList:
    """What the shell's gate does for the core."""

    def __init__(self) -> None:
        self.gone: frozenset[str] = frozenset()
        self.changed: frozenset[str] = frozenset()
        self.error = ""

    def reload(self) -> frozenset[str]:
        if self.error:
            raise SettingsError(self.error)
        return self.gone | self.changed

    def allows(self, principal: str) -> bool:
        return principal not in self.gone

    def report(self) -> dict[str, Any]:
        return {"keys": 1}


def keyed(store: MemoryStore | None = None) -> tuple[World, Core, KeyList]:
    w, keys = World(store=store), KeyList()
    w.core.operators.gate = keys
    return w, w.core, keys


def codes(peer: Any) -> list[str]:
    return [fault.error.code for fault in peer.take(p.Fault)]


def test_another_principal_at_a_sessions_address_is_nobody() -> None:
    w = World()
    client, worker = w.client(principal="client:alice"), w.worker(principal="worker:box")
    run = client.submit(2)
    for peer, message in (
        (client, p.Cancel(id=run, start=0, stop=2)), (client, p.Goodbye()), (client, p.Control(request=1, op="x")),
        (worker, p.Drain()), (worker, p.Goodbye()), (worker, p.Pull(credit=(99, 99))),
    ):  # fmt: skip
        w.handle(Received(peer.side, peer.route, f"{peer.principal}2", message))
        assert codes(peer) == [p.Code.UNATTACHED]
    assert w.core.workers.by_route[worker.route].state == "busy"
    worker.finish_all()
    assert [client.row(run, row).num_finals for row in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("principal", "may"),
    [("uid:1", True), ("admin:root", True), ("client:admin:", False), ("client:a", False), ("uid:2", False),
     ("loopback", False), ("worker:admin", False), ("", False)],
)  # fmt: skip
def test_control_is_for_operators(principal: str, may: bool) -> None:
    w = World()
    w.worker()
    client = w.client(principal=principal)
    client.send(p.Control(request=1, op="drain", target="worker"))
    error = client.take(p.Reply)[0].error
    assert (error is None) == may
    assert error is None or error.code == p.Code.NOT_AUTHORISED
    assert w.core.state.counters["refused_not_authorised"] == (not may)


def test_without_operators_nobody_controls() -> None:
    w = World()
    core = Core(w.core.state.config, epoch=1, now=0.0)
    assert core.operators.control("uid:0", "reload", "", 0.0).code == p.Code.NOT_AUTHORISED  # type: ignore[union-attr]


def test_a_key_that_goes_takes_sessions_and_leases_along() -> None:
    w, core, keys = keyed()
    alice, away, bob = (w.client(principal=f"client:{name}") for name in ("alice", "alice", "bob"))
    box, other = w.worker(spec(max_batch_size=4), principal="worker:box"), None
    mine, yours = alice.submit(4), bob.submit(4)
    keys.gone = frozenset(("client:alice", "worker:box"))
    core.operators.reload(w.now)
    w.advance(0.1)
    other = w.worker(spec(max_batch_size=4), name="other", principal="worker:other")
    other.finish_all()
    assert codes(alice) == codes(away) == codes(box) == [p.Code.NOT_AUTHORISED]
    assert len(core.clients) == 1 and [x.name for x in core.workers.by_secret.values()] == ["other"]
    assert all(bob.row(yours, row).num_finals == 1 for row in range(4))
    assert core.state.ledger.find("client:alice", mine) is None
    assert core.state.counters["expelled"] == 3


@pytest.mark.parametrize("is_down", [False, True], ids=["running", "while no broker ran"])
def test_durable_tasks_of_a_key_that_goes_end_and_can_be_had_again(is_down: bool) -> None:
    w, core, keys = keyed(MemoryStore())
    alice, bob = (w.client(principal=f"client:{name}") for name in ("alice", "bob"))
    runs = [client.submit(2, is_durable=True, key=b"nightly") for client in (alice, bob)]
    w.commit()
    keys.gone = frozenset(("client:alice",))
    if is_down:
        w.restart(gate=keys)
    else:
        core.operators.reload(w.now)
        w.advance(0.1)
    assert [run.id for run in w.state.ledger.runs()] == [runs[1]], "whoever may still connect keeps what is queued"
    assert [event["subject"] for event in w.state.events.recent() if event["kind"] == "disowned"] == ["client:alice"]
    w.commit()
    w.restart(gate=keys)
    assert [run.id for run in w.state.ledger.runs()] == [runs[1]], "that is safe"
    keys.gone = frozenset()
    alice = w.client(principal="client:alice")
    alice.send(p.Status(request=1, what="jobs", key=b"nightly"))
    [job] = alice.take(p.Reply)[0].body["jobs"]
    assert job["state"] == "failed" and "revoked" in job["errors"][0]["message"]
    alice.send(p.Control(request=2, op="requeue", key=b"nightly"))
    w.commit()
    assert alice.take(p.Reply)[0].error is None
    assert w.worker().sizes() == [4]


def test_a_new_key_for_the_same_name_leaves_durable_tasks_alone() -> None:
    w, core, keys = keyed(MemoryStore())
    alice = w.client(principal="client:alice")
    run = alice.submit(1, is_durable=True)
    w.commit()
    keys.changed = frozenset(("client:alice",))
    core.operators.reload(w.now)
    w.advance(0.1)
    assert codes(alice) == [p.Code.NOT_AUTHORISED]
    assert core.state.ledger.find("client:alice", run) is not None


def test_keys_that_cannot_be_read_change_nothing_and_are_told() -> None:
    w, core, keys = keyed()
    admin = w.client(principal="admin:root")
    keys.error = "bad.toml: it needs role and public, no more"
    admin.send(p.Control(request=1, op="reload"))
    error = admin.take(p.Reply)[0].error
    assert error.code == p.Code.INVALID and "bad.toml" in error.message
    assert len(core.clients) == 1


def test_rules_for_principals() -> None:
    quotas = Quotas(parse_rules({
        "client:alice": {"weight": 3.0}, "worker:*": {"weight": 2.0}, "train": {"weight": 5.0}, "default": {"weight": 1.5},
    }))  # fmt: skip
    assert quotas.account_name("client:alice", "train") == "client:alice"
    assert quotas.account_name("client:bob", "train") == "train"
    assert quotas.account_name("worker:x", "y") == "worker:x"
    pretender = quotas.account_name("client:bob", "client:alice")
    assert quotas.rules(pretender).weight == 1.5
    assert quotas.rules(quotas.account_name("client:alice", "x")).weight == 3.0
    assert quotas.rules(quotas.account_name("worker:x", "y")).weight == 2.0
    assert Quotas({}).account_name("uid:1", "train") == "train"

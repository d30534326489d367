"""Principals in the core: every message is its sender's, keys that go take everything along, and control is for operators."""

from typing import Any

import pytest
from broker_world import World, spec

from penstock.broker import protocol as p
from penstock.broker.core import Core, Received
from penstock.broker.scheduling.quotas import Quotas, parse_rules
from penstock.broker.settings import SettingsError


class KeyList:
    """What the shell's gate does for the core."""

    def __init__(self) -> None:
        self.gone: frozenset[str] = frozenset()
        self.error = ""

    def reload(self) -> frozenset[str]:
        if self.error:
            raise SettingsError(self.error)
        return self.gone

    def report(self) -> dict[str, Any]:
        return {"keys": 1}


def keyed() -> tuple[World, Core, KeyList]:
    w, keys = World(), KeyList()
    w.core.gate = keys
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
    assert core._control("uid:0", "reload", "", 0.0).code == p.Code.NOT_AUTHORISED  # type: ignore[union-attr]


def test_a_key_that_goes_takes_sessions_and_leases_along() -> None:
    w, core, keys = keyed()
    alice, away, bob = (w.client(principal=f"client:{name}") for name in ("alice", "alice", "bob"))
    box, other = w.worker(spec(max_batch_size=4), principal="worker:box"), None
    mine, yours = alice.submit(4), bob.submit(4)
    keys.gone = frozenset(("client:alice", "worker:box"))
    core.reload(w.now)
    w.advance(0.1)
    other = w.worker(spec(max_batch_size=4), name="other", principal="worker:other")
    other.finish_all()
    assert codes(alice) == codes(away) == codes(box) == [p.Code.NOT_AUTHORISED]
    assert len(core.clients) == 1 and [x.name for x in core.workers.by_secret.values()] == ["other"]
    assert all(bob.row(yours, row).num_finals == 1 for row in range(4))
    assert core.state.ledger.find("client:alice", mine) is None
    assert core.state.counters["expelled"] == 3


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

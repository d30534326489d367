"""What tasks and brokers say of themselves: position, ETA, why; all open tasks; reload. New brokers and old ones."""

import asyncio
from typing import Any

import numpy as np
import pytest
from session_rig import PLAIN, Rig

from penstock.broker.protocol import Code, Error
from penstock.client import AsyncClient, InvalidInput, ProtocolFault, reports

X = np.arange(4, dtype="f4")
TOLD: dict[str, Any] = {
    "client": "notebook", "rows": 1, "position": 812, "eta_ms": 1500.0, "alone_ms": 12.0, "complexity": 3.2,
    "bin": "fast", "deadline_in_ms": 58_000.0, "why": "behind 812 rows of 3 clients",
}  # fmt: skip


def test_a_task_says_when_it_ends_and_why_it_waits(fake, ps):
    with fake.lock:
        fake.model.told = TOLD
    task = ps.submit("hold", x=X)
    assert task.eta() == 1.5
    assert task.why() == "behind 812 rows of 3 clients"
    report = task.status()
    assert report["id"] == task.id.partition("/")[0]
    assert {name: report[name] for name in TOLD} == TOLD
    fake.release()
    task.result(5)
    assert (task.eta(), task.why()) == (0.0, "it has ended: done")


def test_an_older_broker_says_less(ps):
    task = ps.submit("hold", x=X)
    assert (task.eta(), task.why()) == (None, "it is queued")
    with pytest.raises(ProtocolFault, match="too old"):
        ps.tasks()
    assert task.cancel()
    assert (task.eta(), task.why()) == (0.0, "it has ended: cancelled")


@pytest.mark.parametrize(
    ("body", "eta_s", "why"),
    [
        ({}, None, "it is unknown"),
        ({"state": "unknown"}, None, "it is unknown"),
        ({"state": "finished"}, 0.0, "it has ended: finished"),
        ({"state": "running", "workers": ["a", "b"], "eta_ms": 20.0}, 0.02, "it runs on a, b"),
        ({"state": "queued", "ahead": 3, "workers": [], "eta_ms": None}, None, "it is queued behind 3 rows"),
        ({"state": "queued", "kernel": "k", "is_waiting_for_kernel": True}, None, "no worker offers 'k' yet"),
        ({"state": "queued", "why": "busy", "ahead": 3}, None, "busy"),
    ],
)
def test_what_is_made_of_less(body, eta_s, why):
    assert (reports.eta_s(body), reports.why(body)) == (eta_s, why)


def test_all_open_tasks_of_all_clients(fake, ps):
    with fake.lock:
        fake.model.told = TOLD
    held = [ps.submit("hold", x=np.zeros(i, "f4")) for i in range(3)]
    ps.call("echo", x=X)
    for task in held:
        task.accepted(5)
    ids = [task.id.partition("/")[0] for task in held]
    assert sorted(report["id"] for report in ps.tasks()) == sorted(ids)
    assert ps.task(ids[1])["client"] == "notebook"
    assert ps.task(held[1].id)["id"] == ids[1]
    assert ps.task("0" * 32) == {"state": "unknown"}
    assert ps.cancel(held) == 3
    assert ps.tasks() == []


@pytest.mark.parametrize("wrong", ["", "abc", "g" * 32, "0" * 31 + " ", "0" * 34])
def test_what_is_no_id_is_not_asked_for(ps, wrong):
    with pytest.raises(InvalidInput, match="32 hex digits"):
        ps.task(wrong)


def test_reload_says_what_is_wrong(fake, ps):
    ps.reload()
    with fake.lock:
        fake.model.control_error = Error(Code.INVALID, "penstock.toml: scheduling.max_bins must be above 0")
    with pytest.raises(InvalidInput, match="max_bins must be above 0"):
        ps.reload()
    ps_async(fake)
    assert fake.model.controls == [("reload", "")] * 3


def ps_async(fake) -> None:
    """The same questions, awaited."""

    async def main() -> None:
        async with AsyncClient(fake.url) as ps:
            with pytest.raises(InvalidInput, match="max_bins"):
                await ps.reload()
            with fake.lock:
                fake.model.told = TOLD
            task = await ps.submit("hold", x=X)
            await task.accepted(5)
            assert (await task.eta(), await task.why()) == (1.5, TOLD["why"])
            (report,) = await ps.tasks()
            assert await ps.task(report["id"]) == report
            assert await task.cancel()
            assert await task.eta() == 0.0

    asyncio.run(asyncio.wait_for(main(), 20))


def test_what_still_waits_here_is_told_by_the_client():
    rig = Rig(window=(2, 1 << 20)).attached()
    for _ in range(2):
        rig.submit()
    first, second = (rig.submit(x=np.zeros(i, "f4"))[0] for i in (5, 6))
    rig.session.flush()
    rig.exchange()
    assert reports.of_waiting(rig.session, first, rig.now)["why"] == (
        "it waits in this client: 0 rows go before it, and the broker takes 2 at a time"
    )
    assert "1 rows go before it" in reports.of_waiting(rig.session, second, rig.now)["why"]
    rig.broker.refuse = lambda m: Error(Code.OVERLOADED, "the queue is full", 2000.0)
    run, _ = rig.submit(options=PLAIN, x=np.zeros(7, "f4"))
    rig.session.flush()
    rig.broker.release()
    rig.exchange()
    report = reports.of_waiting(rig.session, run, rig.now)
    assert report["state"] == "waiting"
    assert report["why"].startswith("it waits in this client: the broker had no room, once (the queue is full); again in 2.")
    rig.session.reconnected(rig.now)
    assert "does not answer" in reports.of_waiting(rig.session, run, rig.now)["why"]

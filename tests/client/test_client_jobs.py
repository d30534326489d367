"""Durable tasks that somebody else submitted: fetched, listed, changed; through lost connections and brokers."""

import asyncio
from typing import Any

import numpy as np
import pytest
from client_fakes import ModelSession
from session_rig import PLAIN, PLANS, Rig, X, codes

from penstock.broker import protocol
from penstock.broker.protocol import Code, Submit
from penstock.client import AsyncClient, Client, Conflict, InvalidInput, ProtocolFault, UnknownTask
from penstock.client.questions import Request
from penstock.client.run import CLOSED, SENT, Options, Run, submit_message

DURABLE = Options(timeout=None, is_durable=True, key=b"k")
JOB = {"id": b"\1" * 16, "key": b"nightly", "state": "dead", "dead": 1, "rows": 1}


def stored(rig: Rig, rows: int = 1, key: bytes = b"k") -> Submit:
    """A task in the broker's journal, of nobody that is there."""
    made = Run(rig.random.randbytes(16), PLANS["hold"].row({"x": X}).shape, PLAIN, float("inf"))
    for _ in range(rows):
        made.add(PLANS["hold"].row({"x": X}))
    made.seal()
    task = submit_message(made, 0, rig.now)
    rig.broker.durable[key] = task
    return task


def fetch(rig: Rig, **which: Any) -> Request:
    return rig.session.ask(lambda number: protocol.Fetch(request=number, **which), rig.now)


def check_credit(rig: Rig) -> None:
    """Both sides count the same."""
    (session,) = rig.broker.peers.values()
    credit = rig.session.submissions.credit
    assert (credit._sent_rows, credit._sent_bytes) == (session.rows, session.bytes)


def test_outcomes_may_come_with_the_reply():
    rig = Rig().attached()
    task = stored(rig, 3)
    request = fetch(rig, key=b"k")
    rig.send()
    rig.broker.release()
    rig.deliver()
    assert request.run is not None
    assert request.run.id == task.id
    assert codes(request.run) == ["ok"] * 3
    assert request.run.state == CLOSED
    check_credit(rig)


def test_outcomes_whose_reply_was_lost_are_not_acknowledged():
    """The connection broke behind the outcomes, and they come again before the reply does: nobody has them yet."""
    rig = Rig().attached()
    task = stored(rig)
    request = fetch(rig, key=b"k")
    outcome = protocol.Outcome([(task.id, 0, 1)], error=protocol.Error(Code.FAILED, "no"))
    rig.tell(protocol.Results(seq=1, outcomes=[outcome]))
    assert rig.session._receipts.ack() == 0
    body = {"id": task.id, "kernel": "hold", "rows": 1, "client": "me", "is_handed": True, "uses": [0, 0]}
    rig.tell(protocol.Reply(request=request.number, body=body))
    rig.tell(protocol.Results(seq=2, outcomes=[outcome]))
    assert codes(request.run) == [Code.FAILED]
    assert rig.session._receipts.ack() == 2


def test_nor_does_an_attach_acknowledge_them():
    rig = Rig().attached()
    task = stored(rig)
    fetch(rig, key=b"k")
    rig.tell(protocol.Results(seq=1, outcomes=[protocol.Outcome([(task.id, 0, 1)], error=protocol.Error(Code.FAILED, "no"))]))
    rig.session.reconnected(rig.now)
    attach = next(m for m in rig.send() if isinstance(m, protocol.Attach))
    assert attach.received == 0


def test_what_is_over_uses_no_credit():
    rig = Rig().attached()
    run, _ = rig.submit("echo", options=DURABLE)
    rig.exchange()
    request = fetch(rig, key=b"k")
    rig.exchange()
    assert request.run is not run
    assert codes(request.run) == ["ok"]
    check_credit(rig)


def test_ones_own_open_task_is_the_same_run():
    rig = Rig().attached()
    run, _ = rig.submit(options=DURABLE)
    request = fetch(rig, key=b"k")
    rig.exchange()
    assert request.run is run
    check_credit(rig)
    rig.broker.release()
    rig.exchange()
    assert codes(run) == ["ok"]


def test_a_new_broker_is_asked_again():
    rig = Rig().attached()
    task = stored(rig, 2)
    request = fetch(rig, id=task.id)
    rig.exchange()
    run = request.run
    rig.broker.restart()
    rig.reconnect()
    rig.exchange()
    asked = [m for m in rig.broker.log if isinstance(m, protocol.Fetch)]
    assert [m.id for m in asked] == [task.id, task.id]
    assert run.state == SENT
    check_credit(rig)
    rig.broker.release()
    rig.exchange()
    assert codes(run) == ["ok", "ok"]
    assert not rig.submits()


def test_a_lost_connection_asks_nothing_again():
    rig = Rig().attached()
    request = fetch(rig, id=stored(rig).id)
    rig.exchange()
    rig.broker.drop_connections()
    rig.reconnect()
    rig.exchange()
    rig.broker.release()
    rig.exchange()
    assert codes(request.run) == ["ok"]
    assert len([m for m in rig.broker.log if isinstance(m, protocol.Fetch)]) == 1
    check_credit(rig)


def test_a_reply_that_was_lost_is_asked_for_again():
    rig = Rig().attached()
    request = fetch(rig, id=stored(rig).id)
    rig.send()
    rig.broker.out.clear()
    rig.broker.drop_connections()
    rig.reconnect()
    rig.exchange()
    rig.broker.release()
    rig.exchange()
    assert codes(request.run) == ["ok"]
    check_credit(rig)


@pytest.mark.parametrize("fate", ["forgotten", "taken"])
def test_a_new_broker_may_not_have_it_any_more(fate):
    rig = Rig().attached()
    task = stored(rig)
    request = fetch(rig, id=task.id)
    rig.exchange()
    rig.broker.restart()
    if fate == "forgotten":
        rig.broker.durable.clear()
    else:
        other = rig.broker.sessions[b"other"] = ModelSession(b"other")
        other.submitted[task.id], other.open_rows[task.id] = task, {0}
    rig.reconnect()
    rig.exchange()
    assert codes(request.run) == [Code.UNKNOWN_TASK if fate == "forgotten" else Code.UNAVAILABLE]
    check_credit(rig)


FETCHED = {"id": b"i" * 16, "rows": 2, "uses": [2, 8], "is_handed": True, "kernel": "hold", "client": "c"}


@pytest.mark.parametrize("wrong", [
    *({name: None} for name in FETCHED), {"id": b"short"}, {"rows": 0}, {"rows": 1 << 60}, {"uses": [1]}, {"uses": [-1, 8]},
    {"rows": True},
])  # fmt: skip
def test_an_answer_to_a_fetch_that_cannot_be_understood_is_its_error(wrong):
    rig = Rig().attached()
    request = fetch(rig, id=FETCHED["id"])
    rig.send()
    rig.broker.out.clear()
    rig.tell(protocol.Reply(request=request.number, body={**FETCHED, **wrong}))
    assert request.is_done
    assert request.run is None
    with pytest.raises(ProtocolFault, match="cannot be understood"):
        request.answer()


def test_a_fetched_task_is_cancelled_as_any():
    rig = Rig().attached()
    request = fetch(rig, id=stored(rig).id)
    rig.exchange()
    rig.session.cancel(request.run, 0, 1)
    rig.exchange()
    assert codes(request.run) == [Code.CANCELLED]


def test_who_closes_says_what_has_arrived():
    rig = Rig().attached()
    rig.submit("echo")
    rig.exchange()
    rig.session.close()
    sent = rig.send()
    assert [type(m) for m in sent] == [protocol.Ack, protocol.Goodbye]
    assert sent[0].seq == 1


# --- what users see ----------------------------------------------------------------------------------------------------


def test_fetch_gives_a_task(fake, ps):
    with Client(fake.url, name="first") as first:
        first.options(durable=True, idempotency_key="job").submit("hold", x=X).accepted(5)
        with pytest.raises(Conflict, match=r"'other', last heard of 2 s ago.*take=True"):
            ps.fetch(key="job")
        task = ps.fetch(key="job", take=True)
    assert (task.state, task.done()) == ("open", False)
    assert repr(task).startswith("<Task hold ")
    fake.release()
    np.testing.assert_array_equal(task.result(5), X)
    assert task.state == "done"


def test_rows_of_a_submission_are_named_one_by_one(fake, ps):
    with fake.lock:
        rig = Rig()
        rig.broker = fake.model
        task = stored(rig, 3)
    with pytest.raises(InvalidInput, match=r"rows 0 to 2.*fetch_rows"):
        ps.fetch(key="k")
    with pytest.raises(InvalidInput, match="rows 0 to 2"):
        ps.fetch(id=f"{task.id.hex()}/3")
    one, rows = ps.fetch(id=f"{task.id.hex()}/1"), ps.fetch_rows(key="k")
    assert one.id == rows[1].id == f"{task.id.hex()}/1"
    fake.release()
    assert [row.result(5).tolist() for row in rows] == [X.tolist()] * 3
    assert one.result(0).tolist() == X.tolist()


def test_a_task_is_named_by_one_name(ps):
    for which in ({}, {"key": "k", "id": "0" * 32}, {"id": "beef"}, {"key": ""}):
        with pytest.raises(InvalidInput):
            ps.fetch(**which)
    with pytest.raises(UnknownTask):
        ps.fetch(key="nothing")


def test_lists_and_changes(fake, ps, tmp_path):
    with pytest.raises(ProtocolFault, match="too old"):
        ps.jobs()
    with fake.lock:
        fake.model.jobs = [JOB, {**JOB, "key": b"\xff", "dead": 0}, {**JOB, "key": None}]
    assert [job["key"] for job in ps.jobs()] == ["nightly", b"\xff", None]
    assert [job["key"] for job in ps.jobs(dead=True)] == ["nightly", None]
    assert ps.jobs()[0]["id"] == "01" * 16
    assert ps.job(key="nightly")["state"] == "dead"
    ps.cancel_job(key="k")
    ps.drop(id="ab" * 16)
    assert ps.requeue(key="k") == "09" * 16
    ps.backup(tmp_path / "copy")
    with fake.lock:
        assert fake.model.controls == [
            ("cancel", b"k".hex()), ("drop", "ab" * 16), ("requeue", b"k".hex()), ("backup", str(tmp_path / "copy")),
        ]  # fmt: skip


def test_asynchronously(fake):
    async def work() -> None:
        with fake.lock:
            fake.model.jobs = [JOB]
            rig = Rig()
            rig.broker = fake.model
            stored(rig, 2)
        async with AsyncClient(fake.url) as ps:
            rows = await ps.fetch_rows(key="k")
            one = await ps.fetch(id=rows[1].id)
            fake.release()
            assert [(await row).tolist() for row in rows] == [X.tolist()] * 2
            assert (await one).tolist() == X.tolist()
            with pytest.raises(UnknownTask):
                await ps.fetch(key="nothing")
            assert (await ps.jobs(dead=True))[0]["key"] == "nightly"
            assert (await ps.job(key="nightly"))["dead"] == 1
            assert await ps.requeue(key="k") == "09" * 16
            await ps.cancel_job(key="k")
            await ps.drop(key="k")
            await ps.backup("/copy")

    asyncio.run(asyncio.wait_for(work(), 20))

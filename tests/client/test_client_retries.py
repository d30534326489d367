"""Refused for want of room: from the broker to the user and back, without sockets or clocks, then on real ones."""

import asyncio
import math
import threading
import time

import numpy as np
import pytest
from client_fakes import ModelBroker
from session_rig import PLAIN, Rig, X, codes

from penstock.broker import protocol
from penstock.broker.protocol import Code, Error, Submit
from penstock.client import AsyncClient, Client, ClientConfig, DeadlineExceeded, Overloaded
from penstock.client.run import CLOSED, SENT, WAITING, Options, Run

MINUTE = Options(timeout=60.0)


def full(broker: ModelBroker, retry_after_ms: float | None = 100.0, times: float = float("inf")) -> None:
    """From now on so many submissions are refused."""
    left = times

    def refuse(m: Submit) -> Error | None:
        nonlocal left
        left -= 1
        return Error(Code.OVERLOADED, "the queue is full", retry_after_ms) if left >= 0 else None

    broker.refuse = refuse


def test_a_refused_run_leaves_again_as_it_was_with_less_time():
    rig = Rig(window=(1, 1 << 20)).attached()
    full(rig.broker, times=1)
    run, _ = rig.submit("echo", options=MINUTE)
    rig.exchange()
    assert (run.state, codes(run)) == (WAITING, [None])
    assert 0.1 <= rig.session.next_deadline() - rig.now <= 0.15
    rig.advance(0.099)
    assert rig.send() == []
    rig.advance(0.052)
    rig.exchange()
    first, second = rig.submits()
    assert (first.id, first.is_again, second.is_again) == (second.id, False, False)
    assert (first.timeout_ms, second.timeout_ms) == (pytest.approx(60_000), pytest.approx(59_849))
    assert codes(run) == ["ok"]


def test_credit_is_given_back_by_every_refusal():
    rig = Rig(window=(2, 40)).attached()
    held, _ = rig.submit()  # with nothing under way a run leaves without credit
    full(rig.broker, times=5)
    runs = [rig.submit("echo")[0] for _ in range(3)]
    for _ in range(100):
        rig.exchange()
        rig.advance(0.1)
    assert (held.state, [codes(run) for run in runs]) == (SENT, [["ok"]] * 3)


def test_a_refused_run_has_its_old_place():
    rig = Rig(window=(1, 1 << 20)).attached()
    held, _ = rig.submit()
    full(rig.broker, times=1)
    early, _ = rig.submit("echo")
    late, _ = rig.submit(x=np.zeros(5, "f4"))
    rig.session.flush()
    rig.broker.release()
    rig.exchange()  # early is refused, late has left instead
    assert (held.state, early.state, late.state) == (CLOSED, WAITING, SENT)
    later, _ = rig.submit(x=np.zeros(6, "f4"))
    rig.session.flush()
    rig.advance(0.2)
    rig.broker.release()
    rig.exchange()
    assert [m.id for m in rig.submits()[-2:]] == [early.id, later.id]


def test_jobs_wait_for_room_and_can_be_cancelled_meanwhile():
    rig = Rig().attached()
    full(rig.broker)
    job, other = rig.submit("echo", options=PLAIN)[0], rig.submit("echo", options=PLAIN)[0]
    for _ in range(3000):
        rig.exchange()
        rig.advance(0.1)
    assert codes(job) == [None]
    assert 10 < len(rig.submits()) < 100, "they are backed off"
    rig.session.cancel(job, 0, 1)
    assert codes(job) == [Code.CANCELLED]
    full(rig.broker, times=0)
    rig.advance(31.0)
    rig.exchange()
    assert codes(other) == ["ok"]
    rig.session.check()


def test_a_cancel_that_crosses_the_refusal_holds():
    rig = Rig().attached()
    full(rig.broker, times=1)
    run, _ = rig.submit("echo")
    rig.session.cancel(run, 0, 1)
    rig.exchange()
    assert codes(run) == [Code.CANCELLED]
    rig.advance(1.0)
    rig.exchange()
    assert len(rig.submits()) == 1


def test_one_cancelled_row_of_a_resting_run_stays_cancelled():
    rig = Rig(window=(4, 1 << 20)).attached()
    for _ in range(4):
        rig.submit()
    run, _ = rig.submit()
    assert rig.submit()[0] is run
    rig.session.flush()
    full(rig.broker, times=1)
    rig.broker.release()
    rig.exchange()
    assert run.state == WAITING
    rig.session.cancel(run, 1, 2)
    rig.advance(0.2)
    rig.exchange()
    rig.broker.release()
    rig.exchange()
    assert codes(run) == ["ok", Code.CANCELLED]


def test_no_room_within_the_time_limit_is_said_at_once():
    rig = Rig().attached()
    full(rig.broker, 2000.0)
    run, _ = rig.submit("echo", options=Options(timeout=1.5))
    rig.exchange()
    assert codes(run) == [Code.OVERLOADED]
    assert run.slots[0].error.retry_after_ms == 2000.0


def test_a_time_limit_that_ends_while_it_waits_names_the_reason():
    rig = Rig(window=(1, 1 << 20)).attached()
    full(rig.broker, times=1)
    run, _ = rig.submit(options=Options(timeout=1.0))
    rig.exchange()
    rig.submit()  # takes the only room
    rig.advance(1.0)
    assert codes(run) == [Code.DEADLINE]
    assert "the broker had no room: the queue is full" in run.slots[0].error.message


def test_other_refusals_and_what_never_fits_end_at_once():
    rig = Rig(window=(100, 40)).attached()
    rig.broker.refuse = lambda m: Error(Code.UNAVAILABLE, "stopping", 100.0)
    run, _ = rig.submit("echo")
    rig.exchange()
    rig.broker.refuse = lambda m: None
    giant, _ = rig.submit("echo", options=PLAIN, x=np.zeros(100, "f4"))
    rig.exchange()
    assert (codes(run), codes(giant)) == ([Code.UNAVAILABLE], [Code.OVERLOADED])


def test_retries_can_be_turned_off():
    rig = Rig(ClientConfig(max_retries=0)).attached()
    full(rig.broker, times=2)
    runs = [rig.submit("echo", options=options)[0] for options in (PLAIN, MINUTE)]
    rig.exchange()
    assert [codes(run) for run in runs] == [[Code.OVERLOADED]] * 2
    with pytest.raises(ValueError, match="max_retries"):
        ClientConfig(max_retries=-1)


@pytest.mark.parametrize("loss", ["connection", "broker"])
def test_a_resting_run_outlives_its_connection(loss):
    rig = Rig(window=(1, 1 << 20)).attached()
    full(rig.broker, 5000.0, times=1)
    run, _ = rig.submit("echo", options=MINUTE)
    rig.exchange()
    if loss == "broker":
        rig.broker.restart()
    rig.reconnect()
    rig.exchange()
    attach = next(m for m in rig.broker.log if isinstance(m, protocol.Attach))
    assert attach.open == b"", "the broker does not have it"
    rig.advance(8.0)
    rig.exchange()
    assert codes(run) == ["ok"]
    assert [m.is_again for m in rig.submits()] == [False, False]


def test_closing_ends_what_rests():
    rig = Rig().attached()
    full(rig.broker)
    runs = [rig.submit("echo", options=options)[0] for options in (PLAIN, MINUTE)]
    rig.exchange()
    rig.session.close()
    assert [codes(run) for run in runs] == [[Code.CANCELLED]] * 2
    rig.session.check()
    assert not rig.session.is_busy
    assert rig.session.backlog.wake_at == math.inf


def test_resting_tasks_count_as_waiting_ones():
    rig = Rig(ClientConfig(max_waiting=1)).attached()
    full(rig.broker)
    rig.submit("echo")
    rig.exchange()
    assert not rig.session.backlog.has_room(1, 16)
    assert rig.session.is_busy


def test_under_overload_tasks_are_held_back_here_and_jobs_are_not():
    rig = Rig().attached()
    full(rig.broker, 1000.0)
    runs = list[Run]()
    for _ in range(200):
        runs.append(rig.submit("echo", options=Options(timeout=0.5))[0])
        rig.exchange()
    assert {codes(run)[0] for run in runs} == {Code.OVERLOADED}
    num_arrived = len(rig.submits())
    assert 10 < num_arrived < 80
    last = next(run for run in reversed(runs) if "not sent" in run.slots[0].error.message)
    assert "the queue is full" in last.slots[0].error.message
    assert 1000 <= last.slots[0].error.retry_after_ms <= 1500
    for options in (PLAIN, Options(timeout=0.5, priority=1)):
        rig.submit("echo", options=options)
        rig.exchange()
    assert len(rig.submits()) == num_arrived + 2
    full(rig.broker, times=0)
    rig.advance(1.5)  # what the broker said is over
    run, _ = rig.submit("echo", options=Options(timeout=0.5))
    rig.exchange()
    assert codes(run) == ["ok"]


def test_the_throttle_can_be_turned_off():
    rig = Rig(ClientConfig(has_throttle=False)).attached()
    full(rig.broker, 1000.0)
    for _ in range(100):
        rig.submit("echo", options=Options(timeout=0.5))
        rig.exchange()
    assert len(rig.submits()) == 100


# --- on real sockets -----------------------------------------------------------------------------------------------


def test_a_call_waits_for_room_within_its_time_limit(fake, ps):
    full(fake.model, 20.0, times=3)
    assert ps.call("echo", x=X).tolist() == X.tolist()
    full(fake.model, 20.0, times=3)
    assert len(list(ps.map("echo", [{"x": X}] * 40, window=40))) == 40
    full(fake.model, 5000.0)
    began = time.monotonic()
    with pytest.raises(Overloaded, match="the queue is full"):
        ps.options(timeout=1.0).call("echo", x=X)
    assert time.monotonic() - began < 0.9
    full(fake.model, 20.0, times=2)
    np.testing.assert_array_equal(ps.options(timeout=None).map_rows("echo", x=np.zeros((600, 2))), np.zeros((600, 2)))


def test_retries_go_on_while_nobody_waits(fake, ps):
    full(fake.model, 20.0, times=2)
    came = threading.Event()
    ps.submit("echo", x=X).add_done_callback(lambda _: came.set())
    assert came.wait(5)


def test_accepted_means_taken_and_not_refused(fake, ps):
    full(fake.model, 50.0, times=2)
    task = ps.submit("hold", x=X)
    task.accepted(5)
    with fake.lock:
        assert len(fake.model.held) == 1
    full(fake.model, 60_000.0)
    job = ps.options(timeout=None).submit("hold", x=X)
    with pytest.raises(TimeoutError, match="not been accepted"):
        job.accepted(0.05)
    durable = ps.options(timeout=1.0, durable=True).submit("hold", x=X)
    with pytest.raises(Overloaded):
        durable.accepted(5)
    assert ps.cancel([task, job]) == 2


def test_a_resting_task_says_what_it_waits_for(fake, ps):
    full(fake.model, 60_000.0)
    job = ps.options(timeout=None).submit("hold", x=X)
    until = time.monotonic() + 5
    while job.state == "open" and time.monotonic() < until:
        job.done()
    assert job.state == "waiting"
    assert "the broker had no room, once (the queue is full); again in" in job.why()
    assert job.eta() is None
    report = job.status()
    assert (report["id"], report["rows"], report["deadline_in_ms"]) == (job.id[:32], 1, None)
    assert job.cancel()


def test_the_async_client_does_the_same(fake):
    async def main() -> None:
        async with AsyncClient(fake.url) as ps:
            full(fake.model, 20.0, times=3)
            values = await asyncio.gather(*(ps.call("echo", x=X) for _ in range(20)))
            assert len(values) == 20
            full(fake.model, 50.0, times=1)
            task = await ps.submit("hold", x=X)
            await task.accepted(5)
            full(fake.model, 60_000.0)
            job = await ps.options(timeout=None).submit("hold", x=X)
            with pytest.raises(TimeoutError, match="not been accepted"):
                await job.accepted(0.05)
            assert "the queue is full" in await job.why()
            assert await job.eta() is None
            with pytest.raises(Overloaded):
                await ps.options(timeout=1.0).call("echo", x=X)
            assert await ps.cancel([task, job]) == 2

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_client_in_time_trouble_still_ends_on_time(fake):
    with Client(fake.url, config=ClientConfig(max_retries=1000)) as ps:
        full(fake.model, 30.0)
        began = time.monotonic()
        with pytest.raises((Overloaded, DeadlineExceeded)):
            ps.options(timeout=0.4).call("echo", x=X)
        assert time.monotonic() - began < 2.0

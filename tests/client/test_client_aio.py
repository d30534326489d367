"""`AsyncClient` against a fake broker on a real socket."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from client_fakes import FakeBroker

from penstock.broker import protocol
from penstock.client import (
    AsyncClient,
    Cancelled,
    ClientConfig,
    DeadlineExceeded,
    InvalidInput,
    KernelFailed,
    Unavailable,
    UnknownKernel,
)

X = np.arange(4, dtype="f4")


def run(fake: FakeBroker, work: Callable[[AsyncClient], Awaitable[None]], **arguments: object) -> None:
    async def main() -> None:
        async with AsyncClient(fake.url, **arguments) as ps:  # type: ignore[arg-type]
            await asyncio.wait_for(work(ps), 30)

    asyncio.run(main())


def test_call_submit_and_errors(fake):
    async def work(ps):
        np.testing.assert_array_equal(await ps.call("echo", x=X), X)
        task = await ps.submit("echo", x=X)
        np.testing.assert_array_equal(await task, X)
        assert task.done()
        assert task.timings["worker"] == "fake"
        assert await task.exception() is None
        with pytest.raises(KernelFailed):
            await ps.call("fail", x=X)
        with pytest.raises(UnknownKernel):
            await ps.call("nope")
        with pytest.raises(InvalidInput):
            await ps.call("echo", y=X)
        assert "echo" in await ps.kernels()

    run(fake, work)


def test_calls_gathered_share_messages(fake):
    async def work(ps):
        await ps.call("echo", x=X)
        values = await asyncio.gather(*(ps.call("echo", x=X + i) for i in range(500)))
        assert [v[0] for v in values] == list(range(500))

    run(fake, work)
    sizes = [m.block.num_rows for m in fake.model.log if isinstance(m, protocol.Submit)]
    assert 32 <= max(sizes) <= 128
    assert len(sizes) < 40


def test_cancelling_an_await_cancels_the_task(fake):
    async def work(ps):
        call = asyncio.create_task(ps.call("hold", x=X))
        while not fake.model.held:
            await asyncio.sleep(0.002)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while fake.model.held:
            await asyncio.sleep(0.002)

    run(fake, work)


def test_cancel_status_accepted_and_timeouts(fake):
    async def work(ps):
        task = await ps.submit("hold", x=X)
        await task.accepted()
        assert (await task.status())["state"] == "queued"
        with pytest.raises(TimeoutError):
            await task.result(0.02)
        durable = await ps.options(durable=True).submit("hold", x=X)
        await durable.accepted(5)
        assert await task.cancel()
        assert await ps.cancel([task, durable]) == 2
        with pytest.raises(Cancelled):
            await durable
        with pytest.raises(DeadlineExceeded):
            await ps.options(timeout=0.05).call("hold", x=X)

    run(fake, work)


def test_map_and_map_rows(fake):
    async def items():
        for i in range(300):
            yield {"x": X + i}

    async def work(ps):
        assert [v[0] async for v in ps.map("echo", items(), window=70)] == list(range(300))
        assert [v[0] async for v in ps.map("echo", [{"x": X}], progress=True)] == [0]
        assert len([v async for v in ps.map("fail", items(), ordered=False, return_exceptions=True)]) == 300
        with pytest.raises(KernelFailed):
            [v async for v in ps.map("fail", items())]
        x = np.random.default_rng(0).random((2500, 3))
        np.testing.assert_array_equal(await ps.map_rows("echo", x=x), x)

    run(fake, work)


def test_stream_and_as_completed(fake):
    async def work(ps):
        stream = await ps.stream("count", steps=4)
        assert [float(c) async for c in stream] == [0, 1, 2, 3]
        assert await stream.result() == 4
        with pytest.raises(InvalidInput):
            await ps.stream("echo", x=X)
        async with await ps.stream("hold_stream", steps=4) as held:
            pass
        assert isinstance(await held.task.exception(5), Cancelled)
        tasks = [await ps.submit("echo", x=X) for _ in range(20)]
        assert {t async for t in ps.as_completed(tasks)} == set(tasks)

    run(fake, work)


def test_a_full_client_waits(tmp_ipc):
    async def work(ps):
        tasks = [await ps.submit("echo", x=X) for _ in range(20)]
        assert len(await asyncio.gather(*(t.result(5) for t in tasks))) == 20

    with FakeBroker(tmp_ipc, window=(1, 1 << 20)) as fake:
        run(fake, work, config=ClientConfig(max_waiting=2))


def test_a_restarted_broker_is_met_again(tmp_ipc):
    async def work(ps):
        task = await ps.submit("hold", x=X)
        while not fake.model.held:
            await asyncio.sleep(0.002)
        with fake.lock:
            fake.model.restart()
        while not fake.model.held:
            await asyncio.sleep(0.002)
        fake.release()
        np.testing.assert_array_equal(await task.result(5), X)

    with FakeBroker(tmp_ipc, heartbeat_ms=100.0) as fake:
        run(fake, work)


def test_closing_wakes_who_waits(fake):
    async def work(ps):
        call = asyncio.create_task(ps.call("hold", x=X))
        while not fake.model.held:
            await asyncio.sleep(0.002)
        await ps.close()
        with pytest.raises(Cancelled):
            await call
        with pytest.raises(Unavailable):
            await ps.call("echo", x=X)

    run(fake, work)


def test_no_broker(tmp_ipc):
    async def main():
        async with AsyncClient(f"ipc://{tmp_ipc}", connect_timeout=0.1) as ps:
            with pytest.raises(Unavailable, match="penstock up"):
                await ps.call("echo", x=X)

    asyncio.run(main())


def test_a_map_that_is_given_up_while_it_waits_for_room_leaves_nothing_behind(tmp_ipc):
    async def work(ps):
        held = [await ps.submit("hold", x=X) for _ in range(3)]

        async def consume():
            return [v async for v in ps.map("hold", [{"x": X}] * 10)]

        consumer = asyncio.create_task(consume())
        while not ps._line._waiters:
            await asyncio.sleep(0.002)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        ps._line.session.check()
        assert await ps.cancel(held) == 3

    with FakeBroker(tmp_ipc, window=(1, 1 << 20)) as fake:
        run(fake, work, config=ClientConfig(max_waiting=2))


def test_a_callback_that_raises_does_not_stop_the_others(fake, caplog):
    async def work(ps):
        task = await ps.submit("echo", x=X)
        task.add_done_callback(lambda _: 1 / 0)
        np.testing.assert_array_equal(await task.result(5), X)

    run(fake, work)
    assert "a callback of a task failed" in caplog.text

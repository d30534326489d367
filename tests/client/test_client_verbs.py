"""The verbs of `Client` and `Executor` against a fake broker on a real socket."""

import concurrent.futures
import gc
import time

import numpy as np
import pytest
from client_fakes import FakeBroker

from penstock.broker import protocol
from penstock.client import Cancelled, Client, Executor, InvalidInput, KernelFailed, as_completed

X = np.arange(4, dtype="f4")


def test_call_gives_the_array_or_a_dict(ps):
    np.testing.assert_array_equal(ps.call("echo", x=X), X)
    both = ps.call("two", a=X, b=[1, 2])
    assert set(both) == {"a", "b"}
    assert both["b"].tolist() == [1, 2]
    assert ps.call("text", text="Grüße") == "Grüße"
    assert ps.call("text", text="a", upper=True) == "A"
    assert ps.call("sleep", seconds=2) == 2.0
    assert ps.call("data", data=b"\0\1") == b"\0\1"


def test_large_arrays_there_and_back(ps):
    x = np.random.default_rng(0).random(1 << 20)
    np.testing.assert_array_equal(ps.call("echo", x=x), x)


def test_a_task_tells_of_itself(ps):
    task = ps.submit("echo", x=X)
    assert repr(task).startswith("<Task echo ")
    np.testing.assert_array_equal(task.result(5), X)
    assert task.exception() is None
    assert (task.state, task.done(), task.cancel()) == ("done", True, False)
    assert task.timings == {"queue_ms": 0.25, "batch_size": 1, "worker": "fake", "compute_ms": 0.5}
    assert task.status() == {"state": "done"}


def test_a_failed_task_tells_how(ps):
    task = ps.submit("fail", x=X)
    assert isinstance(task.exception(5), KernelFailed)
    with pytest.raises(KernelFailed):
        task.result()
    assert task.state == "failed"


def test_accepted_status_and_cancel_of_a_running_task(fake, ps):
    task = ps.submit("hold", x=X)
    assert task.timings == {}
    task.accepted(5)
    assert task.status() == {"state": "queued"}
    durable = ps.options(durable=True).submit("hold", x=X)
    durable.accepted(5)
    assert task.cancel() is True
    assert task.state == "cancelled"
    with pytest.raises(Cancelled):
        task.result()
    assert ps.cancel([task, durable]) == 2
    with fake.lock:
        flags = [(m.is_durable, m.wants_accepted) for m in fake.model.log if isinstance(m, protocol.Submit)]
    assert flags == [(False, False), (True, True)]


def test_options_reach_the_wire_and_leave_the_client_alone(fake, ps):
    ps.options(priority="high", timeout=5.0, idempotency_key="once").call("echo", x=X)
    ps.options(timeout=None).options(priority=9).call("echo", x=X)
    ps.call("echo", x=X)
    with fake.lock:
        sent = [m for m in fake.model.log if isinstance(m, protocol.Submit)]
    assert [(m.priority, m.key) for m in sent] == [(1, b"once"), (9, None), (5, None)]
    assert sent[1].timeout_ms is None
    assert 4900 < sent[0].timeout_ms <= 5000
    assert 59_000 < sent[2].timeout_ms <= 60_000


@pytest.mark.parametrize(
    "wrong",
    [{"priority": "urgent"}, {"priority": 10}, {"priority": True}, {"timeout": "1"}, {"timeout": 1e9},
     {"timeout": float("nan")}, {"idempotency_key": ""}, {"idempotency_key": "x" * 129}],
)  # fmt: skip
def test_options_out_of_bounds_are_refused(ps, wrong):
    with pytest.raises(InvalidInput):
        ps.options(**wrong)


def test_map_keeps_the_order_and_the_window(fake, ps):
    values = list(ps.map("echo", ({"x": X + i} for i in range(1000)), window=100))
    assert [v[0] for v in values] == list(range(1000))
    with fake.lock:
        sizes = [m.block.num_rows for m in fake.model.log if isinstance(m, protocol.Submit)]
    assert max(sizes) == 12, "an eighth of the window"
    assert len(sizes) < 100


def test_map_of_mixed_shapes_nothing_and_endless_items(ps):
    assert list(ps.map("echo", [])) == []
    shapes = [v.shape for v in ps.map("echo", ({"x": np.zeros(i % 3)} for i in range(50)))]
    assert shapes == [(i % 3,) for i in range(50)]
    endless = ps.map("echo", ({"x": X} for _ in iter(int, 1)))
    assert [next(endless).tolist() for _ in range(3)] == [X.tolist()] * 3
    endless.close()


def test_map_stops_at_the_first_failure_and_cancels_the_rest(fake, ps):
    def items():
        for i in range(200):
            yield {"x": X if i % 50 == 49 else X + i}

    with fake.lock:
        fake.model.specs["hold"] = fake.model.specs["echo"]
    values = ps.map("fail", items())
    with pytest.raises(KernelFailed):
        list(values)
    kinds = list(ps.map("fail", items(), return_exceptions=True, ordered=False))
    assert len(kinds) == 200
    assert all(isinstance(k, KernelFailed) for k in kinds)
    held = ps.map("hold", items())
    ended = next(ps.map("echo", items()))
    assert ended is not None
    held.close()


def test_leaving_a_map_early_cancels_what_is_under_way(fake, ps):
    for _ in ps.map("echo", ({"x": X} for _ in range(40)), window=40):
        break
    values = ps.map("hold", ({"x": X} for _ in range(40)), window=40)
    import threading

    threading.Timer(0.05, lambda: fake.release(1)).start()
    next(values)
    values.close()
    fake.wait_until(lambda m: not m.held)


def test_map_with_a_bar_prints_to_stderr(ps, capfd):
    assert len(list(ps.map("echo", [{"x": X}] * 5, progress=True))) == 5
    out, err = capfd.readouterr()
    assert out == ""
    assert "echo" in err


def test_map_rows_takes_a_whole_array(fake, ps):
    x = np.random.default_rng(1).random((3000, 5)).astype("f4")
    got = ps.map_rows("echo", x=x)
    np.testing.assert_array_equal(got, x)
    assert got.flags.writeable
    assert ps.map_rows("text", text=["a", "bc"]) == ["a", "bc"]
    assert ps.map_rows("sleep", seconds=np.arange(3)).tolist() == [0.0, 1.0, 2.0]
    assert ps.map_rows("echo", x=x[:0]) == []
    with fake.lock:
        sizes = [m.block.num_rows for m in fake.model.log if isinstance(m, protocol.Submit)]
    assert sizes[:12] == [256] * 11 + [3000 - 11 * 256]


def test_map_rows_raises_what_the_first_failed_row_raised(ps):
    with pytest.raises(KernelFailed) as failed:
        ps.map_rows("fail", x=np.zeros((5, 2)))
    assert failed.value.__notes__ == ["row 0 of the array"]
    with pytest.raises(InvalidInput, match="names one task"):
        ps.options(idempotency_key="k").map_rows("echo", x=np.zeros((5, 2)))


def test_map_rows_in_a_small_window(tmp_ipc):
    with FakeBroker(tmp_ipc, window=(10, 1 << 20)) as fake, Client(fake.url) as ps:
        x = np.arange(200.0).reshape(100, 2)
        np.testing.assert_array_equal(ps.map_rows("echo", x=x), x)
        assert len(list(ps.map("echo", ({"x": X} for _ in range(100))))) == 100
        assert len([t.result(5) for t in [ps.submit("echo", x=X) for _ in range(100)]]) == 100


def test_stream_yields_the_parts_and_then_has_the_whole(ps):
    stream = ps.stream("count", steps=5)
    assert [float(c) for c in stream] == [0, 1, 2, 3, 4]
    assert stream.result() == 5
    assert stream.task.timings["worker"] == "fake"


def test_a_kernel_that_does_not_stream_says_so(ps):
    with pytest.raises(InvalidInput, match="'echo' does not stream"):
        ps.stream("echo", x=X)


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_leaving_a_stream_early_cancels_it(fake, ps, how):
    stream = ps.stream("hold_stream", steps=3)
    task = stream.task
    fake.wait_until(lambda m: bool(m.held))
    with fake.lock:
        fake.model.partial(*fake.model.held[0], part=0)
    assert float(next(stream)) == 0
    if how == "close":
        stream.close()
    elif how == "with":
        with stream:
            pass
    else:
        del stream
        gc.collect()
    fake.wait_until(lambda m: not m.held)
    assert isinstance(task.exception(5), Cancelled)


def test_a_second_attempt_does_not_repeat_parts(fake, ps):
    stream = ps.stream("hold_stream", steps=3)
    fake.wait_until(lambda m: bool(m.held))
    with fake.lock:
        for part in (0, 1, 0, 1, 2):
            fake.model.partial(*fake.model.held[0], part=part)
    assert [float(next(stream)) for _ in range(3)] == [0, 1, 2]


def test_as_completed_gives_what_ends_first(fake, ps):
    held, quick = ps.submit("hold", x=X), [ps.submit("echo", x=X) for _ in range(20)]
    order = as_completed([held, *quick], timeout=10)
    assert {next(order) for _ in range(20)} == set(quick)
    fake.release()
    assert next(order) is held
    assert list(order) == []
    assert list(as_completed([])) == []
    with pytest.raises(TimeoutError, match="1 tasks"):
        list(as_completed([ps.submit("hold", x=X)], timeout=0.05))
    with Client(fake.url) as other, pytest.raises(ValueError, match="one client"):
        list(as_completed([held, other.submit("echo", x=X)]))


def test_kernels_and_status_are_the_brokers_word(ps):
    assert ps.kernels()["echo"]["inputs"][0][0] == "x"
    assert ps.status()["is_settled"] is True


def test_an_executor_has_futures(fake):
    with Executor(address=fake.url) as pool:
        assert isinstance(pool, concurrent.futures.Executor)
        futures = [pool.submit("echo", x=X + i) for i in range(50)]
        assert [f.result(10)[0] for f in futures] == list(range(50))
        assert len(concurrent.futures.wait(futures, 5).done) == 50
        assert isinstance(pool.submit("fail", x=X).exception(5), KernelFailed)
        assert [v[0] for v in pool.map("echo", [{"x": X}, {"x": X + 1}])] == [0, 1]
        with pytest.raises(InvalidInput):
            pool.submit(print, 1)
        with pytest.raises(InvalidInput):
            pool.map(print, [1])
        held = pool.submit("hold", x=X)
        held.cancel()
        assert isinstance(held.exception(5), Cancelled)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit("echo", x=X)


def test_an_executor_on_a_client_leaves_it_open(ps):
    with Executor(ps.options(priority="low")) as pool:
        assert pool.submit("echo", x=X).result(5).tolist() == X.tolist()
    ps.call("echo", x=X)


def test_a_chain_of_futures_is_not_slowed_by_naps(ps):
    with Executor(ps) as pool:
        pool.submit("echo", x=X).result(5)
        began = time.monotonic()
        for _ in range(100):
            pool.submit("echo", x=X).result(5)
        assert time.monotonic() - began < 1.5

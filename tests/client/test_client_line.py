"""The synchronous driver on real sockets: threads, wake-ups, the pump, reconnection, fork."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from client_fakes import FakeBroker

from penstock.broker import protocol
from penstock.client import (
    Cancelled,
    Client,
    ClientConfig,
    DeadlineExceeded,
    InvalidInput,
    KernelFailed,
    Overloaded,
    Unavailable,
    UnknownKernel,
    as_completed,
)

X = np.arange(4, dtype="f4")


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in threads; the first failure is raised, a hang fails."""
    failures: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    if failures:
        raise failures[0]
    assert not any(t.is_alive() for t in threads), "a thread was never woken"


def test_many_threads_call_at_once_and_nobody_is_forgotten(ps):
    def work(i: int) -> None:
        for n in range(150):
            x = np.full(3, i * 1000 + n, "f4")
            np.testing.assert_array_equal(ps.call("echo", x=x), x)

    in_threads(8, work)


def test_threads_that_call_submit_wait_and_watch_at_once(ps):
    """The lost wake-up hunt: every way to wait, mixed, with results that other threads receive."""
    fired = []

    def work(i: int) -> None:
        for n in range(60):
            x = np.full(2, n, "f4")
            if i % 4 == 0:
                assert ps.call("echo", x=x)[0] == n
            elif i % 4 == 1:
                tasks = [ps.submit("echo", x=x) for _ in range(7)]
                tasks[3].add_done_callback(fired.append)
                assert [t.result(20)[0] for t in tasks] == [n] * 7
            elif i % 4 == 2:
                assert len(list(as_completed([ps.submit("echo", x=x) for _ in range(9)], 20))) == 9
            else:
                assert len(list(ps.map("echo", ({"x": x} for _ in range(50)), window=40))) == 50

    in_threads(8, work)
    until = time.monotonic() + 5
    while len(fired) < 120 and time.monotonic() < until:
        time.sleep(0.005)
    assert len(fired) == 120


def test_a_task_that_another_thread_receives_wakes_its_waiter(fake, ps):
    held = [ps.submit("hold", x=X) for _ in range(3)]

    def work(i: int) -> None:
        if i < 3:
            np.testing.assert_array_equal(held[i].result(20), X)
        else:
            for _ in range(200):
                ps.call("echo", x=X)
            fake.wait_until(lambda m: len(m.held) == 3)
            fake.release()

    in_threads(4, work)


def test_result_with_a_timeout_leaves_the_task_running(fake, ps):
    task = ps.submit("hold", x=X)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="it goes on"):
        task.result(0.05)
    assert 0.04 < time.monotonic() - began < 2
    assert not task.done()
    fake.release()
    np.testing.assert_array_equal(task.result(5), X)
    assert task.done()


def test_callbacks_come_without_anybody_waiting(fake, ps):
    came: list[Any] = []
    task = ps.submit("hold", x=X)
    task.add_done_callback(lambda t: came.append(t.result()))
    fake.wait_until(lambda m: bool(m.held))
    fake.release()
    until = time.monotonic() + 5
    while not came and time.monotonic() < until:
        time.sleep(0.002)
    assert len(came) == 1
    task.add_done_callback(came.append)
    assert came[1] is task


def test_a_failing_callback_is_logged_and_harms_nobody(ps, caplog):
    task = ps.submit("echo", x=X)
    task.result(5)
    task.add_done_callback(lambda _: 1 / 0)
    assert "callback" in caplog.text
    ps.call("echo", x=X)


def test_pending_tasks_leave_without_anybody_waiting(fake, ps):
    tasks = [ps.submit("hold", x=X) for _ in range(10)]
    fake.wait_until(lambda m: sum(h.block.num_rows for _, h in m.held) == 10)
    fake.release()
    assert [t.result(5).tolist() for t in tasks] == [X.tolist()] * 10


def test_tasks_past_the_window_go_on_while_nobody_waits(tmp_ipc):
    with FakeBroker(tmp_ipc, window=(2, 1 << 20)) as fake, Client(fake.url) as ps:
        for _ in range(9):
            ps.submit("hold", x=X)
        for _ in range(9):
            fake.wait_until(lambda m: bool(m.held))
            fake.release(1)
            if not fake.model.held and sum(isinstance(m, protocol.Submit) for m in fake.model.log) >= 5:
                break


def test_submit_blocks_when_too_much_waits_and_its_time_runs(tmp_ipc):
    config = ClientConfig(max_waiting=2)
    with FakeBroker(tmp_ipc, window=(1, 1 << 20)) as fake, Client(fake.url, config=config) as ps:
        for _ in range(3):
            ps.submit("hold", x=X)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            ps.options(timeout=0.1).submit("hold", x=X)
        assert time.monotonic() - began < 2
        threading.Timer(0.05, fake.release).start()
        ps.submit("hold", x=X)


def test_a_deadline_in_the_client_holds_without_an_answer(fake, ps):
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        ps.options(timeout=0.1).call("hold", x=X)
    assert 0.3 < time.monotonic() - began < 1.5  # the limit and the grace
    with pytest.raises(DeadlineExceeded, match="already over"):
        ps.options(timeout=-1).call("hold", x=X)


def test_no_broker_is_said_in_one_helpful_line(tmp_ipc):
    with Client(f"ipc://{tmp_ipc}", connect_timeout=0.1) as ps:
        for _ in range(2):
            with pytest.raises(Unavailable, match=f"no broker at ipc://{tmp_ipc}; start one with `penstock up`"):
                ps.call("echo", x=X)


def test_a_broker_that_starts_late_is_found(tmp_ipc):
    with Client(f"ipc://{tmp_ipc}", connect_timeout=10) as ps:
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(ps.call("echo", x=X)))
        thread.start()
        with FakeBroker(tmp_ipc):
            thread.join(20)
            assert len(got) == 1


def test_a_broker_that_forgets_everything_gets_the_tasks_again(tmp_ipc):
    with FakeBroker(tmp_ipc, heartbeat_ms=100.0) as fake, Client(fake.url) as ps:
        tasks = [ps.submit("hold", x=X) for _ in range(6)]
        fake.wait_until(lambda m: sum(h.block.num_rows for _, h in m.held) == 6)
        with fake.lock:
            fake.model.restart()
        fake.wait_until(lambda m: sum(h.block.num_rows for _, h in m.held) == 6)
        assert all(h.is_again for _, h in fake.model.held)
        fake.release()
        assert all(t.result(5).tolist() == X.tolist() for t in tasks)


def test_a_silent_broker_gets_a_new_connection(tmp_ipc):
    with FakeBroker(tmp_ipc, heartbeat_ms=50.0) as fake, Client(fake.url) as ps:
        task = ps.submit("hold", x=X)
        fake.wait_until(lambda m: bool(m.held))
        with fake.lock:
            fake.model.is_mute = True
            fake.model.drop_connections()
        fake.wait_until(lambda m: any(isinstance(x, protocol.Attach) for x in m.log))
        with fake.lock:
            fake.model.is_mute = False
        fake.wait_until(lambda m: bool(m.peers), 10)
        fake.release()
        np.testing.assert_array_equal(task.result(5), X)


def test_a_broker_that_was_replaced_is_met_again(tmp_ipc):
    with Client(f"ipc://{tmp_ipc}") as ps:
        with FakeBroker(tmp_ipc, heartbeat_ms=100.0):
            ps.call("echo", x=X)
        with FakeBroker(tmp_ipc, heartbeat_ms=100.0, epoch=2):
            np.testing.assert_array_equal(ps.call("echo", x=X), X)


def test_closing_cancels_what_is_open_and_wakes_who_waits(fake):
    ps = Client(fake.url)
    task = ps.submit("hold", x=X)
    fake.wait_until(lambda m: bool(m.held))
    closer = threading.Timer(0.05, ps.close)
    closer.start()
    with pytest.raises(Cancelled, match="closed"):
        task.result(10)
    closer.join()
    ps.close()
    with pytest.raises(Unavailable, match="closed"):
        ps.call("echo", x=X)
    fake.wait_until(lambda m: any(isinstance(x, protocol.Goodbye) for x in m.log))


def test_a_forked_child_is_told(ps):
    ps.call("echo", x=X)
    task = ps.submit("hold", x=X)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = []
        for use in (lambda: ps.call("echo", x=X), lambda: task.result(1)):
            try:
                use()
            except RuntimeError as e:
                said.append(str(e))
        os.write(write, "|".join(said).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1000).decode().count("make a new Client after fork") == 2
    os.close(read)
    os.close(write)
    np.testing.assert_array_equal(ps.call("echo", x=X), X)


def test_an_idle_client_hardly_wakes_up(fake, ps):
    ps.call("echo", x=X)
    turns = ps._line.num_turns
    time.sleep(1.5)
    assert ps._line.num_turns - turns <= 4


def test_a_loop_of_calls_never_rings_the_pump(fake, ps, monkeypatch):
    ps.call("echo", x=X)
    rings = []
    bell = ps._line.pump.bell
    monkeypatch.setattr(ps._line.pump, "bell", type("Bell", (), {"ring": lambda _: rings.append(1), "fileno": bell.fileno})())
    for _ in range(200):
        ps.call("echo", x=X)
    assert len(rings) <= 1


def test_errors_have_their_types(fake, ps):
    with pytest.raises(KernelFailed, match="it raised") as failed:
        ps.call("fail", x=X)
    assert failed.value.detail == "Traceback"
    with pytest.raises(UnknownKernel, match="no kernel 'nope'; known: count, data, echo"):
        ps.call("nope")
    with fake.lock:
        fake.model.refuse = lambda m: protocol.Error("overloaded", "full", 250.0)
    with pytest.raises(Overloaded, match=r"full; not tried again: 0\.\d s of its time limit are left") as full:
        ps.options(timeout=0.2).call("echo", x=X)
    assert full.value.retry_after == 0.25
    with pytest.raises(ValueError, match="missing argument"):
        ps.submit("echo")


def test_a_kernel_that_is_still_starting_is_waited_for(fake, ps):
    with fake.lock:
        spec = fake.model.specs.pop("echo")
        fake.model.is_settled = False
    late = threading.Timer(0.1, lambda: fake.model.specs.update(echo=spec))
    late.start()
    np.testing.assert_array_equal(ps.call("echo", x=X), X)
    with pytest.raises(DeadlineExceeded, match="no worker offers kernel 'never'"):
        ps.options(timeout=0.2).call("never")


def test_specs_are_asked_for_again_after_a_refusal(fake, ps):
    ps.call("echo", x=X)
    with fake.lock:
        fake.model.specs["echo"] = {"inputs": [["y", "tensor", {}]], "modes": ["batch"]}
        error = protocol.Error("invalid_input", "no x any more")
        fake.model.refuse = lambda m: error if m.block.columns[0].name == "x" else None
    with pytest.raises(InvalidInput, match="no x any more"):
        ps.call("echo", x=X)
    np.testing.assert_array_equal(ps.call("echo", y=X), X)

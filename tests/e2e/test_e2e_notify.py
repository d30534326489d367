"""Broker and worker under a service manager that is only a socket: ready, alive, hung, reloaded, drained, started again."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from notify_socket import NotifySocket, socket_in
from running import KERNELS, STOP_S, Running, until

ONE = np.ones(3, np.float32)
WATCHDOG_S = 0.6
"""A sign of life is due every 0.3 s."""
QUIET_S = 2.0


@pytest.fixture
def ear(folder: Path) -> Iterator[NotifySocket]:
    made = socket_in(folder)
    yield made
    made.close()


@pytest.fixture
def run(folder: Path) -> Iterator[Running]:
    made = Running(folder)
    yield made
    made.stop()


def start_broker(run: Running, ear: NotifySocket, *arguments: str, **extra: str) -> "subprocess.Popen[bytes]":
    run.env |= ear.env(WATCHDOG_S) | extra
    process = run.start_broker(*arguments)
    for name in (*ear.env(WATCHDOG_S), *extra):
        run.env.pop(name)
    return process


def test_a_broker_is_ready_when_it_answers(run: Running, ear: NotifySocket) -> None:
    broker = start_broker(run, ear)
    ready = ear.wait("READY")
    with run.client(connect_timeout=1.0, timeout=1.0, name="first") as client:
        assert client.status()["pid"] == broker.pid
        assert client.status()["counters"].get("unattached", 0) == 0, "its test of itself is no stranger"
    assert ear.seen == [ready], "nothing comes before"
    assert ready.pid == broker.pid
    assert ready.fields["READY"] == "1"
    assert run.url in ready.fields["STATUS"]

    second = run.start("second", broker.args, ear.env(WATCHDOG_S))  # type: ignore[arg-type]
    assert second.wait(STOP_S) == 3
    assert all(notice.pid == broker.pid for notice in ear.drain()), "who does not get the address is not ready"


def test_a_broker_is_ready_when_it_has_read_its_journal(run: Running, ear: NotifySocket) -> None:
    start_broker(run, ear)
    ear.wait("READY")
    run.start_worker("w", "--kernels", str(KERNELS))
    run.wait_ready("w")
    with run.client(name="doomed") as client:
        durable = client.options(durable=True)
        durable.call("scale", x=ONE)
        run.kill("w")
        for _ in range(3):
            durable.submit("scale", x=ONE).accepted()
        run.kill("broker")
        client.close()  # who is not there cannot submit them again
    ear.drain()
    start_broker(run, ear)
    assert ear.wait("READY").fields["STATUS"].startswith("3 open tasks")


def test_a_broker_gives_signs_of_life_until_its_loop_stands_still(run: Running, ear: NotifySocket) -> None:
    broker = start_broker(run, ear)
    for _ in range(4):
        ear.wait("WATCHDOG", limit_s=10.0)  # idle
    with run.client() as client:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            client.status()  # under load
    busy = [notice for notice in ear.drain() if "WATCHDOG" in notice.fields]
    assert len(busy) >= 2
    broker.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(broker.pid).status() == psutil.STATUS_STOPPED, "it is stopped")
    until(lambda: ear.is_quiet(QUIET_S), "silence", 20.0)
    broker.send_signal(signal.SIGCONT)
    ear.wait("WATCHDOG", limit_s=10.0)

    broker.send_signal(signal.SIGSTOP)
    broker.send_signal(signal.SIGABRT)  # as the service manager does, which wakes a stopped one to have it end
    broker.send_signal(signal.SIGCONT)
    assert broker.wait(STOP_S) == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in run.log("broker")
    assert "server.py" in run.log("broker"), "where it stood"


def test_what_waits_goes_on_when_the_watchdog_has_had_the_broker_restarted(run: Running, ear: NotifySocket) -> None:
    broker = start_broker(run, ear)
    ear.wait("READY")
    run.start_worker("w", "--kernels", str(KERNELS))
    run.wait_ready("w")
    with run.client() as client:
        task = client.submit("sleep", seconds=0.5)
        broker.send_signal(signal.SIGSTOP)
        until(lambda: ear.is_quiet(QUIET_S), "silence", 20.0)
        broker.kill()
        broker.wait(STOP_S)
        start_broker(run, ear)
        ear.wait("READY")
        task.result(timeout=60.0)
        assert client.call("scale", x=ONE).tolist() == [2.0] * 3


def test_sighup_is_a_reload_with_an_end(run: Running, ear: NotifySocket) -> None:
    broker = start_broker(run, ear)
    ear.wait("READY")
    before = time.monotonic_ns() // 1000
    broker.send_signal(signal.SIGHUP)
    reloading = ear.wait("RELOADING")
    assert before <= int(reloading.fields["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert ear.wait("READY").at >= reloading.at


def test_a_stopping_broker_asks_for_its_time_and_finishes_what_runs(run: Running, ear: NotifySocket) -> None:
    broker = start_broker(run, ear, "--drain-s", "400")
    ear.wait("READY")
    run.start_worker("w", "--kernels", str(KERNELS))
    run.wait_ready("w")
    with run.client() as client:
        task = client.submit("sleep", seconds=1.5)
        until(lambda: client.status()["tasks"]["leased"] == 1, "it runs")
        broker.send_signal(signal.SIGTERM)
        stopping = ear.wait("STOPPING")
        assert int(stopping.fields["EXTEND_TIMEOUT_USEC"]) > 400e6
        assert "1 open tasks" in stopping.fields["STATUS"]
        ear.wait("WATCHDOG", limit_s=10.0)  # also while it drains
        task.result(timeout=30.0)
    assert broker.wait(STOP_S) == 0


def test_lines_for_the_journal(run: Running, ear: NotifySocket) -> None:
    log = run.folder / "broker.log"
    log.touch()
    found = log.stat()
    broker = start_broker(run, ear, JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}")
    ear.wait("READY")
    broker.send_signal(signal.SIGTERM)
    assert broker.wait(STOP_S) == 0
    lines = run.log("broker").splitlines()
    assert f"<6>broker {broker.pid} listens at {run.url}" in lines
    assert all(line[:3] in ("<3>", "<4>", "<6>") for line in lines)


# --- the worker ----------------------------------------------------------------------------------------------------


def start_worker(run: Running, ear: NotifySocket) -> "subprocess.Popen[bytes]":
    return run.start_worker("w", "--kernels", str(KERNELS), "--hang-limit-s", "5", extra=ear.env(WATCHDOG_S))


def child_of(process: "subprocess.Popen[bytes]") -> psutil.Process:
    (child,) = psutil.Process(process.pid).children()
    return child


@pytest.fixture
def worker(run: Running, ear: NotifySocket) -> "subprocess.Popen[bytes]":
    """Ready, at a broker."""
    run.start_broker()
    process = start_worker(run, ear)
    ready = ear.wait("READY")
    assert ready.pid == process.pid, "the supervisor is the main process"
    assert [notice for notice in ear.seen if notice is not ready] == []
    return process


def test_a_worker_is_ready_when_it_works(run: Running, worker: "subprocess.Popen[bytes]") -> None:
    with run.client() as client:
        assert client.options(timeout=10.0).call("scale", x=ONE).tolist() == [2.0] * 3


def test_a_worker_gives_signs_of_life_for_what_is_under_it(
    run: Running, ear: NotifySocket, worker: "subprocess.Popen[bytes]"
) -> None:
    until(lambda: ear.wait("WATCHDOG", limit_s=10.0) and ear.status.startswith("waiting for work"), "it idles")
    for _ in range(5):  # longer than its loop rests without going round
        ear.wait("WATCHDOG", limit_s=10.0)
    with run.client() as client:
        task = client.submit("sleep", seconds=2.0)
        until(lambda: ear.wait("WATCHDOG", limit_s=10.0) and "a run of kernel 'sleep'" in ear.status, "it runs")
        ear.wait("WATCHDOG", limit_s=10.0)  # one long run within its limit is life, too
        task.result(timeout=30.0)
    child = child_of(worker)
    for stopped in (child, psutil.Process(worker.pid)):
        stopped.suspend()
        until(lambda stopped=stopped: stopped.status() == psutil.STATUS_STOPPED, "it is stopped")
        until(lambda: ear.is_quiet(QUIET_S), "silence, although the other of the two works on", 20.0)
        stopped.resume()
        ear.wait("WATCHDOG", limit_s=10.0)

    child.kill()
    until(lambda: ear.wait("WATCHDOG", limit_s=10.0) and "killed by SIGKILL" in ear.status, "its restart")
    with run.client() as client:
        assert client.call("scale", x=ONE).tolist() == [2.0] * 3
    assert not [notice for notice in ear.seen if notice.pid != worker.pid], "only the main process speaks"


def test_a_stopping_worker_finishes_what_it_holds_and_another_start_is_ready(
    run: Running, ear: NotifySocket, worker: "subprocess.Popen[bytes]"
) -> None:
    with run.client() as client:
        task = client.submit("sleep", seconds=1.5)
        until(lambda: client.status()["tasks"]["leased"] == 1, "it runs")
        os.kill(worker.pid, signal.SIGTERM)  # to the main process alone: KillMode=mixed
        stopping = ear.wait("STOPPING")
        assert int(stopping.fields["EXTEND_TIMEOUT_USEC"]) > 120e6
        task.result(timeout=30.0)
        assert worker.wait(STOP_S) == 0
        start_worker(run, ear)
        ear.wait("READY")
        assert client.options(timeout=10.0).call("scale", x=ONE).tolist() == [2.0] * 3

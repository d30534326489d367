"""`penstock up`: ready soon, restarts what crashes, and leaves nothing running however it ends."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import CLI, STOP_S, Running, is_gone, until, worker_of


class Up(Running):
    """One `penstock up` with two workers on the CPU."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        super().__init__(folder)
        self.process = self.start("up", [*CLI, "up", "--device", "cpu", *arguments])
        self.pids: set[int] = set()

    def wait_up(self, *names: str) -> dict[str, Any]:
        body = self.wait_ready(*names)
        self.pids |= {p.pid for p in psutil.Process(self.process.pid).children(recursive=True)}
        return body

    def assert_nothing_is_left(self, limit_s: float) -> None:
        until(lambda: all(map(is_gone, self.pids)), f"all of {self.pids} ended:\n{self.log('up')}", limit_s)
        assert not (self.folder / "penstock" / "connection.json").exists()

    def stop(self) -> None:
        super().stop()
        for pid in self.pids:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def up(folder: Path) -> Iterator[Callable[..., Up]]:
    made: list[Up] = []

    def start(*arguments: str) -> Up:
        made.append(Up(folder, *arguments))
        return made[-1]

    yield start
    for one in made:
        one.stop()


def test_first_call_and_ctrl_c(up: Callable[..., Up]) -> None:
    began = time.monotonic()
    one = up()
    done = one.cli("call", "softmax", "x=[0.0, 0.0]")  # does not wait for anything: it finds its broker or fails
    took_s = time.monotonic() - began
    assert (done.returncode, done.stdout) == (0, "float32 [2] [0.5 0.5]\n"), done.stderr
    assert took_s < 15  # 5 s where the machine is free; here others may be at work
    one.wait_up("worker-1")
    until(lambda: "ready after" in one.log("up"), "the user is told")
    assert one.cli("status").returncode == 0
    assert one.cli("doctor").returncode == 0
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(STOP_S) == 0
    one.assert_nothing_is_left(1)
    assert one.log("up").count("penstock call softmax") == 1
    assert "Traceback" not in one.log("up")


def test_workers_that_crash_start_again_and_drained_ones_do_not(up: Callable[..., Up]) -> None:
    one = up("--workers", "2")
    body = one.wait_up("worker-1", "worker-2")
    first = worker_of(body, "worker-1")["pid"]
    os.kill(first, signal.SIGKILL)
    until(lambda: first not in [w["pid"] for w in one.wait_up("worker-2")["workers"]], "the broker knows")
    assert worker_of(one.wait_up("worker-1", "worker-2"), "worker-1")["pid"] != first
    assert "worker worker-1 has ended (killed by SIGKILL in waiting for work); it starts again in" in one.log("up")
    assert one.cli("drain", "worker-2").returncode == 0
    until(lambda: "worker-2 was drained and has ended" in one.log("up"), "worker-2 has ended")
    # The broker is restarted too, and the worker finds it.
    broker = int(one.wait_up("worker-1")["pid"])
    os.kill(broker, signal.SIGKILL)
    until(lambda: is_gone(broker), "it is killed")
    assert one.wait_up("worker-1")["pid"] != broker
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(STOP_S) == 0
    one.assert_nothing_is_left(1)


def test_sigkill_leaves_nothing_running(up: Callable[..., Up]) -> None:
    one = up()
    one.wait_up("worker-1")
    one.process.kill()
    one.process.wait(STOP_S)
    one.assert_nothing_is_left(STOP_S)


def test_a_second_ctrl_c_ends_at_once(up: Callable[..., Up]) -> None:
    one = up()
    one.wait_up("worker-1")
    caller = subprocess.Popen([*CLI, "call", "sleep", "seconds=30"], env=one.env, stderr=subprocess.DEVNULL)
    with one.client() as ps:
        until(lambda: ps.status()["tasks"]["leased"] == 1, "the task runs")
    one.process.send_signal(signal.SIGINT)
    until(lambda: "open tasks may finish" in one.log("up"), "it drains")
    assert one.process.poll() is None
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(STOP_S) == 0
    until(lambda: all(map(is_gone, one.pids)), "all ended", 1)
    caller.kill()
    caller.wait(STOP_S)


def test_what_cannot_start_ends(up: Callable[..., Up]) -> None:
    one = up("--kernels", "nowhere.py")
    assert one.process.wait(30) == 1
    log = one.log("up")
    assert "nowhere.py" in log
    assert "Traceback" not in log
    one.assert_nothing_is_left(1)

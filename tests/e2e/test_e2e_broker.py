"""Brokers that start twice, die and come back, or have no worker; clients that vanish."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import Running, running, until, worker_of

from penstock.client import Client, Unavailable, UnknownKernel

ONE = np.ones(3, np.float32)
ENDLESS = "import sys; from penstock.client import Client; Client(sys.argv[1], name='doomed').call('sleep', seconds=30.0)"


@pytest.fixture(scope="module")
def stack(module_folder: Path) -> Iterator[Running]:
    with running(module_folder, "w", extra={"PENSTOCK_BROKER_SESSION_TTL_S": "2"}) as run:
        yield run


def test_a_second_broker_on_the_address_is_refused(stack: Running, ps: Client) -> None:
    for command in ("broker", "up"):
        began = time.monotonic()
        done = stack.cli(command, "--url", stack.url)
        assert done.returncode == 3
        assert time.monotonic() - began < 15
        told = [line for line in (done.stdout + done.stderr).splitlines() if "already running" in line]
        assert len(told) == 1
        assert stack.url in told[0]
    assert ps.call("scale", x=ONE).tolist() == [2.0] * 3
    assert ps.status()["pid"] == stack.processes["broker"].pid


def test_a_client_killed_mid_call(stack: Running, ps: Client) -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", ENDLESS, stack.url], env=stack.env)
    until(lambda: ps.status()["tasks"]["leased"] == 1, "its task runs")
    waiting = ps.submit("sleep", seconds=0.0, steps=7)
    process.kill()
    process.wait(10)
    # Its task ends with its session; the worker cannot leave the sleep, so only the broker's books are free at once.
    until(lambda: ps.status()["tasks"]["open"] <= 1, "the task of the dead client is gone", 10)
    assert waiting.cancel() is True
    assert ps.status()["tasks"]["open"] == 0
    stack.kill("w")
    stack.start_worker("w", "--kernels", str(Path(__file__).with_name("e2e_kernels.py")))
    stack.wait_ready("w")
    assert ps.call("scale", x=ONE).tolist() == [2.0] * 3


def test_a_broker_that_dies_and_comes_back(stack: Running, ps: Client) -> None:
    worker = worker_of(ps.status(), "w")["pid"]
    tasks = [ps.submit("sleep", seconds=0.02, steps=i + 1) for i in range(60)]
    until(lambda: sum(task.done() for task in tasks) > 5, "some have ended")
    stack.kill("broker")
    assert not all(task.done() for task in tasks)
    stack.start_broker()
    assert [task.result(40)["seconds"] for task in tasks] == [0.02] * 60
    body = stack.wait_ready("w")
    assert [w["pid"] for w in body["workers"]] == [worker]
    assert ps.call("scale", x=ONE).tolist() == [2.0] * 3


def test_a_broker_that_stops_lets_open_tasks_finish(stack: Running) -> None:
    with stack.client() as ps:
        tasks = [ps.submit("sleep", seconds=0.1, steps=i + 1) for i in range(5)]
        for task in tasks:
            task.accepted(10)
        broker = stack.processes["broker"]
        broker.send_signal(signal.SIGTERM)
        assert [task.result(30)["seconds"] for task in tasks] == [0.1] * 5
        assert broker.wait(20) == 0
    done = stack.cli("status")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith(f"penstock: no broker at {stack.url}")


def test_no_worker_at_all(folder: Path) -> None:
    with running(folder, broker=["--worker-grace-s", "0.5"]) as run, run.client() as ps:
        with pytest.raises(UnknownKernel, match="no worker"):
            ps.call("softmax", x=ONE)
        done = run.cli("status")
        assert done.returncode == 4
        assert "NOT READY" in done.stdout
        done = run.cli("call", "softmax", "x=[1]")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "UnknownKernel" in done.stderr
        doctor = run.cli("doctor")
        assert doctor.returncode == 1
        assert "WRONG  worker" in doctor.stdout


def test_no_broker_at_all(folder: Path) -> None:
    with Client(f"ipc://{folder}/penstock", connect_timeout=0.2) as ps:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="penstock up"):
            ps.call("softmax", x=ONE)
        assert time.monotonic() - began < 2

"""Several addresses: of a broker that is not at the first one, and of brokers that stand in for each other."""

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ports import free_port
from running import KERNELS, LIMIT_S, Running, until

from penstock.client import AsyncClient, Client, Executor, Unavailable
from penstock.client.config import ClientConfig

NOBODY = "ipc:///tmp/penstock-nobody-is-here"
NUM_TASKS = 300
PROMPT = {"PENSTOCK_BROKER_HEARTBEAT_MS": "300"}
"""Silence is three heartbeats: these tests wait for it several times."""


class Two(Running):
    """Two brokers that know nothing of each other, and workers and clients that know both."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {"E2E_DELAY_S": "0.01"})
        self.urls = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
        self.url = ",".join(self.urls)

    def start_at(self, at: int) -> None:
        command = [sys.executable, "-P", "-m", "penstock.broker", "--url", self.urls[at]]
        own = {"XDG_RUNTIME_DIR": str(self.folder / f"b{at}"), "XDG_STATE_HOME": str(self.folder / f"s{at}")}
        self.start(f"broker{at}", command, PROMPT | own)
        until(lambda: "listens at" in self.log(f"broker{at}"), "it listens, so that nobody moves on to the other")

    def pid_at(self, at: int) -> int:
        return self.processes[f"broker{at}"].pid


@pytest.fixture
def two(folder: Path) -> Iterator[Two]:
    run = Two(folder)
    try:
        yield run
    finally:
        run.stop()


def hashed(number: int) -> tuple[bytes, np.ndarray]:
    data = b"task %d" % number
    return data, np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def test_nobody_is_at_the_first_address(two: Two) -> None:
    """Client, AsyncClient, Executor, the command and the worker."""
    two.start_at(1)
    two.start_worker("w", "--kernels", str(KERNELS))
    two.wait_ready("w")
    x = np.ones(3, np.float32)
    with two.client() as ps, Client(config=ClientConfig(url=tuple(two.urls))) as configured:
        np.testing.assert_array_equal(ps.call("scale", x=x), 2 * x)
        assert ps.where == configured.where == ", ".join(two.urls)
        assert configured.status()["pid"] == two.pid_at(1)

    async def ask() -> int:
        async with AsyncClient([NOBODY, *two.urls]) as client:
            return int((await client.status())["pid"])

    assert asyncio.run(ask()) == two.pid_at(1)
    with Executor(address=two.urls) as pool:
        np.testing.assert_array_equal(pool.submit("scale", x=x).result(LIMIT_S), 2 * x)
    shown = two.cli("status", "--url", f"{NOBODY},{two.urls[1]}")
    assert shown.returncode == 0, shown.stderr
    assert two.urls[1] in shown.stdout


def test_an_error_names_all_addresses(two: Two) -> None:
    with Client(two.url, connect_timeout=1.0) as ps, pytest.raises(Unavailable, match=f"{two.urls[0]}, {two.urls[1]}"):
        ps.status()


def test_the_broker_moves_under_load(two: Two) -> None:
    """Killed with tasks open, durable and not: the one at the other address does them all, under their ids and keys."""
    two.start_at(0)
    two.start_at(1)
    two.start_worker("w", "--kernels", str(KERNELS))
    two.wait_ready("w")
    with two.client() as ps:
        assert ps.status()["pid"] == two.pid_at(0), "the first address is the preferred one"
        tasks = []
        for number in range(NUM_TASKS):
            options = ps.options(durable=True, idempotency_key=f"task-{number}") if number % 3 == 0 else ps
            tasks.append(options.submit("slow_hash", data=hashed(number)[0]))
        until(lambda: sum(task.done() for task in tasks) > NUM_TASKS // 10, "some are done")
        assert not all(task.done() for task in tasks)
        two.kill("broker0")
        for number, task in enumerate(tasks):
            np.testing.assert_array_equal(task.result(LIMIT_S), hashed(number)[1])
        status = ps.status()
        assert status["pid"] == two.pid_at(1)
        assert status["tasks"]["open"] == 0
        assert status["tasks"]["done"] > 0


def test_there_and_back(two: Two) -> None:
    """The first broker hangs, and goes on when its peers have left; they come back to it when the second one is gone."""
    two.start_at(0)
    two.start_at(1)
    two.start_worker("w", "--kernels", str(KERNELS))
    two.wait_ready("w")
    with two.client() as ps:
        for number in range(20):
            np.testing.assert_array_equal(ps.call("slow_hash", data=hashed(number)[0]), hashed(number)[1])
        os.kill(two.pid_at(0), signal.SIGSTOP)
        tasks = [ps.submit("slow_hash", data=hashed(number)[0]) for number in range(50)]
        for number, task in enumerate(tasks):
            np.testing.assert_array_equal(task.result(LIMIT_S), hashed(number)[1])
        assert ps.status()["pid"] == two.pid_at(1)
        os.kill(two.pid_at(0), signal.SIGCONT)
        tasks = [ps.submit("slow_hash", data=hashed(number)[0]) for number in range(NUM_TASKS)]
        two.kill("broker1")
        for number, task in enumerate(tasks):
            np.testing.assert_array_equal(task.result(LIMIT_S), hashed(number)[1])
        status = ps.status()
        assert status["pid"] == two.pid_at(0)
        until(lambda: ps.status()["tasks"]["open"] == 0, "what it had when it hung is done, too")

"""Two workers: tasks spread over both; one is killed, drained, slow or silent, the other carries on and nothing is lost."""

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from running import Running, running, until, worker_of

from penstock.client import Client, Task

NUM_TASKS = 600


@pytest.fixture(scope="module")
def stack(module_folder: Path) -> Iterator[Running]:
    # A worker that is silent for 2 s counts as lost; 5 s are the default.
    quick = {"PENSTOCK_BROKER_LIVENESS_S": "2", "PENSTOCK_BROKER_HEARTBEAT_MS": "500"}
    with running(module_folder, "a", "b", extra=quick) as run:
        yield run


@pytest.fixture
def ps(stack: Running) -> Iterator[Client]:
    """A client of a broker with both workers ready."""
    stack.wait_ready("a", "b")
    with stack.client() as client:
        yield client


def restart(stack: Running, name: str, **extra: str) -> None:
    from running import KERNELS

    stack.start_worker(name, "--kernels", str(KERNELS), extra=extra)
    stack.wait_ready("a", "b")


def submit_hashes(ps: Client) -> tuple[list[bytes], list[Task]]:
    data = [f"task {i} ".encode() * (i % 50 + 1) for i in range(NUM_TASKS)]
    return data, [ps.submit("slow_hash", data=item) for item in data]


def check_all(data: Sequence[bytes], tasks: Sequence[Task]) -> Counter[str]:
    """Every task has its own right answer; how many each worker did comes back."""
    assert [bytes(task.result(60)) for task in tasks] == [hashlib.sha256(item).digest() for item in data]
    return Counter(task.timings["worker"] for task in tasks)


def wait_busy(ps: Client, *names: str) -> None:
    """Until these workers hold a lease and have finished something since."""
    before = {w["name"]: w["done"] for w in ps.status()["workers"]}

    def is_busy() -> bool:
        rows = {w["name"]: w for w in ps.status()["workers"]}
        return all(rows[n]["leases"] > 0 and rows[n]["done"] > before[n] for n in names)

    until(is_busy, f"{names} at work", 20)


def test_tasks_spread(ps: Client) -> None:
    done_by = check_all(*submit_hashes(ps))
    assert set(done_by) == {"a", "b"}
    assert min(done_by.values()) > NUM_TASKS * 0.25


def test_one_is_killed_mid_batch(stack: Running, ps: Client) -> None:
    before = ps.status()
    data, tasks = submit_hashes(ps)
    wait_busy(ps, "a", "b")
    stack.kill("a")
    done_by = check_all(data, tasks)
    assert done_by["b"] > NUM_TASKS / 4, "what was left when it drained"
    after = ps.status()
    assert [worker["name"] for worker in after["workers"]] == ["b"]
    assert after["tasks"]["done"] - before["tasks"]["done"] == NUM_TASKS
    assert after["tasks"]["open"] == 0
    assert after["counters"]["redelivered"] > before["counters"].get("redelivered", 0)
    restart(stack, "a")


def test_one_is_drained(stack: Running, ps: Client) -> None:
    data, tasks = submit_hashes(ps)
    wait_busy(ps, "a", "b")
    lost = ps.status()["counters"].get("workers_lost", 0)
    done = stack.cli("drain", "a")
    assert (done.returncode, done.stderr) == (0, "")
    assert stack.processes.pop("a").wait(20) == 0
    done_by = check_all(data, tasks)
    assert done_by["a"] > 0
    assert done_by["b"] > NUM_TASKS / 4, "what was left when it drained"
    assert ps.status()["counters"].get("workers_lost", 0) == lost
    restart(stack, "a")


def test_sigterm_drains(stack: Running, ps: Client) -> None:
    data, tasks = submit_hashes(ps)
    wait_busy(ps, "a", "b")
    stack.processes["a"].send_signal(signal.SIGTERM)
    assert stack.processes.pop("a").wait(20) == 0
    check_all(data, tasks)
    restart(stack, "a")


def test_one_is_slow(stack: Running, ps: Client) -> None:
    stack.kill("a")
    restart(stack, "a", E2E_DELAY_S="0.3")
    done_by = check_all(*submit_hashes(ps))
    assert 0 < done_by["a"] < done_by["b"] / 2
    stack.kill("a")
    restart(stack, "a")


def test_one_falls_silent_and_comes_back(stack: Running, ps: Client) -> None:
    before = ps.status()
    data, tasks = submit_hashes(ps)
    wait_busy(ps, "a", "b")
    stopped = int(worker_of(before, "a")["pid"])
    os.kill(stopped, signal.SIGSTOP)
    check_all(data, tasks)
    after = ps.status()
    assert [worker["name"] for worker in after["workers"]] == ["b"]
    assert after["tasks"]["done"] - before["tasks"]["done"] == NUM_TASKS
    os.kill(stopped, signal.SIGCONT)
    again = worker_of(stack.wait_ready("a", "b"), "a")
    assert again["pid"] == stopped
    check_all(*submit_hashes(ps))

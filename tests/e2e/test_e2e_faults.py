"""Kernels that hang or break the device, from a client's view: the guilty task is dead, others are done, the worker goes on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import Running, running

from penstock.client import Client, Dead, KernelFailed

FAULTS = Path(__file__).parents[1] / "worker" / "fault_kernels.py"
ILLEGAL, HANG_WITH_LOCK = 3, 5


@pytest.fixture(scope="module")
def stack(module_folder: Path) -> Iterator[Running]:
    worker = ("--kernels", str(FAULTS), "--hang-limit-s", "1", "--scan-outputs", "softmax=fail")
    with running(module_folder, "w", worker=worker) as run:
        yield run


@pytest.fixture
def ps(stack: Running) -> Iterator[Client]:
    stack.wait_ready("w")
    with stack.client() as client:
        assert client.call("fickle", x=np.zeros(2, np.float32)).tolist() == [1.0, 1.0]
        yield client


def run_with(ps: Client, guilty: int, num_rows: int) -> Dead:
    """One guilty task among others of its batch, which must be done; how it ended."""
    rows = [np.array([0.0, i / 100], np.float32) for i in range(num_rows)]
    rows[num_rows // 2][0] = guilty
    nap = ps.submit("sleep", seconds=0.5)  # meanwhile they are queued, and become one batch
    tasks = [ps.submit("fickle", x=row) for row in rows]
    assert nap.result(60) is not None
    for i, task in enumerate(tasks):
        if i != num_rows // 2:
            np.testing.assert_array_equal(task.result(60), rows[i] + 1)
    error = tasks[num_rows // 2].exception(60)
    assert isinstance(error, Dead)
    return error


def test_a_kernel_that_hangs_with_the_lock(stack: Running, ps: Client) -> None:
    error = run_with(ps, HANG_WITH_LOCK, 4)
    assert "alone" in error.message
    assert stack.log("w").count("its limit is 1.0 s: killed") >= 3
    told = [event["reason"] for event in ps.status()["events"] if event["kind"] == "fault"]
    assert any("a run of kernel 'fickle' has taken" in reason for reason in told)


def test_a_kernel_that_breaks_the_device(stack: Running, ps: Client) -> None:
    error = run_with(ps, ILLEGAL, 2)
    assert "illegal memory access" in error.detail
    assert ps.call("fickle", x=np.zeros(2, np.float32)).tolist() == [1.0, 1.0]


def test_rows_that_are_not_finite_fail_where_that_is_asked_for(ps: Client) -> None:
    good = ps.submit("softmax", x=np.zeros(2, np.float32))
    bad = ps.submit("softmax", x=np.array([0.0, np.nan], np.float32))
    assert good.result(60).tolist() == [0.5, 0.5]
    error = bad.exception(60)
    assert isinstance(error, KernelFailed)
    assert "output 'out' has values that are not finite" in error.message
    assert ps.status()["counters"]["not_finite"] >= 1

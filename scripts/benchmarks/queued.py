"""What queued tasks cost the broker: memory each, time per operation at 1k to 1M queued, and the loop's longest turn."""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import zmq
from rich.progress import Progress
from stack import Stack

from penstock.broker.columns import Block
from penstock.broker.config import BrokerConfig
from penstock.broker.core import Core
from penstock.broker.events import Received, Turn
from penstock.broker.layout import Column
from penstock.broker.protocol import TO_CLIENT, Cancel, Hello, Ready, Reply, Status, Submit, WorkerHello
from penstock.broker.state import BACK, FRONT
from penstock.broker.wire import Message, decode, encode

COLUMNS = (Column("x", "float32", (4,)),)
PAYLOAD_BYTES = 16
SPEC = {
    "name": "idle", "version": "1", "digest": b"idle-one",
    "inputs": [["x", "tensor", {"dtypes": None, "rank": 1, "ragged": "exact"}]],
    "modes": ["batch"], "combine": "max", "idempotent": True, "scoped": False, "resident": False, "max_batch_size": 32,
    "max_batch_cost_ms": None, "cost": {"base_ms": 1.0, "per": {}},
}  # fmt: skip
SAMPLE = 2000


def submission(timeout_ms: float | None, payload: bytes) -> Submit:
    return Submit(id=os.urandom(16), kernel="idle", block=Block(1, COLUMNS, [None], [payload]), timeout_ms=timeout_ms)


class Loaded:
    """A core with queued single-task submissions and a worker that has no credit. Drives it like the server does."""

    def __init__(self) -> None:
        huge = 1 << 40
        self.core = Core(BrokerConfig(max_queue_rows=huge, max_queue_bytes=huge, window_rows=huge, window_bytes=huge), 1, 0.0)
        self.now = 0.0
        self.ids = list[bytes]()
        self.handle(BACK, b"w", WorkerHello(name="w", secret=bytes(16), pid=1, device="cpu"))
        self.handle(BACK, b"w", Ready(specs=[SPEC], credit=(0, 0)))
        self.handle(FRONT, b"c", Hello(name="c", secret=bytes(16)))

    def handle(self, side: str, route: bytes, message: Message) -> None:
        self.core.handle(Received(side, route, "uid:0", message), self.now)

    def fill(self, count: int) -> None:
        for _ in range(count - len(self.ids)):
            self.submit_one(1e9)

    def submit_one(self, timeout_ms: float) -> None:
        m = submission(timeout_ms + len(self.ids) % 997, os.urandom(PAYLOAD_BYTES))
        self.ids.append(m.id)
        self.handle(FRONT, b"c", m)

    def cancel_one(self) -> None:
        index = len(self.ids) * 7919 // 13007 % len(self.ids)
        self.ids[index], self.ids[-1] = self.ids[-1], self.ids[index]
        self.handle(FRONT, b"c", Cancel(id=self.ids.pop()))

    def cost_us(self, act: Callable[[], None], count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            act()
        return 1e6 * (time.perf_counter() - started) / count

    def expiry_us(self, count: int) -> float:
        """Per task, of `count` that reach their deadline in one instant among all the others."""
        before = self.core.state.ledger.num_open
        for _ in range(count):
            self.handle(FRONT, b"c", submission(1000.0, bytes(PAYLOAD_BYTES)))
        self.now += 2.0
        started = time.perf_counter()
        while self.core.state.ledger.num_open > before:
            self.core.handle(Turn(), self.now)
        return 1e6 * (time.perf_counter() - started) / count


def operations(sizes: tuple[int, ...], progress: Progress) -> list[dict[str, float]]:
    """Cost per operation with n tasks queued, garbage collection as in the broker."""
    gc.collect()
    gc.disable()
    loaded, rows = Loaded(), list[dict[str, float]]()
    bar = progress.add_task("in one process", total=len(sizes))
    for size in sizes:
        loaded.fill(size)
        rows.append({
            "queued": size,
            "submit us": loaded.cost_us(lambda: loaded.submit_one(1e9), SAMPLE),
            "cancel us": loaded.cost_us(loaded.cancel_one, SAMPLE),
            "expire us": loaded.expiry_us(SAMPLE),
        })  # fmt: skip
        progress.advance(bar)
    gc.enable()
    return rows


class Peer:
    """A client that speaks the protocol and waits for nothing, to fill a real broker fast."""

    def __init__(self, url: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.set_hwm(0)
        self.socket.connect(f"{url}/clients.sock")
        self.send(Hello(name="fill", secret=os.urandom(16)))
        self.socket.recv_multipart()

    def send(self, message: Message) -> None:
        self.socket.send_multipart(encode(message))

    def status(self) -> dict[str, Any]:
        self.send(Status(request=1))
        while True:
            message = decode(TO_CLIENT, self.socket.recv_multipart())
            if isinstance(message, Reply):
                return dict(message.body)


def real_broker(count: int, rows_per_run: int, progress: Progress) -> dict[str, float]:
    """Fill a broker process with `count` tasks that nobody takes."""
    args = ["--max-queue-rows", str(2 * count), "--window-rows", str(2 * count)]
    bar = progress.add_task(f"a broker process, {rows_per_run} per run", total=count)
    with tempfile.TemporaryDirectory(prefix="ps-bench-") as folder, Stack(Path(folder), broker_args=args) as stack:
        assert stack.broker is not None
        process, peer = psutil.Process(stack.broker.pid), Peer(stack.url)
        for w in stack.workers:  # nobody takes anything away
            w.terminate()
            w.wait()
        before = process.memory_info().rss
        started = time.perf_counter()
        for i in range(count // rows_per_run):
            block = Block(rows_per_run, COLUMNS, [None], [os.urandom(PAYLOAD_BYTES * rows_per_run)])
            peer.send(Submit(id=os.urandom(16), kernel="affine", block=block, timeout_ms=3e6 + i % 997))
            progress.advance(bar, rows_per_run)
        while peer.status()["tasks"]["queued"] < count // rows_per_run * rows_per_run:
            pass
        took = time.perf_counter() - started
        used = process.memory_info().rss - before
        filled_us = peer.status()["counters"]["longest_turn_us"]
        peer.socket.close(0)
        other = Peer(stack.url)
        for _ in range(200):
            other.status()
        longest_us = other.status()["counters"]["longest_turn_us"]
        other.socket.close(0)
    return {
        "tasks": count, "rows per run": rows_per_run, "bytes per task beyond payload": used / count - PAYLOAD_BYTES,
        "submitted per s": count / took, "longest turn ms, filling": filled_us / 1e3, "longest turn ms": longest_us / 1e3,
    }  # fmt: skip


def measure(max_tasks: int = 1_000_000) -> dict[str, Any]:
    sizes = tuple(n for n in (1_000, 10_000, 100_000, 1_000_000) if n <= max_tasks)
    with Progress(transient=True) as progress:
        return {
            "operations": operations(sizes, progress),
            "broker": [real_broker(max_tasks, 1, progress), real_broker(max_tasks, 32, progress)],
        }


def lines(result: dict[str, Any]) -> list[str]:
    made = list[str]()
    for table in (result["operations"], result["broker"]):
        made.append("  ".join(f"{name:>12s}" for name in table[0]))
        made += ["  ".join(f"{value:>{max(12, len(name))},.1f}" for name, value in row.items()) for row in table]
        made.append("")
    return made

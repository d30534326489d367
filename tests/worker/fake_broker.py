"""A broker of a few lines for the worker's tests: a ROUTER on a real ipc socket that the test drives by hand."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import zmq

from penstock.broker import protocol
from penstock.broker.address import Address
from penstock.broker.columns import Block, pack
from penstock.broker.layout import Column
from penstock.broker.wire import Message, decode, encode

HERE = Path(__file__).resolve().parent
LIMIT_S = 20.0
M = TypeVar("M", bound=Message)


class FakeBroker:
    """Answers hellos and heartbeats by itself; everything else waits in `inbox` for the test.

    Attributes:
        beats: (time, heartbeat) as they came.
        sessions: secret -> leases that this broker believes the session to hold.
        limits: what its welcomes say of checkpoints; nothing, as those of a broker of protocol 1.2.
    """

    def __init__(self, folder: Path, epoch: int = 1, heartbeat_ms: float = 100.0) -> None:
        self.url = f"ipc://{folder}"
        self.epoch = epoch
        self.heartbeat_ms = heartbeat_ms
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(Address(self.url).back)
        self.inbox: list[Message] = []
        self.beats: list[tuple[float, protocol.WorkerHeartbeat]] = []
        self.hellos: list[protocol.WorkerHello] = []
        self.sessions: set[bytes] = set()
        self.worker = b""
        self.is_deaf = False
        self.limits: dict[str, Any] = {}

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    def send(self, message: Message) -> None:
        self.send_raw(encode(message))

    def send_raw(self, frames: Sequence[Any]) -> None:
        self.socket.send_multipart([self.worker, *frames])

    def turn(self, timeout_ms: int = 20) -> None:
        """Receive what has come, waiting a moment for it."""
        if not self.socket.poll(timeout_ms):
            return
        while int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            route, *frames = self.socket.recv_multipart()
            if not self.is_deaf:
                self._on_message(route, decode(protocol.FROM_WORKER, frames))

    def _on_message(self, route: bytes, message: Message) -> None:
        if isinstance(message, protocol.WorkerHeartbeat):
            self.beats.append((time.monotonic(), message))
            answer: Message = protocol.Heartbeat() if message.session in self.sessions else unattached()
            self.socket.send_multipart([route, *encode(answer)])
        elif isinstance(message, protocol.WorkerHello):
            self.worker = route
            self.hellos.append(message)
            is_resumed = message.secret in self.sessions
            self.sessions.add(message.secret)
            how = {"epoch": self.epoch, "heartbeat_ms": self.heartbeat_ms, "is_resumed": is_resumed, "limits": self.limits}
            self.send(protocol.Welcome(**how))
        else:
            self.inbox.append(message)

    def wait_until(self, is_true: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        limit = time.monotonic() + limit_s
        while not is_true():
            assert time.monotonic() < limit, f"waited {limit_s} s for {what}; came: {self.inbox}"
            self.turn()

    def expect(self, kind: type[M], limit_s: float = LIMIT_S) -> M:
        """The next message of this kind, taken out of the inbox."""
        self.wait_until(lambda: any(isinstance(m, kind) for m in self.inbox), kind.__name__, limit_s)
        found = next(m for m in self.inbox if isinstance(m, kind))
        self.inbox.remove(found)
        assert isinstance(found, kind)
        return found

    def answers(self, lease: int, num_rows: int) -> tuple[list[protocol.Answer], protocol.WorkerFinal]:
        """All answers to a lease, sorted, and the last message that brought some; each row exactly once."""
        answers: list[protocol.Answer] = []
        while sum(a.stop - a.start for a in answers) < num_rows:
            final = self.expect(protocol.WorkerFinal)
            assert final.lease == lease
            answers += final.answers
        answers.sort(key=lambda a: a.start)
        assert [a.start for a in answers] == [0, *(a.stop for a in answers[:-1])]
        assert answers[-1].stop == num_rows
        return answers, final


def unattached() -> protocol.Fault:
    return protocol.Fault(error=protocol.Error("unattached", "say hello"))


def start_worker(broker_url: str, state_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """A worker process on the CPU with the tests' kernels: the worker itself, without a supervisor."""
    return start_command(broker_url, state_dir, "--unsupervised", *arguments)


def start_command(broker_url: str, state_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """`penstock worker` on the CPU with the tests' kernels, as a user starts it."""
    command = [
        sys.executable, "-P", "-m", "penstock.worker", "--broker", broker_url, "--device", "cpu", "--name", "cpu-0",
        "--kernels", "worker_kernels", "--state-dir", str(state_dir), "--threads", "1", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    with open(state_dir / "worker.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment, cwd=state_dir)


def received(frames: Sequence[Any]) -> list[Any]:
    """Frames as they arrive at the other end."""
    return [bytes(frame) for frame in frames]


def tensor_block(array: Any, name: str = "x") -> Block:
    """Rows of a numpy array [rows, ...] as one column."""
    column = Column(name, str(array.dtype), tuple(array.shape[1:]))
    return pack([(column, None, [array.tobytes()])], len(array))


def assign(lease: int, kernel: str, *blocks: Block, **fields: Any) -> protocol.Assign:
    statics = fields.pop("statics", None)
    packed = msgpack.packb(statics) if statics else b""
    return protocol.Assign(lease=lease, kernel=kernel, blocks=blocks, statics=packed, **fields)

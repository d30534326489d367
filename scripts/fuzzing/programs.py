"""Programs under test, in folders of their own: whether they live, how much they grow; and an honest peer's socket."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil
import samples
import zmq
from inprocess import Violation
from mutate import Frames

from penstock.broker.wire import Message, ProtocolError, decode, encode

SERVED_EVERY: Final = 200
SERVE_S: Final = 10.0
MAX_GROWTH: Final = 64 << 20
WARM_UP: Final = 1000


def free_port() -> int:
    """With a successor that is free, too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError):
                second.bind(("127.0.0.1", port + 1))
                return port


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ps-fuzz-", dir="/tmp"))


class Dealer:
    """A peer that speaks the protocol, or anything else."""

    def __init__(self, context: "zmq.Context[Any]", endpoint: str, answers: dict[str, type[Message]]) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, 2000)
        self._answers = answers
        self.socket.connect(endpoint)

    def send(self, message: Message) -> None:
        self.socket.send_multipart([bytes(f) for f in encode(message)])

    def receive(self, kind: type[Message], limit_s: float = SERVE_S) -> Any:
        end = time.monotonic() + limit_s
        while (left := end - time.monotonic()) > 0:
            if self.socket.poll(int(1000 * left)):
                message = decode(self._answers, self.socket.recv_multipart())
                if isinstance(message, kind):
                    return message
        raise Violation(f"an honest peer got no {kind.TYPE} within {limit_s:.0f} s")

    def drain(self) -> None:
        while self.socket.poll(0):
            self.socket.recv_multipart()


class Program:
    """A process under test, in a folder of its own; how much it grows and whether it lives."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder = folder
        env = {n: v for n, v in os.environ.items() if not n.startswith("PENSTOCK_")}
        env |= {"XDG_RUNTIME_DIR": str(self.folder), "XDG_STATE_HOME": str(self.folder / "state"), "PYTHONSAFEPATH": "1"}
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-P", "-m", *command], env=env, stdout=log, stderr=log, cwd=folder)
        self._seen = psutil.Process(self.process.pid)
        self._base: int | None = None
        self.most = 0

    def check(self, number: int) -> None:
        """Raises Violation: it has ended, or grown."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise Violation(f"it has ended with {self.process.returncode}:\n{tail}")
        size = self._seen.memory_info().rss
        if self._base is None and number >= WARM_UP:
            self._base = size
        self.most = max(self.most, size - (self._base or size))
        if self.most > MAX_GROWTH:
            raise Violation(f"it has grown by {self.most >> 20} MiB since input {WARM_UP}")

    def wait(self, is_true: Callable[[], bool], limit_s: float = 60.0) -> None:
        end = time.monotonic() + limit_s
        while not is_true():
            self.check(0)
            if time.monotonic() > end:
                raise Violation("it does not come up")
            time.sleep(0.05)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[str]:
        faults = sum("Traceback" in line for line in self.log.read_text(errors="replace").splitlines())
        return [f"grown by at most {self.most / 2**20:.1f} MiB after warming up, {faults} tracebacks in its log ({self.log})"]


def answer_to(table: str, frames: Frames) -> str:
    """What the codec makes of a message."""
    try:
        return decode(samples.TABLES[table], frames).TYPE
    except ProtocolError as e:
        return str(e)

"""Target: a worker whose broker says anything. It must go on, and run an honest batch afterwards."""

import random
import time
from typing import Any

import numpy as np
import samples
import zmq
from inprocess import Corpus, Violation
from mutate import Frames
from programs import SERVE_S, SERVED_EVERY, Program, answer_to, new_folder

from penstock.broker import protocol as p
from penstock.broker.columns import pack
from penstock.broker.layout import Column
from penstock.broker.wire import Message, ProtocolError, decode, encode


class WorkerTarget:
    """A broker that says anything to a real worker: it goes on, and runs an honest batch afterwards."""

    def __init__(self, seed: int) -> None:
        self._corpus = Corpus(samples.corpus("to worker"))
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._lease, self._worker, self._secret = 1 << 40, b"", b""
        folder = new_folder()
        self._socket.bind(f"ipc://{folder}/workers.sock")
        self._program = Program(
            folder,
            "penstock.worker",
            "--broker",
            f"ipc://{folder}",
            "--device",
            "cpu",
            "--name",
            "w",
            "--unsupervised",
            "--state-dir",
            str(folder / "state"),
            "--threads",
            "1",
            "--log-level",
            "error",
        )
        self._program.wait(lambda: self._turn(50) is not None and bool(self._worker))
        self.worst_s = 0.0
        self._serve()

    def _turn(self, wait_ms: int) -> Any:
        """One message: hellos and heartbeats are answered as they should be; what it was, if anything came."""
        if not self._socket.poll(wait_ms):
            return None
        route, *frames = self._socket.recv_multipart()
        message = decode(p.FROM_WORKER, frames)
        if isinstance(message, p.WorkerHello):
            self._worker, self._secret = route, message.secret
            self._send(route, p.Welcome(epoch=1, heartbeat_ms=1000.0, is_resumed=True))
        elif isinstance(message, p.WorkerHeartbeat):
            self._send(route, p.Heartbeat())
        return message

    def _send(self, route: bytes, message: Message) -> None:
        self._socket.send_multipart([route, *(bytes(f) for f in encode(message))])

    def make(self, draw: random.Random) -> tuple[str, Frames]:
        """What would end it rightly, a fault and a goodbye, is left out; assignments mostly name a kernel that it has."""
        while True:
            frames = self._corpus.draw(draw)
            try:
                message = decode(p.TO_WORKER, frames)
            except ProtocolError:
                return "to worker", frames
            if isinstance(message, p.Assign) and draw.random() < 0.8:
                message.kernel, message.digest = draw.choice(("softmax", "sha256", "filter", "matmul")), b""  # type: ignore[misc]
                message.lease = draw.randrange(1 << 30)  # type: ignore[misc]
                return "to worker", [bytes(f) for f in encode(message)]
            if not isinstance(message, p.Fault | p.Drain):
                return "to worker", frames

    def run(self, number: int, name: str, frames: Frames) -> None:
        self._socket.send_multipart([self._worker, *frames])
        self._corpus.learn(frames, answer_to("to worker", frames))
        while self._turn(0) is not None:
            continue
        if number % SERVED_EVERY == 0:
            self._program.check(number)
            self._serve()

    def _serve(self) -> None:
        """An honest batch."""
        self._lease += 1
        x = np.ones((2, 4), np.float32)
        block, began = pack([(Column("x", "float32", (4,)), None, [x.tobytes()])], 2), time.monotonic()
        self._send(self._worker, p.Welcome(epoch=1, heartbeat_ms=1000.0, is_resumed=True))
        sent_at = 0.0
        while time.monotonic() - began < 6 * SERVE_S:
            if time.monotonic() - sent_at > 1.0:  # what came before it was ready was ignored
                sent_at = time.monotonic()
                self._send(self._worker, p.Assign(lease=self._lease, kernel="softmax", blocks=[block]))
            message = self._turn(100)
            if isinstance(message, p.WorkerFinal) and message.lease == self._lease:
                if message.answers[0].error is not None:
                    raise Violation(f"an honest batch failed: {message.answers[0].error}")
                self.worst_s = max(self.worst_s, time.monotonic() - began)
                return
            self._program.check(0)
        raise Violation("it does not run an honest batch any more")

    def lines(self) -> list[str]:
        return [f"an honest batch took at most {1000 * self.worst_s:.0f} ms", *self._program.lines()]

    def close(self) -> None:
        self._context.destroy(0)
        self._program.close()

"""Targets: a broker's sockets and pages. It must stay alive and small, and go on serving an honest client."""

import contextlib
import os
import random
import socket
import time
from typing import Any, Final

import samples
import zmq
from inprocess import Corpus, Violation
from mutate import Frames
from programs import SERVE_S, SERVED_EVERY, Dealer, Program, answer_to, free_port, new_folder

from penstock.broker import protocol as p
from penstock.broker.columns import pack
from penstock.broker.keys import KeyFolder
from penstock.broker.layout import Column

MAX_OPEN: Final = 32
SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"


class _Served:
    """A broker on ipc and, with keys, on tcp; an honest client and an honest worker that must be served all the time."""

    def __init__(self, seed: int) -> None:
        self.port, self.pages = free_port(), free_port()
        folder = new_folder()
        KeyFolder(folder / "state").new("somebody", "client", folder / "somebody.key")
        self.program = Program(
            folder,
            "penstock.broker",
            "--url",
            f"ipc://{folder}/b",
            "--listen",
            f"tcp://127.0.0.1:{self.port}",
            "--metrics",
            f"127.0.0.1:{self.pages}",
            "--state-dir",
            str(folder / "state"),
            "--log-level",
            "error",
        )
        self.context: zmq.Context[Any] = zmq.Context()
        self.front, self.back = (f"ipc://{folder}/b/{side}.sock" for side in ("clients", "workers"))
        self.program.wait(lambda: (folder / "penstock" / "connection.json").exists())
        self.honest = Dealer(self.context, self.front, p.TO_CLIENT)
        self.worker = Dealer(self.context, self.back, p.TO_WORKER)
        self.honest.send(p.Hello(name="honest", secret=os.urandom(16)))
        self.honest.receive(p.Welcome)
        self.secret = os.urandom(16)
        self.worker.send(p.WorkerHello(name="honest", secret=self.secret, pid=os.getpid(), device="cpu"))
        self.worker.receive(p.Welcome)
        self.num_batches = 0
        self.worker.send(p.Ready(specs=[samples.spec("honest")], credit=[1, 1 << 40]))
        self.worst_s = 0.0

    def serve(self, number: int) -> None:
        """Every so often an honest task, and a look at the process."""
        if number % SERVED_EVERY:
            return
        self.program.check(number)
        self.worker.send(p.WorkerHeartbeat(session=self.secret, progress=number))
        began, run = time.monotonic(), os.urandom(16)
        block = pack([(Column("x", "uint8", (4,)), None, [run[:4]])], 1)
        self.honest.send(p.Submit(id=run, kernel="honest", block=block, timeout_ms=1000 * SERVE_S))
        assign = self.worker.receive(p.Assign)
        self.num_batches += 1
        self.worker.send(
            p.WorkerFinal(lease=assign.lease, answers=[p.Answer(0, 1, block)], credit=[1 + self.num_batches, 1 << 40])
        )
        results = self.honest.receive(p.Results)
        self.honest.send(p.Ack(seq=results.seq))
        if bytes(results.outcomes[0].block.row(0, 0)) != run[:4]:
            raise Violation("an honest client got another's row")
        self.worst_s = max(self.worst_s, time.monotonic() - began)

    def lines(self) -> list[str]:
        return [f"an honest task took at most {1000 * self.worst_s:.0f} ms", *self.program.lines()]

    def close(self) -> None:
        self.context.destroy(0)
        self.program.close()


class BrokerTarget(_Served):
    """Peers of the same user with a session each, client and worker, that send mutated messages."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._corpora = {name: Corpus(samples.corpus(name)) for name in ("from client", "from worker")}
        self._peers: dict[str, Dealer] = {}
        self._left = 0

    def make(self, draw: random.Random) -> tuple[str, Frames]:
        name = draw.choice(list(self._corpora))
        return name, self._corpora[name].draw(draw)

    def run(self, number: int, name: str, frames: Frames) -> None:
        if not self._left:
            self._begin()
            self._left = 50
        self._left -= 1
        peer = self._peers[name]
        with contextlib.suppress(zmq.Again):
            peer.socket.send_multipart(frames)
        self._corpora[name].learn(frames, answer_to(name, frames))
        if number % 10 == 0:
            for other in self._peers.values():
                other.drain()
        self.serve(number)

    def _begin(self) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(zmq.Again):
                peer.send(p.Goodbye())
            peer.socket.close(100)
        client, worker = Dealer(self.context, self.front, p.TO_CLIENT), Dealer(self.context, self.back, p.TO_WORKER)
        client.send(p.Hello(name="hostile", secret=os.urandom(16)))
        worker.send(p.WorkerHello(name="hostile", secret=os.urandom(16), pid=0, device="cpu"))
        worker.send(p.Ready(specs=[samples.spec("fuzzed"), samples.spec("echo")], credit=[100, 1 << 40]))
        self._peers = {"from client": client, "from worker": worker}


class ZmtpTarget(_Served):
    """Bytes on the broker's tcp and ipc sockets that ZeroMQ never sends: greetings, handshakes and frames gone wrong."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._open: list[socket.socket] = []

    def make(self, draw: random.Random) -> tuple[str, Frames]:
        """A connection's bytes, in a few writes."""
        where = draw.choice(("tcp front", "tcp back", "ipc front", "ipc back"))
        mechanism = draw.choice((b"NULL", b"CURVE", b"PLAIN", b"GSSAPI", draw.randbytes(20)))
        parts = [
            SIGNATURE
            + bytes((draw.choice((3, 3, 3, 0, 1, 2, 255)), draw.choice((0, 1))))
            + mechanism.ljust(20, b"\0")[:20]
            + bytes(32)
        ]
        properties = b"".join(_property(draw) for _ in range(draw.randrange(4)))
        parts.append(
            draw.choice(
                (
                    _command(b"READY", _prop(b"Socket-Type", b"DEALER") + properties),
                    _command(b"HELLO", draw.randbytes(194)),
                    _command(b"INITIATE", draw.randbytes(draw.randrange(500))),
                    _command(draw.randbytes(4), properties),
                    b"",
                )
            )
        )
        for _ in range(draw.randrange(4)):
            parts.append(
                _command(
                    draw.choice((b"PING", b"PONG", b"ERROR", b"SUBSCRIBE", b"MESSAGE")), draw.randbytes(draw.randrange(60))
                )
            )
        for frames in draw.sample(samples.corpus("from client" if "front" in where else "from worker"), draw.randrange(3)):
            parts.append(b"".join(_frame(f, i < len(frames) - 1) for i, f in enumerate(frames)))
        data = bytearray(b"".join(parts))
        for _ in range(draw.choice((0, 1, 1, 3, 20))):
            at = draw.randrange(len(data))
            how = draw.randrange(4)
            if how == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif how == 1:
                data[at:at] = draw.randbytes(draw.choice((1, 8, 64)))
            elif how == 2:
                del data[at : at + draw.choice((1, 8, 64))]
            else:
                data[at : at + 9] = bytes((draw.randrange(8),)) + draw.choice(
                    (b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8), (1 << 30).to_bytes(8, "big"))
                )
            if not data:
                data = bytearray(b"\0")
        cut = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        return where, [bytes(data[: cut[0]]), bytes(data[cut[0] : cut[1]]), bytes(data[cut[1] :])]

    def run(self, number: int, name: str, frames: Frames) -> None:
        with contextlib.suppress(OSError):
            s = self._connect(name)
            self._open.append(s)
            for part in frames:
                s.sendall(part)
            s.setblocking(False)
            s.recv(4096)
        while len(self._open) > MAX_OPEN:
            self._open.pop(0).close()
        self.serve(number)

    def _connect(self, where: str) -> socket.socket:
        transport, side = where.split()
        if transport == "tcp":
            return socket.create_connection(("127.0.0.1", self.port + (side == "back")), timeout=5.0)
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(5.0)
        s.connect((self.front if side == "front" else self.back).removeprefix("ipc://"))
        return s


class HttpTarget(_Served):
    """Requests to the broker's pages that are none, or are too many."""

    def make(self, draw: random.Random) -> tuple[str, Frames]:
        path = draw.choice((b"/metrics", b"/healthz", b"/status", b"/", b"/../etc/passwd", b"/%00", b"*", draw.randbytes(20)))
        line = (
            draw.choice((b"GET", b"HEAD", b"POST", b"get", b"", draw.randbytes(4)))
            + b" "
            + path
            + draw.choice((b" HTTP/1.1", b" HTTP/9", b""))
        )
        headers = [
            draw.choice(
                (
                    b"Host: 127.0.0.1",
                    b"Host: evil.example",
                    b"Content-Length: 99999999",
                    b"Transfer-Encoding: chunked",
                    b"A: " + b"b" * 9000,
                    b"Host:",
                    draw.randbytes(30),
                    b"Expect: 100-continue",
                    b"Connection: keep-alive",
                )
            )
            for _ in range(draw.randrange(6))
        ]
        data = bytearray(
            draw.choice((b"\r\n", b"\n")).join([line, *headers]) + draw.choice((b"\r\n\r\n", b"\n\n", b"\r\n", b""))
        )
        for _ in range(draw.choice((0, 0, 1, 5))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        at = draw.randrange(len(data) + 1)
        return "pages", [bytes(data[:at]), bytes(data[at:])]

    def run(self, number: int, name: str, frames: Frames) -> None:
        answer = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.pages), timeout=5.0) as s:
            for part in frames:
                s.sendall(part)
            s.shutdown(socket.SHUT_WR)
            while data := s.recv(65536):
                answer += data
        status = answer.split(b"\r\n")[0]
        if answer and status.split()[:2] not in ([b"HTTP/1.1", code] for code in (b"200", b"400", b"404", b"405", b"503")):
            raise Violation(f"it answers {status!r:.80}")
        self.serve(number)


def _prop(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


def _property(draw: random.Random) -> bytes:
    name = draw.choice((b"Identity", b"User-Id", b"Resource", b"X", draw.randbytes(draw.randrange(1, 60))))
    return _prop(name, draw.choice((b"", b"admin:boss", draw.randbytes(draw.randrange(300)))))


def _command(name: bytes, body: bytes) -> bytes:
    content = bytes((len(name),)) + name + body
    return (
        b"\x04" + bytes((len(content),)) + content
        if len(content) < 256
        else b"\x06" + len(content).to_bytes(8, "big") + content
    )


def _frame(data: bytes, more: bool) -> bytes:
    return bytes((more, len(data))) + data if len(data) < 256 else bytes((2 | more,)) + len(data).to_bytes(8, "big") + data

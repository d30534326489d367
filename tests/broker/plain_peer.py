"""A client and a worker written from PROTOCOL.md alone: plain msgpack and pyzmq, nothing of ours imported.

Run as a program it is a worker that takes work and never answers, for tests that kill it.
"""

import os
import sys
import time
from typing import Any

import msgpack
import zmq

VERSION = b"PS\x01\x00"
Message = tuple[dict[str, Any], list[bytes]]


class PlainPeer:
    """A DEALER socket and the two frames before the payload."""

    def __init__(self, endpoint: str, key: tuple[bytes, bytes, bytes] | None = None) -> None:
        """`key`: public, secret, and the broker's public one."""
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IPV6, 1)
        if key is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey, self.socket.curve_serverkey = key
        self.socket.connect(endpoint)

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    def send_frames(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def send(self, kind: str, *payload: bytes, **fields: Any) -> None:
        self.send_frames(VERSION, msgpack.packb({"type": kind, **fields}), *payload)

    def receive(self, kind: str | None = None, timeout_s: float = 20.0) -> Message:
        """The next message, or the next of a type, dropping what comes before it."""
        end = time.monotonic() + timeout_s
        while True:
            if not self.socket.poll(int(max(0.0, end - time.monotonic()) * 1000)):
                raise TimeoutError(f"no {kind or 'message'} within {timeout_s} s")
            version, header, *payload = self.socket.recv_multipart()
            assert version[:3] == VERSION[:3]
            fields = msgpack.unpackb(header)
            if kind is None or fields["type"] == kind:
                return fields, payload

    def is_quiet(self, seconds: float) -> bool:
        return not self.socket.poll(int(seconds * 1000))

    # --- client ------------------------------------------------------------------------------------------------------

    def hello(self, secret: bytes | None = None) -> dict[str, Any]:
        self.send("hello", name="plain", secret=secret or os.urandom(16))
        return self.receive("welcome")[0]

    def submit(self, rows: list[bytes], kernel: str = "echo", **fields: Any) -> bytes:
        """Rows of equal length as one run; its id."""
        run_id = os.urandom(16)
        layout = msgpack.packb([["x", "uint8", [len(rows[0])], False, False]])
        self.send("submit", b"".join(rows), id=run_id, kernel=kernel, block=[len(rows), layout], **fields)
        return run_id

    def result(self, timeout_s: float = 20.0) -> list[tuple[bytes, int, bytes | list[Any]]]:
        """The rows of the next `final`: (id, row, payload or error). Acknowledged."""
        header, frames = self.receive("final", timeout_s)
        got = list[tuple[bytes, int, bytes | list[Any]]]()
        for spans, block, error, *_ in header["outcomes"]:
            rows = [(run_id, row) for run_id, start, stop in spans for row in range(start, stop)]
            payload = [] if block is None else rows_of(block, frames)
            for at, (run_id, row) in enumerate(rows):
                got.append((run_id, row, error if block is None else payload[at]))
        self.send("ack", seq=header["seq"])
        return got

    # --- worker ------------------------------------------------------------------------------------------------------

    def become_worker(self, name: str = "plain", batches: int = 1) -> None:
        self.send("hello", name=name, secret=os.urandom(16), pid=os.getpid(), device="cpu")
        self.receive("welcome")
        spec = {
            "name": "echo", "version": "1", "digest": b"12345678",
            "inputs": [["x", "tensor", {"dtypes": None, "rank": 1, "ragged": "exact"}]],
            "modes": ["batch"], "combine": "max", "idempotent": True, "scoped": False, "resident": False, "max_batch_size": 256,
            "max_batch_cost_ms": None, "cost": {"base_ms": 0.0, "per": {}},
        }  # fmt: skip
        self.credit = [batches, 1 << 40]
        self.send("ready", specs=[spec], credit=self.credit)

    def work(self, timeout_s: float = 20.0) -> int:
        """Answer one batch with its rows in reverse byte order; the number of rows."""
        header, frames = self.receive("assign", timeout_s)
        rows = [row[::-1] for block in header["blocks"] for row in rows_of(block, frames)]
        self.credit[0] += 1
        lengths = [len(r) for r in rows]
        block = [len(rows), msgpack.packb([["out", "bytes", [], True, False]]), [lengths]]
        answer = [0, len(rows), block, None]
        self.send("final", b"".join(rows), lease=header["lease"], answers=[answer], credit=self.credit)
        return len(rows)


def rows_of(block: list[Any], frames: list[bytes]) -> list[bytes]:
    """The rows of a block of one packed byte column; takes its frame."""
    num_rows, layout = block[:2]
    ((_, dtype, shape, is_ragged, is_framed),) = msgpack.unpackb(layout)
    assert dtype in ("uint8", "bytes")
    assert not is_framed
    data = frames.pop(0)
    lengths = block[2][0] if is_ragged else [shape[0]] * num_rows
    starts = [sum(lengths[:i]) for i in range(num_rows)]
    return [data[a : a + n] for a, n in zip(starts, lengths, strict=True)]


if __name__ == "__main__":
    peer = PlainPeer(sys.argv[1])
    peer.become_worker("doomed")
    print("ready", flush=True)
    peer.receive("assign", 60.0)
    print("assigned", flush=True)
    sys.stdin.read()

"""Strangers at the door: what 200 attacks a second do to the calls of an honest client over tcp, in interleaved pairs.

The attackers are a process of their own. Each attack is a connection: without a key, with a key that is not allowed, one of
another role, bytes at random, a handshake that stops half way; or, with an allowed key, a message that is none.
"""

import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq
from stack import Stack

from penstock.broker.curve import show_key
from penstock.broker.keys import OwnKey, draw, read_key
from penstock.client import Client, PenstockError

RATE: Final = 200
GOALS: Final = {"p99 ratio": 2.0, "failed calls": 0.0, "attacks/s": 0.9 * RATE}
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
OPEN_AT_ONCE: Final = 64


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def attack(port: int, key_file: str, seconds: float) -> None:
    """For so long, `RATE` times a second; prints how many there were."""
    context, rng = zmq.Context(), random.Random(port)
    client = read_key(Path(key_file))
    stranger = draw("stranger", "client", client.server)
    opened = list[Any]()
    started, done = time.perf_counter(), 0
    while (now := time.perf_counter() - started) < seconds:
        if done > now * RATE:
            time.sleep(done / RATE - now)
        kind = rng.choice(("null", "stranger", "role", "bytes", "half", "malformed"))
        if kind in ("bytes", "half"):
            opened.append(_raw(port, GREETING[:40] if kind == "half" else rng.randbytes(300)))
        else:
            key = {"null": None, "stranger": stranger}.get(kind, client)
            opened.append(_knock(context, port + (kind == "role"), key))
        while len(opened) > OPEN_AT_ONCE:
            opened.pop(0).close()
        done += 1
    print(done / seconds)
    for one in opened:
        one.close()
    context.term()


def _raw(port: int, data: bytes) -> socket.socket:
    s = socket.create_connection(("127.0.0.1", port), timeout=5.0)
    s.sendall(data)
    return s


def _knock(context: "zmq.Context[Any]", port: int, key: OwnKey | None) -> "zmq.Socket[Any]":
    s = context.socket(zmq.DEALER)
    s.setsockopt(zmq.LINGER, 0)
    s.setsockopt(zmq.SNDTIMEO, 0)
    show_key(s, key)
    s.connect(f"tcp://127.0.0.1:{port}")
    s.send_multipart([b"PS\x01\x00", b"\x91" * 60_000])
    return s


def calls(client: Client, seconds: float) -> tuple[list[float], int]:
    """Milliseconds of each call, one in flight, and how many failed."""
    x, times, failed = np.zeros(1024, np.float32), list[float](), 0
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        try:
            client.call("affine", x=x)
        except PenstockError:
            failed += 1
        times.append(1000.0 * (time.perf_counter() - began))
    return times, failed


def measure(num_pairs: int = 5, seconds: float = 5.0) -> dict[str, Any]:
    """Run the pairs: the same client in peace, then under attack."""
    port, pairs = free_port(), list[dict[str, float]]()
    with (
        tempfile.TemporaryDirectory(prefix="ps-bench-") as folder,
        Stack(Path(folder), url=f"tcp://127.0.0.1:{port}", has_keys=True) as stack,
        Client(stack.url, key=stack.keys["client"]) as client,
    ):
        calls(client, 1.0)
        for _ in range(num_pairs):
            peace, failed = calls(client, seconds)
            command = [sys.executable, __file__, str(port), str(stack.keys["client"]), str(seconds + 1.0)]
            attackers = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            time.sleep(0.5)
            siege, more_failed = calls(client, seconds)
            rate = float(attackers.communicate()[0])
            p99s = [statistics.quantiles(times, n=100)[98] for times in (peace, siege)]
            pairs.append({
                "p50 ms": statistics.median(peace), "p50 under attack ms": statistics.median(siege), "p99 ms": p99s[0],
                "p99 under attack ms": p99s[1], "p99 ratio": p99s[1] / p99s[0], "failed calls": failed + more_failed,
                "attacks/s": rate,
            })  # fmt: skip
        counters = Counter(client.status()["counters"])
    median = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    kept = {name: n for name, n in counters.items() if name.startswith(("handshakes", "connections", "malformed"))}
    return {"pairs": pairs, "median": median, "counters": kept, "goals": GOALS}


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    made = list[str]()
    for name, value in result["median"].items():
        spread = sorted(pair[name] for pair in result["pairs"])
        goal, note = GOALS.get(name), ""
        if goal is not None:
            is_met = value >= goal if name == "attacks/s" else value <= goal
            note = f"   goal {'at least' if name == 'attacks/s' else 'at most'} {goal:g}: {'met' if is_met else 'NOT MET'}"
        made.append(f"{name:24s} {value:10.2f}   ({spread[0]:.2f} to {spread[-1]:.2f}){note}")
    return [*made, "counted by the broker: " + ", ".join(f"{name} {n}" for name, n in sorted(result["counters"].items()))]


if __name__ == "__main__":
    attack(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))

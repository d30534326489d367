"""Strangers at the door: what 200 attacks a second do to the calls of an honest client over tcp, in interleaved pairs.

The attackers are a process of their own. Each attack is a connection: without a key, with a key that is not allowed, one of
another role, bytes at random, a handshake that stops half way; or, with an allowed key, a message that is none.
"""

import contextlib
import math
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
from stack import Stack, free_port

from penstock.broker.curve import show_key
from penstock.broker.keys import OwnKey, draw, read_key
from penstock.client import Client, PenstockError

RATE: Final = 200
GOALS: Final = {"p99 ratio": 2.0, "failed calls": 0.0, "attacks/s": 0.9 * RATE}
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
OPEN_AT_ONCE: Final = 64
LEAD_S: Final = 0.3


def attack(port: int, key_file: str) -> None:
    """For each line of standard input, a number of seconds: `RATE` attacks a second for so long, then how many there were."""
    context, rng = zmq.Context(), random.Random(port)
    client = read_key(Path(key_file))
    stranger = draw("stranger", "client", client.server)
    opened = list[Any]()
    for line in sys.stdin:
        started, done = time.perf_counter(), 0
        while (now := time.perf_counter() - started) < float(line):
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
        print(done / float(line), flush=True)
        while opened:  # no more knocking in the time of peace
            opened.pop().close()
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


class Attackers:
    """The process that attacks when it is told to."""

    def __init__(self, port: int, key_file: Path) -> None:
        command = [sys.executable, __file__, str(port), str(key_file)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def rate(self) -> float:
        """Of the attacks that have ended, per second."""
        assert self._process.stdout is not None
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def measure(num_pairs: int = 25, seconds: float = 1.5) -> dict[str, Any]:
    """Run the pairs: the same client in peace and under attack, each first in turn, so that what changes slowly cancels."""
    port, pairs = free_port(), list[dict[str, float]]()
    everything: dict[bool, list[float]] = {False: [], True: []}
    with (
        tempfile.TemporaryDirectory(prefix="ps-bench-") as folder,
        Stack(Path(folder), url=f"tcp://127.0.0.1:{port}", has_keys=True) as stack,
        Client(stack.url, key=stack.keys["client"]) as client,
        contextlib.closing(Attackers(port, stack.keys["client"])) as attackers,
    ):
        calls(client, 1.0)
        for number in range(num_pairs):
            times, num_failed, rate = dict[bool, list[float]](), 0, 0.0
            for is_siege in (False, True) if number % 2 else (True, False):
                if is_siege:
                    attackers.begin(seconds + LEAD_S)
                    time.sleep(LEAD_S)
                times[is_siege], failed = calls(client, seconds)
                num_failed += failed
                if is_siege:
                    rate = attackers.rate()
                    time.sleep(LEAD_S)
                everything[is_siege] += times[is_siege]
            p50s, p99s = ([_quantile(times[is_siege], q) for is_siege in (False, True)] for q in (50, 99))
            pairs.append({
                "p50 ms": p50s[0], "p50 under attack ms": p50s[1], "p99 ms": p99s[0], "p99 under attack ms": p99s[1],
                "p99 ratio": p99s[1] / p99s[0], "failed calls": num_failed, "attacks/s": rate,
            })  # fmt: skip
        counters = Counter(client.status()["counters"])
    median = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    kept = {name: n for name, n in counters.items() if name.startswith(("handshakes", "connections", "malformed"))}
    pooled = _quantile(everything[True], 99) / _quantile(everything[False], 99)
    low, high = interval([pair["p99 ratio"] for pair in pairs])
    verdict = "met" if high <= GOALS["p99 ratio"] else "NOT MET" if low > GOALS["p99 ratio"] else "undecided"
    num_failed = sum(int(pair["failed calls"]) for pair in pairs)
    return {
        "pairs": pairs, "median": median, "counters": kept, "goals": GOALS, "pooled p99 ratio": pooled,
        "p99 ratio between": [low, high], "verdict": verdict, "failed calls": num_failed,
        "has_failed": verdict == "NOT MET" or num_failed > 0,
    }  # fmt: skip


def _quantile(times: list[float], percent: int) -> float:
    return statistics.quantiles(times, n=100)[percent - 1]


def interval(values: list[float]) -> tuple[float, float]:
    """Where the median of what was sampled lies with at least 95 %, whatever its distribution: two of the values in order."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < (n - 1) // 2 and outside + math.comb(n, k) / 2**n <= 0.025:
        outside += math.comb(n, k) / 2**n
        k += 1
    at = max(k - 1, 0)
    return ordered[at], ordered[n - 1 - at]


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    made = list[str]()
    for name, value in result["median"].items():
        low, _, high = statistics.quantiles([pair[name] for pair in result["pairs"]], n=4)
        made.append(f"{name:24s} {value:10.2f}   (half of the pairs: {low:.2f} to {high:.2f})")
    low, high = result["p99 ratio between"]
    hint = " (more --pairs, or a machine that does nothing else, would tell)" if result["verdict"] == "undecided" else ""
    has_rate = result["median"]["attacks/s"] >= GOALS["attacks/s"]
    made += [
        f"p99 under attack: {result['median']['p99 ratio']:.2f} times as much, median of {len(result['pairs'])} pairs",
        f"  with 95 % between {low:.2f} and {high:.2f}; all calls together {result['pooled p99 ratio']:.2f}",
        f"  goal at most {GOALS['p99 ratio']:g}: {result['verdict']}{hint}",
        f"failed calls: {result['failed calls']}, goal 0",
        f"attacks/s: goal at least {GOALS['attacks/s']:g}: {'met' if has_rate else 'NOT MET'}",
    ]
    return [*made, "counted by the broker: " + ", ".join(f"{name} {n}" for name, n in sorted(result["counters"].items()))]


if __name__ == "__main__":
    attack(int(sys.argv[1]), sys.argv[2])

"""What CURVE costs: the same stack over loopback tcp with keys and without, in interleaved pairs; ipc beside it."""

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from stack import Stack, free_port
from throughput import CALLS_PER_ROUND, call_times, map_rate

from penstock.client import Client


def measure(num_pairs: int = 5, seconds: float = 2.0) -> dict[str, Any]:
    """Run the rounds: ipc, tcp, tcp with keys, one after another; ratios round by round."""
    x = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    rounds = list[dict[str, float]]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-")))
        clients = dict[str, Client]()
        for name in ("ipc", "tcp", "curve"):
            url = "" if name == "ipc" else f"tcp://127.0.0.1:{free_port()}"
            made = stack.enter_context(Stack(folder / name, url=url, has_keys=name == "curve"))
            clients[name] = stack.enter_context(Client(made.url, key=made.keys.get("client")))
            map_rate(clients[name], x, 0.5)
        for _ in range(num_pairs):
            rounds.append(_round(clients, x, seconds))
    return {"pairs": rounds, "median": {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}}


def _round(clients: dict[str, Client], x: np.ndarray, seconds: float) -> dict[str, float]:
    rates = {name: map_rate(client, x, seconds) for name, client in clients.items()}
    calls = {name: statistics.median(call_times(client, x, CALLS_PER_ROUND)) for name, client in clients.items()}
    return {
        **{f"map tasks/s, {name}": rate for name, rate in rates.items()},
        **{f"call p50 us, {name}": 1e6 * s for name, s in calls.items()},
        "map: curve / tcp": rates["curve"] / rates["tcp"], "map: curve / ipc": rates["curve"] / rates["ipc"],
        "call p50: curve / tcp": calls["curve"] / calls["tcp"], "call p50: curve / ipc": calls["curve"] / calls["ipc"],
    }  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    made = list[str]()
    for key, value in result["median"].items():
        spread = sorted(r[key] for r in result["pairs"])
        text = f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
        made.append(f"{key:28s} {text:>12s}   ({spread[0]:,.2f} to {spread[-1]:,.2f})")
    return made

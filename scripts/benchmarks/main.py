"""`scripts/bench`: run a benchmark, print it, and keep it as JSON under bench-results/."""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench-results"
BENCHES: dict[str, tuple[str, dict[str, str]]] = {
    "throughput": ("throughput", {"pairs": "num_pairs", "seconds": "seconds"}),
    "queued": ("queued", {"tasks": "max_tasks"}),
    "scheduling": ("scheduling", {"pairs": "num_pairs", "seconds": "seconds"}),
    "overload": ("overload", {"seconds": "seconds"}),
    "attacks": ("attacks", {"pairs": "num_pairs", "seconds": "seconds"}),
    "encryption": ("encryption", {"pairs": "num_pairs", "seconds": "seconds"}),
    "policy": ("policy_cost", {"tasks": "num_tasks", "pairs": "num_rounds"}),
    "prediction": ("prediction", {}),
    "durable": ("durable", {"pairs": "num_pairs", "seconds": "seconds", "tasks": "max_tasks"}),
    "kernels": ("kernel_bench", {"device": "device", "ops": "ops", "quick": "is_quick", "pairs": "num_rounds"}),
    "shared": ("shared", {"pairs": "num_pairs"}),
    "detection": ("detection", {}),
    "peers": ("peers", {"seconds": "seconds"}),
}
"""What there is: its module, and which options its `measure` takes under which names."""


def facts() -> dict[str, Any]:
    """What the figures depend on."""
    import msgpack
    import numpy as np
    import zmq

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"), "cores": os.cpu_count(), "python": platform.python_version(),
        "pyzmq": zmq.__version__, "libzmq": zmq.zmq_version(), "msgpack": msgpack.version, "numpy": np.__version__,
        "commit": commit.stdout.strip(),
    }  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure Penstock on this machine against floors measured in the same run.",
        epilog="throughput: map, submit and call against bare pyzmq. queued: memory and time per queued task. "
        "scheduling: bins against one bin, late binding against sealing, on a real mixed load. overload: ten times what a "
        "worker can do. attacks: an honest client's calls beside 200 attacks a second. encryption: tcp with keys and without. "
        "policy: what a decision costs. prediction: measured times of the built-in kernels. "
        "durable: tasks on disk against tasks in memory, and restarts with many queued. "
        "kernels: each kernel's correctness, then its time against the device's floor and against other implementations. "
        "detection: how soon a dead or hung worker, client or broker is noticed. "
        "shared: large arrays through shared memory against the socket. "
        "peers: other systems that pip can install, same task (installs them into .venv-peers).",
    )
    p.add_argument("what", nargs="?", default="throughput", choices=tuple(BENCHES))
    p.add_argument("--peers", action="store_true", help="run the peers after the benchmark")
    p.add_argument("--pairs", type=int, help="interleaved pairs (default 7; policy: 5 rounds)")
    p.add_argument("--seconds", type=float, help="per measurement (default 2; scheduling 10, overload 60)")
    p.add_argument("--tasks", type=int, help="queued tasks at most (default 1000000; policy: 20000)")
    p.add_argument("--device", help="kernels: cpu, cuda or mps (default cpu)")
    p.add_argument("--ops", help="kernels: families or operations, comma separated (default: all)")
    p.add_argument("--quick", action="store_true", default=None, help="kernels: small sizes only")
    p.add_argument("--page", action="store_true", help="kernels on cuda: write docs/gpu-results.md as well")
    args = p.parse_args()
    if args.page and args.device != "cuda":
        p.error("--page needs --device cuda")
    result = _run(args.what, args)
    if args.page:
        importlib.import_module("kernel_bench").write_page(result)
    if args.peers and args.what != "peers":
        _run("peers", args)
    return int(result.get("has_failed", False))


def _run(what: str, args: argparse.Namespace) -> dict[str, Any]:
    module, options = BENCHES[what]
    bench = importlib.import_module(module)
    given = {name: getattr(args, option) for option, name in options.items() if getattr(args, option) is not None}
    result: dict[str, Any] = bench.measure(**given)
    _show(what, result, bench.lines(result))
    return result


def _show(name: str, result: dict[str, Any], lines: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"facts": facts(), **result}, indent=1))
    print("\n".join([name, "", *lines, f"as JSON: {path.relative_to(RESULTS.parent)}"]))


if __name__ == "__main__":
    sys.exit(main())

"""`scripts/bench`: run a benchmark, print it, and keep it as JSON under bench-results/."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench-results"


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
        "peers: other systems that pip can install, same task (installs them into .venv-peers).",
    )
    p.add_argument("what", nargs="?", default="throughput", choices=("throughput", "queued", "peers"))
    p.add_argument("--peers", action="store_true", help="run the peers after the benchmark")
    p.add_argument("--pairs", type=int, default=7, help="interleaved pairs (default 7)")
    p.add_argument("--seconds", type=float, default=2.0, help="per measurement (default 2)")
    p.add_argument("--tasks", type=int, default=1_000_000, help="queued tasks at most (default 1000000)")
    args = p.parse_args()
    if args.what == "queued":
        import queued as bench

        result = bench.measure(args.tasks)
    elif args.what == "peers":
        import peers as bench

        result = bench.measure(args.seconds)
    else:
        import throughput as bench

        result = bench.measure(args.pairs, args.seconds)
    _show(args.what, result, bench.lines(result))
    if args.peers and args.what != "peers":
        import peers

        result = peers.measure(args.seconds)
        _show("peers", result, peers.lines(result))
    return 0


def _show(name: str, result: dict[str, Any], lines: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"facts": facts(), **result}, indent=1))
    print("\n".join([name, "", *lines, f"as JSON: {path.relative_to(RESULTS.parent)}"]))


if __name__ == "__main__":
    sys.exit(main())

"""Other systems on the same task: 1,024 float32 in, 2x + 1 out, batched up to 32, 64 in flight (and one at a time).

Each runs in its own process with the interpreter of .venv-peers, so that nothing of theirs is among our dependencies. HTTP
servers are driven by a small asyncio client of ours with kept-alive connections, which itself costs about half a core.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from rich.progress import Progress

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "ProcessPoolExecutor": (), "mosec": ("mosec",), "litserve": ("litserve",), "ipyparallel": ("ipyparallel",),
    "dask": ("distributed",),
}  # fmt: skip


def measure(seconds: float = 2.0) -> dict[str, Any]:
    """Install what is missing, run each, keep what failed as its reason."""
    python = ROOT / ".venv-peers" / "bin" / "python"
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
    rows = list[dict[str, Any]]()
    with Progress(transient=True) as progress:
        bar = progress.add_task("peers", total=len(PACKAGES))
        for name, packages in PACKAGES.items():
            progress.update(bar, description=name)
            rows.append(_run(str(python), name, packages, seconds))
            progress.advance(bar)
    return {"peers": rows}


def _run(python: str, name: str, packages: tuple[str, ...], seconds: float) -> dict[str, Any]:
    pip = [python, "-m", "pip", "install", "-q", "numpy", "torch==2.13.0", *packages] if name == "litserve" else [
        python, "-m", "pip", "install", "-q", "numpy", *packages
    ]  # fmt: skip
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        return {"peer": name, "failed": "cannot be installed here"}
    script = Path(__file__).with_name("peer_run.py")
    done = subprocess.run([python, str(script), name, str(seconds)], capture_output=True, text=True, timeout=180)
    if done.returncode:
        return {"peer": name, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def lines(result: dict[str, Any]) -> list[str]:
    made = [f"{'peer':20s} {'tasks/s':>10s} {'p50 ms':>8s} {'p99 ms':>8s}"]
    for row in result["peers"]:
        if "failed" in row:
            made.append(f"{row['peer']:20s} {row['failed']}")
        else:
            made.append(f"{row['peer']:20s} {row['tasks_per_s']:>10,.0f} {row['p50_ms']:>8.2f} {row['p99_ms']:>8.2f}")
    return made


if __name__ == "__main__":
    sys.exit("run scripts/bench peers")

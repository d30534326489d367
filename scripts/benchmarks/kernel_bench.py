"""The kernels on one device: first whether they are right, then their time against the hardware's floor and their peers.

A case that fails its gate is not timed, and makes the run fail.
"""

import importlib
import pkgutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from clocks import ceilings, clock_of, in_turns, speedup
from gpu_goals import KERNELS, RUNTIME
from kernel_cases import FLOOR, Case

from penstock.kernels import backends

RESULTS_PAGE = Path(__file__).parents[2] / "docs" / "gpu-results.md"
NUM_ROUNDS = 15


def families() -> list[str]:
    """The modules of cases there are."""
    return sorted(module.name for module in pkgutil.iter_modules(kernel_cases.__path__))


def measure(device: str = "cpu", ops: str = "", is_quick: bool = False, num_rounds: int = NUM_ROUNDS) -> dict[str, Any]:
    """Every case of the families or operations named in `ops` (comma separated; empty: all)."""
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads()))
    place = torch.device(device)
    wanted = {name for name in ops.split(",") if name}
    limits = ceilings(place)
    rows = []
    with torch.inference_mode():
        for case in _cases(place, wanted, is_quick):
            row = _measure(case, place, limits, num_rounds)
            rows.append(row)
            print(_line(row), file=sys.stderr, flush=True)
    return {"device": _device(place), "ceilings": limits, "rows": rows, "has_failed": any("error" in row for row in rows)}


def _cases(device: torch.device, wanted: set[str], is_quick: bool) -> Iterator[Case]:
    for family in families():
        module = importlib.import_module(f"kernel_cases.{family}")
        for case in module.cases(device, is_quick):
            if not wanted or wanted & {family, case.op}:
                yield case


def _device(device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        about |= {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "when": time.strftime("%Y-%m-%d")}
    return about


def _measure(case: Case, device: torch.device, limits: Mapping[str, float], num_rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "size": case.size, "goals": dict(case.goals)}
    try:
        case.check()
    except Exception as e:
        return {**row, "error": f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"}
    times = in_turns(clock_of(device), {"": case.ours, **case.peers}, case.can_graph, num_rounds)
    ours = times.pop("")
    row["ms"] = statistics.median(ours)
    row["backend"] = backends.ran().get((case.op, device.type), "torch")
    floor_ms = 1e3 * max(case.num_bytes / limits["copy"], case.num_flops / limits.get(case.flops_dtype, limits["float32"]))
    if floor_ms:
        row["floor"] = floor_ms / row["ms"]
    row["peers"] = {name: speedup(ours, theirs) for name, theirs in times.items()}
    return row


def _met(row: Mapping[str, Any]) -> list[str]:
    """Each goal with what was reached."""
    reached = {FLOOR: row.get("floor"), **row.get("peers", {})}
    return [
        f"{name} {reached[name]:.2f} (goal {goal:g}{'' if reached[name] >= goal else ', NOT met'})"
        for name, goal in row["goals"].items()
        if reached.get(name) is not None
    ]


def _line(row: Mapping[str, Any]) -> str:
    head = f"{row['op']:24} {row['size']:44}"
    if "error" in row:
        return f"{head} WRONG: {row['error']}"
    floor = f"{row['floor']:6.1%} of floor" if "floor" in row else " " * 15
    peers = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["peers"].items())
    goals = "; ".join(_met(row))
    return f"{head} {row['ms']:9.3f} ms {row['backend']:8} {floor}  {peers}{'  [' + goals + ']' if goals else ''}"


def lines(result: Mapping[str, Any]) -> list[str]:
    about, limits = result["device"], result["ceilings"]
    shown = ", ".join(
        f"{name} {value / 1e9:.0f} G{'B' if name in ('copy', 'h2d', 'd2h') else 'FLOP'}/s" for name, value in limits.items()
    )
    head = [f"device: {about.get('name', about['device'])}, torch {about['torch']}", f"measured ceilings: {shown}", ""]
    tail = ["", "SOME KERNELS ARE WRONG"] if result["has_failed"] else []
    return [*head, *map(_line, result["rows"]), *tail]


def write_page(result: Mapping[str, Any], path: Path = RESULTS_PAGE) -> None:
    """Every goal on a GPU with what the run measured of it, then all rows of the run."""
    about, limits, rows = result["device"], result["ceilings"], result["rows"]
    rates = ", ".join(f"{name} {value / 1e9:.0f} G/s" for name, value in limits.items()) or "not measured"
    out = [
        "# Kernels on a GPU",
        "",
        "Written by `scripts/bench kernels --device cuda --page`; goals that no run has measured say so.",
        "",
        f"Last run: {about.get('when', 'none')}. Device: {about.get('name', 'none')}, torch {about.get('torch', '-')}.",
        f"Measured ceilings: {rates}.",
        "",
        "| goal | operation | measured |",
        "|---|---|---|",
    ]
    for goal in KERNELS + RUNTIME:
        found = [f"{row['size']}: {'; '.join(_met(row)) or row.get('error', '')}" for row in rows if row["op"] == goal.op]
        out.append(f"| {goal.text} | {goal.op} | {'<br>'.join(found) or 'not measured'} |")
    out += ["", "| operation | size | backend | ms | of the floor | against peers |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            out.append(f"| {row['op']} | {row['size']} | | | | WRONG: {row['error']} |")
            continue
        peers = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["peers"].items())
        floor = f"{row['floor']:.0%}" if "floor" in row else ""
        out.append(f"| {row['op']} | {row['size']} | {row['backend']} | {row['ms']:.3f} | {floor} | {peers} |")
    path.write_text("\n".join(out if rows else out[:-3]) + "\n")

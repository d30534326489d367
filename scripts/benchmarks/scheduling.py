"""What scheduling by predicted time brings, with real processes: bins against one bin, late binding against sealing."""

from collections.abc import Mapping
from typing import Any

from mixed import compare
from multibin import measure_multibin

GOALS = {"theorem 4.2, off by at most": 0.05, "late / sealed, at least": 1.8, "p95 at 30 %, bins / one bin at most": 1.03}
NUM_BATCHES, NUM_ROUNDS = 60, 3


def measure(num_pairs: int = 5, seconds: float = 8.0) -> dict[str, Any]:
    """`seconds` per measurement. With the defaults it takes about nine minutes."""
    return {
        **measure_multibin(NUM_BATCHES, NUM_ROUNDS, seconds),
        "one worker": compare(num_pairs, seconds),
        "two workers, one three times slower": compare(num_pairs, seconds, slowness=(1.0, 3.0)),
        "goals": GOALS,
    }


def lines(result: dict[str, Any]) -> list[str]:
    made = [f"throughput of B = 128, U(4, 80) ms, against theorem 4.2 of multi-bin batching, best of {NUM_ROUNDS} rounds:"]
    for row in result["theorem 4.2"]:
        off = abs(row["measured / theory"] - 1.0)
        spent = f"per batch {row['gap ms per batch']:.2f} ms between, {row['overslept ms per batch']:.2f} overslept"
        made.append(
            f"  {row['bins']} bins {row['tasks/s']:8,.0f} tasks/s, theory {row['theory']:6,.0f}: "
            f"{row['measured / theory']:.3f} ({spent}){_verdict(off <= 0.05)}"
        )
    late = result["late binding"]
    made += [
        "late binding against sealing, B = 32, 3 bins, U(5, 50) ms, 1600 tasks/s offered:",
        f"  {late['late tasks/s']:,.0f} against {late['sealed tasks/s']:,.0f} tasks/s (sealed batches of "
        f"{late['sealed rows per batch']:.1f}): {late['late / sealed']:.2f} times{_verdict(late['late / sealed'] >= 1.8)}",
    ]
    for name in ("one worker", "two workers, one three times slower"):
        made += [f"mixed load, {name}:", *_mixed(result[name])]
    return made


def _mixed(part: Mapping[str, Any]) -> list[str]:
    made = list[str]()
    for how in ("closed loop", "burst"):
        bins, one = part["tasks/s"]["bins"][how], part["tasks/s"]["one bin"][how]
        made.append(f"  {how:12s} {bins:8,.0f} tasks/s with bins, {one:8,.0f} with one: {bins / one:.2f} times")
    for load, row in part["p95 ms"].items():
        ratio = row["bins / one bin"]
        verdict = _verdict(ratio <= 1.03) if load == "30 %" else ""
        spread = sorted(pair["bins / one bin"] for pair in part["pairs"][load])
        made.append(
            f"  p95 at {load} {row['bins']:8.1f} ms with bins, {row['one bin']:8.1f} with one: {ratio:.3f} "
            f"({spread[0]:.2f} to {spread[-1]:.2f}){verdict}"
        )
    late = max(pair["driver late ms"] for rows in part["pairs"].values() for pair in rows)
    made.append(f"  the driver used {part['driver']:.0%} of a core and was at most {late:.1f} ms late (99th percentile)")
    return made


def _verdict(is_met: bool) -> str:
    return "   goal met" if is_met else "   goal NOT MET"

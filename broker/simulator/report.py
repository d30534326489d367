"""What a simulation tells: JSON for programs, a few lines for people. Knows no rules, measures nothing."""

from collections.abc import Mapping
from typing import Any, Final

from penstock.broker.simulator.experiment import Finished, Setup

MAX_EVENTS: Final = 3


def to_json(finished: Finished) -> dict[str, Any]:
    """Everything that is known of a run; durations in `unit`, throughput in tasks per `unit`."""
    return {**describe(finished.setup, finished.boundaries_ms), **finished.summary(), "events": finished.events}


def describe(setup: Setup, boundaries_ms: tuple[float, ...]) -> dict[str, Any]:
    """What was simulated."""
    return {
        "policy": setup.policy, "service": setup.service.text, "unit": setup.unit, "batch": setup.batch_size,
        "bins": setup.bins or ("auto" if setup.policy == "dynamic" else 1),
        "boundaries": [ms / 1000.0 / setup.unit_s for ms in boundaries_ms],
        "servers": setup.num_servers, "arrival": _arrival(setup), "mispredict": setup.mispredict, "seed": setup.seed,
        "warmup": setup.num_warmup,
    }  # fmt: skip


def _arrival(setup: Setup) -> str:
    return "burst" if setup.arrival_rate is None else f"poisson:{setup.arrival_rate:g}"


def show(finished: Finished) -> str:
    """A run for people."""
    summary, setup, unit = finished.summary(), finished.setup, finished.setup.unit
    lines = [
        _title(finished),
        f"  throughput  {summary['throughput']:.4f} tasks/{unit}{_per_s(summary, unit)}   "
        f"({summary['finished']:,} of {summary['tasks']:,} tasks finished, in {_number(summary['elapsed'])} {unit})",
        f"  latency     {_latency(summary['latency'])}   ({unit})",
        f"  batches     {summary['batches']:,} of {summary['mean_batch_size']:.1f} tasks on average; "
        f"useful work {summary['useful_work_ratio']:.1%}, servers busy {summary['utilization']:.1%}",
    ]
    if len(summary["per_bin"]) > 1:
        lines += [f"  bin         {_bin(label, facts, unit)}" for label, facts in summary["per_bin"].items()]
    if len(setup.clients) > 1:
        lines += [f"  client      {_client(name, facts, unit)}" for name, facts in summary["clients"].items()]
    drops = summary["drops"]
    late = summary["late"]
    lines.append(f"  dropped     {drops['deadline']:,} by their time limit, {drops['refused']:,} refused; {late:,} late")
    lines += [
        f"  event       {event['kind']} at {event['at_s']:.1f} s: {event['reason']}" for event in finished.events[:MAX_EVENTS]
    ]
    return "\n".join(lines)


def _title(finished: Finished) -> str:
    setup = finished.setup
    facts = describe(setup, finished.boundaries_ms)
    edges = ", ".join(_number(edge) for edge in facts["boundaries"])
    bins = "" if setup.policy == "continuous" else f", bins: {facts['bins']}{f' (at {edges} {setup.unit})' if edges else ''}"
    return (
        f"{setup.policy}, batches of {setup.batch_size}{bins}, servers: {setup.num_servers}, "
        f"{setup.service.text} {setup.unit}, {facts['arrival']}, seed {setup.seed}"
    )


def _per_s(summary: Mapping[str, Any], unit: str) -> str:
    return "" if unit == "s" else f" = {summary['throughput_per_s']:.1f} tasks/s"


def _latency(latency: Mapping[str, float | None]) -> str:
    return "  ".join(f"{name} {'-' if value is None else _number(value)}" for name, value in latency.items())


def _bin(label: str, facts: Mapping[str, float], unit: str) -> str:
    return (
        f"{label}: {facts['batches']:,} batches of {facts['mean_size']:.1f} tasks, {_number(facts['mean_time'])} {unit} each; "
        f"spoiled {facts['spoiled']:.1%}"
    )


def _client(name: str, facts: Mapping[str, Any], unit: str) -> str:
    return (
        f"{name} (weight {facts['weight']:g}): {facts['finished']:,} of {facts['tasks']:,} tasks, "
        f"service {_number(facts['service'])} {unit} ({facts['share']:.1%}); latency {_latency(facts['latency'])}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"

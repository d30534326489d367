"""How the broker's status looks on a terminal. Knows the body of `status` and rich; does not know clients."""

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

READY_STATUS: Final = 0
NOT_READY_STATUS: Final = 4
NO_BROKER_STATUS: Final = 5
_COLOURS: Final = {"ready": "green", "busy": "green", "starting": "yellow", "draining": "yellow", "away": "red"}
_OUTCOMES: Final = ("done", "failed", "cancelled", "expired", "dead")


def exit_status(body: Mapping[str, Any]) -> int:
    """0 only if a worker is ready: a broker alone cannot serve anybody."""
    return READY_STATUS if body.get("is_ready") else NOT_READY_STATUS


def render(body: Mapping[str, Any], url: str) -> RenderableType:
    """Everything that a person wants to see at a glance."""
    parts: list[RenderableType] = [_headline(body, url), _workers(body.get("workers", ()))]
    if body.get("queues"):
        parts.append(_queues(body["queues"]))
    parts += [_tasks(body), _counters(body.get("counters", {}))]
    return Group(*parts)


def _headline(body: Mapping[str, Any], url: str) -> Text:
    if body.get("is_draining"):
        state, colour = "draining", "yellow"
    elif body.get("is_ready"):
        state, colour = "ready", "green"
    else:
        state, colour = "NOT READY: no worker", "red"
    up_s = float(body.get("uptime_s", 0.0))
    return Text.assemble(
        ("broker ", "bold"), f"{body.get('pid', '?')} at {url}  ", (state, f"bold {colour}"),
        f"  up {duration(up_s)}  clients {body.get('num_clients', '?')}  {float(body.get('tasks_per_s', 0.0)):.0f} tasks/s",
    )  # fmt: skip


def _workers(workers: Any) -> RenderableType:
    if not workers:
        return Text("no worker: start one with `penstock worker`, or both with `penstock up`", style="yellow")
    table = _table("worker", "pid", "device", "state", "leases", "done", "failed", "memory", "resident")
    for worker in workers:
        state = str(worker.get("state", "?"))
        resident = ", ".join(_resident(name, how) for name, how in worker.get("resident", {}).items() if how != "absent")
        table.add_row(
            str(worker["name"]), str(worker["pid"]), str(worker["device"]), Text(state, style=_COLOURS.get(state, "")),
            f"{worker['leases']:,}", f"{worker['done']:,}", f"{worker['failed']:,}",
            _memory(worker.get("memory", {})), resident or "-",
        )  # fmt: skip
    return table


def _resident(name: str, how: object) -> str:
    return name if how == "ready" else f"{name} ({how})"


def _memory(memory: Mapping[str, Any]) -> str:
    value = memory.get("allocated_bytes", memory.get("rss_bytes"))
    return "-" if value is None else size(int(value))


def _queues(queues: Any) -> Table:
    table = _table("queue", "mode", "queued", "batch keys")
    for queue in queues:
        table.add_row(str(queue["kernel"]), str(queue["mode"]), f"{queue['queued']:,}", str(queue["batch_keys"]))
    return table


def _tasks(body: Mapping[str, Any]) -> Text:
    tasks: Mapping[str, Any] = body.get("tasks", {})
    parts = [f"{tasks.get(name, 0):,} {name}" for name in ("queued", "leased")]
    known = ("open", "open_bytes", "queued", "leased")
    ends = [*_OUTCOMES, *sorted(set(tasks) - set(_OUTCOMES) - set(known))]
    parts += [f"{tasks[name]:,} {name}" for name in ends if tasks.get(name)]
    return Text(f"tasks: {', '.join(parts)} ({size(int(tasks.get('open_bytes', 0)))} open)")


def _counters(counters: Mapping[str, Any]) -> Text:
    shown = ", ".join(f"{name} {value:,}" for name, value in sorted(counters.items()) if value)
    return Text(f"counters: {shown or 'nothing unusual'}", style="dim")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    numeric = {"pid", "leases", "done", "failed", "memory", "queued", "batch keys"}
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return table


def size(num_bytes: int) -> str:
    """Bytes for people."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

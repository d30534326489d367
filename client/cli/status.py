"""How the broker's status looks on a terminal. Knows the body of `status` and rich; does not know clients."""

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from penstock.client.cli import scheduling
from penstock.client.cli.arguments import NOT_READY
from penstock.client.cli.figures import duration, size, table

_COLOURS: Final = {"ready": "green", "busy": "green", "starting": "yellow", "draining": "yellow", "away": "red"}
_OUTCOMES: Final = ("done", "failed", "cancelled", "expired", "dead")


def exit_status(body: Mapping[str, Any]) -> int:
    """0 only if a worker is ready: a broker alone cannot serve anybody."""
    return 0 if body.get("is_ready") else NOT_READY


def render(body: Mapping[str, Any], url: str) -> RenderableType:
    """Everything that a person wants to see at a glance."""
    parts: list[RenderableType] = [_headline(body, url), _workers(body.get("workers", ()))]
    if body.get("bins"):
        parts.append(scheduling.bins(body["bins"], body.get("queues", ())))
    elif body.get("queues"):
        parts.append(_queues(body["queues"]))
    parts += [_tasks(body), *scheduling.sections(body), _counters(body.get("counters", {}))]
    if body.get("left_out"):
        parts.append(Text(f"not shown, too long for a message: {', '.join(body['left_out'])}", style="dim"))
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
    numeric = ("pid", "leases", "done", "failed", "memory")
    shown = table("worker", "pid", "device", "state", "leases", "done", "failed", "memory", "resident", numeric=numeric)
    for worker in workers:
        state = str(worker.get("state", "?"))
        resident = ", ".join(_resident(name, how) for name, how in worker.get("resident", {}).items() if how != "absent")
        shown.add_row(
            str(worker["name"]), str(worker["pid"]), str(worker["device"]), Text(state, style=_COLOURS.get(state, "")),
            f"{worker['leases']:,}", f"{worker['done']:,}", f"{worker['failed']:,}",
            _memory(worker.get("memory", {})), resident or "-",
        )  # fmt: skip
    return shown


def _resident(name: str, how: object) -> str:
    return name if how == "ready" else f"{name} ({how})"


def _memory(memory: Mapping[str, Any]) -> str:
    value = memory.get("allocated_bytes", memory.get("rss_bytes"))
    return "-" if value is None else size(int(value))


def _queues(queues: Any) -> Table:
    shown = table("queue", "queued", "batch keys", numeric=("queued", "batch keys"))
    for queue in queues:
        shown.add_row(scheduling.queue_name(queue), f"{queue['queued']:,}", str(queue["batch_keys"]))
    return shown


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

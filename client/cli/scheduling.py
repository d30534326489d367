"""How the broker's scheduling looks on a terminal: bins, accounts, admission, what failed and what was changed.

Knows the parts of a status body that brokers send since protocol 1.1; each is shown if it has something to say. Does not
know the rest of the page (`status.py`).
"""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from penstock.client.cli.figures import duration, milliseconds, share, table

MAX_EVENTS: Final = 8
MAX_LIMITS: Final = 8
Entries = Sequence[Mapping[str, Any]]


def bins(entries: Entries, queues: Entries) -> Table:
    """The queues, each with what waits in its bins by predicted time, and how good the predictions are.

    Not every one has bins; `queues` knows what waits in all batch keys together.
    """
    waiting = {queue_name(queue): queue for queue in queues}
    entries = [{**entry, **waiting.pop(queue_name(entry), {})} for entry in entries]
    numeric = ("queued", "keys", "error", "in q95")
    shown = table("queue", "queued", "keys", "bins", "error", "in q95", numeric=numeric)
    for entry in [*entries, *waiting.values()]:
        has_samples = bool(entry.get("samples"))
        shown.add_row(
            queue_name(entry), f"{entry.get('queued', 0):,}", str(entry.get("batch_keys", "-")), _occupancy(entry) or "-",
            share(entry.get("mape") if has_samples else None), share(entry.get("coverage") if has_samples else None),
        )  # fmt: skip
    return shown


def _occupancy(entry: Mapping[str, Any]) -> str:
    """`fast(<100ms):3  ...`: without blanks inside, so that lines end between bins. The boundaries come last if bins are
    left out that hold nothing."""
    occupancy, edges = entry.get("occupancy", ()), [f"{edge:.3g}" for edge in entry.get("edges_ms", ())]
    labels = [str(bin_["bin"]).replace(" ", "") for bin_ in occupancy]
    bounds = ""
    if edges and len(labels) == len(edges) + 1:
        ranges = [f"<{edges[0]}ms", *(f"{low}-{high}ms" for low, high in pairwise(edges)), f">={edges[-1]}ms"]
        labels = [label if label.endswith("ms") else f"{label}({of})" for label, of in zip(labels, ranges, strict=True)]
    elif edges:
        bounds = f"bounds:{'|'.join(edges)}ms"
    counts = [f"{label}:{bin_['queued']:,}" for label, bin_ in zip(labels, occupancy, strict=True)]
    return "  ".join([*counts, bounds] if bounds else counts)


def queue_name(entry: Mapping[str, Any]) -> str:
    mode = entry.get("mode", "batch")
    return str(entry["kernel"]) if mode == "batch" else f"{entry['kernel']} ({mode})"


def sections(body: Mapping[str, Any]) -> list[RenderableType]:
    """What comes after the queues."""
    parts: list[RenderableType] = []
    accounts = [a for a in body.get("accounts", ()) if a.get("queued") or a.get("leased") or a.get("device_s")]
    if accounts:
        parts.append(_accounts(accounts))
    parts += _admission(body.get("admission", {})) + _breakers(body.get("breakers", ())) + _limits(body.get("limits", ()))
    if body.get("events"):
        parts.append(_events(body["events"]))
    return parts + _config(body.get("config", {}))


def _accounts(entries: Entries) -> Table:
    numeric = ("queued", "running", "weight", "share", "device time")
    shown = table("client", *numeric, numeric=numeric)
    for entry in entries:
        shown.add_row(
            str(entry["client"]), f"{entry.get('queued', 0):,}", f"{entry.get('leased', 0):,}", f"{entry.get('weight', 1):g}",
            share(entry.get("share")), milliseconds(1000.0 * entry.get("device_s", 0.0)),
        )  # fmt: skip
    return shown


def _admission(admission: Mapping[str, Any]) -> list[RenderableType]:
    queued_s, closed = float(admission.get("queued_s") or 0.0), admission.get("closed_classes") or ()
    parts = [f"{milliseconds(1000.0 * queued_s)} of work queued"] if queued_s else []
    if closed:
        parts.append(f"closed to new work of priority {', '.join(map(str, closed))}")
    return [Text(f"admission: {'; '.join(parts)}", style="yellow" if closed else "")] if parts else []


def _breakers(entries: Entries) -> list[RenderableType]:
    return [
        Text(f"breaker: {e['kernel']} on {e['worker']} is {e['state'].replace('_', ' ')}{_probe(e)}", style="red")
        for e in entries
        if e.get("state") != "closed"
    ]


def _probe(entry: Mapping[str, Any]) -> str:
    retry_s = entry.get("retry_in_s")
    return "" if retry_s is None else f", tried again in {milliseconds(1000.0 * max(0.0, retry_s))}"


def _limits(entries: Entries) -> list[RenderableType]:
    """One line per kernel and worker: the batch size of each class of time."""
    lines = [
        f"{kernel} on {worker}: " + ", ".join(f"{entry['class']} {entry['limit']}" for entry in group)
        for (kernel, worker), group in groupby(entries, lambda e: (e["kernel"], e["worker"]))
    ]
    if len(lines) > MAX_LIMITS:
        lines[MAX_LIMITS:] = [f"... {len(lines) - MAX_LIMITS} more (--json)"]
    return [Text("\n".join(f"{'' if i else 'batch sizes:':13}{line}" for i, line in enumerate(lines)))] if lines else []


def _events(entries: Entries) -> Table:
    shown = table("ago", "event", "subject", "reason", numeric=("ago",))
    for entry in entries[:MAX_EVENTS]:
        kind = str(entry["kind"]).replace("_", " ")
        shown.add_row(duration(entry.get("age_s", 0.0)), kind, str(entry.get("subject", "")), str(entry.get("reason", "")))
    return shown


def _config(config: Mapping[str, Any]) -> list[RenderableType]:
    parts = list[RenderableType]()
    if config.get("path"):
        parts.append(
            Text(f"configuration: {config['path']}, read {duration(config.get('loaded_age_s') or 0.0)} ago", style="dim")
        )
    if config.get("error"):
        parts.append(Text(f"configuration: the last one that was read is not used: {config['error']}", style="red"))
    return parts

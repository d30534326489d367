"""How durable tasks look on a terminal. Knows their reports and rich; does not know clients."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from penstock.client.cli.figures import milliseconds, size, table

MAX_KEY: Final = 32
_ENDS: Final = ("done", "failed", "dead", "expired", "cancelled")
_COLOURS: Final = {"done": "green", "failed": "red", "dead": "red", "expired": "yellow"}


def render(jobs: Sequence[Mapping[str, Any]], is_dead: bool) -> RenderableType:
    """One per line."""
    if not jobs:
        return Text("nothing has failed" if is_dead else "no durable tasks")
    numeric = ("rows", "done", "failed", "age", "kept for")
    shown = table("id", "key", "client", "kernel", "state", *numeric, numeric=numeric)
    for job in jobs:
        state, num_failed = str(job.get("state", "?")), sum(job.get(name, 0) for name in ("failed", "dead", "expired"))
        shown.add_row(
            str(job["id"])[:8], _clip(key_text(job)), str(job.get("client", "-")), str(job.get("kernel", "-")),
            Text(state, style=_COLOURS.get(state, "")), f"{job.get('rows', 0):,}", f"{job.get('done', 0):,}", f"{num_failed:,}",
            milliseconds(job.get("age_ms")), milliseconds(job.get("expires_in_ms")),
        )  # fmt: skip
    return shown


def key_text(job: Mapping[str, Any]) -> str:
    """A key that is no text is shown as hexadecimal digits."""
    key = job.get("key")
    return "-" if key is None else key.hex() if isinstance(key, bytes) else str(key)


def _clip(text: str) -> str:
    return text if len(text) <= MAX_KEY else f"{text[: MAX_KEY - 1]}…"


def render_one(job: Mapping[str, Any]) -> RenderableType:
    """All that is known of one, its errors with what is known of them."""
    counts = [f"{job[name]:,} {name}" for name in (*_ENDS, "open") if job.get(name)]
    lines = [
        ("id", str(job["id"])), ("key", key_text(job)), ("client", str(job.get("client", "-"))),
        ("kernel", str(job.get("kernel", "-"))), ("state", str(job.get("state", "?"))),
        ("rows", f"{job.get('rows', 0):,} ({', '.join(counts)})"), ("age", milliseconds(job.get("age_ms"))),
        ("kept for", milliseconds(job.get("expires_in_ms"))), ("size", size(int(job.get("bytes", 0)))),
        ("fetched", "yes" if job.get("is_acknowledged") else ""), ("requeue", "can be" if job.get("can_requeue") else ""),
    ]  # fmt: skip
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, text in lines:
        if text not in ("", "-"):
            grid.add_row(name, text)
    return Group(grid, *(part for error in job.get("errors", ()) for part in _error(error)))


def _error(error: Mapping[str, Any]) -> list[RenderableType]:
    rows = ", ".join(str(start) if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in error.get("rows", ()))
    head = Text(f"row {rows}: {error.get('code')}: {error.get('message')}", style="red")
    detail = str(error.get("detail") or "")
    return [head, Padding(Text(detail), (0, 0, 0, 2))] if detail else [head]

"""How open tasks look on a terminal. Knows their reports and rich; does not know clients."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from penstock.client.cli.figures import milliseconds

WIDE: Final = 120
"""From here on the reason stands in the task's line, else below it."""
MAX_SHOWN: Final = 100
_HEADERS: Final = ("id", "client", "kernel", "rows", "state", "pos", "eta", "prio", "cplx")
_NUMERIC: Final = {"rows", "pos", "eta", "prio", "cplx"}


def render(tasks: Sequence[Mapping[str, Any]], width: int) -> RenderableType:
    """One task per line, the most urgent first, with why it waits."""
    if not tasks:
        return Text("no open tasks")
    is_wide = width >= WIDE
    rows = [_cells(task, 20 if is_wide else 10) for task in tasks]
    widths = [max(len(row[i]) for row in (_HEADERS, *rows)) for i in range(len(_HEADERS))]
    parts: list[RenderableType] = [Text(_line(_HEADERS, widths) + ("  why" if is_wide else ""), style="bold")]
    for task, row in zip(tasks, rows, strict=True):
        line, why = _line(row, widths), str(task.get("why") or "")
        if is_wide:
            parts.append(Text(f"{line}  {why}", no_wrap=True, overflow="ellipsis"))
        else:
            parts.append(Text(line, no_wrap=True, overflow="ellipsis"))
            parts += [Padding(Text(why, style="dim"), (0, 0, 0, 2))] if why else []
    if len(tasks) >= MAX_SHOWN:
        parts.append(Text("these are the most urgent; there may be more", style="dim"))
    return Group(*parts)


def _cells(task: Mapping[str, Any], max_name: int) -> tuple[str, ...]:
    complexity = task.get("complexity")
    return (
        str(task.get("id", "?"))[:8], _clip(task.get("client", "-"), max_name), _clip(task.get("kernel", "-"), max_name + 2),
        _count(task.get("rows")), str(task.get("state", "-")), _count(task.get("position")),
        milliseconds(task.get("eta_ms")), str(task.get("priority", "-")), "-" if complexity is None else f"{complexity:.1f}",
    )  # fmt: skip


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(
        cell.rjust(width) if header in _NUMERIC else cell.ljust(width)
        for header, cell, width in zip(_HEADERS, cells, widths, strict=True)
    )


def _clip(name: object, length: int) -> str:
    text = str(name)
    return text if len(text) <= length else text[: length - 1] + "…"


def _count(number: Any) -> str:
    return "-" if number is None else f"{number:,}"


def render_one(task: Mapping[str, Any]) -> RenderableType:
    """All that is known of one task; what a newer broker says besides comes last, as it is."""
    rest = dict(task)
    counts = ", ".join(f"{rest.pop(name):,} {name}" for name in ("queued", "leased", "done") if rest.get(name) is not None)
    rows, deadline_ms, is_kernel_missing = rest.pop("rows", None), rest.pop("deadline_in_ms", None), "is_waiting_for_kernel"
    shown: list[tuple[str, str]] = [
        *((name, str(rest.pop(name))) for name in ("id", "client", "kernel", "state", "why") if rest.get(name) is not None),
        ("rows", "" if rows is None else f"{rows:,} ({counts})" if counts else f"{rows:,}"),
        ("workers", ", ".join(rest.pop("workers", ()))),
        ("position", _rows_before(rest.pop("position", None), rest.pop("ahead", None))),
        ("eta", milliseconds(rest.pop("eta_ms", None))),
        ("alone", milliseconds(rest.pop("alone_ms", None))),
        ("time limit", "none" if deadline_ms is None else f"in {milliseconds(deadline_ms)}"),
        ("age", milliseconds(rest.pop("age_ms", None))),
    ]
    if rest.pop(is_kernel_missing, False):
        shown.append(("waits for", "a worker with its kernel"))
    shown += [(name.replace("_", " "), _plain(value)) for name, value in rest.items() if value is not None]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in shown:
        if text not in ("", "-"):
            table.add_row(name, text)
    return table


def _rows_before(position: Any, ahead: Any) -> str:
    if position is None:
        return "" if ahead is None else f"{ahead:,} rows before it in its queue"
    return f"{position:,} rows before it" + ("" if ahead in (None, position) else f", {ahead:,} of them in its queue")


def _plain(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)

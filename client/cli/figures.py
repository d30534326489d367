"""Numbers and tables as people read them on a terminal. Knows units; does not know what is shown."""

from collections.abc import Sequence

from rich.table import Table


def table(*columns: str, numeric: Sequence[str]) -> Table:
    """An empty table; `numeric` columns are aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return made


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


def milliseconds(value: float | None) -> str:
    """A time that may be short or long."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"
    return f"{value / 1000:.1f} s" if value < 60_000 else duration(value / 1000)


def share(value: float | None) -> str:
    """A part of one, in percent."""
    return "-" if value is None else f"{100 * value:.0f} %"

"""Whether anything grows over a long run: samples of memory, descriptors, queue, disk and latency, a verdict, and a plot.

Flat means: the Theil-Sen slope of the 10 s medians after the warm-up, times the time that they cover, is at most 10 % of
their median and a floor that belongs to the quantity. It is one-sided: what shrinks has not leaked. Knows processes by what
`stage.py` tells; does not know faults but as marks in the plot.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from penstock.client import Client, PenstockError

WINDOW_S = 10.0
SHARE = 0.10
WARM_UP_SHARE, MIN_WARM_UP_S = 0.2, 150.0
MIB = 1 << 20
FLOORS = {"memory": 4.0, "descriptors": 3.0, "p50": 5.0, "p99": 20.0, "open tasks": 20.0, "journal": 4.0}
"""Growth over the whole run that is not told from noise, in the units of the plot: MiB, descriptors, ms, tasks."""
UNITS = {"memory": "MiB", "descriptors": "", "p50": "ms", "p99": "ms", "open tasks": "", "journal": "MiB"}


@dataclass
class Series:
    """One quantity over time: seconds since the start, and values; `name` is "memory broker", say."""

    name: str
    times: list[float]
    values: list[float]

    @property
    def kind(self) -> str:
        return next(kind for kind in FLOORS if self.name.startswith(kind))


@dataclass
class Verdict:
    """`growth` over the time that was looked at, beside the `level` (median) and the growth that is allowed."""

    name: str
    level: float
    growth: float
    allowed: float

    @property
    def is_flat(self) -> bool:
        return self.growth <= self.allowed


def windows(series: Series, seconds: float = WINDOW_S, quantile: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """The middles of its windows that have values, and a quantile of each: `[n]`, `[n]`."""
    times, values = np.asarray(series.times), np.asarray(series.values)
    numbers = (times // seconds).astype(int)
    found = np.unique(numbers)
    return (found + 0.5) * seconds, np.array([np.quantile(values[numbers == number], quantile) for number in found])


def slope(times: np.ndarray, values: np.ndarray) -> float:
    """The median of the slopes between all pairs (Theil 1950, Sen 1968): up to 29 % of the points may be anything."""
    first, second = np.triu_indices(len(times), 1)
    return float(np.median((values[second] - values[first]) / (times[second] - times[first])))


def judge(series: Series, from_s: float) -> Verdict | None:
    """The verdict on what came after the warm-up; None if that is too little (under 5 windows)."""
    times, values = windows(series)
    times, values = times[times >= from_s], values[times >= from_s]
    if len(times) < 5:
        return None
    level = float(np.median(values))
    growth = slope(times, values) * float(times[-1] - times[0])
    return Verdict(series.name, level, growth, SHARE * abs(level) + FLOORS[series.kind])


class Sampler:
    """Looks once a second, in a thread of its own.

    Args:
        pids: name -> process, now; queue_url: where to ask how many tasks are open; journal: a folder.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int | None]], url: str, journal: Path) -> None:
        self._pids = pids
        self._journal = journal
        self._client = Client(url, name="soak", connect_timeout=1.0)
        self._start = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak")
        self.series: dict[str, Series] = {}
        self._lives: dict[str, tuple[int, psutil.Process]] = {}

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            now = time.monotonic() - self._start
            for name, pid in self._pids().items():
                with suppress(psutil.Error):
                    self._process(now, name, pid)
            self._add(now, "journal", _folder_bytes(self._journal) / MIB)
            with suppress(PenstockError, TimeoutError):
                self._add(now, "open tasks", self._client.status(timeout=1.0)["tasks"]["open"])

    def _process(self, now: float, name: str, pid: int | None) -> None:
        if pid is None:
            return
        if name not in self._lives or self._lives[name][0] != pid:
            self._lives[name] = pid, psutil.Process(pid)
        process = self._lives[name][1]
        self._add(now, f"memory {name}", process.memory_info().rss / MIB)
        self._add(now, f"descriptors {name}", process.num_fds())

    def _add(self, now: float, name: str, value: float) -> None:
        series = self.series.setdefault(name, Series(name, [], []))
        series.times.append(now)
        series.values.append(float(value))

    def finished(self, latencies: Sequence[tuple[float, float]]) -> list[Series]:
        """All series, with those of the latencies: (monotonic seconds, ms) of each call."""
        raw = Series("p99", [at - self._start for at, _ in latencies], [ms for _, ms in latencies])
        made = [*self.series.values()]
        for name, quantile in (("p50", 0.5), ("p99", 0.99)):
            times, values = windows(raw, WINDOW_S, quantile)
            made.append(Series(f"{name} of a call", times.tolist(), values.tolist()))
        return made

    @property
    def started_at(self) -> float:
        return self._start


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def warm_up(seconds: float) -> float:
    """How much of a run of so many seconds is not judged."""
    return min(max(WARM_UP_SHARE * seconds, MIN_WARM_UP_S), seconds / 2)


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """For people."""
    lines = [f"{'':26s} {'median':>10s} {'growth':>10s} {'allowed':>10s}"]
    for v in verdicts:
        word = "flat" if v.is_flat else "NOT FLAT"
        lines.append(f"{v.name:26s} {v.level:10.1f} {v.growth:+10.2f} {v.allowed:10.2f}   {word}")
    return lines


def plot(path: Path, series: Sequence[Series], marks: Sequence[float], from_s: float, title: str) -> None:
    """One panel per kind of quantity; faults are ticks at the foot, the warm-up is grey. PNG, SVG or PDF by the name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(series)
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(9, 1.9 * len(panels)), facecolor="white")
    for axis, (label, members) in zip(axes, panels.items(), strict=True):
        _panel(axis, label, members)
        axis.axvspan(0, from_s / 60, color="0.92", zorder=0)
        foot = axis.get_xaxis_transform()
        axis.plot([at / 60 for at in marks], [0.02] * len(marks), "|", color="0.45", markersize=5, transform=foot)
    axes[0].set_title(title, fontsize=10, loc="left")
    axes[-1].set_xlabel("minutes; grey: warm-up, not judged; ticks: faults")
    axes[-1].set_xlim(left=0)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panels(series: Sequence[Series]) -> dict[str, list[Series]]:
    """Workers are a hundred times as large as supervisors: a panel for each."""
    made: dict[str, list[Series]] = {}
    for s in series:
        is_worker = s.name.startswith("memory w")
        label = {"memory": "memory, MiB", "p50": "call, ms", "p99": "call, ms", "journal": "journal, MiB"}.get(s.kind, s.kind)
        made.setdefault(f"workers' {label}" if is_worker else label, []).append(s)
    return made


def _panel(axis: Any, label: str, members: Sequence[Series]) -> None:
    for s in members:
        gaps = np.flatnonzero(np.diff(s.times) > 3 * WINDOW_S) + 1
        x, y = np.insert(np.array(s.times) / 60, gaps, np.nan), np.insert(np.array(s.values), gaps, np.nan)
        axis.plot(x, y, linewidth=1.1, label=s.kind if s.kind in ("p50", "p99") else s.name.removeprefix(f"{s.kind} "))
    axis.set_ylabel(label, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="0.85", linewidth=0.6)
    if label.startswith("call"):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    if len(members) > 1:
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

"""Cells, bins and the plan that says which cells form a bin now.

A *cell* is a narrow class of predicted time (the q95 of a task alone), a *bin* a range of adjacent cells that may share a
batch. Queued work is kept by cell, and a bin is looked up when a worker pulls: moving a boundary touches no task.
Boundaries are learned from how much work fell into each cell (boundaries.py), and move only for a gain that is worth it.

Knows times. Does not know queues, kernels, workers or clocks.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import inf, isfinite, log2, sqrt
from typing import Protocol

import numpy as np

from penstock.broker.scheduling.boundaries import (
    CellCosts,
    Floats,
    all_boundaries,
    equal_mass_boundaries,
    expected_max,
    num_worth,
    optimal_boundaries,
)

__all__ = [
    "CLASSIC_MS", "CLASSIC_NAMES", "BinPlan", "FixedGrid", "Grid", "Histogram", "LogGrid", "all_boundaries",
    "equal_mass_boundaries", "expected_max", "optimal_boundaries",
]  # fmt: skip

CLASSIC_MS = (100.0, 500.0)
CLASSIC_NAMES = ("fast", "medium", "slow")
CELLS_PER_OCTAVE = 8
MAX_OCTAVES = 22
"""Above 2^22 ms, 70 minutes, all tasks are in one cell."""
MIN_ROWS = 200.0
"""Fewer rows than this teach nothing."""
MIN_GAIN = 0.05
"""A boundary moves for more throughput than this, as a share."""
WORTH = 0.02
STILL_WORTH = 0.01
"""One bin more has to add `WORTH` of throughput to be taken, and `STILL_WORTH` to be kept."""


class Grid(Protocol):
    """Cells 0 to num_cells - 1 over all times from 0 to infinity; cell c holds low_ms(c) <= t < low_ms(c + 1)."""

    @property
    def num_cells(self) -> int: ...

    @property
    def first_edges(self) -> tuple[int, ...]:
        """The cells that start a bin, before anything is learned; without cell 0."""

    def cell(self, ms: float) -> int: ...

    def low_ms(self, cell: int) -> float: ...

    def center_ms(self, cell: int) -> float: ...


class _EdgeGrid:
    """Cells between ascending edges in ms."""

    def __init__(self, edges_ms: Sequence[float], first_edges_ms: Sequence[float]) -> None:
        self._edges = [float(edge) for edge in edges_ms]
        self._lows = [0.0, *self._edges, inf]
        self.num_cells = len(self._edges) + 1
        self.first_edges = tuple(self.cell(edge) for edge in first_edges_ms)

    def cell(self, ms: float) -> int:
        """The cell of a time; what is no number belongs to the slowest."""
        return bisect_right(self._edges, ms)

    def low_ms(self, cell: int) -> float:
        """Where a cell starts; infinity for `num_cells`."""
        return self._lows[cell]

    def center_ms(self, cell: int) -> float:
        """A time that stands for the cell: the geometric middle where it has one."""
        low, high = self._lows[cell], self._lows[cell + 1]
        if high == inf:
            return 1.5 * low if low else 1.0
        return sqrt(low * high) if low else high / 2


class FixedGrid(_EdgeGrid):
    """Cells between given boundaries, and every cell a bin: for bins that somebody has set by hand."""

    def __init__(self, edges_ms: Sequence[float]) -> None:
        """Takes boundaries in ascending ms, above 0; none of them: one cell.

        Raises:
            ValueError: boundaries that are not finite, positive and ascending.
        """
        if not all(low < high and isfinite(high) for low, high in pairwise((0.0, *edges_ms))):
            raise ValueError(f"boundaries must be above 0 ms, finite and ascending, not {list(edges_ms)}")
        super().__init__(edges_ms, edges_ms)


class LogGrid(_EdgeGrid):
    """Cells of equal ratio, 8 per octave (9 % wide), from 1 ms up, and one for all below.

    The edges nearest to the classic boundaries are moved onto them, so that the classic classes are exact.
    """

    def __init__(self) -> None:
        edges = [2.0 ** (i / CELLS_PER_OCTAVE) for i in range(1 + CELLS_PER_OCTAVE * MAX_OCTAVES)]
        for classic in CLASSIC_MS:
            edges[round(CELLS_PER_OCTAVE * log2(classic))] = classic
        super().__init__(edges, CLASSIC_MS)


class Histogram:
    """Rows per cell, dealt out to two halves, so that what is learned from one can be tried on the other.

    Past `max_total` all counts are halved: old work fades and the sums stay bounded.
    """

    __slots__ = ("_half", "_other", "_turn", "max_total", "total")

    def __init__(self, num_cells: int, max_total: float = 20_000.0) -> None:
        self._half = [0.0] * num_cells
        self._other = [0.0] * num_cells
        self._turn = 0.0
        self.max_total = max_total
        self.total = 0.0

    @property
    def halves(self) -> tuple[list[float], list[float]]:
        """Counts per cell of either half."""
        return self._half, self._other

    @property
    def counts(self) -> list[float]:
        """Counts per cell."""
        return [a + b for a, b in zip(self._half, self._other, strict=True)]

    def add(self, cell: int, count: float = 1.0) -> None:
        """Note `count` rows of a cell; rows that came together go into one half."""
        # Steps of the golden ratio: a client whose work comes in turns, short and long, fills both halves alike.
        turn = self._turn = (self._turn + 0.6180339887498949) % 1.0
        half = self._half if turn < 0.5 else self._other
        half[cell] += count
        self.total += count
        if self.total > self.max_total:
            self.decay()

    def decay(self) -> None:
        """Halve the counts until they are below the cap again; what is left of under a hundredth of a row is gone."""
        factor = 0.5
        while self.total * factor > self.max_total:
            factor /= 2
        for half in (self._half, self._other):
            half[:] = [count * factor if count * factor >= 0.01 else 0.0 for count in half]
        self.total = sum(self._half) + sum(self._other)


class BinPlan:
    """Which cells form a bin, for every number of bins that the backlog may call for.

    Starts with the classic boundaries at 100 and 500 ms, or those of a `FixedGrid`; with fewer bins the slow ones are one,
    so that fast tasks never wait for them. `learn` is for kernels whose batches last as long as their slowest row:
    where rows add up, bins gain nothing.
    """

    def __init__(self, grid: Grid, max_bins: int) -> None:
        """Takes the most bins that may ever be in use, 1 or more."""
        self.grid = grid
        self.max_bins = max_bins
        self._centers: Floats = np.array([grid.center_ms(cell) for cell in range(grid.num_cells)])
        self._names = _classic_names(grid)
        first = grid.first_edges[: max_bins - 1]
        self._use([first[:num_edges] for num_edges in range(len(first) + 1)])

    def _use(self, edges: Sequence[tuple[int, ...]]) -> None:
        """Take the inner edges, in cells, for 1, 2 ... num_bins bins."""
        self.num_bins = len(edges)
        self._edges = [edges[0], *edges]
        self._ranges = [
            [(low, high) for low, high in pairwise((0, *inner, self.grid.num_cells)) for _ in range(low, high)]
            for inner in self._edges
        ]

    def range(self, cell: int, num_bins: int) -> tuple[int, int]:
        """The bin of a cell as [low cell, high cell), when at most `num_bins` (1 or more) are in use."""
        ranges = self._ranges
        return ranges[num_bins if num_bins < len(ranges) else -1][cell]

    def edges_ms(self, num_bins: int) -> list[float]:
        """The boundaries when at most `num_bins` are in use, ascending ms."""
        return [self.grid.low_ms(edge) for edge in self._edges[min(num_bins, self.num_bins)]]

    def label(self, low: int, high: int) -> str:
        """The name of the bin [low cell, high cell): all, fast, medium, slow, or its times."""
        if low == 0 and high == self.grid.num_cells:
            return "all"
        if (low, high) in self._names:
            return self._names[low, high]
        unit, scale = ("s", 0.001) if self.grid.low_ms(high if low == 0 else low) >= 1000.0 else ("ms", 1.0)
        if low == 0:
            return f"<{scale * self.grid.low_ms(high):.3g} {unit}"
        if high == self.grid.num_cells:
            return f">={scale * self.grid.low_ms(low):.3g} {unit}"
        return f"{scale * self.grid.low_ms(low):.3g}-{scale * self.grid.low_ms(high):.3g} {unit}"

    def learn(self, histogram: Histogram, batch_size: float) -> str | None:
        """Move the boundaries to where they are best for the rows that were seen, if that is worth it.

        Worth is throughput, 1 / sum_i p_i * E[max of B | bin i]. What is best for some rows always looks better on them than
        what was there before, so boundaries learned from one half count as they do on the other. They change, for every
        number of bins at once, when they gain over 5 % on both halves, or when the last bins no longer add 1 % each.

        Returns:
            What changed and why, in a line; None if nothing did.
        """
        if histogram.total < MIN_ROWS or batch_size < 2:
            return None
        half, other = (CellCosts(counts, self._centers, batch_size) for counts in histogram.halves)
        if min(half.num_rows, other.num_rows) < MIN_ROWS / 4:
            return None
        trials = [
            [tried.cost_ms(edges) for edges in learned.best_edges(self.max_bins)]
            for learned, tried in ((half, other), (other, half))
        ]
        costs = [sum(pair) for pair in zip(*trials, strict=True)]
        num_bins = num_worth(costs, WORTH)
        current = self._edges[self.num_bins]
        gain = min(old.cost_ms(current) / trial[num_bins - 1] - 1 for old, trial in zip((other, half), trials, strict=True))
        if gain > MIN_GAIN:
            reason = f"predicted +{100 * gain:.0f} % throughput"
        elif num_worth(costs, STILL_WORTH) < self.num_bins:
            reason = f"another would add under {100 * WORTH:.0f} %"
        else:
            return None
        self._use(CellCosts(histogram.counts, self._centers, batch_size).best_edges(num_bins))
        return f"{_text(self.edges_ms(num_bins))}, {reason}"


def _classic_names(grid: Grid) -> dict[tuple[int, int], str]:
    """fast, medium and slow, for a grid that has the classic boundaries."""
    edges = [grid.cell(classic) for classic in CLASSIC_MS]
    if any(grid.low_ms(edge) != classic for edge, classic in zip(edges, CLASSIC_MS, strict=True)):
        return {}
    return dict(zip(pairwise((0, *edges, grid.num_cells)), CLASSIC_NAMES, strict=True))


def _text(edges_ms: Sequence[float]) -> str:
    """'3 bins: 7.3 and 13.5 ms'."""
    if not edges_ms:
        return "1 bin"
    *first, last = (f"{edge:.3g}" for edge in edges_ms)
    places = f"{', '.join(first)} and {last}" if first else last
    return f"{len(edges_ms) + 1} bins: {places} ms"

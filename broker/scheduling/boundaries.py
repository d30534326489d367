"""Where to cut service times into bins, so that a batch does not wait for one slow member.

A batch takes as long as its slowest member. With bins that hold a share p_i of the work each, a batch of B takes
sum_i p_i * E[max of B | bin i] on average, and that is what the boundaries minimise. Equal shares are best only for
uniform times, where E[max of B in U(a, b)] = (B * b + a) / (B + 1).
Source: Multi-Bin Batching, arXiv 2412.04504. Its equations 8, 10 and 11 print the formula of the minimum; meant is the maximum.

Knows distributions of times. Does not know queues, or when a boundary may move.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRID = 100
"""Boundaries lie on 1 % quantiles, on equal shares for each number of bins, and closer together in the last percent."""


def expected_max(times_sorted: Floats, batch_size: float) -> float:
    """E[max of B] of draws, with replacement, from measured times.

    Args:
        times_sorted: [n] ms, ascending, n >= 1.
        batch_size: B >= 1.

    Raises:
        ValueError: no times.
    """
    num_times = len(times_sorted)
    if num_times == 0:
        raise ValueError("the largest of no times is unknown")
    powers = (np.arange(num_times + 1) / num_times) ** batch_size
    return float(np.diff(powers) @ times_sorted)


def optimal_boundaries(times: Sequence[float], num_bins: int, batch_size: float) -> list[float]:
    """The num_bins - 1 boundaries of least expected batch time, ascending ms; fewer when there are fewer distinct times.

    A boundary b separates t < b from t >= b.
    """
    return all_boundaries(times, num_bins, batch_size)[-1]


def all_boundaries(times: Sequence[float], max_bins: int, batch_size: float) -> list[list[float]]:
    """`optimal_boundaries` for 1, 2 ... max_bins bins in one pass; the first list is empty. About 0.02 s for 20 000 times."""
    values, weights, cumulative = _distinct(times)
    if len(values) <= GRID:
        cuts = np.arange(len(values) + 1)
    else:
        cuts = np.unique(np.concatenate(([0], _nearest_cuts(cumulative, _shares(max_bins, cumulative[-1])), [len(values)])))
    found = best_cuts(bin_costs(values, weights, cuts, batch_size), max_bins)
    return [[_between(values, cuts[block]) for block in blocks] for _, blocks in found]


def equal_mass_boundaries(times: Sequence[float], num_bins: int) -> list[float]:
    """Boundaries that put the same share of the times into every bin, as nearly as ties allow; ascending ms."""
    values, _, cumulative = _distinct(times)
    cuts = np.unique(_nearest_cuts(cumulative, np.arange(1, num_bins) / num_bins))
    return [_between(values, cut) for cut in cuts if 0 < cut < len(values)]


def bin_costs(values: Floats, weights: Floats, cuts: NDArray[np.intp], batch_size: float) -> Floats:
    """What every possible bin adds to the mean batch time: its weight * E[max of B | the bin].

    From one cut to the next, the powers of all starts at once: the (share below)^B of what came before only shrinks by a
    factor, so nothing is summed twice, and where it underflows it counts for nothing.

    Args:
        values: [m] ms, ascending and distinct. weights: [m], above 0.
        cuts: [n + 1] ascending places in `values`, from 0 to m: block i is values[cuts[i]:cuts[i + 1]].

    Returns:
        [n, n + 1]: at [i, j] the bin of blocks i to j - 1; inf where j <= i.
    """
    num_blocks = len(cuts) - 1
    cumulative = np.concatenate(([0.0], np.cumsum(weights)))
    starts = cumulative[cuts]
    costs = np.full((num_blocks, num_blocks + 1), np.inf)
    largest = np.zeros(num_blocks)
    for block, (low, high) in enumerate(pairwise(cuts.tolist())):
        before = starts[: block + 1, None]
        mass = cumulative[high] - before
        powers = ((cumulative[low : high + 1] - before) / mass) ** batch_size
        so_far = largest[: block + 1]
        so_far *= powers[:, 0]
        so_far += np.diff(powers) @ values[low:high]
        costs[: block + 1, block + 1] = mass[:, 0] * so_far
    return costs


def best_cuts(costs: Floats, max_bins: int) -> list[tuple[float, list[int]]]:
    """The cheapest division of n blocks into 1, 2 ... max_bins bins: (cost, the blocks where a new bin starts).

    Dynamic programming: k bins over the first j blocks are k - 1 bins over the first i and one bin of the rest.
    Past n bins the last answer is repeated.

    Args:
        costs: [n, n + 1] as `bin_costs` makes it.
    """
    num_blocks = len(costs)
    if num_blocks == 0:
        return [(0.0, []) for _ in range(max_bins)]
    best = costs[0]
    found = [(float(best[-1]), list[int]())]
    choices = list[NDArray[np.intp]]()
    for _ in range(1, max_bins):
        if len(found) >= num_blocks:
            found.append(found[-1])
            continue
        totals = best[:-1, None] + costs
        choices.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
        found.append((float(best[-1]), _trace(choices, num_blocks)))
    return found


class CellCosts:
    """What any bin of adjacent classes of time, *cells*, would cost for rows of which only the cell was noted."""

    def __init__(self, counts: Sequence[float], centers_ms: Floats, batch_size: float) -> None:
        """Takes rows per cell, and the time that stands for each cell."""
        weights = np.array(counts)
        self.cells = np.flatnonzero(weights)
        self.num_rows = float(weights.sum())
        blocks = np.arange(len(self.cells) + 1)
        self.costs = bin_costs(centers_ms[self.cells], weights[self.cells], blocks, batch_size) / (self.num_rows or 1.0)

    def cost_ms(self, edges: Sequence[int]) -> float:
        """The mean batch time with these edges, in cells; a bin that holds nothing costs nothing."""
        starts = np.searchsorted(self.cells, edges).tolist()
        return sum(float(self.costs[low, high]) for low, high in pairwise((0, *starts, len(self.cells))) if low < high)

    def best_edges(self, max_bins: int) -> list[tuple[int, ...]]:
        """The edges of 1, 2 ... max_bins bins, each in the middle of the empty cells between one bin's rows and the next's."""
        cells = self.cells.tolist()
        found = best_cuts(self.costs, max_bins)
        return [tuple((cells[block - 1] + cells[block] + 1) // 2 for block in blocks) for _, blocks in found]


def num_worth(costs: Sequence[float], least: float) -> int:
    """The largest number of bins that still gains this share over the best of fewer; costs[0] is the cost of one bin."""
    num_bins, best = 1, costs[0]
    for number, cost in enumerate(costs[1:], 2):
        if best / cost - 1 >= least:
            num_bins = number
        best = min(best, cost)
    return num_bins


def _trace(choices: list[NDArray[np.intp]], num_blocks: int) -> list[int]:
    """The starts of the bins, from the last one's back to the second's."""
    blocks = list[int]()
    end = num_blocks
    for choice in reversed(choices):
        end = int(choice[end])
        blocks.append(end)
    return blocks[::-1]


def _distinct(times: Sequence[float]) -> tuple[Floats, Floats, Floats]:
    """(distinct times ascending [m], how often each [m], cumulative counts from 0 [m + 1])."""
    values, counts = np.unique(np.asarray(times, dtype=np.float64), return_counts=True)
    weights = counts.astype(np.float64)
    return values, weights, np.concatenate(([0.0], np.cumsum(weights)))


def _shares(max_bins: int, num_times: float) -> Floats:
    """Shares of the work at which a boundary may lie. A large batch looks far into the tail, so the grid follows it there."""
    per_bins = [np.arange(1, bins) / bins for bins in range(2, max_bins + 1)]
    tail = 1.0 - 0.5 ** np.arange(1, max(2.0, np.ceil(np.log2(num_times / GRID)))) / GRID
    return np.unique(np.concatenate((np.arange(1, GRID) / GRID, tail, *per_bins)))


def _nearest_cuts(cumulative: Floats, shares: Floats) -> NDArray[np.intp]:
    """For every share the place among the distinct times that comes nearest to it."""
    wanted = shares * cumulative[-1]
    after = np.searchsorted(cumulative, wanted)
    is_before_nearer = wanted - cumulative[after - 1] <= cumulative[after] - wanted
    nearest: NDArray[np.intp] = np.where(is_before_nearer, after - 1, after)
    return nearest


def _between(values: Floats, cut: int) -> float:
    """A boundary in the middle between two neighbours, or the upper one where no number lies between."""
    lower, upper = float(values[cut - 1]), float(values[cut])
    middle = lower + (upper - lower) / 2
    return middle if middle > lower else upper

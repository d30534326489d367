"""Bins: boundaries against closed forms and brute force, cells that fit together, and a plan that moves only for a gain."""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from math import inf, nan

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.broker.scheduling.bins import (
    BinPlan,
    FixedGrid,
    Grid,
    Histogram,
    LogGrid,
    all_boundaries,
    equal_mass_boundaries,
    expected_max,
    optimal_boundaries,
)

GRID = LogGrid()
DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, n: rng.uniform(1, 20, n),
    "exponential": lambda rng, n: rng.exponential(10, n),
    "lognormal": lambda rng, n: rng.lognormal(2, 1.5, n),
    "bimodal": lambda rng, n: np.where(rng.random(n) < 0.9, 1.0, 100.0),
    "spread bimodal": lambda rng, n: np.where(rng.random(n) < 0.9, 1.0, 100.0) * rng.uniform(0.9, 1.1, n),
}


def batch_ms(times: Sequence[float] | np.ndarray, boundaries: Sequence[float], batch_size: float) -> float:
    """sum p_i * E[max | bin i], bin by bin."""
    ordered = np.sort(np.asarray(times, dtype=float))
    cuts = [0, *np.searchsorted(ordered, boundaries).tolist(), len(ordered)]
    return sum((b - a) / len(ordered) * expected_max(ordered[a:b], batch_size) for a, b in pairwise(cuts) if a < b)


def filled(times: np.ndarray, grid: Grid = GRID) -> Histogram:
    histogram = Histogram(grid.num_cells)
    for ms in times.tolist():
        histogram.add(grid.cell(ms))
    return histogram


# Expected maxima


@pytest.mark.parametrize("batch_size", [1, 2, 7, 128, 4096])
def test_the_largest_of_a_uniform_sample_is_the_closed_form(batch_size: int) -> None:
    times = np.linspace(3.0, 11.0, 100_001)
    assert expected_max(times, batch_size) == pytest.approx((batch_size * 11.0 + 3.0) / (batch_size + 1), rel=1e-4)


def test_the_largest_of_one_is_the_mean_and_of_many_the_maximum() -> None:
    times = np.array([1.0, 2.0, 2.0, 7.0])
    assert expected_max(times, 1) == pytest.approx(3.0)
    assert expected_max(times, 4096) == pytest.approx(7.0)
    assert expected_max(times, 2) == pytest.approx((1 * 1 + 8 * 2 + 7 * 7) / 16)
    with pytest.raises(ValueError, match="no times"):
        expected_max(np.array([]), 2)


def test_equal_mass_bins_reproduce_the_papers_throughput() -> None:
    """Multi-Bin Batching, theorem 4.2: B / (m + A / k) for U(1, 20) and B = 128."""
    times = np.random.default_rng(3).uniform(1, 20, 50_000)
    for num_bins, throughput in enumerate([6.4475, 8.4342, 9.3996, 9.9703, 10.3472], 1):
        for boundaries in (equal_mass_boundaries(times, num_bins), optimal_boundaries(times, num_bins, 128)):
            assert len(boundaries) == num_bins - 1
            assert 128 / batch_ms(times, boundaries, 128) == pytest.approx(throughput, rel=0.005)
    assert equal_mass_boundaries(times, 3) == pytest.approx([1 + 19 / 3, 1 + 38 / 3], rel=0.01)


# Boundaries


@settings(deadline=None, max_examples=150)
@given(
    times=st.lists(st.floats(0, 1000) | st.sampled_from([1.0, 2.0, 100.0]), min_size=1, max_size=9),
    num_bins=st.integers(1, 5),
    batch_size=st.sampled_from([1, 2, 3, 64, 4096]),
)
@example(times=[5.0] * 4, num_bins=3, batch_size=8)
@example(times=[1.0, 1.0, 1.0, 100.0], num_bins=2, batch_size=64)
@example(times=[0.0, 5e-324], num_bins=2, batch_size=2)
def test_no_set_of_boundaries_is_better(times: list[float], num_bins: int, batch_size: int) -> None:
    distinct = sorted(set(times))
    most = min(num_bins, len(distinct)) - 1
    best = min(batch_ms(times, chosen, batch_size) for chosen in combinations(distinct[1:], most))
    found = optimal_boundaries(times, num_bins, batch_size)
    assert len(found) == most
    assert batch_ms(times, found, batch_size) == pytest.approx(best, rel=1e-9)
    bins = [0, *np.searchsorted(distinct, found).tolist(), len(distinct)]
    assert all(low < high for low, high in pairwise(bins)), "every bin holds something"


def test_one_pass_gives_every_number_of_bins() -> None:
    times = np.random.default_rng(1).lognormal(2, 1, 3000)
    found = all_boundaries(times, 8, 32)
    assert [len(boundaries) for boundaries in found] == list(range(8))
    costs = [batch_ms(times, boundaries, 32) for boundaries in found]
    assert all(more < fewer for fewer, more in pairwise(costs))
    assert all(low < high for boundaries in found for low, high in pairwise(boundaries))
    assert optimal_boundaries(times, 5, 32) == pytest.approx(found[4], rel=0.2)


def test_few_and_equal_times() -> None:
    assert all_boundaries([], 3, 8) == [[], [], []]
    assert all_boundaries([4.0], 3, 8) == [[], [], []]
    assert all_boundaries([1.0, 1.0, 100.0], 3, 8) == [[], [50.5], [50.5]]
    assert equal_mass_boundaries([2.0, 2.0, 2.0], 3) == []
    assert equal_mass_boundaries([1.0, 1.0, 1.0, 9.0], 2) == [5.0]
    close = [1.0, float(np.nextafter(1.0, 2.0))]
    assert optimal_boundaries(close, 2, 8) == [close[1]], "nothing lies between: the upper one separates"


@pytest.mark.parametrize("name", ["uniform", "exponential", "lognormal", "bimodal", "spread bimodal"])
def test_never_worse_than_equal_mass_and_much_better_on_skewed_times(name: str) -> None:
    rng = np.random.default_rng(17)
    seen, fresh = DRAWS[name](rng, 10_000), DRAWS[name](rng, 30_000)
    gains = []
    for batch_size in (2, 16, 256):
        for num_bins, boundaries in enumerate(all_boundaries(seen, 8, batch_size)[1:], 2):
            equal = equal_mass_boundaries(seen, num_bins)
            assert batch_ms(seen, boundaries, batch_size) <= batch_ms(seen, equal, batch_size) * (1 + 1e-12)
            gains.append(batch_ms(fresh, equal, batch_size) / batch_ms(fresh, boundaries, batch_size))
    assert min(gains) > 0.997, "on other rows equal shares may win by no more than the sample's noise"
    if name not in ("uniform", "bimodal"):  # where equal shares are best, and where any cut finds the gap
        assert max(gains) > 1.15
    if name in ("lognormal", "spread bimodal"):
        assert max(gains) > 2


@pytest.mark.parametrize("name", ["uniform", "exponential", "lognormal"])
def test_many_bins_come_near_the_ceiling_and_never_pass_it(name: str) -> None:
    times = DRAWS[name](np.random.default_rng(5), 20_000)
    ceiling = expected_max(np.sort(times), 64) / float(times.mean())
    if name == "exponential":
        assert ceiling == pytest.approx(sum(1 / i for i in range(1, 65)), rel=0.02)  # H_64
    reached = [batch_ms(times, [], 64) / batch_ms(times, found, 64) for found in all_boundaries(times, 32, 64)]
    assert all(fewer < more for fewer, more in pairwise(reached))
    assert 0.85 * ceiling < reached[-1] < ceiling


# Cells


@given(ms=st.floats(0, 1e12))
@example(ms=100.0)
@example(ms=0.0)
@pytest.mark.parametrize("grid", [GRID, FixedGrid([7.5]), FixedGrid([]), FixedGrid([1.0, 100.0, 500.0])])
def test_a_time_lies_in_its_cell(grid: Grid, ms: float) -> None:
    cell = grid.cell(ms)
    assert 0 <= cell < grid.num_cells
    assert grid.low_ms(cell) <= ms < grid.low_ms(cell + 1)


@pytest.mark.parametrize("grid", [GRID, FixedGrid([7.5]), FixedGrid([]), FixedGrid([1.0, 100.0, 500.0])])
def test_cells_are_in_order_and_their_edges_are_their_own(grid: Grid) -> None:
    lows = [grid.low_ms(cell) for cell in range(grid.num_cells + 1)]
    assert lows[0] == 0.0 and lows[-1] == inf
    assert all(low < high for low, high in pairwise(lows))
    for cell in range(grid.num_cells):
        assert grid.cell(lows[cell]) == cell
        assert grid.cell(grid.center_ms(cell)) == cell
    assert grid.cell(inf) == grid.cell(nan) == grid.num_cells - 1


def test_the_log_grid_has_narrow_cells_and_the_classic_boundaries() -> None:
    lows = [GRID.low_ms(cell) for cell in range(1, GRID.num_cells)]
    assert lows[0] == 1.0 and 100.0 in lows and 500.0 in lows
    assert all(1.05 < high / low < 1.13 for low, high in pairwise(lows))
    assert GRID.cell(0.3) == GRID.cell(0.9) == 0


@pytest.mark.parametrize("edges", [[0.0], [-1.0, 2.0], [3.0, 3.0], [5.0, 2.0], [nan], [1.0, inf]])
def test_fixed_edges_must_ascend(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        FixedGrid(edges)


# The histogram


def test_a_histogram_forgets_old_work() -> None:
    histogram = Histogram(3, max_total=100.0)
    for _ in range(90):
        histogram.add(0)
    assert histogram.counts == [90.0, 0.0, 0.0] and histogram.total == 90.0
    for _ in range(2000):
        histogram.add(2)
        assert histogram.total <= 100.0
    assert histogram.counts[0] == 0.0, "faded away, not left as dust"
    assert histogram.total == pytest.approx(sum(histogram.counts)) and histogram.total > 50
    histogram.add(1, 1e6)
    assert histogram.total <= 100.0 and histogram.counts[1] > 49


@pytest.mark.parametrize("period", [1, 2, 3, 4])
def test_work_that_comes_in_turns_fills_both_halves_alike(period: int) -> None:
    histogram = Histogram(period)
    for turn in range(1000):
        histogram.add(turn % period)
    for half, other in zip(*histogram.halves, strict=True):
        assert half == pytest.approx(other, rel=0.1)


# The plan


def ranges(plan: BinPlan, num_bins: int) -> list[tuple[int, int]]:
    """The distinct bins, in order of their cells."""
    return sorted({plan.range(cell, num_bins) for cell in range(plan.grid.num_cells)})


def test_a_plan_starts_with_the_classic_classes() -> None:
    plan = BinPlan(GRID, 8)
    assert plan.num_bins == 3
    assert plan.edges_ms(3) == plan.edges_ms(8) == [100.0, 500.0]
    assert plan.edges_ms(2) == [100.0] and plan.edges_ms(1) == []
    assert [plan.label(*cells) for cells in ranges(plan, 3)] == ["fast", "medium", "slow"]
    assert [plan.label(*cells) for cells in ranges(plan, 2)] == ["fast", ">=100 ms"]
    assert [plan.label(*cells) for cells in ranges(plan, 1)] == ["all"]
    assert plan.label(*plan.range(GRID.cell(99.9), 8)) == "fast"
    assert plan.label(*plan.range(GRID.cell(100.0), 8)) == "medium"
    assert plan.label(0, GRID.cell(8.0)) == "<8 ms"
    assert plan.label(GRID.cell(8.0), GRID.cell(16.0)) == "8-16 ms"
    assert BinPlan(GRID, 2).num_bins == 2 and BinPlan(GRID, 1).edges_ms(9) == []


def test_the_cells_of_a_fixed_grid_are_its_bins() -> None:
    grid = FixedGrid([7.0, 14.0])
    plan = BinPlan(grid, 5)
    assert plan.num_bins == 3
    assert [plan.range(cell, 3) for cell in range(3)] == [(0, 1), (1, 2), (2, 3)]
    assert [plan.range(cell, 2) for cell in range(3)] == [(0, 1), (1, 3), (1, 3)]
    assert [plan.label(*cells) for cells in ranges(plan, 3)] == ["<7 ms", "7-14 ms", ">=14 ms"]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    name=st.sampled_from(sorted(DRAWS)),
    max_bins=st.integers(1, 8),
    batch_size=st.sampled_from([1, 2, 64, 4096]),
)
def test_bins_cover_every_cell_once(seed: int, name: str, max_bins: int, batch_size: int) -> None:
    plan = BinPlan(GRID, max_bins)
    plan.learn(filled(DRAWS[name](np.random.default_rng(seed), 300)), batch_size)
    assert 1 <= plan.num_bins <= max_bins
    for num_bins in range(1, max_bins + 2):
        bins = ranges(plan, num_bins)
        assert len(bins) == min(num_bins, plan.num_bins)
        assert bins[0][0] == 0 and bins[-1][1] == GRID.num_cells
        assert all(low[1] == high[0] for low, high in pairwise(bins)), "no gap, no overlap"
        assert all(plan.range(cell, num_bins) == (low, high) for low, high in bins for cell in range(low, high))
        assert plan.edges_ms(num_bins) == [GRID.low_ms(low) for low, _ in bins[1:]]


def test_a_plan_learns_what_is_best_and_says_so() -> None:
    plan = BinPlan(GRID, 3)
    times = DRAWS["uniform"](np.random.default_rng(2), 5000)
    said = plan.learn(filled(times), 128)
    assert plan.edges_ms(3) == pytest.approx([7.33, 13.67], rel=0.1), "within a cell"
    assert plan.edges_ms(2) == pytest.approx([10.5], rel=0.1)
    low, high = plan.edges_ms(3)
    assert said is not None
    assert said.startswith(f"3 bins: {low:.3g} and {high:.3g} ms, predicted +") and said.endswith(" % throughput")
    gain = batch_ms(times, [], 128) / batch_ms(times, plan.edges_ms(3), 128) - 1
    assert float(said.split("+")[1].split()[0]) == pytest.approx(100 * gain, abs=3)


@pytest.mark.parametrize("name", sorted(DRAWS))
@pytest.mark.parametrize("batch_size", [8, 64])
def test_noise_moves_nothing_and_a_change_of_scale_does(name: str, batch_size: int) -> None:
    rng = np.random.default_rng(23)
    plan, histogram = BinPlan(GRID, 8), Histogram(GRID.num_cells)

    def work(num_rounds: int, scale: float) -> list[str | None]:
        said = []
        for _ in range(num_rounds):
            for ms in (scale * DRAWS[name](rng, 2000)).tolist():
                histogram.add(GRID.cell(ms))
            said.append(plan.learn(histogram, batch_size))
        return said

    assert any(work(10, 1.0))
    before = plan.edges_ms(2)
    assert work(20, 1.0) == [None] * 20
    # Twice as long is 8 % for lognormal times, no more than their noise; and no loss while a boundary stays in the gap.
    assert any(work(15, {"lognormal": 4.0, "bimodal": 20.0}.get(name, 2.0)))
    assert plan.edges_ms(2) != before


def test_few_rows_are_not_taken_for_more_than_they_say() -> None:
    """On the rows that they were learned from, new boundaries would look over 5 % better in two thirds of these rounds."""
    rng = np.random.default_rng(29)
    num_moves = 0
    for _ in range(20):
        plan = BinPlan(GRID, 8)
        assert plan.learn(filled(DRAWS["lognormal"](rng, 250)), 16) is not None
        num_moves += plan.learn(filled(DRAWS["lognormal"](rng, 250)), 16) is not None
    assert num_moves <= 7


def test_nothing_is_learned_from_little_or_for_single_rows() -> None:
    plan = BinPlan(GRID, 8)
    times = DRAWS["lognormal"](np.random.default_rng(4), 1000)
    assert plan.learn(filled(times[:199]), 64) is None
    assert plan.learn(filled(times), 1) is None
    one_run = Histogram(GRID.num_cells)
    one_run.add(5, 300.0)
    assert plan.learn(one_run, 64) is None, "nothing to try it on"
    assert plan.edges_ms(3) == [100.0, 500.0]
    assert plan.learn(filled(times), 64) is not None


def test_bins_that_gain_nothing_are_given_up() -> None:
    plan = BinPlan(GRID, 8)
    assert plan.learn(filled(np.full(1000, 10.0)), 64) == "1 bin, another would add under 2 %"
    assert plan.learn(filled(np.full(1000, 10.0)), 64) is None
    said = plan.learn(filled(DRAWS["bimodal"](np.random.default_rng(6), 2000)), 64)
    assert said is not None and said.startswith("2 bins: ")
    low, high = (GRID.cell(ms) for ms in (1.0, 100.0))
    assert plan.range(low, 8) == (0, GRID.cell(plan.edges_ms(2)[0])) and plan.range(high, 8)[1] == GRID.num_cells
    assert 8 < plan.edges_ms(2)[0] < 12, "in the middle of the gap"

"""The verdict of a soak: noise and outliers are flat, a leak is seen, and the plot is made of what there is."""

from pathlib import Path

import numpy as np
import pytest
from soak import FLOORS, Series, judge, plot, slope, warm_up, windows

SECONDS = 1200
RANDOM = np.random.default_rng(0)


def series(name: str, values: np.ndarray) -> Series:
    return Series(name, list(range(len(values))), values.tolist())


def noise(level: float, spread: float) -> np.ndarray:
    """With one outlier in ten, ten times as large."""
    values = level + spread * RANDOM.standard_normal(SECONDS)
    values[RANDOM.random(SECONDS) < 0.1] *= 10
    return values


@pytest.mark.parametrize("name", ["memory broker", "descriptors broker", "p99 of a call", "open tasks", "journal"])
def test_noise_is_flat_and_a_leak_of_a_quarter_is_not(name: str) -> None:
    level = 20 * next(floor for kind, floor in FLOORS.items() if name.startswith(kind))
    steady = series(name, noise(level, 0.1 * level))
    leak = series(name, noise(level, 0.1 * level) + np.linspace(0, 0.33 * level, SECONDS))
    steady_verdict, leak_verdict = judge(steady, 240.0), judge(leak, 240.0)
    assert steady_verdict is not None
    assert steady_verdict.is_flat
    assert leak_verdict is not None
    assert not leak_verdict.is_flat
    assert leak_verdict.growth == pytest.approx(0.33 * level * 0.8, rel=0.2)


def test_a_small_leak_of_descriptors_is_seen() -> None:
    """One in two minutes, beside forty that stay."""
    verdict = judge(series("descriptors broker", 40 + np.arange(SECONDS) // 120), 240.0)
    assert verdict is not None
    assert not verdict.is_flat


def test_what_shrinks_is_flat() -> None:
    verdict = judge(series("memory broker", np.linspace(100, 50, SECONDS)), 240.0)
    assert verdict is not None
    assert verdict.is_flat


def test_the_warm_up_is_not_judged() -> None:
    values = np.concatenate([np.linspace(10, 100, 240), np.full(960, 100.0)])
    from_start, after = judge(series("memory broker", values), 0.0), judge(series("memory broker", values), 240.0)
    assert from_start is not None
    assert after is not None
    assert after.growth == 0.0
    assert warm_up(1200) == 240.0
    assert warm_up(60) == 30.0


def test_too_little_is_not_judged() -> None:
    assert judge(series("memory broker", np.ones(40)), 0.0) is None
    assert judge(Series("memory broker", [], []), 0.0) is None


def test_slopes_and_windows() -> None:
    times = np.arange(10.0)
    assert slope(times, 3 * times + 1) == pytest.approx(3.0)
    middles, tops = windows(Series("p99", [0, 1, 2, 25, 26], [1, 2, 3, 10, 20]), 10.0, 1.0)
    assert middles.tolist() == [5.0, 25.0]
    assert tops.tolist() == [3.0, 20.0]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"soak.{ending}"
    names = ("memory broker", "memory w0", "open tasks", "p50 of a call", "p99 of a call")
    found = [series(name, noise(50, 1)) for name in names]
    plot(path, found, [30.0, 60.0], 240.0, "a plot")
    assert path.stat().st_size > 5000

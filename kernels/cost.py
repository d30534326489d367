"""Fits the linear cost form to a user's cost function.

Knows least squares over sampled terms; does not know what a term means. The broker evaluates the fitted form, never
the function.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.errors import SpecError

SAMPLES = (1.0, 4.0, 16.0, 256.0, 4096.0, 65536.0)
"""Where each term is sampled, clipped to its range."""


def fit_cost(
    name: str, function: Callable[[dict[str, float]], float], terms: Mapping[str, tuple[float, float]]
) -> tuple[float, dict[str, float]]:
    """(base_ms, {term: ms per unit}) nearest to `function`, all of them 0 or more.

    The function is called with a dict that holds every one of `terms`: once with all at their smallest value, once per
    sample with one term varied, once per sample with all varied together. The residuals are weighted by the inverse of
    the values, so that small tasks count as much as large ones; a function that is linear is reproduced exactly.
    Raises SpecError if it raises, or returns anything but finite milliseconds of 0 or more.
    """
    names = list(terms)
    points = _sample_points(names, terms)
    values = np.array([_evaluate(name, function, dict(zip(names, point, strict=True))) for point in points])
    weights = 1.0 / np.maximum(values, max(values.max() * 1e-6, 1e-12))
    system = np.column_stack([np.ones(len(points)), np.array(points).reshape(len(points), len(names))])
    solution = _non_negative(system * weights[:, None], values * weights)
    return float(solution[0]), {term: float(slope) for term, slope in zip(names, solution[1:], strict=True) if slope}


def _sample_points(names: list[str], terms: Mapping[str, tuple[float, float]]) -> list[list[float]]:
    low = [terms[name][0] for name in names]
    clipped = [[min(max(value, terms[name][0]), terms[name][1]) for name in names] for value in SAMPLES]
    points = [low]
    for column in range(len(names)):
        points += [[*low[:column], row[column], *low[column + 1 :]] for row in clipped]
    return points + clipped


def _evaluate(name: str, function: Callable[[dict[str, float]], float], features: dict[str, float]) -> float:
    try:
        value = function(dict(features))
    except Exception as error:
        raise SpecError(f"kernel {name!r}: its cost function raised {error!r} for {features}") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise SpecError(
            f"kernel {name!r}: its cost function must return milliseconds of 0 or more; it returned {value!r} for {features}"
        )
    return float(value)


def _non_negative(system: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares with the most negative column dropped until none is; columns scaled for condition."""
    scale = np.maximum(np.abs(system).max(axis=0), 1e-300)
    active = np.ones(system.shape[1], dtype=bool)
    solution = np.zeros(system.shape[1])
    while active.any():
        part, *_ = np.linalg.lstsq(system[:, active] / scale[active], target, rcond=None)
        solution[:] = 0.0
        solution[active] = part / scale[active]
        if not (solution < 0).any():
            break
        active[np.argmin(solution * scale)] = False
    solution[np.abs(solution * scale) < 1e-12 * max(np.abs(target).max(), 1e-300)] = 0.0
    return solution

"""Relative recursive least squares on [1, bytes, cost, rows]: milliseconds from what a batch is.

Features and time are divided by the prediction, so that short and long work count alike. It forgets only in the direction
of the sample (Kulhavy 1987; Bittanti, Bolzern, Campi 1990), so that a kernel that is always called alike winds up nothing
and unlearns nothing about other sizes. Coefficients stay 0 or more: a prediction grows with its features and is never
negative, also far from what was seen.

Knows numbers. Does not know kernels, corrections or noise: what is too far off to be true, the caller has cut.
"""

import math
from collections.abc import Sequence
from typing import Any

FORGETTING = 0.995
MIN_MS, MAX_MS = 1e-3, 1e9
_FIRST_VARIANCES = (0.1, 0.3, 1.0, 0.3)
"""Where the samples do not tell cost and the rest apart, the time goes to the cost."""

USUAL_ROWS = 32.0
"""Tasks that came one by one say little about what a row more costs: their time is not the row's."""

Four = tuple[float, float, float, float]
Ten = tuple[float, float, float, float, float, float, float, float, float, float]
Sample = tuple[float, float, int, float]
"""(cost, bytes, rows, milliseconds) of a batch."""


class Linear:
    """ms = fixed + per_byte * bytes + per_ms * cost + per_row * rows.

    Attributes:
        slopes: these four.
    """

    __slots__ = ("_covariance", "_theta", "_units", "slopes")

    def __init__(self, samples: Sequence[Sample] = ()) -> None:
        """Begins with time in proportion to the cost, and goes over the first samples twice."""
        self._covariance = _diagonal()
        self._theta: Four = (0.0, 0.0, 1.0, 0.0)
        self._units: Four = (1.0, 0.0, 1.0, 0.0)
        self.slopes: Four = (0.0, 0.0, 1.0, 0.0)
        if not samples:
            return
        mean_ms = math.exp(_mean([math.log(ms) for *_, ms in samples]))
        costs, sizes, rows, _ = (_mean(column) for column in zip(*samples, strict=True))
        ratio = math.exp(_mean([math.log(ms / cost) for cost, _, _, ms in samples]))
        # A feature times its unit is the usual time: so that coefficients compare, and a feature that is always 0 stays out.
        rows = max(rows, USUAL_ROWS)
        a, b, c, d = (mean_ms / mean if mean > 1e-9 else 0.0 for mean in (1.0, sizes, costs, rows))
        self._units, self._theta, self.slopes = (a, b, c, d), (0.0, 0.0, ratio / c, 0.0), (0.0, 0.0, ratio, 0.0)
        for cost, num_bytes, num_rows, ms in [*samples, *samples]:
            base_ms = self.ms(cost, num_bytes, num_rows)
            self.learn(cost, num_bytes, num_rows, base_ms, math.log(ms / base_ms))

    def copy(self) -> "Linear":
        made = Linear()
        made._covariance, made._theta, made._units, made.slopes = self._covariance, self._theta, self._units, self.slopes
        return made

    def ms(self, cost_ms: float, num_bytes: float, num_rows: int) -> float:
        """MIN_MS to MAX_MS."""
        fixed, per_byte, per_ms, per_row = self.slopes
        ms = fixed + per_byte * num_bytes + per_ms * cost_ms + per_row * num_rows
        return ms if MIN_MS <= ms <= MAX_MS else (MIN_MS if ms < MIN_MS else MAX_MS)

    def learn(self, cost_ms: float, num_bytes: float, num_rows: int, base_ms: float, residual: float) -> None:
        """One step from `base_ms`, what `ms` says, towards exp(residual) times that; f, P and theta as in any textbook."""
        u0, u1, u2, u3 = self._units
        f0, f1, f2, f3 = u0 / base_ms, u1 * num_bytes / base_ms, u2 * cost_ms / base_ms, u3 * num_rows / base_ms
        a, b, c, d, e, f, g, h, i, j = self._covariance
        g0 = a * f0 + b * f1 + c * f2 + d * f3
        g1 = b * f0 + e * f1 + f * f2 + g * f3
        g2 = c * f0 + f * f1 + h * f2 + i * f3
        g3 = d * f0 + g * f1 + i * f2 + j * f3
        r = f0 * g0 + f1 * g1 + f2 * g2 + f3 * g3
        if not 1e-12 < r < 1e12:
            if not 0.0 <= r < 1e12:  # rounding has made a variance negative, or a feature is out of all bounds
                self._covariance = _diagonal()
            return
        # Upwards the residual counts as its log, so that no single sample multiplies the coefficients.
        k = (residual if residual > 0.0 else math.expm1(residual)) / (1.0 + r)
        m = (FORGETTING - (1.0 - FORGETTING) / r) / (FORGETTING * (1.0 + r))
        self._covariance = covariance = (
            a - m * g0 * g0, b - m * g0 * g1, c - m * g0 * g2, d - m * g0 * g3,
            e - m * g1 * g1, f - m * g1 * g2, g - m * g1 * g3,
            h - m * g2 * g2, i - m * g2 * g3, j - m * g3 * g3,
        )  # fmt: skip
        t0, t1, t2, t3 = self._theta
        theta = (t0 + k * g0, t1 + k * g1, t2 + k * g2, t3 + k * g3)
        if min(theta) < 0.0:
            theta = _not_negative(theta, covariance)
        self._theta = theta
        self.slopes = (theta[0] * u0, theta[1] * u1, theta[2] * u2, theta[3] * u3)

    def dump(self) -> list[list[float]]:
        return [list(map(short, self._theta)), list(map(short, self._units)), [short(x, 4) for x in self._covariance]]

    @classmethod
    def restore(cls, saved: Any) -> "Linear":
        """Raises ValueError, TypeError for what `dump` never made."""
        theta, units, covariance = saved
        made = cls()
        made._theta, made._units = _four(theta), _four(units)
        made._covariance = tuple(map(finite, covariance))  # type: ignore[assignment]
        if len(covariance) != len(_diagonal()):
            raise ValueError("a covariance has ten numbers")
        a, b, c, d = (t * u for t, u in zip(made._theta, made._units, strict=True))
        made.slopes = (a, b, c, d)
        return made


def _diagonal() -> Ten:
    a, e, h, j = _FIRST_VARIANCES
    return (a, 0.0, 0.0, 0.0, e, 0.0, 0.0, h, 0.0, j)


_ROWS = ((0, 1, 2, 3), (1, 4, 5, 6), (2, 5, 7, 8), (3, 6, 8, 9))
"""Where row i of the symmetric matrix stands in its ten numbers."""


def _not_negative(theta: Four, covariance: Ten) -> Four:
    """The point without a negative coordinate that costs least in fit, one coordinate after the other."""
    moved = list(theta)
    for _ in range(2):
        for i, row in enumerate(_ROWS):
            variance = covariance[row[i]]
            if moved[i] < 0.0 and variance > 0.0:
                share = moved[i] / variance
                for k, place in enumerate(row):
                    moved[k] -= covariance[place] * share
    a, b, c, d = (max(value, 0.0) for value in moved)
    return a, b, c, d


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _four(values: Any) -> Four:
    a, b, c, d = map(finite, values)
    if min(a, b, c, d) < 0.0:
        raise ValueError("a coefficient is negative")
    return a, b, c, d


def finite(value: Any) -> float:
    """A number from a file. Raises ValueError, TypeError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} where a finite number belongs")
    return number


def short(value: float, digits: int = 7) -> float:
    """A few digits, for a file."""
    return float(f"{value:.{digits}g}")

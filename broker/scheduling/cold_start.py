"""Predictions before there is a model: the declared cost, then a mean ratio to it per octave of cost.

Knows costs and the first measured times. Does not know what comes after it.
"""

import math
from typing import Any

from penstock.broker.scheduling.linear import MAX_MS, MIN_MS, Sample, finite, short

MIN_COST_MS, MAX_COST_MS = 1e-2, 1e12
MAX_BYTES = 1e15
NUM_FIRST = 20
"""Samples until there is a model."""
_GAIN, _OVERALL_GAIN = 0.2, 0.1


class ColdStart:
    """The first samples of a kernel on a worker."""

    __slots__ = ("_octaves", "_ratio", "samples")

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._octaves: dict[int, list[float]] = {}
        self._ratio = 1.0

    def copy(self) -> "ColdStart":
        made = ColdStart()
        made.samples, made._ratio = self.samples[:], self._ratio
        made._octaves = {octave: entry[:] for octave, entry in self._octaves.items()}
        return made

    @property
    def is_over(self) -> bool:
        return len(self.samples) >= NUM_FIRST

    def predict(self, cost_ms: float) -> float:
        """Milliseconds: the cost times the mean ratio of its octave; where that is unknown, of all; at first, the cost."""
        entry = self._octaves.get(math.frexp(cost_ms)[1])
        return min(max(cost_ms * (self._ratio if entry is None else entry[0]), MIN_MS), MAX_MS)

    def learn(self, sample: Sample) -> None:
        cost_ms, *_, ms = sample
        self.samples.append(sample)
        ratio = ms / cost_ms
        entry = self._octaves.setdefault(math.frexp(cost_ms)[1], [ratio, 0.0])
        entry[1] += 1.0
        entry[0] += max(1.0 / entry[1], _GAIN) * (ratio - entry[0])
        self._ratio += max(1.0 / len(self.samples), _OVERALL_GAIN) * (ratio - self._ratio)

    def dump(self) -> list[list[float]]:
        return [[short(x) for x in sample] for sample in self.samples]

    @classmethod
    def restore(cls, saved: Any) -> "ColdStart":
        """Raises ValueError, TypeError for what `dump` never made."""
        made = cls()
        for cost_ms, num_bytes, num_rows, ms in saved[: NUM_FIRST - 1]:
            ms = min(max(finite(ms), MIN_MS), MAX_MS)
            made.learn((tame_cost(finite(cost_ms)), tame_bytes(finite(num_bytes)), max(int(num_rows), 1), ms))
        return made


def tame_cost(cost_ms: float) -> float:
    """A declared cost as a positive finite number; what is none counts as the least."""
    return min(max(cost_ms, MIN_COST_MS), MAX_COST_MS) if cost_ms == cost_ms else MIN_COST_MS


def tame_bytes(num_bytes: float) -> float:
    """A size as a finite number of 0 or more; what is none counts as 0."""
    return min(max(num_bytes, 0.0), MAX_BYTES) if num_bytes == num_bytes else 0.0

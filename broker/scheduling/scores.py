"""How good predictions are, scored before they are learned from; and what they have to beat.

Knows predicted and measured milliseconds. Does not know where predictions come from.
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable, Sequence

CLASSIC_MS = (100.0, 500.0)
"""Between fast, medium and slow."""
MEMORY = 200.0
"""Batches that the figures go back, about."""


class Scores:
    """Decayed figures over the last batches: what a prequential test says now.

    Attributes:
        num_batches: ever scored.
        mape: mean of |measured - predicted| / measured.
        bias: mean of log(predicted / measured): above 0 when predictions are too high.
        coverage: share of times not above the predicted q95; 0.95 is right.
        bin_accuracy: share whose q95 was in the bin of the measured time.
        faster: share whose q95 was in a faster bin: the ones that spoil a batch.
        last: (predicted mean, predicted q95, measured), or None.
    """

    __slots__ = ("bias", "bin_accuracy", "coverage", "faster", "last", "mape", "num_batches")

    def __init__(self) -> None:
        self.num_batches = 0
        self.mape = self.bias = self.coverage = self.bin_accuracy = self.faster = 0.0
        self.last: tuple[float, float, float] | None = None

    def add(self, mean_ms: float, q95_ms: float, measured_ms: float, edges_ms: Sequence[float] = CLASSIC_MS) -> None:
        """Score one prediction; all times above 0, `edges_ms` ascending."""
        self.num_batches += 1
        gain = max(1.0 / self.num_batches, 1.0 / MEMORY)
        predicted_bin, measured_bin = bisect_right(edges_ms, q95_ms), bisect_right(edges_ms, measured_ms)
        self.mape += gain * (abs(measured_ms - mean_ms) / measured_ms - self.mape)
        self.bias += gain * (math.log(mean_ms / measured_ms) - self.bias)
        self.coverage += gain * ((measured_ms <= q95_ms) - self.coverage)
        self.bin_accuracy += gain * ((predicted_bin == measured_bin) - self.bin_accuracy)
        self.faster += gain * ((predicted_bin < measured_bin) - self.faster)
        self.last = (mean_ms, q95_ms, measured_ms)

    def report(self) -> dict[str, float | list[float] | None]:
        """All figures by name; times in ms."""
        return {
            "batches": self.num_batches, "mape": self.mape, "bias": self.bias, "coverage": self.coverage,
            "bin_accuracy": self.bin_accuracy, "faster": self.faster, "last": list(self.last) if self.last else None,
        }  # fmt: skip


class Ranks:
    """Where a time stands among all recent ones, as a score from 1 to 10: 1 + 9 * its rank in a decayed log-histogram.

    Before anything is known, the histogram is one of a single time spread evenly over 0.1 ms to 100 s.
    """

    LOW_LOG2, PER_OCTAVE, NUM_CELLS = -10, 4, 160
    FADE = 1.001
    """Weight of a time over that of the one before it."""

    def __init__(self) -> None:
        first, last = self._cell(0.1), self._cell(1e5)
        self.counts = [0.0] * self.NUM_CELLS
        for cell in range(first, last + 1):
            self.counts[cell] = 1.0 / (last + 1 - first)
        self._weight = 1.0

    def _cell(self, ms: float) -> int:
        place = (math.log2(ms) - self.LOW_LOG2) * self.PER_OCTAVE if ms > 0.0 else 0.0
        return int(min(max(place, 0.0), self.NUM_CELLS - 1))

    def add(self, ms: float) -> None:
        self._weight *= self.FADE
        if self._weight > 1e9:
            self.counts = [count / self._weight for count in self.counts]
            self._weight = 1.0
        self.counts[self._cell(ms)] += self._weight

    def score(self, ms: float) -> float:
        """1 to 10; times in the same quarter octave score the same."""
        cell = self._cell(ms)
        below = sum(self.counts[:cell]) + 0.5 * self.counts[cell]
        return 1.0 + 9.0 * below / sum(self.counts)

    def dump(self) -> dict[str, float]:
        """Cell -> share of the total, where there is any."""
        total = sum(self.counts)
        shares = {str(cell): round(count / total, 6) for cell, count in enumerate(self.counts)}
        return {cell: share for cell, share in shares.items() if share}

    def restore(self, saved: dict[str, float]) -> None:
        """The inverse; worth as many times as the histogram goes back. Raises ValueError, TypeError, AttributeError."""
        counts = [0.0] * self.NUM_CELLS
        for cell, share in saved.items():
            if not (0 <= int(cell) < self.NUM_CELLS and 0.0 <= share <= 1.0):
                raise ValueError(f"the histogram of times has no cell {cell} or share {share}")
            counts[int(cell)] = share / (self.FADE - 1.0)
        if sum(counts) > 0.0:
            self.counts, self._weight = counts, 1.0


# --- what a prediction has to beat: `predict` a batch's ms (None: no idea yet), then `learn` what it took --------------


class LastValue:
    """What the last batch of the key took."""

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}

    def predict(self, key: Hashable, cost_ms: float) -> float | None:
        return self._last.get(key)

    def learn(self, key: Hashable, cost_ms: float, measured_ms: float) -> None:
        self._last[key] = measured_ms


class BucketMean:
    """A moving average per key and octave of cost."""

    def __init__(self, gain: float = 0.1) -> None:
        self._gain = gain
        self._means: dict[Hashable, float] = {}

    def predict(self, key: Hashable, cost_ms: float) -> float | None:
        return self._means.get((key, math.frexp(cost_ms)[1]))

    def learn(self, key: Hashable, cost_ms: float, measured_ms: float) -> None:
        bucket = (key, math.frexp(cost_ms)[1])
        mean = self._means.get(bucket, measured_ms)
        self._means[bucket] = mean + self._gain * (measured_ms - mean)


class MaxOfTen:
    """The maximum of the last ten of the key and octave of cost (Clockwork, OSDI 2020): an upper bound, no mean.

    On independent equal times the next one exceeds it one time in eleven.
    """

    def __init__(self) -> None:
        self._times: dict[Hashable, deque[float]] = {}

    def predict(self, key: Hashable, cost_ms: float) -> float | None:
        times = self._times.get((key, math.frexp(cost_ms)[1]))
        return max(times) if times else None

    def learn(self, key: Hashable, cost_ms: float, measured_ms: float) -> None:
        self._times.setdefault((key, math.frexp(cost_ms)[1]), deque(maxlen=10)).append(measured_ms)

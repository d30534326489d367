"""What a linear model leaves out: a factor per batch key and cost, the times of batches that come again, and the spread.

Everything is in logs, so that a correction multiplies. Knows costs, numbers of rows and residuals. Does not know the
model that it corrects, nor kernels.
"""

import math
from typing import Any

from penstock.broker.scheduling.linear import finite, short

SPLIT_MS = 4.0
"""Between short and long times."""
NUM_FEW = 20
GAIN = 0.1
"""Weight of a new residual once there are ten."""
PRIOR, ROWS_PRIOR = 0.3, 5.0
MAX_LOG = 30.0
MAX_KNOTS = 64
NUM_NEW = 6.0
"""Samples of a knot before residuals are clipped."""
NUM_MEDIAN = 7
"""Times of a batch of which the median is taken, before a moving mean goes on from there: first calls take long."""
FAR, NUM_SHORTER, NUM_LONGER = 2.0, 3.0, 4.0
"""So many times in a row that are so many bounds too short, or too long: the batch is not what it was, and they begin anew.
Neighbours add time, so that longer ones have to be more."""
NUM_TRUSTED = 3
"""Times after which a batch's own are believed."""
MAX_TIMES = 32
MAX_TIMES_SAVED = 4


class Quantile:
    """A factor over the mean that 95 of 100 times stay below, whatever their distribution: a stochastic quantile.

    The log of the factor rises by a share of itself when it is exceeded, and falls by a nineteenth of that share when it is
    not: it can only stay where it is if it is exceeded one time in twenty. Source: Robbins and Monro 1951.
    """

    __slots__ = ("_log", "count", "factor")
    SHARE, GAIN = 0.95, 0.2
    LOW, HIGH = 0.005, 3.0

    def __init__(self, factor: float = 2.0, count: int = 0) -> None:
        """Takes a first guess above 0, and how many times that one is the result of."""
        self.count = count
        self._log = min(max(math.log(factor), self.LOW), self.HIGH)
        self.factor = math.exp(self._log)

    def copy(self) -> "Quantile":
        return Quantile(self.factor, self.count)

    def learn(self, ratio: float) -> None:
        """Take in log(measured / predicted mean)."""
        self.count = count = self.count + 1
        gain = 1.0 / (count + 1) if count < 4 else self.GAIN
        log = self._log * math.exp(gain * self.SHARE if ratio > self._log else gain * (self.SHARE - 1.0))
        if self.LOW <= log <= self.HIGH:
            self._log = log
            self.factor = math.exp(log)


class Spread:
    """The q95 of short times and of long ones: what a neighbour adds is a larger part of a short time."""

    __slots__ = ("long", "short")

    def __init__(self, short: Quantile, long: Quantile) -> None:
        self.short = short
        self.long = long

    def copy(self) -> "Spread":
        return Spread(self.short.copy(), self.long.copy())

    def learn(self, predicted_ms: float, ratio: float) -> None:
        """Take in log(measured / predicted)."""
        (self.short if predicted_ms < SPLIT_MS else self.long).learn(ratio)

    def factor(self, ms: float) -> float:
        """For a predicted time; from the other kind of times while there are few of its own."""
        short, long = self.short, self.long
        if ms < SPLIT_MS:
            return short.factor if short.count >= NUM_FEW or short.count >= long.count else long.factor
        return long.factor if long.count >= NUM_FEW or long.count >= short.count else short.factor

    def factor_of_all(self, times_ms: list[float]) -> float:
        """One that is large enough for all of these times."""
        if not times_ms:
            return self.short.factor
        return max(self.factor(min(times_ms)), self.factor(max(times_ms)))

    def dump(self) -> list[list[float]]:
        return [[short(q.factor), min(q.count, 99)] for q in (self.short, self.long)]

    @classmethod
    def restore(cls, saved: Any) -> "Spread":
        """Raises ValueError, TypeError for what `dump` never made."""
        (short_factor, short_count), (long_factor, long_count) = saved
        return cls(
            Quantile(max(finite(short_factor), 1.0), abs(int(short_count))),
            Quantile(max(finite(long_factor), 1.0), abs(int(long_count))),
        )


class Curve:
    """A log factor over the place, a log2 of the cost: knots at whole places, straight lines between them.

    A power of the cost is a straight line here, so that n^3 where n^2 was declared is met exactly. Beyond the knots the
    last value holds.
    """

    __slots__ = ("counts", "low", "prior", "values")

    def __init__(self, low: int, value: float, prior: float = PRIOR) -> None:
        """Takes the first knot's place and value, and how many samples the value of a new knot counts for."""
        self.low = low
        self.prior = prior
        self.values = [value]
        self.counts = [0.0]

    def copy(self) -> "Curve":
        made = Curve(self.low, 0.0, self.prior)
        made.values, made.counts = self.values[:], self.counts[:]
        return made

    def at(self, place: float) -> float:
        """The log of the factor; place >= 0."""
        index = int(place)
        part = place - index
        index -= self.low
        values = self.values
        if index < 0:
            return values[0]
        if index >= len(values) - 1:
            return values[-1]
        start = values[index]
        return start + part * (values[index + 1] - start)

    def learn(self, place: float, residual: float, bound: float) -> None:
        """Move the two knots around the place towards what was missing there; by `bound` at most once they know it."""
        index = int(place)
        part = place - index
        index -= self.low
        if index < 0 or index + 1 >= len(self.values):
            index = self._reach(index)
        values, counts = self.values, self.counts
        rest = 1.0 - part
        count = rest * counts[index] + part * counts[index + 1]
        if count >= NUM_NEW and not -bound <= residual <= bound:
            residual = bound if residual > 0.0 else -bound
        gain = 1.0 / (count + 1.0 + self.prior)
        step = (gain if gain > GAIN else GAIN) * residual / (rest * rest + part * part)
        values[index] = _bounded(values[index] + rest * step)
        values[index + 1] = _bounded(values[index + 1] + part * step)
        counts[index] += rest
        counts[index + 1] += part

    def _reach(self, index: int) -> int:
        """Add knots, equal to the nearest, so that there are `index` and the one after it; `index` as it is then."""
        while index < 0:
            self.values.insert(0, self.values[0])
            self.counts.insert(0, 0.0)
            self.low -= 1
            index += 1
        while index + 1 >= len(self.values):
            self.values.append(self.values[-1])
            self.counts.append(0.0)
        return index

    def dump(self) -> list[Any]:
        counts = "".join(str(min(round(count), 9)) for count in self.counts)  # more are as good as nine
        return [self.low, [round(value, 3) for value in self.values], counts]

    @classmethod
    def restore(cls, saved: Any, prior: float = PRIOR) -> "Curve":
        """Raises ValueError, TypeError for what `dump` never made."""
        low, values, counts = saved
        made = cls(int(low), 0.0, prior)
        made.values = [_bounded(finite(value)) for value in values]
        made.counts = [abs(finite(count)) for count in counts]
        if not 0 < len(values) == len(counts) <= MAX_KNOTS or not 0 <= made.low <= MAX_KNOTS:
            raise ValueError("a curve's knots do not fit together")
        return made


class Correction:
    """What is known of one batch key.

    Attributes:
        curve: a factor over the cost.
        rows: another one over the log2 of the number of rows: many small ones are not the same as a few large ones.
        times: number of rows -> [cost, log ms, samples, how often in a row too long or, below 0, too short, the first of
            them]. Rows of one shape make batches that are equal where their number is, and what these take has steps and
            cliffs that no smooth curve follows.
    """

    __slots__ = ("curve", "rows", "times")

    def __init__(self, curve: Curve) -> None:
        self.curve = curve
        self.rows = Curve(0, 0.0, ROWS_PRIOR)
        self.times: dict[int, list[float]] = {}

    def copy(self) -> "Correction":
        made = Correction(self.curve.copy())
        made.rows = self.rows.copy()
        made.times = {num_rows: entry[:] for num_rows, entry in self.times.items()}
        return made

    def note(self, num_rows: int, cost_ms: float, log_ms: float, bound: float) -> None:
        """Take in a time: by the median of the first ones, then as if it were no further from the mean than `bound`."""
        entry = self.times.get(num_rows)
        if entry is None or entry[0] != cost_ms:  # of another cost: another batch
            if entry is None and len(self.times) >= MAX_TIMES:
                del self.times[next(iter(self.times))]
            self.times[num_rows] = [cost_ms, log_ms, 1.0, 0.0, log_ms]
            return
        entry[2] = count = entry[2] + 1.0
        if count <= NUM_MEDIAN:
            entry.append(log_ms)
            first = sorted(entry[4:])
            entry[1] = first[(len(first) - 1) // 2]
            return
        away = log_ms - entry[1]
        if -FAR * bound <= away <= FAR * bound:
            run = 0.0
        else:
            run = min(entry[3], 0.0) - 1.0 if away < 0.0 else max(entry[3], 0.0) + 1.0
            if not -NUM_SHORTER < run < NUM_LONGER:
                entry[1:] = log_ms, 1.0, 0.0, log_ms
                return
        entry[3:] = (run,)
        entry[1] += GAIN * (away if -bound <= away <= bound else (bound if away > 0.0 else -bound))

    def dump(self) -> list[Any]:
        """The curves, and the times that were measured most often."""
        often = sorted(self.times.items(), key=lambda item: -item[1][2])[:MAX_TIMES_SAVED]
        times = [[num_rows, cost_ms, round(log_ms, 4), min(int(count), 99)] for num_rows, (cost_ms, log_ms, count, *_) in often]
        return [self.curve.dump(), self.rows.dump(), [t for t in times if t[-1] >= NUM_TRUSTED]]

    @classmethod
    def restore(cls, saved: Any) -> "Correction":
        """Raises ValueError, TypeError for what `dump` never made."""
        curve, rows, times = saved
        made = cls(Curve.restore(curve))
        made.rows = Curve.restore(rows, ROWS_PRIOR)
        for num_rows, cost_ms, log_ms, count in times[:MAX_TIMES]:
            entry = [finite(cost_ms), _bounded(finite(log_ms)), max(finite(count), float(NUM_MEDIAN)), 0.0]
            made.times[int(num_rows)] = entry
        return made


def _bounded(log: float) -> float:
    return log if -MAX_LOG <= log <= MAX_LOG else (MAX_LOG if log > 0.0 else -MAX_LOG)

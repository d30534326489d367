"""How long a kernel's batches take on one worker: a linear part, what it leaves out, and how far times spread.

    ms = linear(bytes, cost, rows) * correction(batch key, cost) * level

`level` is one factor that follows what slows everything down, such as a neighbour. Cold start: the declared cost, then a
mean ratio to it per octave, then the model. Once there are some samples, a residual counts up to a bound, so that one time
in five may be an outlier.

Knows features and measured times of one kernel on one worker. Does not know other workers, clocks or bins.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from penstock.broker.scheduling.cold_start import (
    MAX_BYTES,
    MAX_COST_MS,
    MIN_COST_MS,
    NUM_FIRST,
    ColdStart,
    tame_bytes,
    tame_cost,
)
from penstock.broker.scheduling.corrections import MAX_LOG, NUM_TRUSTED, Correction, Curve, Quantile, Spread
from penstock.broker.scheduling.linear import MAX_MS, MIN_MS, Linear, Sample, finite, short

NUM_UNCLIPPED = 50
MAX_CONTEXTS = 128
MAX_DUMP = 950
_OFFSET = 7.0
"""log2 of a cost plus this is never negative."""
_LEVEL_GAIN, _LEVEL_FADE, _LEVEL_MS = 0.08, 0.99, 1.0
"""The level fades, so that what lasts moves to the other parts. Times under a millisecond say less about it: what moves
them is their own."""
_CLIP = 1.5
"""A residual counts up to so many median residuals: one standard deviation of a normal one (Huber 1964)."""
_SPREAD_STEP = 1.05
_MIN_SPREAD, _MAX_SPREAD = 0.01, 1.0
Features = tuple[bytes, float, float, int]
"""(context, cost, bytes, rows) of a batch, cost and bytes as `tame_cost` and `tame_bytes` leave them."""


class Model:
    """Times of one kernel on one worker.

    Attributes:
        num_samples: measured batches that it has learned from.
        q95: how far times spread around the prediction.
        is_sum: costs and bytes of a batch are sums over its rows, else maxima.
        mean_rows, mean_cost_ms, mean_bytes: of recent batches, per row the last two.
    """

    __slots__ = (
        "_cold", "_contexts", "_level", "_linear", "_parent", "_spread", "is_sum", "mean_bytes", "mean_cost_ms", "mean_rows",
        "num_samples", "q95",
    )  # fmt: skip

    def __init__(self) -> None:
        self.num_samples = 0
        self.q95 = Spread(Quantile(), Quantile())
        self.is_sum = True
        self.mean_rows = 1.0
        self.mean_cost_ms = self.mean_bytes = 0.0
        self._cold: ColdStart | None = ColdStart()
        self._contexts: dict[bytes, Correction] = {}
        self._parent = Curve(0, 0.0)
        self._linear = Linear()
        self._level = 0.0
        self._spread = 0.3

    @property
    def is_warm(self) -> bool:
        """It has seen enough to be believed."""
        return self._cold is None

    def knows(self, context: bytes) -> bool:
        """It has measured batches of this key."""
        return context in self._contexts

    # --- predicting ------------------------------------------------------------------------------------------------

    def predict(self, context: bytes, cost_ms: float, num_bytes: float, num_rows: int) -> float:
        """Mean milliseconds of a batch; of a task alone with one row."""
        if not MIN_COST_MS <= cost_ms <= MAX_COST_MS:
            cost_ms = tame_cost(cost_ms)
        if self._cold is not None:
            return self._cold.predict(cost_ms)
        found = self._contexts.get(context)
        more = self._level
        if found is None:
            curve = self._parent
        else:
            entry = found.times.get(num_rows)
            if entry is not None and entry[0] == cost_ms and entry[2] >= NUM_TRUSTED:
                return min(max(math.exp(entry[1] + more), MIN_MS), MAX_MS)
            curve = found.curve
            more += found.rows.at(math.log2(num_rows))
        if not 0.0 <= num_bytes <= MAX_BYTES:
            num_bytes = tame_bytes(num_bytes)
        fixed, per_byte, per_ms, per_row = self._linear.slopes
        ms = (fixed + per_byte * num_bytes + per_ms * cost_ms + per_row * num_rows) * math.exp(
            curve.at(math.log2(cost_ms) + _OFFSET) + more
        )
        return ms if MIN_MS <= ms <= MAX_MS else (MIN_MS if ms < MIN_MS else MAX_MS)

    def predict_each(self, context: bytes, costs_ms: list[float], num_bytes: float) -> list[float]:
        """Mean milliseconds of tasks alone that differ in cost."""
        if self._cold is not None:
            return [self._cold.predict(tame_cost(cost)) for cost in costs_ms]
        found = self._contexts.get(context)
        curve, more = (self._parent, 0.0) if found is None else (found.curve, found.rows.at(0.0))
        fixed, per_byte, per_ms, per_row = self._linear.slopes
        fixed += per_byte * tame_bytes(num_bytes) + per_row
        lines = [(a, b - a) for a, b in pairwise([curve.values[0], *curve.values, curve.values[-1]])]
        last, offset, more, log2, exp = len(lines) - 1, 1 - curve.low, more + self._level, math.log2, math.exp
        made = list[float]()
        for cost in costs_ms:
            if not MIN_COST_MS <= cost <= MAX_COST_MS:
                cost = tame_cost(cost)
            place = log2(cost) + _OFFSET
            index = int(place)
            line = index + offset
            start, rise = lines[line if 0 <= line <= last else (0 if line < 0 else last)]
            ms = (fixed + per_ms * cost) * exp(start + (place - index) * rise + more)
            made.append(ms if MIN_MS <= ms <= MAX_MS else (MIN_MS if ms < MIN_MS else MAX_MS))
        return made

    def fixed_and_row_ms(self) -> tuple[float, float]:
        """(fixed, per row): the line through a batch of one and one of the usual size (two at least), rows as usual."""
        many = max(round(self.mean_rows), 2)
        one_ms, many_ms = self._usual_ms(1), self._usual_ms(many)
        row_ms = max(many_ms - one_ms, 0.0) / (many - 1)
        return max(one_ms - row_ms, 0.0), row_ms

    def _usual_ms(self, num_rows: int) -> float:
        rows = num_rows if self.is_sum else 1
        return self.predict(b"", self.mean_cost_ms * rows, self.mean_bytes * rows, num_rows)

    # --- learning --------------------------------------------------------------------------------------------------

    def learn(self, features: Features, measured_ms: float, predicted_ms: float) -> None:
        """Take in the time of a batch, MIN_MS to MAX_MS, and what had been predicted for it."""
        ratio = math.log(measured_ms / predicted_ms)
        self.num_samples += 1
        self.q95.learn(predicted_ms, ratio)
        context, cost_ms, num_bytes, num_rows = features
        gain = 0.05 if self.num_samples > 20 else 1.0 / self.num_samples
        rows = num_rows if self.is_sum else 1
        self.mean_rows += gain * (num_rows - self.mean_rows)
        self.mean_cost_ms += gain * (cost_ms / rows - self.mean_cost_ms)
        self.mean_bytes += gain * (num_bytes / rows - self.mean_bytes)
        if self._cold is not None:
            self._cold.learn((cost_ms, num_bytes, num_rows, measured_ms))
            if self._cold.is_over:
                self._start(self._cold.samples)
            return
        spread = self._spread
        bound = _CLIP * spread
        is_news = context not in self._contexts
        self._correct(features, math.log(measured_ms) - self._level, bound)
        if is_news:  # what is odd about it is the key, not the times that the others take
            return
        if not -spread <= ratio <= spread:
            self._spread = spread * _SPREAD_STEP if spread < _MAX_SPREAD else spread
        elif spread > _MIN_SPREAD:
            self._spread = spread / _SPREAD_STEP
        clipped = ratio if -bound <= ratio <= bound else (bound if ratio > 0.0 else -bound)
        level = _LEVEL_FADE * self._level + clipped * _LEVEL_GAIN * predicted_ms / (predicted_ms + _LEVEL_MS)
        if -MAX_LOG < level < MAX_LOG:
            self._level = level

    def _correct(self, features: Features, log_ms: float, bound: float) -> None:
        """Spread what was missing over the linear part, the batch key's correction, and what new keys begin with."""
        context, cost_ms, num_bytes, num_rows = features
        place = math.log2(cost_ms) + _OFFSET
        base_ms = self._linear.ms(cost_ms, num_bytes, num_rows)
        missing = log_ms - math.log(base_ms)
        inherited = self._parent.at(place)
        found = self._contexts.pop(context, None)
        if found is None:
            found = Correction(Curve(int(place), inherited))
            if len(self._contexts) >= MAX_CONTEXTS:
                del self._contexts[next(iter(self._contexts))]
        self._contexts[context] = found  # the one used last is the last to go
        rows_place = math.log2(num_rows)
        residual = missing - found.curve.at(place) - found.rows.at(rows_place)
        clipped = residual
        if self.num_samples > NUM_UNCLIPPED and not -bound <= residual <= bound:
            clipped = bound if residual > 0.0 else -bound
        self._linear.learn(cost_ms, num_bytes, num_rows, base_ms, clipped)
        self._parent.learn(place, missing - inherited, bound)
        found.curve.learn(place, residual, bound)
        found.rows.learn(rows_place, residual, bound)
        found.note(num_rows, cost_ms, log_ms, bound)

    def _start(self, samples: list[Sample]) -> None:
        """Begin the model with the first samples."""
        linear = self._linear = Linear(samples)
        errors = sorted(abs(math.log(ms / linear.ms(cost_ms, size, rows))) for cost_ms, size, rows, ms in samples)
        self._spread = min(max(errors[NUM_FIRST // 2], 0.05), _MAX_SPREAD)
        first_q95 = math.exp(2.5 * self._spread)
        self.q95 = Spread(Quantile(first_q95), Quantile(first_q95))
        self._parent = Curve(int(math.log2(samples[-1][0]) + _OFFSET), 0.0)
        self._cold = None

    # --- copies and files ------------------------------------------------------------------------------------------

    def copy(self) -> "Model":
        """One that learns on its own."""
        made = Model()
        for name in self.__slots__:
            setattr(made, name, getattr(self, name))
        made.q95 = self.q95.copy()
        made._cold = None if self._cold is None else self._cold.copy()
        made._contexts = {context: found.copy() for context, found in self._contexts.items()}
        made._parent, made._linear = self._parent.copy(), self._linear.copy()
        return made

    def dump(self) -> dict[str, Any]:
        """Plain values, at most 1 KB or so: of the batch keys the last ones, as many as fit."""
        kept: dict[str, Any] = {
            "samples": self.num_samples, "q95": self.q95.dump(), "is_sum": self.is_sum,
            "means": [short(self.mean_rows), short(self.mean_cost_ms), short(self.mean_bytes)],
        }  # fmt: skip
        if self._cold is not None:
            return kept | {"first": self._cold.dump()}
        kept |= {
            "linear": self._linear.dump(), "curve": self._parent.dump(),
            "level": short(self._level), "spread": short(self._spread),
        }  # fmt: skip
        contexts, room = dict[str, Any](), MAX_DUMP - len(repr(kept))
        for context, found in reversed(self._contexts.items()):
            saved = found.dump()
            room -= len(repr(saved)) + 2 * len(context) + 6
            if room < 0:
                break
            contexts[context.hex()] = saved
        return kept | {"contexts": contexts}

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> "Model":
        """The inverse of `dump`.

        Raises:
            ValueError, TypeError, KeyError: what `dump` never made.
        """
        made = cls()
        made.is_sum = bool(saved["is_sum"])
        made.mean_rows, made.mean_cost_ms, made.mean_bytes = (abs(finite(mean)) for mean in saved["means"])
        made.q95 = Spread.restore(saved["q95"])
        if "first" in saved:
            made._cold = ColdStart.restore(saved["first"])
            made.num_samples = len(made._cold.samples)
            return made
        made._cold = None
        made.num_samples = max(int(saved["samples"]), NUM_FIRST)
        made._linear, made._parent = Linear.restore(saved["linear"]), Curve.restore(saved["curve"])
        made._level = min(max(finite(saved["level"]), -MAX_LOG), MAX_LOG)
        made._spread = min(max(finite(saved["spread"]), _MIN_SPREAD), _MAX_SPREAD)
        contexts = [(bytes.fromhex(context), Correction.restore(found)) for context, found in saved["contexts"].items()]
        made._contexts = dict(reversed(contexts[:MAX_CONTEXTS]))
        return made

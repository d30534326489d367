"""Whether a series got worse: its recent mean against that of the long run, by a bound and by more than noise explains.

Knows numbers where higher is worse, and the sources that they come from. Does not know what they mean.
"""

import math
from collections.abc import Collection

RECENT, LONG_RUN = (32.0, 2.0), (1000.0, 600.0)
"""How many samples and seconds a mean goes back, whichever is further."""
NOISE = 4.5
"""Standard errors that a change must exceed: 10,000 batches pass without a false alarm."""
HEALTHY = 0.5
"""Of the way to an alarm: what is below it counts as well."""
MIN_SAMPLES = 20.0
"""That a judgement needs on either side."""
NUM_BAD = 3.0
"""Failures in no more samples than this are an accident."""


class Tally:
    """Decayed sums of a series: its mean and variance, and how many samples these are worth."""

    __slots__ = ("num", "num2", "total", "total2")

    def __init__(self) -> None:
        self.num = self.num2 = self.total = self.total2 = 0.0

    def add(self, x: float) -> None:
        self.num += 1.0
        self.num2 += 1.0
        self.total += x
        self.total2 += x * x

    def fold(self, newer: "Tally", elapsed_s: float = 0.0, depth: tuple[float, float] = RECENT) -> None:
        """Take in what is newer, and fade the old by the samples and seconds that it spans; 0 s: not at all."""
        keep = math.exp(-min(newer.num / depth[0], elapsed_s / depth[1]))
        self.num = self.num * keep + newer.num
        self.num2 = self.num2 * keep * keep + newer.num2
        self.total = self.total * keep + newer.total
        self.total2 = self.total2 * keep + newer.total2

    @property
    def mean(self) -> float:
        return self.total / self.num if self.num else 0.0

    @property
    def variance(self) -> float:
        return max(self.total2 / self.num - self.mean**2, 0.0)

    @property
    def worth(self) -> float:
        return self.num**2 / self.num2 if self.num2 else 0.0


class Measure:
    """A series from several sources, which are expected to be alike.

    Args:
        least: the change of the mean that counts.
    """

    def __init__(self, least: float) -> None:
        self.recent, self.long = Tally(), Tally()
        self.least = least
        self._sources: dict[str, Tally] = {}
        self._news: dict[str, Tally] = {}

    def add(self, source: str, x: float) -> None:
        news = self._news.get(source)
        if news is None:
            news = self._news[source] = Tally()
        news.add(x)

    def look(self, elapsed_s: float, ignored: Collection[str]) -> None:
        """Take what is new since the last look into the means; ignored sources only into their own."""
        news, self._news = self._news, {}
        pooled = Tally()
        for source, tally in news.items():
            self._sources.setdefault(source, Tally()).fold(tally, elapsed_s)
            if source not in ignored:
                pooled.fold(tally)
        self.recent.fold(pooled, elapsed_s)
        self.long.fold(pooled, elapsed_s, LONG_RUN)

    def worse(self, recent: Tally, base: Tally | None = None) -> float:
        """How much worse the mean is, over what counts: a bound, and more than noise; 0 while there is too little to tell.

        Args:
            base: what to compare with; left out, the long run.
        """
        base = self.long if base is None else base
        if min(recent.worth, base.worth) < MIN_SAMPLES:
            return 0.0
        noise = NOISE * math.sqrt(base.variance * (1.0 / recent.worth + 1.0 / base.worth))
        return (recent.mean - base.mean) / max(self._bound(recent, base), noise)

    def worst(self, ignored: Collection[str]) -> tuple[float, str]:
        """How much worse it got, and where: the source that stands out from the others, or "" if none does."""
        alike = {source: tally for source, tally in self._sources.items() if source not in ignored}
        judged = [(self.worse(tally), source) for source, tally in alike.items()]
        pooled = self.worse(self.recent)
        most, source = max(judged, default=(0.0, ""))
        if alike and max(most, pooled) > 1.0:
            others = Tally()
            for name, tally in alike.items():
                if name != source:
                    others.fold(tally)
            if self.worse(alike[source], others) > 1.0:
                return max(most, pooled), source
        return pooled, ""

    def of(self, source: str) -> Tally:
        """The recent past of a source, or of all for ""."""
        return self._sources.get(source, Tally()) if source else self.recent

    def is_well(self, source: str) -> bool:
        """Whether a source, or all for "", is about as good as the long run, as far as can be told."""
        return self.worse(self.of(source)) < HEALTHY

    def start_again(self) -> None:
        """The recent past is what comes from now on."""
        self.recent = Tally()
        self._sources.clear()
        self._news.clear()

    def _bound(self, recent: Tally, base: Tally) -> float:
        return self.least


class ShareMeasure(Measure):
    """Of shares that failed: it has to get above `least`, and half as much again as before."""

    def _bound(self, recent: Tally, base: Tally) -> float:
        if recent.total**2 <= NUM_BAD * recent.total2:  # the number of bad samples, were they alike
            return math.inf
        return max(self.least - base.mean, 0.5 * base.mean)

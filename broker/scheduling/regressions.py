"""Whether a kernel got worse: latency, errors and throughput of its batches, and on which worker.

Three measures, each "higher is worse": the log of measured over predicted batch time (so that another mix of work is no
regression), the share of a batch's rows that failed, and minus the log of work per second under backlog. The prediction
should come from a model that does not learn within seconds: a regression that the prediction has followed is none any more.

Knows figures of one kernel. Does not know what is done about them.
"""

import math
from collections import deque
from collections.abc import Mapping

from penstock.broker.scheduling.baselines import HEALTHY, MIN_SAMPLES, Measure, ShareMeasure, Tally
from penstock.broker.wire import record

LATENCY_UP = math.log(1.20)
THROUGHPUT_DOWN = -math.log(0.85)
MAX_ERRORS = 0.01
MIN_BATCHES = 20
"""Batches per worker in a sample of throughput."""
NUM_RATES = 4
"""All of so many samples have to be worse: a stall is in one of them only."""
RATE_NOISE = 2.0
"""Standard deviations that each of them must exceed."""
LONG_RUN_RATES = (50.0, 600.0)
"""How many samples and seconds their mean goes back, whichever is further."""
MAX_LOG = 2.0
"""Bound on one sample: a hiccup is no regression."""
IDLE_S = 60.0
"""After a pause this long the recent past starts again."""


@record
class Alarm:
    """What got worse; `worker` is the one that did, or empty if it is not one alone."""

    worker: str
    reason: str


@record
class _Window:
    """A time of backlog: its start, what had been done then, and per worker the device time of all kernels and of this."""

    at: float
    num_batches: int
    work: float
    busy_ms: dict[str, tuple[float, float]]


class Figures:
    """One kernel's. `spared` holds the workers that are known to be worse, and since when: they count no more."""

    def __init__(self, now: float) -> None:
        self.spared: dict[str, float] = {}
        self.last_at = self._looked_at = now
        self._has_news = False
        self._num_batches, self._work, self._batch_rows = 0, 0.0, 0.0
        self._busy_ms: dict[str, float] = {}
        self._window: _Window | None = None
        self.learn_anew()

    def completed(
        self, worker: str, num_rows: int, measured_ms: float, predicted_ms: float | None, num_failed: int, now: float,
        work: float,
    ) -> None:  # fmt: skip
        """Take in a batch; `work` in any unit that another mix of rows or another batch size does not change."""
        self.last_at, self._has_news = now, True
        self._busy_ms[worker] = self._busy_ms.get(worker, 0.0) + measured_ms
        self._errors.add(worker, num_failed / num_rows)
        if predicted_ms and measured_ms > 0.0:
            self._latency.add(worker, min(max(math.log(measured_ms / predicted_ms), -MAX_LOG), MAX_LOG))
        if worker not in self.spared:
            self._num_batches += 1
            self._work += work
            self._batch_rows += (num_rows - self._batch_rows) / 8.0

    def look(self, now: float, num_queued: int, busy_ms: Mapping[str, float]) -> bool:
        """Take what is new into the figures; False if there was nothing.

        Args:
            num_queued: rows of the kernel that are queued now.
            busy_ms: device time of each worker so far, all kernels together.
        """
        elapsed_s, self._looked_at = now - self._looked_at, now
        has_news, self._has_news = self._has_news, False
        if now - self.last_at > IDLE_S:
            self.start_again()
        self._watch_rate(now, num_queued, busy_ms)
        if has_news:
            self._latency.look(elapsed_s, self.spared)
            self._errors.look(elapsed_s, self.spared)
        return has_news

    def _watch_rate(self, now: float, num_queued: int, busy_ms: Mapping[str, float]) -> None:
        """A sample of throughput whenever a batch per worker was queued at every look, for long enough."""
        then = {worker: (busy_ms[worker], own) for worker, own in self._busy_ms.items() if worker not in self.spared}
        window, self._window = self._window, None
        if not then or num_queued < self._batch_rows * len(then):
            return
        if window is not None and window.busy_ms.keys() == then.keys():
            if self._num_batches - window.num_batches < MIN_BATCHES * len(then):
                self._window = window
                return
            self._sample_rate(window, then, now)
        self._window = _Window(now, self._num_batches, self._work, then)

    def _sample_rate(self, window: _Window, busy_ms: Mapping[str, tuple[float, float]], now: float) -> None:
        """Work per device time that was there for it: not what other kernels used, nor a worker that took no part."""
        elapsed_s = now - window.at
        available_ms = 0.0
        for worker, (all_now, own_now) in busy_ms.items():
            all_then, own_then = window.busy_ms[worker]
            if own_now > own_then:
                available_ms += 1000.0 * elapsed_s - (all_now - all_then) + (own_now - own_then)
        work = self._work - window.work
        if available_ms > 0.0 and work > 0.0:
            sample = Tally()
            sample.add(math.log(available_ms / work))
            self._rates.append(sample.mean)
            self._long_rate.fold(sample, elapsed_s, LONG_RUN_RATES)

    def alarm(self) -> Alarm | None:
        """What got worse."""
        alarms = [self._latency_alarm(), self._errors_alarm(), self._rate_alarm()]
        most, alarm = max(alarms, key=lambda found: found[0])
        return alarm if most > 1.0 else None

    def _latency_alarm(self) -> tuple[float, Alarm]:
        most, worker = self._latency.worst(self.spared)
        percent = 100.0 * math.expm1(self._latency.of(worker).mean - self._latency.long.mean)
        return most, Alarm(worker, f"batches take {percent:.0f} % longer than before")

    def _errors_alarm(self) -> tuple[float, Alarm]:
        most, worker = self._errors.worst(self.spared)
        now, before = self._errors.of(worker).mean, self._errors.long.mean
        return most, Alarm(worker, f"{100.0 * now:.1f} % of the rows fail, {100.0 * before:.1f} % before")

    def _rate_excess(self) -> float:
        base = self._long_rate
        if len(self._rates) < NUM_RATES:
            return 0.0
        return (min(self._rates) - base.mean) / max(THROUGHPUT_DOWN, RATE_NOISE * math.sqrt(base.variance))

    def _rate_alarm(self) -> tuple[float, Alarm]:
        percent = -100.0 * math.expm1(self._long_rate.mean - min(self._rates, default=0.0))
        return self._rate_excess(), Alarm("", f"throughput under backlog is down {percent:.0f} %")

    @property
    def is_all_well(self) -> bool:
        """Whether nothing is on the way to an alarm."""
        return self._latency.is_well("") and self._errors.is_well("") and self._rate_excess() < HEALTHY

    def is_well(self, worker: str) -> bool:
        """Whether a worker has run enough of late to be called about as good as the kernel's long run."""
        has_run = self._errors.of(worker).worth >= MIN_SAMPLES
        return has_run and self._errors.is_well(worker) and self._latency.is_well(worker)

    def start_again(self) -> None:
        """Judge only by what comes from now on."""
        self._latency.start_again()
        self._errors.start_again()
        self._rates.clear()
        self._window = None

    def learn_anew(self) -> None:
        """What was normal so far says nothing any more."""
        self._latency, self._errors = Measure(LATENCY_UP), ShareMeasure(MAX_ERRORS)
        self._rates, self._long_rate, self._window = deque[float](maxlen=NUM_RATES), Tally(), None

    def forget_worker(self, worker: str) -> None:
        """What it did is no measure of the others."""
        if self._busy_ms.pop(worker, None) is not None:
            self.spared.pop(worker, None)
            self.start_again()

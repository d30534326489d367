"""What to try when a kernel got worse: roll the configuration back, spare a worker, smaller batches; one at a time.

Knows regressions and what was tried. Does not know limits, configurations or how a remedy is applied: the caller does that,
and makes each an event.
"""

import math
from collections.abc import Mapping

from penstock.broker.scheduling.regressions import Alarm, Figures
from penstock.broker.wire import record

SUSTAINED_S = 1.5
"""How long an alarm has to last."""
PAUSE_S = 10.0
"""Between remedies for a kernel, to see the effect."""
CHANGE_S = 60.0
"""A regression this soon after a change of the configuration is blamed on it."""
SPARED_S = 60.0
"""How long a worker is spared, at least."""
MAX_REDUCTIONS = 3
EPISODE_S = 600.0
"""Without a remedy for this long, reductions are counted from the start."""
MAX_KERNELS = 1000


@record
class Remedy:
    """`kind`: "roll_back" the configuration; "rebalance": give `worker` less of the kernel; "reduce_batch": halve the
    kernel's batch limit; "restore": undo the rebalance of `worker`, or the reductions if it is empty."""

    kind: str
    kernel: str
    worker: str
    reason: str


class _Case:
    """A kernel's figures, the alarm that lasts, and what was tried."""

    __slots__ = ("alarm_since", "figures", "num_reduced", "quiet_until", "remedied_at")

    def __init__(self, now: float) -> None:
        self.figures = Figures(now)
        self.alarm_since = math.inf
        self.quiet_until = self.remedied_at = -math.inf
        self.num_reduced = 0

    def lasting(self, now: float) -> Alarm | None:
        """The alarm, once it has lasted and the last remedy has had its time."""
        alarm = self.figures.alarm()
        if alarm is None:
            self.alarm_since = math.inf
        else:
            self.alarm_since = min(self.alarm_since, now)
        return alarm if now - self.alarm_since >= SUSTAINED_S and now >= self.quiet_until else None

    def pause(self, now: float) -> None:
        """Something was tried: judge anew, after a while."""
        self.alarm_since, self.quiet_until, self.remedied_at = math.inf, now + PAUSE_S, now
        self.figures.start_again()


class Watch:
    """Say `completed` for every batch and `config_changed`; ask `decide` about every 0.5 s."""

    def __init__(self) -> None:
        self._cases: dict[str, _Case] = {}
        self._busy_ms: dict[str, float] = {}
        self._changed_at = -math.inf

    def completed(
        self, kernel: str, worker: str, num_rows: int, measured_ms: float, predicted_ms: float | None, num_failed: int,
        now: float, alone_ms: float | None = None,
    ) -> None:  # fmt: skip
        """A batch is done.

        Args:
            predicted_ms: by a model that does not learn within seconds; None while the kernel is not known well enough.
            alone_ms: its rows' predicted alone-times together, which makes throughput independent of the mix of rows.
        """
        case = self._cases.get(kernel)
        if case is None:
            if len(self._cases) >= MAX_KERNELS:
                del self._cases[min(self._cases, key=lambda name: self._cases[name].figures.last_at)]
            case = self._cases[kernel] = _Case(now)
        self._busy_ms[worker] = self._busy_ms.get(worker, 0.0) + measured_ms
        work = alone_ms if alone_ms is not None else num_rows
        case.figures.completed(worker, num_rows, measured_ms, predicted_ms, num_failed, now, work)

    def config_changed(self, now: float) -> None:
        """Another configuration holds; not to be told of a roll-back. What was bad before is not its fault."""
        self._changed_at = now
        for case in self._cases.values():
            if not case.figures.is_all_well:
                case.figures.learn_anew()

    def forget_worker(self, worker: str) -> None:
        """The worker is gone."""
        self._busy_ms.pop(worker, None)
        for case in self._cases.values():
            case.figures.forget_worker(worker)

    def decide(self, now: float, num_queued: Mapping[str, int]) -> list[Remedy]:
        """What to do now; `num_queued` rows of each kernel. A kernel that completed nothing since the last call is left."""
        remedies = list[Remedy]()
        for kernel, case in self._cases.items():
            if not case.figures.look(now, num_queued.get(kernel, 0), self._busy_ms):
                continue
            alarm = case.lasting(now)
            if alarm is not None and now - self._changed_at <= CHANGE_S:
                return [self._roll_back(kernel, alarm, now)]
            if alarm is not None:
                remedies.append(_treat(kernel, case, alarm, now))
            elif now >= case.quiet_until:
                remedies += _relieve(kernel, case, now)
        return remedies

    def _roll_back(self, kernel: str, alarm: Alarm, now: float) -> Remedy:
        seconds = now - self._changed_at
        self._changed_at = -math.inf
        for case in self._cases.values():
            case.pause(now)
        return Remedy("roll_back", kernel, "", f"{alarm.reason}, {seconds:.0f} s after a change of the configuration")


def _treat(kernel: str, case: _Case, alarm: Alarm, now: float) -> Remedy:
    """The remedy for an alarm that lasts."""
    figures = case.figures
    if now - case.remedied_at > EPISODE_S:
        case.num_reduced = 0
    if alarm.worker:
        figures.spared[alarm.worker] = now
        remedy = Remedy("rebalance", kernel, alarm.worker, f"{alarm.reason} on {alarm.worker}, not on the others")
    elif case.num_reduced < MAX_REDUCTIONS:
        case.num_reduced += 1
        tried = f"the batch limit is halved ({case.num_reduced} of {MAX_REDUCTIONS})"
        remedy = Remedy("reduce_batch", kernel, "", f"{alarm.reason}: {tried}")
    else:
        case.num_reduced = 0
        figures.learn_anew()
        tried = f"halving the batch limit {MAX_REDUCTIONS} times did not help"
        remedy = Remedy("restore", kernel, "", f"{alarm.reason} and {tried}: the limit is restored, this is the new baseline")
    case.pause(now)
    return remedy


def _relieve(kernel: str, case: _Case, now: float) -> list[Remedy]:
    """Take back the sparing of a worker that has recovered."""
    figures = case.figures
    for worker, since in figures.spared.items():
        if now - since >= SPARED_S and figures.is_well(worker):
            del figures.spared[worker]
            case.pause(now)
            return [Remedy("restore", kernel, worker, f"{worker} is as good as the others again")]
    return []

"""How long tasks and batches will take: one model per (kernel, worker), and what they have in common.

The time *alone* of a task is that of a batch of one on the kernel's reference worker, the one that has measured most.
Knows kernels and workers by name, and what a load is (`BatchLoad`). Does not know tasks, queues, bins or clocks: it learns
in the order in which batches are reported.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.broker.scheduling.cold_start import NUM_FIRST, tame_bytes, tame_cost
from penstock.broker.scheduling.linear import MAX_MS, MIN_MS
from penstock.broker.scheduling.models import Model
from penstock.broker.scheduling.scores import CLASSIC_MS, Ranks
from penstock.broker.scheduling.seats import Seat, Seats
from penstock.broker.spec import Cost
from penstock.broker.wire import record

VERSION = 1
FIRST_Q95 = 2.0
MAX_KERNELS = 1024
MAX_DEVICES = 4096
MAX_ARCHIVED = 512
SHORT_MS = 1.0
NUM_WELL_KNOWN = 200
SHORT_SHARE = 1.0 / 8.0
"""Of short batches of a well-known kernel, so many are learned from: the broker's time is worth more than theirs. Of all
batches, so many enter the histogram of times."""
_GOLDEN = 0.6180339887498949


@record
class BatchLoad:
    """What a batch is, to the predictor.

    `context` stands for the batch key: what equal ones leave open is cost, bytes and rows. `cost_ms` (declared) and
    `num_bytes` are the sum over the rows or their maximum, as `combine` says.
    """

    kernel: str
    context: bytes
    combine: str
    num_rows: int
    cost_ms: float
    num_bytes: float


@record
class Estimate:
    """A task's time alone on the reference worker: `mean_ms` for all rows, or per row; 95 of 100 stay below mean * q95."""

    mean_ms: Cost
    q95: float


class Predictor:
    """See the module.

    Attributes:
        edges_ms: boundaries of the bins that the scores count with; may be replaced at any time.
        num_ignored: measured times that were no times.
    """

    def __init__(self) -> None:
        self.edges_ms: Sequence[float] = CLASSIC_MS
        self.num_ignored = 0
        self._kernels: dict[str, Seats] = {}
        self._devices: dict[str, str] = {}
        self._archive: dict[tuple[str, str], Model] = {}
        self._ranks = Ranks()
        self._turn = 0.0

    # --- predicting ------------------------------------------------------------------------------------------------

    def estimate(self, kernel: str, context: bytes, cost_ms: Cost, row_bytes: float) -> Estimate:
        """The time alone of one task, or of each of a list of costs."""
        known = self._kernels.get(kernel)
        if known is None:
            costs = [tame_cost(cost) for cost in cost_ms] if isinstance(cost_ms, list) else tame_cost(cost_ms)
            return Estimate(costs, FIRST_Q95)
        model = known.reference
        if isinstance(cost_ms, list):
            each_ms = model.predict_each(context, cost_ms, row_bytes)
            return Estimate(each_ms, model.q95.factor_of_all(each_ms))
        ms = model.predict(context, cost_ms, row_bytes, 1)
        return Estimate(ms, model.q95.factor(ms))

    def batch_ms(self, load: BatchLoad, worker: str) -> tuple[float, float]:
        """(mean, q95) milliseconds of a batch on that worker."""
        known = self._kernels.get(load.kernel)
        if known is None:
            prior_ms = min(tame_cost(load.cost_ms), MAX_MS)
            return prior_ms, prior_ms * FIRST_Q95
        seat = known.by_worker.get(worker) or self._seat(known, load.kernel, worker)
        return known.predict(seat, (load.context, load.cost_ms, load.num_bytes, load.num_rows))

    def slowness(self, kernel: str, worker: str) -> float:
        """The worker's times over those of the reference worker; 1.0 if unknown."""
        known = self._kernels.get(kernel)
        seat = known.by_worker.get(worker) if known else None
        return math.exp(seat.slowness) if seat else 1.0

    def is_known(self, kernel: str) -> bool:
        """Enough was measured to refuse or drop tasks by prediction."""
        known = self._kernels.get(kernel)
        return known is not None and known.reference.num_samples >= NUM_FIRST

    def complexity(self, ms: float) -> float:
        """1 to 10: 1 + 9 * the rank of a time among those of all recent tasks alone."""
        return self._ranks.score(ms)

    def fixed_and_row_ms(self, kernel: str, worker: str) -> tuple[float, float]:
        """(fixed, per row) of t(rows) ~ fixed + per row * rows for usual rows; (0, 0) if nothing is known."""
        known = self._kernels.get(kernel)
        if known is None:
            return 0.0, 0.0
        seat = known.by_worker.get(worker)
        return (seat.model if seat and seat.model.is_warm else known.reference).fixed_and_row_ms()

    # --- learning --------------------------------------------------------------------------------------------------

    def observe(self, load: BatchLoad, worker: str, device: str, measured_ms: float) -> float:
        """Learn what a batch took on a worker; returns the mean that was predicted for it.

        A time that is not above 0 and at most MAX_MS is ignored, and counted.
        """
        known = self._kernels.get(load.kernel)
        seat = known.by_worker.get(worker) if known is not None else None
        if known is None or seat is None:
            known, seat = self._take_seat(load.kernel, worker, device)
        context, num_rows = load.context, load.num_rows
        cost_ms, num_bytes = tame_cost(load.cost_ms), tame_bytes(load.num_bytes)
        features = (context, cost_ms, num_bytes, num_rows)
        mean_ms, q95_ms = known.predict(seat, features)
        if not 0.0 < measured_ms <= MAX_MS:
            self.num_ignored += 1
            return mean_ms
        model, reference = seat.model, known.reference
        self._turn = turn = (self._turn + _GOLDEN) % 1.0  # no period of the work falls in step with these
        if measured_ms < SHORT_MS and turn >= SHORT_SHARE and model.num_samples >= NUM_WELL_KNOWN:
            return mean_ms
        measured_ms = max(measured_ms, MIN_MS)
        seat.scores.add(mean_ms, q95_ms, measured_ms, self.edges_ms)
        if model is not reference:
            seat.compare(reference, features, measured_ms)
        model.is_sum = load.combine == "sum"
        model.learn(features, measured_ms, mean_ms)
        if turn < SHORT_SHARE:
            rows = num_rows if model.is_sum else 1
            self._ranks.add(reference.predict(context, cost_ms / rows, num_bytes / rows, 1))
        if model is not reference and known.should_refer_to(model):
            known.refer_to(worker)
        return mean_ms

    # --- workers come and go ---------------------------------------------------------------------------------------

    def add_worker(self, worker: str, device: str) -> None:
        """A worker is there; its models start from what is known of its kind of device."""
        if worker not in self._devices and len(self._devices) >= MAX_DEVICES:
            del self._devices[next(iter(self._devices))]
        self._devices[worker] = device

    def forget_worker(self, worker: str) -> None:
        """A worker is gone; what it learned stays under its device."""
        self._devices.pop(worker, None)
        for name, known in self._kernels.items():
            seat = known.leave(worker)
            if seat is not None:
                kept = self._archive.pop((name, seat.device), seat.model)
                if len(self._archive) >= MAX_ARCHIVED:
                    del self._archive[next(iter(self._archive))]
                self._archive[name, seat.device] = kept if kept.num_samples > seat.model.num_samples else seat.model

    def _take_seat(self, kernel: str, worker: str, device: str) -> tuple[Seats, Seat]:
        self.add_worker(worker, device)
        known = self._kernels.get(kernel)
        if known is None:
            if len(self._kernels) >= MAX_KERNELS:
                del self._kernels[next(iter(self._kernels))]
            known = self._kernels[kernel] = Seats(Model())
        return known, self._seat(known, kernel, worker) or known.take(worker, Model(), device)

    def _seat(self, known: Seats, kernel: str, worker: str) -> Seat | None:
        """A seat for a worker whose kind of device is known to the kernel; None if there is no such."""
        device = self._devices.get(worker)
        if device is None:
            return None
        model = self._archive.pop((kernel, device), None)
        if model is None:
            alike = known.alike(device)
            model = None if alike is None else alike.copy()
        return None if model is None else known.take(worker, model, device)

    # --- reports and files -----------------------------------------------------------------------------------------

    def report(self) -> list[dict[str, Any]]:
        """Per kernel and worker: samples, slowness, and the figures of `Scores`."""
        return [
            {
                "kernel": name, "worker": worker, "device": seat.device, "samples": seat.model.num_samples,
                "is_reference": worker == known.reference_worker, "slowness": math.exp(seat.slowness), **seat.scores.report(),
            }
            for name, known in sorted(self._kernels.items())
            for worker, seat in sorted(known.by_worker.items())
        ]  # fmt: skip

    def _best(self) -> Iterator[tuple[str, str, Model]]:
        """(kernel, device, model) with the model that has seen most of each."""
        best = dict(self._archive)
        for name, known in self._kernels.items():
            for seat in known.by_worker.values():
                kept = best.get((name, seat.device))
                if kept is None or kept.num_samples <= seat.model.num_samples:
                    best[name, seat.device] = seat.model
        return ((kernel, device, model) for (kernel, device), model in best.items())

    def dump(self) -> dict[str, Any]:
        """What was learned per kernel and kind of device, as plain values; about 1 KB each."""
        models = [{"kernel": kernel, "device": device, **model.dump()} for kernel, device, model in self._best()]
        return {"version": VERSION, "ranks": self._ranks.dump(), "models": models}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Start from a `dump`, as far as it is sound; before any worker has come.

        Raises:
            ValueError: something in it was not, and why; the rest is restored.
        """
        if not isinstance(saved, Mapping) or saved.get("version") != VERSION or not isinstance(saved.get("models"), list):
            raise ValueError(f"no predictions of version {VERSION}")
        errors = list[str]()
        try:
            self._ranks.restore(saved.get("ranks", {}))
        except (ValueError, TypeError, AttributeError, OverflowError) as e:
            errors.append(f"ranks: {e}")
        for entry in saved["models"][:MAX_ARCHIVED]:
            try:
                self._restore_model(str(entry["kernel"]), str(entry["device"]), Model.restore(entry))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as e:
                errors.append(f"a model: {type(e).__name__}: {e}")
        if errors:
            raise ValueError(f"{len(errors)} of the saved predictions are unusable: {errors[0]}")

    def _restore_model(self, kernel: str, device: str, model: Model) -> None:
        self._archive[kernel, device] = model
        known = self._kernels.setdefault(kernel, Seats(model))
        if known.reference_worker is None and known.reference.num_samples < model.num_samples:
            known.reference = model

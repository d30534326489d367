"""The workers that run one kernel: a model each, one of them the reference, and how much slower the others are.

Knows workers by name. Does not know kernels, devices' names beyond equality, or where models come from.
"""

import math

from penstock.broker.scheduling.cold_start import NUM_FIRST
from penstock.broker.scheduling.linear import MAX_MS, MIN_MS
from penstock.broker.scheduling.models import Features, Model
from penstock.broker.scheduling.scores import Scores

MAX_WORKERS = 256
_SLOWNESS_GAIN = 0.1
_MAX_SLOWNESS = 7.0
_CLIP = 1.0


class Seat:
    """A worker's model of one kernel. `slowness` is the log of its times over those of the reference worker."""

    __slots__ = ("device", "model", "num_compared", "scores", "slowness")

    def __init__(self, model: Model, device: str) -> None:
        self.model = model
        self.device = device
        self.scores = Scores()
        self.slowness = 0.0
        self.num_compared = 0

    def compare(self, reference: Model, features: Features, measured_ms: float) -> None:
        """Learn the slowness from a batch; once there are some, only from batch keys that the reference has met too."""
        if self.num_compared >= NUM_FIRST and not reference.knows(features[0]):
            return
        away = math.log(measured_ms / reference.predict(*features)) - self.slowness
        self.num_compared += 1
        if self.num_compared > NUM_FIRST:
            away = min(max(away, -_CLIP), _CLIP)
        slowness = self.slowness + max(1.0 / self.num_compared, _SLOWNESS_GAIN) * away
        self.slowness = min(max(slowness, -_MAX_SLOWNESS), _MAX_SLOWNESS)


class Seats:
    """The workers of one kernel.

    Attributes:
        reference: the model that times alone come from.
        reference_worker: whose it is; None while it is one that was kept from before.
        by_worker: who has a seat.
    """

    __slots__ = ("by_worker", "reference", "reference_worker")

    def __init__(self, reference: Model) -> None:
        self.reference = reference
        self.reference_worker: str | None = None
        self.by_worker: dict[str, Seat] = {}

    def predict(self, seat: Seat | None, features: Features) -> tuple[float, float]:
        """(mean, q95) ms by the worker's own model; while that is cold, by the reference's and the worker's slowness."""
        model = self.reference
        if seat is not None and (seat.model.is_warm or not model.is_warm):
            model = seat.model
        ms = model.predict(*features)
        if seat is not None and model is not seat.model:
            ms = min(max(ms * math.exp(seat.slowness), MIN_MS), MAX_MS)
        return ms, ms * model.q95.factor(ms)

    def take(self, worker: str, model: Model, device: str) -> Seat:
        """A seat for a worker."""
        if len(self.by_worker) >= MAX_WORKERS:
            self.leave(next(iter(self.by_worker)))
        seat = self.by_worker[worker] = Seat(model, device)
        if self.should_refer_to(model):
            self.refer_to(worker)
        return seat

    def leave(self, worker: str) -> Seat | None:
        """The worker's seat, now nobody's; the model stays the reference if no other knows enough to be it."""
        seat = self.by_worker.pop(worker, None)
        if seat is not None and self.reference_worker == worker:
            self.reference_worker = None
            busiest = max(self.by_worker, key=lambda other: self.by_worker[other].model.num_samples, default=None)
            if busiest is not None and self.should_refer_to(self.by_worker[busiest].model):
                self.refer_to(busiest)
        return seat

    def should_refer_to(self, model: Model) -> bool:
        """It has seen far more than the reference, or the reference's worker is gone and it knows enough."""
        reference = self.reference
        if model.num_samples > 2 * reference.num_samples:
            return True
        return self.reference_worker is None and (model is reference or model.is_warm or not reference.is_warm)

    def refer_to(self, worker: str) -> None:
        """Make this worker the reference, and count slowness from it."""
        seat = self.by_worker[worker]
        shift = seat.slowness
        for other in self.by_worker.values():
            other.slowness -= shift
        self.reference, self.reference_worker = seat.model, worker

    def alike(self, device: str) -> Model | None:
        """The model that has seen most on such a device."""
        models = [seat.model for seat in self.by_worker.values() if seat.device == device]
        return max(models, key=lambda model: model.num_samples, default=None)

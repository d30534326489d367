"""Latency and throughput against load: the chosen bins beside one bin, from a tenth of the capacity to past it.

Knows which runs that takes. Does not know how they are drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from penstock.broker.simulator.experiment import Setup, run

LOADS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1)
"""Of the capacity of the chosen bins."""
KNEE: Final = (0.8, 0.9, 0.95, 1.0)
"""Of the capacity of what it is compared with, which turns up earlier."""
MIN_STEP: Final = 0.02
WARMUP_SHARE: Final = 0.1
MIN_TASKS: Final = 10_000
BATCHES_PER_POINT: Final = 200


@dataclass(frozen=True, slots=True)
class Series:
    """One line of the picture. `capacity` is its throughput when everything is there at once; a point per offered rate."""

    label: str
    capacity: float
    rates: list[float]
    points: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        points = [{"rate": rate, **point} for rate, point in zip(self.rates, self.points, strict=True)]
        return {"label": self.label, "capacity": self.capacity, "points": points}


def max_runs(setup: Setup) -> int:
    """So many runs a sweep takes at most."""
    num_variants = len(_variants(setup))
    return num_variants * (1 + len(LOADS) + len(KNEE) * (num_variants - 1))


def sweep(setup: Setup, progress: Callable[[int], object] = lambda num_runs: None) -> list[Series]:
    """Run it all; one bin first. `progress` is told the number of runs that are over.

    Raises:
        ValueError: every client has a load of its own, so that there is none to vary.
    """
    if not any(c.has_no_load for c in setup.clients):
        raise ValueError("a picture varies the rate of clients without rate= and closed=: there are none")
    variants = _variants(setup)
    num_done = 0

    def run_one(variant: Setup) -> dict[str, Any]:
        nonlocal num_done
        summary = run(variant).summary()
        num_done += 1
        progress(num_done)
        return summary

    bursts = [replace(v, arrival_rate=None, timeout=None, num_warmup=0) for _, v in variants]
    capacities = [run_one(burst)["throughput"] for burst in bursts]
    rates = _rates(*capacities)
    found = []
    for (label, variant), capacity in zip(variants, capacities, strict=True):
        warmup = int(WARMUP_SHARE * variant.num_tasks)
        points = [run_one(replace(variant, arrival_rate=rate, num_warmup=warmup)) for rate in rates]
        found.append(Series(label, capacity, rates, points))
    return found


def _rates(first: float, chosen: float | None = None) -> list[float]:
    """What is offered, ascending: the chosen one's loads, and between them those at which the other one gives in."""
    highest = first if chosen is None else chosen
    rates = [load * highest for load in LOADS]
    for load in KNEE if chosen is not None else ():
        if all(abs(load * first - rate) > MIN_STEP * highest for rate in rates):
            rates.append(load * first)
    return sorted(rates)


def _variants(setup: Setup) -> list[tuple[str, Setup]]:
    """What is compared; the chosen one last."""
    if setup.policy == "continuous":
        return [("sealed batches", replace(setup, policy="static", bins=1)), ("continuous", setup)]
    if setup.bins == 1 or (setup.bins is None and setup.policy == "static"):
        return [("1 bin", setup)]
    label = "learned bins" if setup.bins is None else f"{setup.bins} bins, {setup.boundaries}"
    return [("1 bin", replace(setup, bins=1)), (label, setup)]


def default_tasks(batch_size: int) -> int:
    """Tasks per run that make a quiet line."""
    return max(MIN_TASKS, BATCHES_PER_POINT * batch_size)

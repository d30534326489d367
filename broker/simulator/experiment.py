"""One simulation, from what was asked for to the record of what happened.

Knows how the parts are put together. Does not know command lines or what reports look like.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from penstock.broker.scheduling.bins import equal_mass_boundaries, optimal_boundaries
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.simulator import record
from penstock.broker.simulator.clients import Client, Load, Source
from penstock.broker.simulator.engine import Scheduler, Server, World
from penstock.broker.simulator.production import Production
from penstock.broker.simulator.record import Record
from penstock.broker.simulator.service import Service
from penstock.broker.simulator.textbook import Sealed

POLICIES: Final = ("static", "dynamic", "continuous")
UNITS_S: Final = {"s": 1.0, "ms": 0.001}
SAMPLE_SIZE: Final = 100_000
SAMPLE_STREAM: Final = 1 << 32

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated. Durations and rates are in the unit of the service, unless the name says otherwise.

    Attributes:
        bins: None lets the dynamic policy learn them; the others then have one.
        boundaries: how so many bins are laid out on a sample of the service: "equal" shares, or "dp".
        arrival_rate: of all clients without a load of their own, together; None: a burst.
        num_tasks: of all open-ended clients together, see `clients.SYNTAX`.
        slowness: of each server; all 1 if empty.
        credit: batches that a server may hold (dynamic only).
    """

    service: Service
    policy: str = "static"
    unit: str = "s"
    batch_size: int = 32
    bins: int | None = None
    boundaries: str = "dp"
    clients: tuple[Client, ...] = (Client(),)
    num_tasks: int = 128_000
    arrival_rate: float | None = None
    timeout: float | None = None
    num_servers: int = 1
    slowness: tuple[float, ...] = ()
    credit: int = 1
    mispredict: float = 0.0
    seal_ms: float | None = None
    num_warmup: int = 0
    seed: int = 0
    config: SchedulingConfig = field(default_factory=SchedulingConfig)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES or self.unit not in UNITS_S or self.boundaries not in ("equal", "dp"):
            raise ValueError(f"policy, unit or boundaries unknown: {self.policy}, {self.unit}, {self.boundaries}")
        if not 1 <= self.batch_size <= 4096:
            raise ValueError(f"the batch size is from 1 to 4096, not {self.batch_size}")
        if self.bins is not None and not 1 <= self.bins <= 64:
            raise ValueError(f"there are 1 to 64 bins, not {self.bins}")
        if not 0.0 <= self.mispredict <= 1.0:
            raise ValueError(f"mispredict is a share from 0 to 1, not {self.mispredict:g}")
        for name in ("num_tasks", "num_servers", "credit", "arrival_rate", "timeout", "seal_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value:g}")
        if self.slowness and (len(self.slowness) != self.num_servers or not all(s > 0 for s in self.slowness)):
            raise ValueError(f"slowness needs {self.num_servers} numbers above 0, one per server")
        if not 0 <= self.num_warmup < self.num_tasks:
            raise ValueError(f"warm-up is 0 or more tasks and fewer than all, not {self.num_warmup}")

    @property
    def unit_s(self) -> float:
        return UNITS_S[self.unit]

    def all_clients(self) -> tuple[Client, ...]:
        """The clients with what they take over from the whole: its time limit, and their part of its rate or tasks."""
        num_without = sum(c.has_no_load for c in self.clients)
        found = []
        for client in self.clients:
            if client.timeout is None:
                client = replace(client, timeout=self.timeout)
            if client.has_no_load and self.arrival_rate is not None:
                client = replace(client, rate=self.arrival_rate / num_without)
            elif client.has_no_load and client.tasks is None:
                client = replace(client, tasks=max(1, self.num_tasks // num_without))
            found.append(client)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Finished:
    """A run, the fixed boundaries that it had, and what the broker says that it did by itself, the newest first."""

    setup: Setup
    record: Record
    boundaries_ms: tuple[float, ...]
    events: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """See `record.summarise`."""
        setup = self.setup
        return record.summarise(self.record, setup.all_clients(), setup.unit_s, setup.num_servers, setup.num_warmup)


def run(setup: Setup, progress: Progress = lambda num: None) -> Finished:
    """Simulate. `progress` is told the number of tasks that have ended, now and then."""
    clients = setup.all_clients()
    sources = [Source(c, i, setup.service, setup.unit_s, setup.mispredict, setup.seed) for i, c in enumerate(clients)]
    boundaries_ms = fixed_boundaries_ms(setup)
    num_slots = setup.batch_size if setup.policy == "continuous" else 1
    slowness = setup.slowness or (1.0,) * setup.num_servers
    servers = [Server(slowness[i // num_slots]) for i in range(setup.num_servers * num_slots)]
    scheduler = _scheduler(setup, clients, boundaries_ms)
    world = World(scheduler, Load(sources, setup.num_tasks), servers, progress)
    world.run()
    events = scheduler.events() if isinstance(scheduler, Production) else []
    return Finished(setup, record.make(world.tasks, world.batches, num_slots), boundaries_ms, events)


def _scheduler(setup: Setup, clients: tuple[Client, ...], boundaries_ms: tuple[float, ...]) -> Scheduler:
    match setup.policy:
        case "static":
            seal_s = None if setup.seal_ms is None else setup.seal_ms / 1000.0
            return Sealed(setup.batch_size, setup.num_servers, boundaries_ms, seal_s)
        case "continuous":
            return Sealed(1, setup.num_servers * setup.batch_size)
        case _:
            config = setup.config
            if setup.bins is not None:
                config = replace(config, max_bins=setup.bins, boundaries_ms=boundaries_ms)
            return Production(clients, setup.batch_size, setup.num_servers, setup.credit, config)


def fixed_boundaries_ms(setup: Setup) -> tuple[float, ...]:
    """Boundaries between a given number of bins, from a sample of what all clients send; none if they are learned."""
    if setup.bins in (None, 1) or setup.policy == "continuous":
        return ()
    random = np.random.default_rng([setup.seed, SAMPLE_STREAM])
    num_each = max(1, SAMPLE_SIZE // len(setup.clients))
    times = np.concatenate([setup.service.sample(random, num_each) * c.size for c in setup.clients])
    times_ms = (times * setup.unit_s * 1000.0).tolist()
    assert setup.bins is not None
    if setup.boundaries == "equal":
        return tuple(equal_mass_boundaries(times_ms, setup.bins))
    return tuple(optimal_boundaries(times_ms, setup.bins, setup.batch_size))

"""Who sends tasks, how many, and when: the clients of a simulated broker.

Knows their loads and draws their tasks. Does not know what happens to a task between its arrival and its end.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from penstock.broker.protocol import NUM_PRIORITIES
from penstock.broker.simulator.service import Service

SYNTAX: Final = """\
NAME[:KEY=VALUE]...,NAME[:KEY=VALUE]...    durations in the unit of --service, rates in tasks per unit
  tasks=N      so many in all. Without it: a burst has its part of --tasks, and other clients go on until all that have
               a number are through; if none has one, until --tasks have been sent by all of them together
  rate=R       they arrive at random, R per unit of time (Poisson)
  closed=N     N are always open: each that ends makes room for the next
               (with neither, --arrival says; a burst of all of them at once by default)
  start=T      it begins so late (default 0)
  size=F       its tasks take F times as long as --service says (default 1)
  weight=W     its share of the devices (default 1)
  account=A    clients with one account share its turn and its weight (default: the client's name)
  priority=P   0 to 9, lower is sooner (default 5)
  timeout=T    its tasks' time limit (default: --timeout)
  rows=N       tasks per submission (default 1; policy dynamic)"""

CHUNK: Final = 4096
MAX_CLIENTS: Final = 10_000
MAX_NAME: Final = 64


class ClientsError(ValueError):
    """A `--clients` that says nothing usable."""


@dataclass(frozen=True, slots=True)
class Client:
    """One client's load. Durations are in units of the service. Without `rate` and `closed` it is a burst of its tasks."""

    name: str = "client"
    tasks: int | None = None
    rate: float | None = None
    closed: int | None = None
    start: float = 0.0
    size: float = 1.0
    weight: float = 1.0
    account: str = ""
    priority: int = 5
    timeout: float | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        if self.rate is not None and self.closed is not None:
            raise ClientsError(f"client {self.name!r}: rate= or closed=, not both")
        for name in ("tasks", "rate", "closed", "size", "weight", "timeout", "rows"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ClientsError(f"client {self.name!r}: {name} must be above 0, not {value}")
        for name in (self.name, self.account or self.name):
            if not 1 <= len(name) <= MAX_NAME:
                raise ClientsError(f"the name of a client or account has 1 to {MAX_NAME} characters, not {len(name)}")
        if not 0 <= self.start < math.inf:
            raise ClientsError(f"client {self.name!r}: start must not be negative, not {self.start}")
        if not 0 <= self.priority < NUM_PRIORITIES:
            raise ClientsError(f"client {self.name!r}: priority is from 0 to {NUM_PRIORITIES - 1}, not {self.priority}")

    @property
    def has_no_load(self) -> bool:
        """Neither a rate nor a loop of its own."""
        return self.rate is None and self.closed is None


def parse(text: str) -> list[Client]:
    """Clients from the command line form, see `SYNTAX`.

    Raises:
        ClientsError: which part makes no sense, and why.
    """
    clients = [_parse_one(part.strip()) for part in text.split(",") if part.strip()]
    names = [c.name for c in clients]
    if not 1 <= len(clients) <= MAX_CLIENTS or len(set(names)) < len(names):
        raise ClientsError(f"--clients needs 1 to {MAX_CLIENTS:,} clients with names of their own")
    return clients


def _parse_one(text: str) -> Client:
    name, *settings = text.split(":")
    kinds: dict[str, Callable[[str], Any]] = {"tasks": int, "closed": int, "priority": int, "rows": int, "account": str}
    values = dict[str, Any]()
    for setting in settings:
        key, is_set, value = setting.partition("=")
        if key == "name" or key not in Client.__slots__ or not is_set:
            raise ClientsError(f"client {name!r}: {setting!r} is no KEY=VALUE with one of the keys\n{SYNTAX}")
        try:
            values[key] = kinds.get(key, float)(value)
        except ValueError:
            raise ClientsError(f"client {name!r}: {key}={value!r} is not a {'whole ' * (key in kinds)}number") from None
    return Client(name, **values)


class Task:
    """One task on its way. Times are seconds of the virtual clock, lengths milliseconds; -1: not yet.

    `retry_s` is what a refusal says.
    """

    __slots__ = (
        "arrived", "batch", "client", "deadline", "finished", "outcome", "predicted_ms", "retry_s", "service_ms", "started",
    )  # fmt: skip

    def __init__(self, client: int, arrived: float, deadline: float, service_ms: float, predicted_ms: float) -> None:
        self.client = client
        self.arrived = arrived
        self.deadline = deadline
        self.service_ms = service_ms
        self.predicted_ms = predicted_ms
        self.started = self.finished = -1.0
        self.retry_s = 0.0
        self.batch = -1
        self.outcome = ""


class Source:
    """A client at work: its tasks in order, each with its length and the length that is predicted for it.

    What it draws depends on the seed and on itself only, so that two policies see the same tasks.

    Args:
        index: its place among the clients.
        unit_s: seconds per unit of the service.
        mispredict: the share of tasks whose prediction is that of another task.
    """

    def __init__(self, client: Client, index: int, service: Service, unit_s: float, mispredict: float, seed: int) -> None:
        self.client = client
        self.index = index
        self.left = client.tasks
        self.start_s = client.start * unit_s
        self.timeout_s = math.inf if client.timeout is None else client.timeout * unit_s
        times, gaps = np.random.SeedSequence([seed, index]).spawn(2)
        self._lengths = _lengths(service, client.size * unit_s * 1000.0, mispredict, np.random.default_rng(times))
        self._gaps = _gaps(unit_s * client.rows / client.rate, np.random.default_rng(gaps)) if client.rate else None

    def make(self, now: float) -> Task:
        """Its next task."""
        service_ms, predicted_ms = next(self._lengths)
        return Task(self.index, now, now + self.timeout_s, service_ms, predicted_ms)

    def gap_s(self) -> float:
        """The time to its next arrival, if it has a rate."""
        assert self._gaps is not None
        return next(self._gaps)


def _lengths(
    service: Service, scale_ms: float, mispredict: float, random: np.random.Generator
) -> Iterator[tuple[float, float]]:
    """(length, predicted length) in ms, without end."""
    others, coins = random.spawn(2)
    num_before = 0
    while True:
        times = service.draw(random, CHUNK, num_before) * scale_ms
        predicted = times
        if mispredict:
            if service.trace is not None:
                wrong = others.choice(service.trace, CHUNK) * scale_ms
            else:
                wrong = service.draw(others, CHUNK) * scale_ms
            predicted = np.where(coins.random(CHUNK) < mispredict, wrong, times)
        num_before += CHUNK
        yield from zip(times.tolist(), predicted.tolist(), strict=True)


def _gaps(mean_s: float, random: np.random.Generator) -> Iterator[float]:
    while True:
        yield from random.exponential(mean_s, CHUNK).tolist()


@dataclass(slots=True)
class Load:
    """All clients together, and when they stop: see `tasks` in `SYNTAX`. `pool` is what open-ended ones may still send."""

    sources: Sequence[Source]
    pool: int
    _num_bounded_open: int = field(init=False)
    _is_pooled: bool = field(init=False)

    def __post_init__(self) -> None:
        bounded = [source.left for source in self.sources if source.left is not None]
        self._num_bounded_open = sum(bounded)
        self._is_pooled = not bounded

    def take(self, source: Source, num_wanted: int) -> int:
        """How many of so many tasks a client still sends; they count as sent."""
        if source.left is not None:
            num = min(num_wanted, source.left)
            source.left -= num
            return num
        if self._is_pooled:
            num = min(num_wanted, self.pool)
            self.pool -= num
            return num
        return num_wanted if self._num_bounded_open else 0

    def has_more(self, source: Source) -> bool:
        """Whether a client would still send something."""
        if source.left is not None:
            return source.left > 0
        return (self.pool if self._is_pooled else self._num_bounded_open) > 0

    def ended(self, task: Task) -> None:
        """A task has its outcome."""
        if self.sources[task.client].left is not None:
            self._num_bounded_open -= 1

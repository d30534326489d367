"""Which fault hits whom and when, and how it is done: SIGKILL, SIGSTOP, SIGTERM, a cut network, a full disk.

The schedule follows from its seed alone. Knows names of targets; processes are the business of `stage.py`.
"""

import heapq
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from network import CUTS

KINDS = ("kill", "blackout", "stop", "restart", "partition", "disk", "poison")
"""kill: SIGKILL. blackout: SIGKILL of everything at once. stop: SIGSTOP, 1 to 15 s. restart: SIGTERM, and started again.
partition: the network is cut. disk: it is full. poison: tasks that end their worker; `load.py` submits them."""
SECONDS = {"stop": (1.0, 15.0), "partition": (2.0, 15.0), "disk": (2.0, 6.0)}
WAYS = {"partition": CUTS, "disk": ("low", "full")}
"""low: below the broker's watermark; full: to the last byte."""
COPIES = {"broker": 3, "worker": 2, "supervisor": 1, "client": 1}
"""How often each process is in the deck, by its role."""
BROKER = "broker"
QUIET_S = 3.0
"""Nothing happens so long after the start."""


@dataclass(frozen=True)
class Fault:
    """`seconds` is how long it lasts, 0 where it is over at once; `how` is one of its kind's `WAYS`."""

    at_s: float
    kind: str
    target: str
    seconds: float = 0.0
    how: str = ""

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind} {self.target}{f' ({self.how})' if self.how else ''}{lasting}"


def schedule(
    seed: int,
    seconds: float,
    kinds: Collection[str],
    roles: Mapping[str, str],
    cut_off: Collection[str] = (),
    gap_s: tuple[float, float] = (1.5, 5.0),
    spared: tuple[Collection[str], float] = ((), 0.0),
) -> list[Fault]:
    """All faults of a run, by time. Each kind comes about equally often to each process: they are drawn from a deck.

    Args:
        roles: target -> broker, worker, supervisor or client.
        cut_off: targets with networks of their own.
        gap_s: the least and the most time between two.
        spared: who is not hit from how many seconds on.
    """
    drawn, faults, busy_until = random.Random(seed), list[Fault](), dict[str, float]()
    cells = _deck(drawn, kinds, roles, cut_off)
    at = QUIET_S
    while True:
        at += drawn.uniform(*gap_s)
        if at >= seconds:
            return faults
        cell = next(cells, None)
        if cell is None:
            return faults
        kind, target = cell
        lasts = round(drawn.uniform(*SECONDS[kind]), 1) if kind in SECONDS else 0.0
        how = drawn.choice(WAYS[kind]) if kind in WAYS else ""
        if busy_until.get(target, 0.0) <= at and not (target in spared[0] and at >= spared[1]):
            busy_until[target] = at + lasts
            faults.append(Fault(round(at, 2), kind, target, lasts, how))


def _deck(
    drawn: random.Random, kinds: Collection[str], roles: Mapping[str, str], cut_off: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Pairs of kind and target, shuffled, again and again."""
    targets: dict[str, Sequence[str]] = {
        "kill": sorted(roles),
        "stop": sorted(roles),
        "restart": sorted(target for target, role in roles.items() if role in ("broker", "supervisor")),
        "partition": sorted(cut_off),
        "disk": [BROKER],
        "blackout": [BROKER],
    }
    cells = [(kind, target) for kind in sorted(set(kinds) & set(targets)) for target in targets[kind]]
    deck = [cell for cell in cells for _ in range(COPIES[roles[cell[1]]])]
    while deck:
        yield from drawn.sample(deck, len(deck))


class Target(Protocol):
    """What a nemesis acts upon."""

    def begin(self, fault: Fault) -> bool: ...

    def end(self, fault: Fault) -> None: ...


@dataclass
class Done:
    """A fault that was done: monotonic seconds of its beginning, and of its end."""

    fault: Fault
    began: float
    ended: float = float("inf")


class Nemesis:
    """Does what is due. `done` are the faults that hit; `num_missed` those whose target was not there at that moment."""

    def __init__(self, faults: Sequence[Fault], target: Target, start: float) -> None:
        self._faults = list(reversed(faults))
        self._target = target
        self._start = start
        self._open: list[tuple[float, int]] = []
        self.done: list[Done] = []
        self.num_missed = 0

    def turn(self, now: float) -> list[Fault]:
        """Begin and end what is due; those that began come back."""
        while self._open and self._open[0][0] <= now:
            self._end(self.done[heapq.heappop(self._open)[1]], now)
        began = []
        while self._faults and self._start + self._faults[-1].at_s <= now:
            fault = self._faults.pop()
            if not self._target.begin(fault):
                self.num_missed += 1
                continue
            self.done.append(Done(fault, now))
            began.append(fault)
            heapq.heappush(self._open, (now + fault.seconds, len(self.done) - 1))
        return began

    def heal(self, now: float) -> None:
        """End all that lasts."""
        self._faults.clear()
        for _, number in self._open:
            self._end(self.done[number], now)
        self._open.clear()

    def _end(self, done: Done, now: float) -> None:
        self._target.end(done.fault)
        done.ended = now

"""Many seeds over several processes, one hash over all of them, and a failure made as small as it gets.

Knows processes and order; does not know what is simulated.
"""

import gc
import hashlib
import logging
import multiprocessing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from simulation.planted import plant
from simulation.world import CHAOS_S, Result, run_seed

CHUNK = 8
SHORTER_S = (0.5, 1.0, 2.0, 3.0, 4.0)


@dataclass(slots=True)
class Total:
    """What many seeds came to. The hash is over the seeds' hashes in their order, whoever ran them."""

    num_seeds: int = 0
    num_events: int = 0
    failures: list[Result] = field(default_factory=list)
    _hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, result: Result) -> None:
        self.num_seeds += 1
        self.num_events += result.num_events
        self._hash.update(result.digest.encode())
        if result.invariant:
            self.failures.append(result)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def results(start: int, num_seeds: int, jobs: int, bug: str = "") -> Iterator[Result]:
    """The seeds from `start` on, in order. `bug` is planted first."""
    seeds = range(start, start + num_seeds)
    if jobs < 2:
        _prepare(bug)
        try:
            yield from map(run_seed, seeds)
        finally:
            logging.disable(logging.NOTSET)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _prepare, (bug,)) as pool:
        yield from pool.imap(run_seed, seeds, CHUNK)


def _prepare(bug: str) -> None:
    logging.disable(logging.CRITICAL)
    if bug:
        plant(bug)
    gc.freeze()


def minimise(result: Result) -> tuple[tuple[str, ...], float, Result]:
    """The kinds of faults to leave out and the shortest time of chaos with which the same invariant still fails."""
    without, chaos_s = [], CHAOS_S
    for kind in result.kinds:
        smaller = _same(result, [*without, kind], chaos_s)
        if smaller is not None:
            without.append(kind)
            result = smaller
    for shorter_s in SHORTER_S:
        smaller = _same(result, without, shorter_s)
        if smaller is not None:
            return tuple(without), shorter_s, smaller
    return tuple(without), chaos_s, result


def _same(result: Result, without: Collection[str], chaos_s: float) -> Result | None:
    smaller = run_seed(result.seed, without, chaos_s)
    return smaller if smaller.invariant == result.invariant else None

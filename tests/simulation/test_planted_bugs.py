"""The simulation itself: every planted bug is noticed."""

import multiprocessing

import pytest

from simulation.planted import BUGS
from simulation.runner import results

MAX_SEEDS = 1000
SLOW = {
    "assigns-before-the-record", "keeps-leases-of-an-old-broker", "resumes-workers-it-does-not-know",
    "submits-again-under-a-new-id",
}  # fmt: skip
"""Those that take more than some 50 seeds."""


def seeds_until_caught(name: str) -> int | None:
    return next((n for n, result in enumerate(results(0, MAX_SEEDS, 1, name), 1) if result.invariant), None)


def caught(names: list[str]) -> dict[str, int | None]:
    """How many seeds each takes; every bug in a process of its own, since it changes the product for good."""
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        return dict(zip(names, pool.map(seeds_until_caught, names, chunksize=1), strict=True))


def test_there_are_enough_of_them_in_all_parts() -> None:
    assert len(BUGS) >= 30
    assert {bug.part for bug in BUGS.values()} == {"broker", "journal", "client", "worker"}
    assert all(bug.text for bug in BUGS.values())


@pytest.mark.timeout(400)
def test_planted_bugs_are_caught_within_a_few_seeds() -> None:
    found = caught([name for name in BUGS if name not in SLOW])
    assert not [name for name, num_seeds in found.items() if num_seeds is None], found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_planted_bugs_that_hide_are_caught_within_a_thousand_seeds() -> None:
    found = caught(sorted(SLOW))
    assert not [name for name, num_seeds in found.items() if num_seeds is None], found

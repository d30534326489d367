"""Seeds of simulated faults: all promises hold, the same seed does the same, and failures come with their smallest form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.faults import KINDS
from simulation.runner import Total, minimise, results
from simulation.seeds import KEPT
from simulation.world import World, run_seed

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "simulate_faults.py"


def simulate(*arguments: str, hash_seed: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def hash_of(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.rsplit("hash ", 1)[1].strip()


@pytest.mark.timeout(400)
def test_two_thousand_seeds_keep_all_promises() -> None:
    """As for every commit: on two free cores within 60 s."""
    run = simulate("--seeds", "2000", "--jobs", "2")
    assert run.returncode == 0, run.stdout
    assert "seeds 0 to 1999: 0 failures" in run.stdout


@pytest.mark.parametrize("seed", [seed for seed, _ in KEPT])
def test_seeds_that_once_failed_do_not(seed: int) -> None:
    result = run_seed(seed)
    assert not result.invariant, "\n".join([*result.story, result.text])


def test_without_faults_everything_is_done() -> None:
    world = World(1, without=KINDS)
    result = world.run()
    assert not result.invariant, result.text
    assert world.oracle.counts["done"] == sum(len(task.rows) for user in world.users for task in user.tasks) > 10


def test_faults_strike_and_rows_end_in_every_way() -> None:
    counts = dict[str, int]()
    struck = set[str]()
    for seed in range(30):
        world = World(seed)
        assert not world.run().invariant
        struck.update(world.kinds)
        for what, count in world.oracle.counts.items():
            counts[what] = counts.get(what, 0) + count
    assert struck == set(KINDS)
    wanted = {"done", "kernel_failed", "dead", "worker_lost", "cancelled", "deadline_exceeded"}
    assert wanted <= {what for what, count in counts.items() if count >= 5}, counts


def test_a_seed_does_the_same_whatever_the_order_of_hashes_and_the_processes() -> None:
    hashes = {
        hash_of(simulate("--seeds", "20", "--start", "300", "--jobs", jobs, hash_seed=hash_seed))
        for jobs, hash_seed in (("1", 1), ("1", 2), ("2", 3))
    }
    assert len(hashes) == 1


def test_two_seeds_differ() -> None:
    assert run_seed(1).digest == run_seed(1).digest != run_seed(2).digest


def test_a_failure_is_explained_and_made_smaller() -> None:
    run = simulate("--seeds", "40", "--jobs", "1", "--planted", "does-not-record-attempts")
    assert run.returncode == 1
    assert "BROKEN  run again" in run.stdout
    command = next(line for line in run.stdout.splitlines() if "smallest:" in line).split("simulate-faults ")[1]
    assert "--without" in command or "--chaos-s 4.0" not in command
    again = simulate(*command.split())
    assert again.returncode == 1
    assert "BROKEN  run again" in again.stdout
    assert again.stdout.count("\n") > 20, "the whole story"


def test_the_total_is_that_of_the_seeds_in_order() -> None:
    total, other = Total(), Total()
    for result in results(5, 3, jobs=1):
        total.add(result)
    for seed in (5, 6, 7):
        other.add(run_seed(seed))
    assert total.digest == other.digest
    assert total.num_seeds == 3
    assert not total.failures


def test_what_does_not_fail_stays_as_it_is() -> None:
    result = run_seed(3)
    without, _, smallest = minimise(result)
    assert set(without) == set(result.kinds), "every kind can go, since nothing fails"
    assert not smallest.invariant


def test_unknown_names_are_refused() -> None:
    for arguments in (("--planted", "nothing"), ("--seed", "1", "--without", "weather")):
        run = simulate(*arguments)
        assert run.returncode == 2
        assert "there are:" in run.stderr

"""A simulation streamed through a real broker and worker: snapshots, neighbours, and a checkpoint that goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import Running, running

from penstock.client import Client, InvalidInput

BOIDS = [[[0.2, 0.05, 0.1, 0.3, 10.0, 3.0, 3.0, 0.5]]]


@pytest.fixture(scope="module")
def stack(module_folder: Path) -> Iterator[Running]:
    with running(module_folder, "w") as run:
        yield run


def flock(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    positions = rng.random((3, 40, 2), dtype=np.float32)
    return {
        "positions": positions, "velocities": positions - 0.5, "agents": BOIDS, "space": [1.0], "world": "boids", "seed": seed
    }  # fmt: skip


def test_snapshots_and_a_checkpoint_beside_other_worlds(ps: Client) -> None:
    given = flock(1)
    others = [ps.submit("simulate", **flock(seed), steps=300) for seed in range(2, 6)]
    with ps.stream("simulate", **given, steps=100, snapshot_every=25) as stream:
        snapshots = list(stream)
        whole = stream.result()
    assert [int(snapshot["steps_done"]) for snapshot in snapshots] == [25, 50, 75, 100]
    assert all(snapshot["positions"].shape == (3, 40, 2) for snapshot in snapshots)
    np.testing.assert_array_equal(snapshots[-1]["positions"], whole["positions"])
    half = ps.call("simulate", **given, steps=50)
    np.testing.assert_array_equal(half["positions"], snapshots[1]["positions"])
    rest = ps.call("simulate", **{**given, **half}, steps=50)
    for name in ("positions", "velocities", "steps_done", "seed"):
        np.testing.assert_array_equal(rest[name], whole[name])
    assert [int(task.result()["steps_done"]) for task in others] == [300] * 4


def test_what_is_refused_says_what_to_do(ps: Client) -> None:
    with pytest.raises(InvalidInput, match="wrap or clip them"):
        ps.call("simulate", **{**flock(1), "space": [0.5]}, steps=1)

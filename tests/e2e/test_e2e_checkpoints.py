"""Long tasks whose worker and broker are killed: they go on where they were, bit for bit, and do not begin anew."""

from pathlib import Path
from typing import Any

import numpy as np
from running import KERNELS, Running, running, until

from penstock.client import Client

NUM_STEPS = 8_000
OFTEN = {"PENSTOCK_BROKER_CHECKPOINT_S": "0.1"}


def flock() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    positions = rng.random((2, 40, 2), dtype=np.float32)
    boids = [[[0.2, 0.05, 0.1, 0.3, 10.0, 3.0, 3.0, 0.5]]]
    given = {"positions": positions, "velocities": positions - 0.5, "agents": boids, "space": [1.0], "world": "boids"}
    return {**given, "seed": 5, "steps": NUM_STEPS}


def num_checkpoints(ps: Client) -> int:
    return int(ps.status()["counters"].get("checkpoints", 0))


def wait_saved(ps: Client, count: int = 2) -> None:
    """So many more checkpoints have come."""
    before = num_checkpoints(ps)
    until(lambda: num_checkpoints(ps) >= before + count, "checkpoints")


def restart_worker(run: Running) -> None:
    run.kill("w")
    run.start_worker("w", "--kernels", str(KERNELS))


def test_a_simulation_outlives_its_worker_and_its_broker(tmp_ipc: Path) -> None:
    steps = tmp_ipc / "steps"
    with running(tmp_ipc, "w", extra={**OFTEN, "E2E_STEPS": str(steps)}) as run, run.client(timeout=120.0) as ps:
        expected = ps.call("simulate", **flock())
        task = ps.options(durable=True).submit("counted", **flock())
        task.accepted()
        wait_saved(ps)
        restart_worker(run)
        wait_saved(ps)
        run.kill("broker")
        run.start_broker()
        wait_saved(ps)
        run.kill("broker")
        run.kill("w")
        run.start_broker()
        run.start_worker("w", "--kernels", str(KERNELS))
        found = task.result()
        counters = ps.status()["counters"]
    for name in ("positions", "velocities", "steps_done", "seed"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert counters["resumed"] >= 1
    lines = [tuple(map(int, line.split())) for line in steps.read_text().splitlines()]
    assert [start for _, start, _ in lines].count(0) == 1, "it began anew"
    assert lines[-1][2] == NUM_STEPS
    assert len({pid for pid, *_ in lines}) == 3, "three workers had a part in it"
    num_done = sum(stop - start for _, start, stop in lines)
    assert NUM_STEPS <= num_done < 2 * NUM_STEPS


def test_a_stream_is_told_every_part_once(tmp_ipc: Path) -> None:
    with running(tmp_ipc, "w", extra=OFTEN) as run, run.client() as ps:
        whole = ps.call("think", prompt="why", num_tokens=100)
        with ps.stream("think", prompt="why", num_tokens=100) as stream:
            pieces = iter(stream)
            tokens = [int(next(pieces)["token"]) for _ in range(20)]
            wait_saved(ps)
            restart_worker(run)
            tokens += [int(piece["token"]) for piece in pieces]
            result = stream.result()
        assert ps.status()["counters"]["resumed"] == 1
    np.testing.assert_array_equal(result, whole)
    assert tokens == whole[1:].tolist()

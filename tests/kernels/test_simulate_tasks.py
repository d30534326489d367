"""The kernel `simulate` as a worker drives it: opened, stepped with others, stopped, resumed, refused."""

import itertools
from typing import Any

import pytest
import torch

from penstock.kernels import InvalidInput, Kernel, registry, simulate
from penstock.kernels.ops import AgentState, Boids, Circles
from penstock.kernels.ops import simulate as run_steps
from penstock.kernels.simulate import tasks

BOIDS = [0.2, 0.05, 0.1, 0.3, 10.0, 3.0, 3.0, 0.5]
CIRCLES = [0.03, 1.0]


@pytest.fixture
def kernel() -> Kernel:
    return registry.get("simulate")


def task(world: str = "boids", num_worlds: int = 2, num_agents: int = 12, seed: int = 0, **given: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    positions = torch.rand(num_worlds, num_agents, 2, generator=g)
    velocities = 0.2 * torch.randn(positions.shape, generator=g)
    agents, space = torch.tensor([[BOIDS if world == "boids" else CIRCLES]]), torch.ones(1)
    if world == "grid":
        cells = torch.rand(num_worlds, 64, generator=g).argsort(1)[:, :num_agents]
        positions, velocities = torch.stack([cells % 8, cells // 8], -1), torch.zeros_like(positions, dtype=torch.int64)
        agents = torch.randint(0, 8, (1, num_agents, 3), generator=g) % torch.tensor([8, 8, 2])
        space = torch.randint(0, 5, (num_worlds, 2, 8, 8), generator=g)
    inputs = {"positions": positions, "velocities": velocities, "agents": agents, "space": space, "world": world}
    return {**inputs, "seed": float(seed), "steps": 20.0, **given}


def finish(kernel: Kernel, *inputs: dict[str, Any]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Every task's chunks and result, all of them open at once."""
    states = [kernel.open(**given) for given in inputs]
    chunks: list[list[dict[str, Any]]] = [[] for _ in states]
    results: dict[int, dict[str, Any]] = {}
    for _ in range(10_000):
        active = [i for i in range(len(states)) if i not in results]
        if not active:
            return [(chunks[i], results[i]) for i in range(len(states))]
        for i, step in zip(active, kernel.step([states[i] for i in active]), strict=True):
            if step.chunk is not None:
                chunks[i].append({name: torch.as_tensor(value).clone() for name, value in step.chunk.items()})
            if step.result is not None:
                results[i] = {name: torch.as_tensor(value) for name, value in step.result.items()}
    raise AssertionError("it does not end")


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def resumed(given: dict[str, Any], result: dict[str, Any], steps: float) -> dict[str, Any]:
    checkpoint = {name: result[name] for name in ("positions", "velocities")}
    return {**given, **checkpoint, "seed": float(result["seed"]), "steps_done": float(result["steps_done"]), "steps": steps}


def test_it_is_simulate(kernel: Kernel) -> None:
    given = task(steps=15.0, dt=0.01)
    [(chunks, result)] = finish(kernel, given)
    state = AgentState.start(given["positions"], given["velocities"])
    expected = run_steps(Boids(1.0, *BOIDS), state, steps=15, dt=0.01)
    assert torch.equal(result["positions"], expected.positions)
    assert torch.equal(result["velocities"], expected.velocities)
    assert (int(result["steps_done"]), int(result["seed"]), chunks) == (15, 0, [])
    given = task("circles", steps=9.0, walls=True, stiffness=70.0, damping=0.5)
    [(_, result)] = finish(kernel, given)
    world = Circles(1.0, 0.03, 1.0, 70.0, 0.5, has_walls=True)
    expected = run_steps(world, AgentState.start(given["positions"], given["velocities"]), steps=9)
    assert torch.equal(result["positions"], expected.positions)


@pytest.mark.parametrize("world", ["boids", "circles", "grid"])
def test_a_checkpoint_goes_on_bit_for_bit(kernel: Kernel, world: str) -> None:
    given = task(world, seed=7, steps=40.0)
    [(_, whole)] = finish(kernel, given)
    [(_, first)] = finish(kernel, {**given, "steps": 23.0})
    [(_, rest)] = finish(kernel, resumed(given, first, 17.0))
    if world == "grid":
        assert first["rewards"].any()
        rest["rewards"] = rest["rewards"] + first["rewards"]
    assert_same(rest, whole)
    assert not torch.equal(first["positions"], whole["positions"])


@pytest.mark.parametrize("chunk_ms", [0.0, 1e9])
@pytest.mark.parametrize("world", ["boids", "circles", "grid"])
def test_who_shares_the_launches_changes_no_bit(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, world: str, chunk_ms: float
) -> None:
    """Tasks of equal and of other shapes, kinds and ends, one of them full of what is not a number."""
    monkeypatch.setattr(simulate, "CHUNK_MS", chunk_ms)
    broken = task(world, seed=3)
    others = [task(world, seed=2, num_worlds=3, steps=31.0, dt=0.04), task(num_agents=5)]
    others.append(task("circles", num_agents=9, walls=True))
    given = task(world, seed=1)
    alone = finish(kernel, given)[0][1]
    states = [kernel.open(**inputs) for inputs in (broken, given, *others)]
    if world != "grid":
        states[0].state.velocities[:] = torch.nan
    result = None
    while result is None:
        result = kernel.step(states)[1].result
        states = [state for state in states if state.num_left or state is states[1]]
    assert_same({name: torch.as_tensor(value) for name, value in result.items()}, alone)


def test_tasks_that_fit_advance_in_one_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def spy(world: Any, state: AgentState, **given: Any) -> AgentState:
        launched.append(tuple(state.positions.shape[:2]))
        return run_steps(world, state, **given)

    monkeypatch.setattr(simulate, "simulate", spy)
    inputs = [task(seed=1), task(seed=2, num_worlds=5, dt=0.1), task(num_agents=3)]
    inputs += [task("circles"), task("circles", walls=True)]
    states = [kernel.open(**given) for given in inputs]
    kernel.step(states)
    assert launched == [(7, 12), (2, 3), (2, 12), (2, 12)]
    launched.clear()
    monkeypatch.setattr(simulate, "MAX_AGENTS", 84)
    kernel.step([kernel.open(**task(seed=seed, num_worlds=3)) for seed in range(5)])
    assert launched == [(6, 12), (6, 12), (3, 12)]


def test_snapshots_come_when_they_are_due(kernel: Kernel) -> None:
    given = task(steps=20.0, snapshot_every=6, steps_done=4.0)
    [(chunks, result)] = finish(kernel, given)
    assert [int(chunk["steps_done"]) for chunk in chunks] == [6, 12, 18, 24]
    assert torch.equal(chunks[-1]["positions"], result["positions"])
    for chunk in chunks:
        [(_, there)] = finish(kernel, {**given, "steps": float(int(chunk["steps_done"]) - 4), "snapshot_every": 0})
        assert torch.equal(chunk["positions"], there["positions"])
    [(chunks, _)] = finish(kernel, task("grid", steps=3.0, snapshot_every=1))
    assert [set(chunk) for chunk in chunks] == [{"positions", "steps_done", "rewards"}] * 3


def test_a_failure_advances_nobody(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker steps each task alone after one that failed: no snapshot may be lost by the common attempt."""
    good = kernel.open(**task(snapshot_every=1))
    bad = kernel.open(**task("circles"))
    monkeypatch.setattr(tasks, "MAX_PAIRS", 10)
    with pytest.raises(InvalidInput, match="close together"):
        kernel.step([good, bad])
    assert (good.steps_done, good.num_left) == (0, 20)
    [step] = kernel.step([good])
    assert step.chunk is not None
    assert int(step.chunk["steps_done"]) == 1


def test_the_chunk_is_bounded_by_time(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 0.004)  # every look at the clock is 4 ms later
    monkeypatch.setattr(simulate.time, "perf_counter", lambda: next(ticks))
    state = kernel.open(**task(steps=1000.0, num_worlds=1))
    done = []
    for _ in range(4):
        kernel.step([state])
        done.append(state.steps_done)
    # 1 step of 4 ms, then 5 in 20 ms, 25 at 0.8 ms each, 125 at 0.16 ms each
    assert done == [1, 6, 31, 156]


REFUSED = [
    ({"world": "fish"}, "world must be one of boids, circles, grid"),
    ({"world": 3}, "world must be one of"),
    ({"walls": 1}, "walls must be True or False"),
    ({"steps": 1.5}, "steps must be a whole number"),
    ({"snapshot_every": -1}, "snapshot_every must be"),
    ({"snapshot_every": 1, "steps": 1e6}, "larger snapshot_every"),
    ({"positions": torch.rand(2, 12, 3)}, "positions must be"),
    ({"positions": torch.rand(2, 11, 2)}, "velocities must have the shape"),
    ({"positions": torch.rand(2, 12, 2) + 1}, "positions must lie in the square"),
    ({"positions": torch.full((2, 12, 2), torch.nan)}, "positions must lie in the square"),
    ({"velocities": torch.full((2, 12, 2), torch.inf)}, "velocities must be finite"),
    ({"agents": torch.ones(1, 1, 7)}, "agents must be"),
    ({"agents": torch.ones(3, 1, 8)}, "agents must be"),
    ({"agents": torch.full((1, 1, 8), torch.nan)}, "agents must be finite"),
    ({"agents": -torch.ones(1, 1, 8)}, "must not be negative"),
    ({"agents": torch.tensor([[[1.0, 1, 2, 1, 0, 0, 0, 0]]])}, "min speed is above max speed"),
    ({"space": torch.zeros(1)}, "side that is not above 0"),
    ({"space": torch.ones(3)}, "space must be the sides"),
    ({"space": torch.ones(1, 1)}, "space must be the sides"),
    (task("boids", 0), "send 1 to"),
    (task("boids", 1, 20_000), "send fewer or smaller worlds"),
    (task("boids", 1 << 11, 1 << 10), "send 1 to"),
    (task("circles", agents=torch.zeros(1, 1, 2)), "above 0"),
    (task("circles", agents=torch.ones(1, 1, 2)), "wider than its square"),
    (task("circles", 1, 60_000, positions=torch.full((1, 60_000, 2), 0.5)), "close together"),
    (task("grid", space=torch.ones(8, 8)), "policy"),
    (task("grid", space=torch.full((1, 2, 8, 8), 5)), "must hold actions"),
    (task("grid", space=torch.zeros(1, 1, 4, 9)), "layers of agents"),
    (task("grid", space=torch.zeros(1, 2, 4, 9)), "positions must be cells"),
    (task("grid", space=torch.full((1, 2, 8, 8), -1)), "stands in a wall"),
    (task("grid", positions=torch.zeros(2, 12, 2)), "on one cell"),
    (task("grid", space=torch.zeros(1).expand(2, 2, 4096, 4096)), "cells in all worlds"),
]


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_what_is_refused(kernel: Kernel, index: int) -> None:
    given, message = REFUSED[index]
    with pytest.raises(InvalidInput, match=message):
        kernel.open(**{**task(), **given})


@pytest.mark.parametrize("world", ["boids", "circles", "grid"])
def test_a_saved_task_goes_on_bit_for_bit(kernel: Kernel, world: str) -> None:
    """What a broker keeps for the next worker, in the middle of a task: snapshots and rewards go on as well."""
    given = task(world, steps=30.0, steps_done=3.0, snapshot_every=4)
    [(chunks, result)] = finish(kernel, given)
    state = kernel.open(**given)
    for _ in range(100):
        if state.steps_done > 15:
            break
        kernel.step([state])
    saved = {name: torch.as_tensor(value).clone() for name, value in (kernel.checkpoint(state) or {}).items()}
    again = kernel.restore(kernel.open(**given), saved)
    assert again.num_left == state.num_left < 20
    rest: list[dict[str, Any]] = []
    for _ in range(100):
        [step] = kernel.step([again])
        if step.chunk is not None:
            rest.append({name: torch.as_tensor(value) for name, value in step.chunk.items()})
        if step.result is not None:
            break
    assert_same({name: torch.as_tensor(value) for name, value in (step.result or {}).items()}, result)
    assert 0 < len(rest) < len(chunks)
    for ours, theirs in zip(rest, chunks[-len(rest) :], strict=True):
        assert_same(ours, theirs)

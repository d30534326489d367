"""Agents in boids, circles and grid worlds: a streaming kernel that advances many users' worlds together.

Knows how long a chunk of steps may take and when a snapshot is due; does not know formulas (`worlds.py`) nor what a task
must look like (`tasks.py`). `penstock.kernels.ops` has `simulate` and the worlds for direct calls.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.inputs import Row, Static, Tensor
from penstock.kernels.runtime import Step
from penstock.kernels.simulate.driver import MAX_STEPS, simulate
from penstock.kernels.simulate.tasks import COLUMNS, MAX_AGENTS, check_crowding, joined, parts, world_of
from penstock.kernels.simulate.worlds import AgentState, Boids, Circles, World
from penstock.kernels.spec import Cost

CHUNK_MS = 20.0
"""About how long an iteration takes, all open tasks together; at least one step each."""
MAX_SNAPSHOT_BYTES = 256 << 20
MAX_SNAPSHOTS = 10_000
MAX_SEED = 2**31 - 1
_NUMBERS = ("float32", "float64", "int32", "int64")


@dataclass(slots=True)
class Simulation:
    """One streamed task: its world and state, how many steps are left, and what one step of one world took last."""

    world: World
    state: AgentState
    dt: torch.Tensor
    seed: int
    steps_done: int
    num_left: int
    snapshot_every: int
    world_ms: float | None = None

    @property
    def num_worlds(self) -> int:
        return len(self.state.positions)

    @property
    def num_to_stop(self) -> int:
        """Steps until the next snapshot or the end."""
        every = self.snapshot_every or MAX_STEPS
        return min(self.num_left, every - self.steps_done % every)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for tasks whose worlds can be advanced together, with the bits that each would get alone."""
        world = self.world
        shape = world.policy.shape[1:] if not isinstance(world, Boids | Circles) else world.has_walls
        return type(world), self.state.positions.shape[1], shape, getattr(world, "max_cells", None)


@kernel(
    "simulate",
    inputs={
        "positions": Tensor(dtypes=_NUMBERS, rank=3),
        "velocities": Tensor(dtypes=_NUMBERS, rank=3),
        "agents": Tensor(dtypes=_NUMBERS, rank=3),
        "space": Tensor(dtypes=(*_NUMBERS, "int8")),
        "steps": Row(minimum=1, maximum=MAX_STEPS),
        "world": Static(),
        "dt": Row(default=0.02, minimum=0.0, maximum=1e6),
        "stiffness": Row(default=1000.0, minimum=0.0, maximum=1e15),
        "damping": Row(default=0.0, minimum=0.0, maximum=1e15),
        "seed": Row(default=0.0, minimum=0.0, maximum=MAX_SEED),
        "steps_done": Row(default=0.0, minimum=0.0, maximum=2**53),
    },
    cost=Cost(base_ms=1.0, per={"steps": 0.5, "positions.numel": 1e-4}),
    combine="sum",
)
class Simulate:
    """Advances agents by `steps` steps of `dt`; called, or streamed with a snapshot every `snapshot_every` steps.

    world: "boids", "circles" or "grid", see `worlds.Boids`, `Circles` and `GridWorld`. positions, velocities: `[worlds, agents,
    2]`, computed in float32, in a grid as int32 cells and last moves. agents: `[1 or worlds, 1 or agents, columns]`: of
    boids perception, separation radius, min speed, max speed, separation, alignment, cohesion, noise; of circles radius,
    mass; in a grid goal x, goal y, layer. space: the side of each square, `[1 or worlds]`; of a grid its policy, integers
    `[1 or worlds, layers, height, width]`. walls: squares with walls, not periodic. stiffness, damping: of circles.

    Result: positions, velocities, steps_done, seed: a checkpoint. Given back as inputs, the simulation goes on bit for
    bit as if it had never stopped, whatever runs beside it (on one device: the CPU, or cuda with Triton). A grid's result
    also has rewards, int32 `[worlds, agents, 2]`: arrivals and refused moves of this task. Snapshots, where the count of
    steps from the beginning is a multiple of `snapshot_every` (0: none): positions, steps_done, rewards. Limits: 2^20
    agents, 2^28 pairs of boids a step, 2^24 cells, 1,000,000 steps, 10,000 snapshots and 256 MiB of them. Tolerance: that
    of `driver.simulate`.
    """

    def open(
        self,
        positions: torch.Tensor,
        velocities: torch.Tensor,
        agents: torch.Tensor,
        space: torch.Tensor,
        steps: float,
        world: str,
        dt: float = 0.02,
        stiffness: float = 1000.0,
        damping: float = 0.0,
        seed: float = 0.0,
        steps_done: float = 0.0,
        snapshot_every: int = 0,
        walls: bool = False,
    ) -> Simulation:
        """The state of one streamed task."""
        if not isinstance(world, str) or world not in COLUMNS:
            raise InvalidInput(f"simulate: world must be one of {', '.join(COLUMNS)}; got {shown(world)}")
        if type(walls) is not bool:
            raise InvalidInput(f"simulate: walls must be True or False; got {shown(walls)}")
        for name, value in (("steps", steps), ("seed", seed), ("steps_done", steps_done)):
            if value != int(value):
                raise InvalidInput(f"simulate: {name} must be a whole number; got {value!r}")
        dtype = torch.int32 if world == "grid" else torch.float32
        state = AgentState.start(positions.to(dtype), velocities.to(dtype), seed=int(seed), steps_done=int(steps_done))
        place = world_of(world, state, agents, space, walls)
        if isinstance(place, Circles):
            place = replace(place, stiffness=_each(state, stiffness), damping=_each(state, damping))
        _check_snapshots(state, int(steps), snapshot_every)
        return Simulation(place, state, _each(state, dt), int(seed), int(steps_done), int(steps), snapshot_every)

    def checkpoint(self, task: Simulation) -> dict[str, Any]:
        """Where everybody is; the world comes with the inputs."""
        state = task.state
        rewards = {} if state.rewards is None else {"rewards": state.rewards}
        place = {"positions": state.positions, "velocities": state.velocities, **rewards}
        return {**place, "steps_done": task.steps_done, "num_left": task.num_left}

    def restore(self, task: Simulation, saved: Mapping[str, Any]) -> Simulation:
        """The task as it was then: it goes on bit for bit."""
        task.steps_done, task.num_left = int(saved["steps_done"]), int(saved["num_left"])
        done = torch.full_like(task.state.steps_done, task.steps_done)
        place = {name: saved[name] for name in ("positions", "velocities", "rewards") if name in saved}
        task.state = replace(task.state, **place, steps_done=done)
        return task

    def step(self, tasks: list[Simulation]) -> list[Step]:
        """Some steps for every task, those that can be advanced together in one go; all tasks advance, or none."""
        groups = _groups(tasks)
        advanced = [(group, *_advance(group, CHUNK_MS / len(groups))) for group in groups]
        for group, states, num_steps, world_ms in advanced:
            for task, state in zip(group, states, strict=True):
                task.state, task.world_ms = state, world_ms
                task.steps_done += num_steps
                task.num_left -= num_steps
        return [_told(task) for task in tasks]


def _groups(tasks: list[Simulation]) -> list[list[Simulation]]:
    """Tasks of one kind together, at most as many agents as the largest task may have."""
    groups: list[list[Simulation]] = []
    latest: dict[tuple[Any, ...], tuple[list[Simulation], int]] = {}
    for task in tasks:
        num_agents = task.state.positions.numel() // 2
        mates, num_before = latest.get(task.kind, ([], MAX_AGENTS))
        if num_before + num_agents > MAX_AGENTS:
            mates, num_before = [], 0
            groups.append(mates)
        mates.append(task)
        latest[task.kind] = mates, num_before + num_agents
    return groups


def _advance(tasks: list[Simulation], budget_ms: float) -> tuple[list[AgentState], int, float]:
    """The tasks' states after as many steps as the time allows, how many, and the ms of one step of one world."""
    world, state = joined([task.world for task in tasks], [task.state for task in tasks])
    num_worlds = sum(task.num_worlds for task in tasks)
    known = [task.world_ms for task in tasks if task.world_ms is not None]
    num_in_time = int(budget_ms / max(max(known) * num_worlds, 1e-6)) if known else 1
    num_steps = max(min(num_in_time, *(task.num_to_stop for task in tasks)), 1)
    for task in tasks:
        check_crowding(task.world, task.state)
    began = time.perf_counter()
    state = simulate(world, state, steps=num_steps, dt=torch.cat([task.dt for task in tasks]))
    if state.positions.device.type == "cuda":
        torch.cuda.synchronize(state.positions.device)
    world_ms = (time.perf_counter() - began) * 1e3 / (num_steps * num_worlds)
    return parts(state, [task.num_worlds for task in tasks]), num_steps, world_ms


def _told(task: Simulation) -> Step:
    """What the iteration gives the task: a snapshot where one is due, and the result at the end."""
    state, done = task.state, torch.tensor(task.steps_done)
    rewards = {} if state.rewards is None else {"rewards": state.rewards}
    is_due = task.snapshot_every and task.steps_done % task.snapshot_every == 0
    chunk = {"positions": state.positions, "steps_done": done, **rewards} if is_due else None
    if task.num_left:
        return Step(chunk=chunk)
    checkpoint = {"positions": state.positions, "velocities": state.velocities, "steps_done": done, "seed": task.seed}
    return Step(chunk=chunk, result={**checkpoint, **rewards})


def _check_snapshots(state: AgentState, steps: int, every: object) -> None:
    if type(every) is not int or not 0 <= every <= MAX_STEPS:
        raise InvalidInput(f"simulate: snapshot_every must be an integer from 0 (none) to {MAX_STEPS}; got {shown(every)}")
    num_snapshots = steps // every + 1 if every else 0
    num_bytes = num_snapshots * state.positions.nbytes * (1 if state.rewards is None else 2)
    if num_snapshots > MAX_SNAPSHOTS + 1 or num_bytes > MAX_SNAPSHOT_BYTES:
        raise InvalidInput(
            f"simulate: {num_snapshots} snapshots of {num_bytes} bytes; at most {MAX_SNAPSHOTS} and {MAX_SNAPSHOT_BYTES}: "
            "choose a larger snapshot_every, or several tasks, each from the result of the one before"
        )


def _each(state: AgentState, value: float) -> torch.Tensor:
    """A number for every world of a state, float32."""
    return torch.full((len(state.positions),), value, dtype=torch.float32, device=state.positions.device)

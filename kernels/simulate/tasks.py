"""From a task's arrays to a world and a state, and many of those as one.

Knows what a task may ask for; does not know when its steps are computed. What is refused is refused here, with a sentence
that says what to do.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from penstock.kernels.errors import InvalidInput
from penstock.kernels.simulate.circles import crowding
from penstock.kernels.simulate.worlds import WALL, AgentState, Boids, Circles, GridWorld, World

MAX_AGENTS = 1 << 20
MAX_PAIRS = 1 << 28
MAX_CELLS = 1 << 24
Joinable = TypeVar("Joinable", AgentState, World)
COLUMNS = {
    "boids": "perception, separation radius, min speed, max speed, separation, alignment, cohesion, noise",
    "circles": "radius, mass",
    "grid": "goal x, goal y, layer",
}


def world_of(kind: str, state: AgentState, agents: torch.Tensor, space: torch.Tensor, has_walls: bool) -> World:
    """The world that a state lives in, with every parameter as `[worlds, agents]` or `[worlds]`. Raises InvalidInput.

    agents: `[1 or worlds, 1 or agents, columns]`, see `COLUMNS`. space: sides `[1 or worlds]`, or a grid's policy
    `[1 or worlds, layers, height, width]`. The springs of circles are left to the caller.
    """
    num_worlds, num_agents, _ = state.positions.shape
    if num_worlds * num_agents > MAX_AGENTS or not num_worlds * num_agents:
        raise InvalidInput(f"simulate: {num_worlds} worlds of {num_agents} agents; send 1 to {MAX_AGENTS} agents per task")
    num_columns = COLUMNS[kind].count(",") + 1
    shape = (num_worlds, num_agents, num_columns)
    _require(
        agents.ndim == 3 and all(n in (1, m) for n, m in zip(agents.shape[:2], shape, strict=False))
        and agents.shape[2] == num_columns,
        f"agents must be [1 or {num_worlds}, 1 or {num_agents}, {num_columns}] in {kind!r} ({COLUMNS[kind]}); "
        f"got {list(agents.shape)}",
    )  # fmt: skip
    agents = agents.to(state.positions.dtype).expand(shape)
    if kind == "grid":
        return _grid(state, agents, space)
    _require(space.ndim == 1 and len(space) in (1, num_worlds), f"space must be the sides, [1 or {num_worlds}]")
    size = space.to(torch.float32).expand(num_worlds).contiguous()
    _require((size > 0) & (size < 1e15), "space holds a side that is not above 0 and below 1e15")
    _require(agents.abs() < 1e15, f"agents must be finite and below 1e15 ({COLUMNS[kind]})")
    limit = size[:, None, None]
    inside = (state.positions >= 0) & (state.positions <= limit)
    _require(inside, "positions must lie in the square from 0 to its side; wrap or clip them")
    _require(state.velocities.abs() < 1e15, "velocities must be finite and below 1e15")
    if kind == "boids":
        return _boids(agents, size, has_walls)
    return _circles(state, agents, size, has_walls)


def _boids(agents: torch.Tensor, size: torch.Tensor, has_walls: bool) -> Boids:
    num_worlds, num_agents, _ = agents.shape
    num_pairs = num_worlds * num_agents**2
    _require(num_pairs <= MAX_PAIRS, f"{num_pairs} pairs of boids a step, at most {MAX_PAIRS}: send fewer or smaller worlds")
    _require(agents[..., :4] >= 0, "perception, separation radius and speeds must not be negative")
    perception, radius, min_speed, max_speed, separation, alignment, cohesion, noise = agents.unbind(-1)
    _require(min_speed <= max_speed, "min speed is above max speed")
    return Boids(size, perception, radius, min_speed, max_speed, separation, alignment, cohesion, noise, has_walls)


def _circles(state: AgentState, agents: torch.Tensor, size: torch.Tensor, has_walls: bool) -> Circles:
    radius, mass = agents.unbind(-1)
    _require((radius > 0) & (mass > 0), "radius and mass must be above 0")
    _require(2 * radius <= size[:, None], "a circle is wider than its square")
    world = Circles(size, radius, mass, has_walls=has_walls)
    check_crowding(world, state)
    return world


def check_crowding(world: World, state: AgentState) -> None:
    """Raises InvalidInput if a step would compare too many pairs of circles."""
    num_worlds, num_agents, _ = state.positions.shape
    if not isinstance(world, Circles) or num_worlds * num_agents**2 <= MAX_PAIRS:
        return
    assert isinstance(world.size, torch.Tensor)
    assert world.max_cells is not None
    _require(
        crowding(state.positions, world.size, world.max_cells) <= 4 * MAX_PAIRS,
        "too many circles are close together, measured by the widest: send fewer, smaller or more alike ones, or spread them",
    )


def _grid(state: AgentState, agents: torch.Tensor, policy: torch.Tensor) -> GridWorld:
    num_worlds = len(state.positions)
    _require(
        policy.ndim == 4 and policy.shape[0] in (1, num_worlds) and policy.numel() > 0,
        f"space must be a grid's policy, [1 or {num_worlds}, layers, height, width]; got {list(policy.shape)}",
    )
    _, num_layers, height, width = policy.shape
    num_cells = num_worlds * num_layers * height * width
    _require(num_cells <= MAX_CELLS, f"{num_cells} cells in all worlds and layers, at most {MAX_CELLS}: send fewer worlds")
    _require((policy >= WALL) & (policy <= 4), "space must hold actions, 0 to 4, and -1 for walls")
    policy = policy.to(torch.int8).expand(num_worlds, num_layers, height, width)
    layers, (x, y) = agents[..., 2].long(), state.positions.long().unbind(-1)
    _require((layers >= 0) & (layers < num_layers), f"the layers of agents must be 0 to {num_layers - 1}")
    _require((x >= 0) & (x < width) & (y >= 0) & (y < height), f"positions must be cells, 0 to {width - 1} and {height - 1}")
    place = torch.arange(num_worlds, device=x.device)[:, None]
    _require(policy[place, layers, y, x] != WALL, "an agent stands in a wall of its layer")
    taken = torch.sort((y * width + x), -1).values
    _require(taken[:, 1:] != taken[:, :-1], "two agents of a world stand on one cell")
    return GridWorld(policy, agents[..., :2], agents[..., 2])


def joined(worlds: Sequence[World], states: Sequence[AgentState]) -> tuple[World, AgentState]:
    """Tasks of equal kind, agents and settings as one, world after world; they must be made by `world_of`."""
    if len(worlds) == 1:
        return worlds[0], states[0]
    return _cat(worlds), _cat(states)


def parts(state: AgentState, num_worlds: Sequence[int]) -> list[AgentState]:
    """A joined state in its parts again; they share its memory."""
    columns = [
        [None] * len(num_worlds) if value is None else torch.split(value, list(num_worlds))
        for value in (getattr(state, field.name) for field in fields(state))
    ]
    return [AgentState(*values) for values in zip(*columns, strict=True)]


def _cat(items: Sequence[Joinable]) -> Joinable:
    first = items[0]
    names = [field.name for field in fields(first) if isinstance(getattr(first, field.name), torch.Tensor)]
    together: dict[str, Any] = {name: torch.cat([getattr(item, name) for item in items]) for name in names}
    return replace(first, **together)


def _require(is_true: bool | torch.Tensor, message: str) -> None:
    if not bool(is_true.all() if isinstance(is_true, torch.Tensor) else is_true):
        raise InvalidInput(f"simulate: {message}")

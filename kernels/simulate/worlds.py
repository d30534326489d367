"""The worlds that agents live in, and the state that a simulation carries from step to step.

Knows names, shapes and limits; does not know how a step is computed. A state is all that there is: no generator is kept
anywhere, so a state that was stored and given back goes on as if it had never stopped.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from penstock.kernels.errors import InvalidInput

Number = float | torch.Tensor
MAX_CELLS_PER_SIDE = 4096
STAY, EAST, NORTH, WEST, SOUTH = range(5)
"""Actions in a `GridWorld`: none, or one cell along +x, +y, -x, -y. A cell with `WALL` cannot be entered."""
WALL = -1
MOVES = {EAST: (1, 0), NORTH: (0, 1), WEST: (-1, 0), SOUTH: (0, -1)}


@dataclass(frozen=True, slots=True)
class AgentState:
    """Where everybody is.

    positions, velocities: `[worlds, agents, 2]` (x, y); floats for `Boids` and `Circles`, int32 cells and last moves for
    `GridWorld`. steps_done: int64 `[worlds]`, steps since the beginning. seeds: int64 `[worlds]`. rewards: int32
    `[worlds, agents, 2]`, in a `GridWorld` only: arrivals at the goal, and moves that were refused.
    """

    positions: torch.Tensor
    velocities: torch.Tensor
    steps_done: torch.Tensor
    seeds: torch.Tensor
    rewards: torch.Tensor | None = None

    @classmethod
    def start(
        cls, positions: torch.Tensor, velocities: torch.Tensor | None = None, *, seed: int = 0, steps_done: int = 0
    ) -> "AgentState":
        """A state from positions `[worlds, agents, 2]`; at rest without velocities. Worlds get seeds of their own."""
        if positions.ndim != 3 or positions.shape[2] != 2:
            raise InvalidInput(f"simulate: positions must be [worlds, agents, 2]; got {list(positions.shape)}")
        velocities = torch.zeros_like(positions) if velocities is None else velocities
        if velocities.shape != positions.shape or velocities.dtype != positions.dtype:
            raise InvalidInput("simulate: velocities must have the shape and dtype of positions")
        num_worlds, device = len(positions), positions.device
        done = torch.full((num_worlds,), steps_done, dtype=torch.int64, device=device)
        seeds = torch.arange(num_worlds, device=device) + (seed << 20)
        rewards = None if positions.is_floating_point() else torch.zeros_like(positions, dtype=torch.int32)
        return cls(positions, velocities, done, seeds, rewards)


@dataclass(frozen=True, eq=False)
class Boids:
    """Flocks (Reynolds 1987): each agent steers by those that it perceives.

        acceleration = separation * sum(-d w(|d|)) + alignment * mean(v_j - v_i) + cohesion * mean(d) + noise * u

    d: from the agent to another within `perception`. w = max(0, r2 / (d2 + r2 / 100) - 1 / 1.01), which falls like the
    inverse square to 0 at r = `separation_radius`. u: uniform in [-1, 1]^2, a hash of seed, step and agent. Then velocity
    gets dt * acceleration, its length is brought into [min_speed, max_speed] (rest stays rest), position gets
    dt * velocity. Agents on one spot do not push each other; noise parts them.

    size: side of the square [0, size)^2, a number or `[worlds]`; periodic (the nearest image counts), or with walls that
    reflect. The others: a number or a tensor that broadcasts to `[worlds, agents]`.
    """

    size: Number = 1.0
    perception: Number = 0.1
    separation_radius: Number = 0.03
    min_speed: Number = 0.1
    max_speed: Number = 0.3
    separation: Number = 10.0
    alignment: Number = 3.0
    cohesion: Number = 3.0
    noise: Number = 0.0
    has_walls: bool = False

    def per_agent(self, state: AgentState) -> torch.Tensor:
        """The parameters from `perception` to `noise`, `[worlds, agents, 8]`."""
        return _per_agent(state, [getattr(self, field.name) for field in fields(self)[1:-1]])


@dataclass(frozen=True, eq=False)
class Circles:
    """Discs that push each other apart where they overlap, and otherwise fly straight.

        force on i from j = max(0, stiffness * overlap - damping * speed apart) along the line of centres

    elastic without damping. Velocity gets dt * force / mass, position dt * velocity (symplectic Euler: stable for dt well
    under sqrt(mass / stiffness)). Two centres on one spot push along x, the lower index to the right.

    size: side of the square, a number or `[worlds]`; periodic, or with elastic walls. radius, mass: a number or a tensor
    that broadcasts to `[worlds, agents]`. stiffness, damping: a number or `[worlds]`. max_cells: cells per side of the
    neighbour search; found from size and radius if None, which waits for the device if one of them is a tensor.
    """

    size: Number = 1.0
    radius: Number = 0.01
    mass: Number = 1.0
    stiffness: Number = 1000.0
    damping: Number = 0.0
    has_walls: bool = False
    max_cells: int | None = None

    def __post_init__(self) -> None:
        if self.max_cells is None:
            object.__setattr__(self, "max_cells", cells_per_side(self.size, self.radius))

    def per_agent(self, state: AgentState) -> torch.Tensor:
        """radius and mass, `[worlds, agents, 2]`."""
        return _per_agent(state, [self.radius, self.mass])


@dataclass(frozen=True, eq=False)
class GridWorld:
    """Agents on cells, at most one on each, that take a step at a time.

    policy: int8 `[1 or worlds, layers, height, width]`: what an agent of that layer does on that cell (`STAY` .. `SOUTH`),
    or `WALL`. Cells are (x, y) with policy[..., y, x]. goals: `[worlds, agents, 2]` or less that broadcasts to it;
    layers: a number or a tensor that broadcasts to `[worlds, agents]`.

    A move is refused if it leaves the grid, enters a wall of the agent's layer, or a cell that is taken when the step
    begins. Of several that want one cell, one direction gets it: each step gives another one the first turn.
    """

    policy: torch.Tensor
    goals: torch.Tensor
    layers: Number = 0

    def per_agent(self, state: AgentState) -> torch.Tensor:
        """goal x, goal y, layer, int32 `[worlds, agents, 3]`."""
        goal_x, goal_y = self.goals.unbind(-1)
        return _per_agent(state, [goal_x, goal_y, self.layers])


World = Boids | Circles | GridWorld


def cells_per_side(size: Number, radius: Number) -> int:
    """How many cells a side of `size` may have for discs that touch to be in neighbouring cells, 1 to 4096.

    A cell must be wider than a diameter, by the rounding of position * cells / size in float32.
    """
    sides = torch.as_tensor(size, dtype=torch.float64, device="cpu")
    radii = torch.as_tensor(radius, dtype=torch.float64, device="cpu")
    ratio = (sides[:, None] if sides.ndim and radii.ndim else sides) / (2 * radii)
    diameters = float(ratio.amin()) if ratio.numel() else 1.0
    cells = int(min(diameters, MAX_CELLS_PER_SIDE)) if diameters >= 1 else 1
    while cells > 1 and cells / diameters > 1.0 - 4e-7 * cells:
        cells -= 1
    return cells


def per_world(state: AgentState, value: Number) -> torch.Tensor:
    """A number or `[worlds]` as contiguous `[worlds]` of the state's dtype and device."""
    like = state.positions
    return _tensor(like, value).expand(len(like)).contiguous()


def _per_agent(state: AgentState, values: list[Any]) -> torch.Tensor:
    like = state.positions
    return torch.stack([_tensor(like, value).expand(like.shape[:2]) for value in values], -1)


def _tensor(like: torch.Tensor, value: Number) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(like.device, like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)

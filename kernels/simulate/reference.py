"""Every world's step by its definition: all pairs, or a loop over agents."""

import torch

from penstock.kernels.simulate import noise
from penstock.kernels.simulate.space import bounded, wrapped
from penstock.kernels.simulate.worlds import MOVES, WALL, AgentState, Boids, Circles, GridWorld, Number, World, per_world


def simulate(
    world: World, state: AgentState, *, steps: int, dt: Number = 0.02, actions: torch.Tensor | None = None
) -> AgentState:
    """`steps` steps, one after another, in the dtype of the state."""
    for k in range(steps):
        if isinstance(world, GridWorld):
            state = _grid(world, state, None if actions is None else actions[k])
        elif isinstance(world, Boids):
            state = _boids(world, state, dt)
        else:
            state = _circles(world, state, dt)
    return state


def _differences(state: AgentState, size: torch.Tensor, has_walls: bool) -> torch.Tensor:
    """[worlds, i, j, 2]: from i to j."""
    d = state.positions[:, None] - state.positions[:, :, None]
    return d if has_walls else wrapped(d, size[..., None])


def _moved(
    state: AgentState, velocities: torch.Tensor, dt: Number, size: torch.Tensor, margin: torch.Tensor | float, has_walls: bool
) -> AgentState:
    positions = state.positions + per_world(state, dt)[:, None, None] * velocities
    positions, velocities = bounded(positions, velocities, size, margin, has_walls)
    return AgentState(positions, velocities, state.steps_done + 1, state.seeds)


def _boids(world: Boids, state: AgentState, dt: Number) -> AgentState:
    size = per_world(state, world.size)[:, None, None]
    perception, radius, min_speed, max_speed, separation, alignment, cohesion, wander = (
        column[..., None] for column in world.per_agent(state).unbind(-1)
    )
    d = _differences(state, size, world.has_walls)
    d2 = (d * d).sum(-1)
    others = ~torch.eye(d.shape[1], dtype=torch.bool, device=d.device)
    near = ((d2 < perception * perception) & others)[..., None]
    count = near.sum(2).clamp(min=1)
    r2 = (radius * radius).clamp(min=1e-30)
    away = -(d * (r2 / (d2 + 0.01 * r2) - 1 / 1.01).clamp(min=0)[..., None]).sum(2)
    align = torch.where(near, state.velocities[:, None] - state.velocities[:, :, None], 0.0).sum(2) / count
    cohere = torch.where(near, d, 0.0).sum(2) / count
    random = noise.uniform(noise.keys(state.seeds), state.steps_done, d.shape[1]).to(d.dtype)
    steering = separation * away + alignment * align + cohesion * cohere + wander * random
    velocities = state.velocities + per_world(state, dt)[:, None, None] * steering
    speed = velocities.norm(dim=-1, keepdim=True)
    velocities = velocities * speed.clamp(min_speed, max_speed) / speed.clamp(min=1e-12)
    return _moved(state, velocities, dt, size, 0.0, world.has_walls)


def _circles(world: Circles, state: AgentState, dt: Number) -> AgentState:
    size = per_world(state, world.size)[:, None, None]
    radius, mass = world.per_agent(state).unbind(-1)
    d = _differences(state, size, world.has_walls)
    d2 = (d * d).sum(-1)
    touch = radius[:, :, None] + radius[:, None, :]
    index = torch.arange(d.shape[1], device=d.device)
    aside = torch.where(index[:, None] < index, -1.0, 1.0).to(d.dtype)  # for centres on one spot
    distance = d2.sqrt()
    normal = torch.where(
        (d2 > 0)[..., None], d / distance[..., None], torch.stack([aside, torch.zeros_like(aside)], -1)
    )
    apart = ((state.velocities[:, None] - state.velocities[:, :, None]) * normal).sum(-1)
    stiffness, damping = (per_world(state, value)[:, None, None] for value in (world.stiffness, world.damping))
    push = (stiffness * (touch - distance) - damping * apart).clamp(min=0)
    others = ~torch.eye(d.shape[1], dtype=torch.bool, device=d.device)
    force = -torch.where(((d2 < touch * touch) & others)[..., None], push[..., None] * normal, 0.0).sum(2)
    velocities = state.velocities + per_world(state, dt)[:, None, None] * force / mass[..., None]
    return _moved(state, velocities, dt, size, radius[..., None], world.has_walls)


def _grid(world: GridWorld, state: AgentState, actions: torch.Tensor | None) -> AgentState:
    assert state.rewards is not None
    num_worlds = len(state.positions)
    agents = world.per_agent(state).tolist()
    policies = world.policy.expand(num_worlds, *world.policy.shape[1:]).tolist()
    positions, rewards = state.positions.clone(), state.rewards.clone()
    for w in range(num_worlds):
        taken = {(x, y) for x, y in state.positions[w].tolist()}
        claims: dict[tuple[int, int], dict[int, int]] = {}  # cell -> direction -> agent
        for a, (x, y) in enumerate(state.positions[w].tolist()):
            layer = policies[w][agents[w][a][2]]
            action = layer[y][x] if actions is None else int(actions[w, a])
            if action not in MOVES:
                continue
            to_x, to_y = x + MOVES[action][0], y + MOVES[action][1]
            is_inside = 0 <= to_y < len(layer) and 0 <= to_x < len(layer[0])
            if is_inside and layer[to_y][to_x] != WALL and (to_x, to_y) not in taken:
                claims.setdefault((to_x, to_y), {})[action] = a
            rewards[w, a, 1] += 1  # until it is granted
        turn = int(state.steps_done[w])
        for cell, claimants in claims.items():
            a = claimants[min(claimants, key=lambda direction: (direction - 1 + turn) % 4)]
            positions[w, a] = torch.tensor(cell)
            rewards[w, a, 1] -= 1
            rewards[w, a, 0] += cell == tuple(agents[w][a][:2])
    velocities = positions - state.positions
    return AgentState(positions, velocities, state.steps_done + 1, state.seeds, rewards)

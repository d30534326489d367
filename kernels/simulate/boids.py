"""Boids on any device with torch: all pairs, in tiles that stay in the cache.

Knows one formula (`worlds.Boids`) and the order of its sums, which does not depend on the other worlds of a batch; does
not know where a state comes from.
"""

import math

import torch

from penstock.kernels.simulate import noise
from penstock.kernels.simulate.space import bounded

_TILE = 1 << 18
"""Pairs per thread and tile, six numbers each, 6 MiB: small enough for a cache, large enough that threads seldom meet."""


def advance(
    positions: torch.Tensor,
    velocities: torch.Tensor,
    agents: torch.Tensor,
    size: torch.Tensor,
    dt: torch.Tensor,
    steps_done: torch.Tensor,
    seeds: torch.Tensor,
    *,
    steps: int,
    has_walls: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and velocities `[worlds, agents, 2]` after `steps` steps.

    agents: `[worlds, agents, 8]` of `Boids.per_agent`; size, dt, steps_done, seeds: `[worlds]`.
    """
    keys = noise.keys(seeds)
    _, _, min_speed, max_speed, separation, alignment, cohesion, wander = agents[..., None].unbind(2)
    side, time = size[:, None, None], dt[:, None, None]
    for k in range(steps):
        away, align, cohere, count = _neighbour_sums(positions, velocities, agents, size, has_walls)
        steering = separation * away + (alignment * align + cohesion * cohere) / count
        steering += wander * noise.uniform(keys, steps_done + k, positions.shape[1]).to(positions.dtype)
        velocities = velocities + time * steering
        speed = velocities.square().sum(-1, keepdim=True).sqrt()
        velocities = velocities * (speed.clamp(min_speed, max_speed) / speed.clamp(min=1e-12))
        positions, velocities = bounded(positions + time * velocities, velocities, side, 0.0, has_walls)
    return positions, velocities


def _neighbour_sums(
    positions: torch.Tensor, velocities: torch.Tensor, agents: torch.Tensor, size: torch.Tensor, has_walls: bool
) -> tuple[torch.Tensor, ...]:
    """Separation, velocity and offset sums `[worlds, agents, 2]`, and neighbours (at least 1) `[worlds, agents, 1]`."""
    num_worlds, num_agents, _ = positions.shape
    side = size[:, None]
    points = torch.stack([*(positions / side[..., None]).unbind(-1), *velocities.unbind(-1)])
    reach = torch.stack([(agents[..., 0] / side).square(), (agents[..., 1] / side).square().clamp(min=1e-30)])
    sums = positions.new_empty(7, num_worlds, num_agents)
    budget = _TILE * (torch.get_num_threads() if positions.device.type == "cpu" else 1 << 6)
    rows = min(num_agents, max(budget // num_agents, 1))
    worlds = min(num_worlds, max(budget // (rows * num_agents), 1))
    buffer = positions.new_empty(6 * worlds * rows * num_agents)
    for w in range(0, num_worlds, worlds):
        for i in range(0, num_agents, rows):
            here = (slice(None), slice(w, w + worlds), slice(i, i + rows))
            others, own = points[:, w : w + worlds, None, :], points[here][..., None]
            _tile(others, own, reach[here][..., None], has_walls, buffer, sums[here])
    count = (sums[6] - 1).clamp(min=1)  # an agent is within its own perception
    away, align, cohere = (pair.movedim(0, -1) for pair in sums[:6].view(3, 2, num_worlds, num_agents))
    return -away * side[..., None], align, cohere * side[..., None], count[..., None]


def _tile(
    others: torch.Tensor, own: torch.Tensor, reach: torch.Tensor, has_walls: bool, buffer: torch.Tensor, sums: torch.Tensor
) -> None:
    """What each agent of a tile sums over all of its world, in units of the side; it adds 0 itself, and 1 to the count.

    others: x, y, vx, vy as `[4, worlds, 1, agents]`; own: the same, `[4, worlds, rows, 1]`; reach: perception and
    separation radius squared; sums: `[7, worlds, rows]`, written. Operations that could be fused are kept apart, so that
    bits do not depend on a tile's shape.
    """
    shape = (others.shape[1], own.shape[2], others.shape[3])
    blocks = buffer[: 6 * math.prod(shape)].view(6, *shape)
    d, product, d2, near = blocks[0:2], blocks[2:4], blocks[4], blocks[5]
    torch.sub(others[:2], own[:2], out=d)
    if not has_walls:
        d -= torch.round(d, out=product)  # to the nearest image
    torch.mul(d, d, out=product)
    torch.add(product[0], product[1], out=d2)
    torch.lt(d2, reach[0], out=near)
    weight = torch.div(reach[1], d2.add_(0.01 * reach[1]), out=d2).sub_(1 / 1.01).clamp_(min=0)
    torch.sum(torch.mul(d, weight, out=product), -1, out=sums[0:2])
    torch.sum(torch.sub(others[2:], own[2:], out=product).mul_(near), -1, out=sums[2:4])
    torch.sum(torch.mul(d, near, out=product), -1, out=sums[4:6])
    torch.sum(near, -1, out=sums[6])

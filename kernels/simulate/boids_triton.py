"""Boids in Triton: a program takes a tile of one world's agents past all the others, in tiles.

Knows the formula of `boids.py`; one launch a step, from one pair of buffers into another. float32.
"""
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl

from penstock.kernels.simulate import noise
from penstock.kernels.simulate.space_triton import bounded, mix, uniform, wrapped


@triton.jit(do_not_specialize=["k"])
def _boids_step(
    positions, velocities, agents, size, dt, keys, steps_done, new_positions, new_velocities, k, num_agents,
    HAS_WALLS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_agents, ROWS)
    world = (tl.program_id(0) // num_tiles).to(tl.int64)
    i = (tl.program_id(0) % num_tiles) * ROWS + tl.arange(0, ROWS)
    is_agent = i < num_agents
    at = 2 * (world * num_agents + i)
    x, y = tl.load(positions + at, is_agent, 0.0), tl.load(positions + at + 1, is_agent, 0.0)
    vx, vy = tl.load(velocities + at, is_agent, 0.0), tl.load(velocities + at + 1, is_agent, 0.0)
    own = agents + 4 * at
    perception, radius = tl.load(own, is_agent, 0.0), tl.load(own + 1, is_agent, 0.0)
    p2, r2 = perception * perception, tl.maximum(radius * radius, 1e-30)
    side, time = tl.load(size + world), tl.load(dt + world)

    away_x, away_y = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    align_x, align_y = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    cohere_x, cohere_y = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_agents, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        is_other = j < num_agents
        there = 2 * (world * num_agents + j)
        dx = tl.load(positions + there, is_other, 0.0)[None, :] - x[:, None]
        dy = tl.load(positions + there + 1, is_other, 0.0)[None, :] - y[:, None]
        if not HAS_WALLS:
            dx, dy = wrapped(dx, side), wrapped(dy, side)
        d2 = dx * dx + dy * dy
        near = tl.where((d2 < p2[:, None]) & is_other[None, :], 1.0, 0.0)
        weight = tl.maximum(r2[:, None] / (d2 + 0.01 * r2[:, None]) - 1 / 1.01, 0.0)
        weight = tl.where(is_other[None, :], weight, 0.0)
        away_x -= tl.sum(dx * weight, 1)
        away_y -= tl.sum(dy * weight, 1)
        align_x += tl.sum(near * (tl.load(velocities + there, is_other, 0.0)[None, :] - vx[:, None]), 1)
        align_y += tl.sum(near * (tl.load(velocities + there + 1, is_other, 0.0)[None, :] - vy[:, None]), 1)
        cohere_x += tl.sum(near * dx, 1)
        cohere_y += tl.sum(near * dy, 1)
        count += tl.sum(near, 1)

    count = tl.maximum(count - 1, 1.0)
    min_speed, max_speed = tl.load(own + 2, is_agent, 0.0), tl.load(own + 3, is_agent, 0.0)
    separation, alignment = tl.load(own + 4, is_agent, 0.0), tl.load(own + 5, is_agent, 0.0)
    cohesion, wander = tl.load(own + 6, is_agent, 0.0), tl.load(own + 7, is_agent, 0.0)
    step = (tl.load(steps_done + world) + k).to(tl.uint32)
    now = mix(tl.load(keys + world).to(tl.uint32) ^ mix(step))
    counter = (2 * i).to(tl.uint32)
    steer_x = separation * away_x + (alignment * align_x + cohesion * cohere_x) / count + wander * uniform(now, counter)
    steer_y = separation * away_y + (alignment * align_y + cohesion * cohere_y) / count + wander * uniform(now, counter + 1)
    vx, vy = vx + time * steer_x, vy + time * steer_y
    speed = tl.sqrt(vx * vx + vy * vy)
    factor = tl.minimum(tl.maximum(speed, min_speed), max_speed) / tl.maximum(speed, 1e-12)
    vx, vy = vx * factor, vy * factor
    x, vx = bounded(x + time * vx, vx, side, 0.0, HAS_WALLS)
    y, vy = bounded(y + time * vy, vy, side, 0.0, HAS_WALLS)
    tl.store(new_positions + at, x, is_agent)
    tl.store(new_positions + at + 1, y, is_agent)
    tl.store(new_velocities + at, vx, is_agent)
    tl.store(new_velocities + at + 1, vy, is_agent)


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
    """As `boids.advance`; nothing waits for the device."""
    num_worlds, num_agents, _ = positions.shape
    rows = min(max(triton.next_power_of_2(num_agents), 16), 32)
    columns = min(max(triton.next_power_of_2(num_agents), 16), 64)
    keys = noise.keys(seeds)
    now = (positions, velocities)
    spare = [(torch.empty_like(now[0]), torch.empty_like(now[1])) for _ in range(min(steps, 2))]
    for k in range(steps):
        then = spare[k % 2]
        _boids_step[(num_worlds * triton.cdiv(num_agents, rows),)](
            *now, agents, size, dt, keys, steps_done, *then, k, num_agents,
            HAS_WALLS=has_walls, ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
        now = then
    return now

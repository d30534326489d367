"""Circles in Triton: a step sorts the discs into cells with torch, then one launch does all the rest.

Knows the formula of `circles.py`; a program takes a tile of sorted discs through the runs of its neighbouring cells until
the longest has ended, so no number of discs in a cell is too large. float32.
"""
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl

from penstock.kernels.simulate.circles import sort_into_cells, usable_side
from penstock.kernels.simulate.space_triton import bounded, wrapped

_ROWS = 128


@triton.jit
def _push(
    first, last, i, order, fields, own, x, y, vx, vy, radius, size, stiffness, damping, fx, fy, IS_PERIODIC: tl.constexpr
):
    """Adds to fx, fy what discs i get from the discs [first, last), all bounds per row of the tile."""
    for step in range(tl.max(last - first, 0)):
        j = first + step
        is_other = (j < last) & (j != i)
        there = fields + 6 * j
        dx, dy = tl.load(there, is_other, 0.0) - x, tl.load(there + 1, is_other, 0.0) - y
        if IS_PERIODIC:
            dx, dy = wrapped(dx, size), wrapped(dy, size)
        d2 = dx * dx + dy * dy
        touch = radius + tl.load(there + 4, is_other, 0.0)
        is_touching = is_other & (d2 < touch * touch)
        distance = tl.sqrt(d2)
        is_apart = d2 > 0
        scale = 1.0 / tl.where(is_apart, distance, 1.0)
        is_lower = own < tl.load(order + j, is_touching & (d2 == 0), 0)
        nx = tl.where(is_apart, dx * scale, tl.where(is_lower, -1.0, 1.0))
        ny = tl.where(is_apart, dy * scale, 0.0)
        apart_x = tl.load(there + 2, is_touching, 0.0) - vx
        apart_y = tl.load(there + 3, is_touching, 0.0) - vy
        push = tl.maximum(stiffness * (touch - distance) - damping * (apart_x * nx + apart_y * ny), 0.0)
        fx -= tl.where(is_touching, push * nx, 0.0)
        fy -= tl.where(is_touching, push * ny, 0.0)
    return fx, fy


@triton.jit
def _circles_step(
    cells, order, starts, fields, size, dt, stiffness, damping, new_positions, new_velocities, num_discs, side,
    HAS_WALLS: tl.constexpr, IS_WRAPPING: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_disc = i < num_discs
    cell = tl.load(cells + i, is_disc, 0)
    own = tl.load(order + i, is_disc, 0)
    column, row, world = cell % side, (cell // side) % side, cell // (side * side)
    at = fields + 6 * i
    x, y = tl.load(at, is_disc, 0.0), tl.load(at + 1, is_disc, 0.0)
    vx, vy = tl.load(at + 2, is_disc, 0.0), tl.load(at + 3, is_disc, 0.0)
    radius, mass = tl.load(at + 4, is_disc, 0.0), tl.load(at + 5, is_disc, 1.0)
    length, time = tl.load(size + world, is_disc, 1.0), tl.load(dt + world, is_disc, 0.0)
    stiff, damp = tl.load(stiffness + world, is_disc, 0.0), tl.load(damping + world, is_disc, 0.0)
    fx, fy = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for offset in tl.static_range(-1, 2):
        there = row + offset
        if IS_WRAPPING:
            is_there = is_disc
            there = (there + side) % side
        else:
            is_there = is_disc & (there >= 0) & (there < side)
        base = (world * side + there) * side
        first = tl.load(starts + base + tl.maximum(column - 1, 0), is_there, 0)
        last = tl.load(starts + base + tl.minimum(column + 1, side - 1) + 1, is_there, 0)
        fx, fy = _push(
            first, last, i, order, fields, own, x, y, vx, vy, radius, length, stiff, damp, fx, fy, IS_PERIODIC=not HAS_WALLS
        )
        if IS_WRAPPING:
            is_border = is_there & ((column == 0) | (column == side - 1))
            beyond = base + tl.where(column == 0, side - 1, 0)
            first = tl.load(starts + beyond, is_border, 0)
            last = tl.load(starts + beyond + 1, is_border, 0)
            fx, fy = _push(
                first, last, i, order, fields, own, x, y, vx, vy, radius, length, stiff, damp, fx, fy, IS_PERIODIC=True
            )
    vx, vy = vx + time * fx / mass, vy + time * fy / mass
    x, vx = bounded(x + time * vx, vx, length, radius, HAS_WALLS)
    y, vy = bounded(y + time * vy, vy, length, radius, HAS_WALLS)
    tl.store(new_positions + 2 * own, x, is_disc)
    tl.store(new_positions + 2 * own + 1, y, is_disc)
    tl.store(new_velocities + 2 * own, vx, is_disc)
    tl.store(new_velocities + 2 * own + 1, vy, is_disc)


def advance(
    positions: torch.Tensor,
    velocities: torch.Tensor,
    agents: torch.Tensor,
    size: torch.Tensor,
    dt: torch.Tensor,
    stiffness: torch.Tensor,
    damping: torch.Tensor,
    *,
    steps: int,
    has_walls: bool,
    max_cells: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `circles.advance`; nothing waits for the device."""
    num_discs = positions.shape[0] * positions.shape[1]
    side = usable_side(max_cells, positions.shape[1])
    for _ in range(steps):
        cells = sort_into_cells(positions, size, side)
        fields = torch.cat([positions, velocities, agents], -1).view(-1, 6)[cells.order]
        positions, velocities = torch.empty_like(positions), torch.empty_like(velocities)
        _circles_step[(triton.cdiv(num_discs, _ROWS),)](
            cells.cell, cells.order, cells.starts, fields, size, dt, stiffness, damping, positions, velocities,
            num_discs, side, HAS_WALLS=has_walls, IS_WRAPPING=not has_walls and side >= 3, ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return positions, velocities

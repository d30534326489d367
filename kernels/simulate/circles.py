"""Circles with torch: discs sorted into cells, and only those of neighbouring cells compared.

Knows one formula (`worlds.Circles`); candidates are made in runs of bounded memory, however many discs share a cell, and
each disc's pushes are summed in an order that depends on nothing but its own world.
"""

import math
from dataclasses import dataclass

import torch

from penstock.kernels.simulate.space import bounded

_MAX_CANDIDATES = 1 << 20
"""Candidate pairs in memory at a time, about 60 bytes each; the candidates of one disc are never parted."""


@dataclass(frozen=True, slots=True)
class Cells:
    """Discs by cell: `order`, int64 `[discs]`, sorted by `cell` (of the sorted ones); `starts`, `[all cells + 1]`.

    Cells of world w, row cy and column cx have the number (w * side + cy) * side + cx.
    """

    side: int
    cell: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor


def cell_of(positions: torch.Tensor, size: torch.Tensor, side: int) -> torch.Tensor:
    """The cell of each disc of `[worlds, agents, 2]`, int32 `[worlds * agents]`; whatever is not a number is in the first."""
    world = torch.arange(len(positions), device=positions.device, dtype=torch.int32)[:, None]
    place = (positions * (side / size)[:, None, None]).floor().clamp(0, side - 1).to(torch.int32).clamp(0, side - 1)
    return ((world * side + place[..., 1]) * side + place[..., 0]).view(-1)


def sort_into_cells(positions: torch.Tensor, size: torch.Tensor, side: int) -> Cells:
    """Every disc of `[worlds, agents, 2]` in a grid of side * side cells per world; without looking at a value."""
    cell, order = torch.sort(cell_of(positions, size, side), stable=True)
    bounds = torch.arange(len(positions) * side * side + 1, device=cell.device, dtype=torch.int32)
    return Cells(side, cell, order, torch.searchsorted(cell, bounds))


def usable_side(max_cells: int, num_agents: int) -> int:
    """Cells per side: not many more cells than agents, so that memory is bounded by them."""
    return max(min(max_cells, 2 * math.isqrt(max(num_agents, 1))), 1)


def neighbour_runs(cells: Cells, is_periodic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the candidates of each sorted disc are: starts and lengths, int64 `[discs, 6]`.

    Three rows of cells, in each the run of up to three cells around the own column, and the one on the other side of the
    border where the square is periodic. On two cells a side or one, that is everybody, once.
    """
    side, cell = cells.side, cells.cell.long()
    column, row, world = cell % side, cell // side % side, cell // (side * side)
    is_wrapping = is_periodic and side >= 3
    left, right = (column - 1).clamp(min=0), (column + 1).clamp(max=side - 1)
    beyond = torch.where(column == 0, side - 1, 0)
    is_border = ((column == 0) | (column == side - 1)) & is_wrapping
    starts, lengths = [], []
    for offset in (-1, 0, 1):
        there = row + offset
        is_there = (there >= 0) & (there < side) if not is_wrapping else torch.ones_like(there, dtype=torch.bool)
        base = (world * side + (there % side)) * side
        for first, last, is_run in (
            (base + left, base + right, is_there),
            (base + beyond, base + beyond, is_border),
        ):
            start = cells.starts.index_select(0, first)
            starts.append(start)
            lengths.append((cells.starts.index_select(0, last + 1) - start) * is_run)
    return torch.stack(starts, -1), torch.stack(lengths, -1)


def crowding(positions: torch.Tensor, size: torch.Tensor, max_cells: int) -> int:
    """At least the number of pairs that a step compares: 9 times the squares of the cells' counts. Waits for the device."""
    cell = cell_of(positions, size, usable_side(max_cells, positions.shape[1]))
    return 9 * int(torch.bincount(cell).square().sum())


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
    """Positions and velocities `[worlds, agents, 2]` after `steps` steps.

    agents: radius and mass `[worlds, agents, 2]`; size, dt, stiffness, damping: `[worlds]`. Waits for the device.
    """
    num_agents = positions.shape[1]
    side = usable_side(max_cells, num_agents)
    side_length = size[:, None, None]
    pull = dt[:, None, None] / agents[..., 1:]
    for _ in range(steps):
        cells = sort_into_cells(positions, size, side)
        fields = torch.stack([*(positions / side_length).unbind(-1), *velocities.unbind(-1), agents[..., 0] / size[:, None]])
        fields = fields.view(5, -1).index_select(1, cells.order)
        constants = torch.stack([size, stiffness, damping]).index_select(1, cells.order // num_agents)
        sums = _pushes(fields, constants, cells, is_periodic=not has_walls).t()
        force = torch.empty_like(sums).index_copy_(0, cells.order, sums).view_as(positions)
        velocities = velocities + pull * force
        moved = positions + dt[:, None, None] * velocities
        positions, velocities = bounded(moved, velocities, side_length, agents[..., :1], has_walls)
    return positions, velocities


def _pushes(fields: torch.Tensor, constants: torch.Tensor, cells: Cells, is_periodic: bool) -> torch.Tensor:
    """The force on each sorted disc, `[2, discs]`.

    fields: x, y, vx, vy, radius, lengths in units of the side; constants: side, stiffness, damping; all `[..., discs]`.
    """
    starts, lengths = neighbour_runs(cells, is_periodic)
    ends = lengths.sum(-1).cumsum(0)
    force = fields.new_zeros(2, fields.shape[1])
    first, done = 0, 0
    while first < len(ends):
        last = max(int(torch.searchsorted(ends, done + _MAX_CANDIDATES, right=True)), first + 1)
        i, j = _candidates(starts[first:last], lengths[first:last], first)
        _add_pushes(force, i, j, fields, constants, cells.order, is_periodic)
        first, done = last, int(ends[last - 1])
    return force


def _candidates(starts: torch.Tensor, lengths: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (i, j) of sorted discs, for i = first, first + 1, ...: all members of each one's runs, itself too."""
    discs = torch.arange(first, first + len(lengths), device=lengths.device)
    i = torch.repeat_interleave(discs, lengths.sum(-1))
    starts, lengths = starts.reshape(-1), lengths.reshape(-1)
    j = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return i, j.add_(torch.arange(len(j), device=j.device))


def _add_pushes(
    force: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
    fields: torch.Tensor,
    constants: torch.Tensor,
    order: torch.Tensor,
    is_periodic: bool,
) -> None:
    """Adds to force `[2, discs]` what the discs i get from the discs j that they overlap."""
    x, y, vx, vy, radius = fields
    dx, dy = _difference(x, i, j), _difference(y, i, j)
    if is_periodic:  # to the nearest image
        dx, dy = dx - dx.round(), dy - dy.round()
    d2, touch = dx * dx + dy * dy, radius.index_select(0, j) + radius.index_select(0, i)
    pairs = ((d2 < touch * touch) & (i != j)).nonzero().squeeze(1)
    i, j, d2, touch, dx, dy = (column.index_select(0, pairs) for column in (i, j, d2, touch, dx, dy))
    side, stiffness, damping = constants.index_select(1, i)
    distance, is_apart = d2.sqrt(), d2 > 0
    aside = torch.where(order[i] < order[j], -1.0, 1.0).to(d2.dtype)
    nx, ny = torch.where(is_apart, dx / distance, aside), torch.where(is_apart, dy / distance, 0.0)
    apart = _difference(vx, i, j) * nx + _difference(vy, i, j) * ny
    push = (stiffness * (side * (touch - distance)) - damping * apart).clamp(min=0)
    force[0].index_add_(0, i, -push * nx)
    force[1].index_add_(0, i, -push * ny)


def _difference(column: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return column.index_select(0, j) - column.index_select(0, i)  # four times as fast as column[j]

"""The square that boids and circles live in: nearest images, and what its border does to a step.

Knows one side length per world; does not know forces.
"""

import torch


def wrapped(d: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Differences of coordinates to the nearest image in a periodic square; `size` broadcasts to `d`."""
    return d - size * (d / size).round()


def bounded(
    positions: torch.Tensor, velocities: torch.Tensor, size: torch.Tensor, margin: torch.Tensor | float, has_walls: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions `[worlds, agents, 2]` brought back into the square, and the velocities after it.

    Periodic: into [0, size). With walls: mirrored at `margin` and size - margin, at most once, and the velocity points
    inwards. size, margin: broadcast to positions.
    """
    if not has_walls:
        positions = positions - size * (positions / size).floor()
        positions = torch.where(positions < 0, positions + size, positions)  # where the product was rounded up
        return torch.where(positions >= size, 0.0, positions), velocities  # -1e-9 + size rounds to size
    low, high = margin, size - margin
    velocities = torch.where(positions < low, velocities.abs(), torch.where(positions > high, -velocities.abs(), velocities))
    positions = torch.where(positions < low, 2 * low - positions, positions)
    positions = torch.where(positions > high, 2 * high - positions, positions)
    return positions.maximum(low + torch.zeros_like(size)).minimum(high), velocities

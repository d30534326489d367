"""Drawing one index per row by weights, in integers: sums do not depend on their order, so a draw depends on its row only.

Knows weights and uniform numbers; does not know logits. A weight of 1 is 2^40 units, what is below one unit is never
drawn: a row of 128k tokens loses less than 2e-7 of its mass to that.
"""

import torch

UNIT = 2.0**40
MAX_VOCAB = 1 << 22
"""Sums of so many weights of 1 fit an int64."""


def to_units(weights: torch.Tensor) -> torch.Tensor:
    """float32 weights in [0, 1] as int64 units; weights is overwritten."""
    return weights.mul_(UNIT).to(torch.int64)


def pick(units: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """int64 `[n]`: index i of each row with probability units[i] / sum, by inversion; -1 where the sum is 0.

    units: int64 `[n, vocab]`, not negative; u: float64 `[n]` in [0, 1). u = 0 gives the first index with any weight.
    """
    sums = units.cumsum(1)
    total = sums[:, -1]
    target = torch.minimum((u * total.double()).to(torch.int64), total - 1)
    index = torch.searchsorted(sums, target[:, None], right=True).squeeze(1)
    return torch.where(total > 0, index, -1)

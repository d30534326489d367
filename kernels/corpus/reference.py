"""Vectors of unit length, by definition, in float64."""

import torch


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x `[n, d]` with every row divided by its length; rows of zeros stay zeros. Returns float32."""
    wide = x.double()
    length = wide.square().sum(1, keepdim=True).sqrt()
    return torch.where(length > 0, wide / length, 0.0).float()

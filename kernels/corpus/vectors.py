"""Vectors of unit length."""

import torch


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x `[n, d]`, finite floats, with every row divided by its length, as float32; rows of zeros stay zeros.

    Rows are first divided by their largest magnitude, so that no square overflows or vanishes.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    largest = wide.abs().amax(1, keepdim=True)
    scaled = torch.where(largest > 0, wide / largest, 0.0).float()
    # A scaled row has an element of magnitude 1, so that its length is at least 1 unless it is zero.
    unit: torch.Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(1.0)
    return unit

"""The matrix product by its definition."""

import torch


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum over k of a[i, k] b[k, j], in float64, rounded once. a: `[batch, m, k]`, b: `[batch, k, n]`."""
    products = a.double()[:, :, :, None] * b.double()[:, None, :, :]
    return products.sum(2).to(a.dtype)

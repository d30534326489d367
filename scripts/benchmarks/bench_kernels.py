"""The benchmarks' kernels: 2x + 1, the task that the peers' scripts run too, and one that does nothing."""

import torch

from penstock.kernels import Tensor, kernel


@kernel("affine", inputs={"x": Tensor(dtypes=("float32",), rank=1)}, max_batch_size=32)
def affine(x: torch.Tensor) -> torch.Tensor:
    """x: [batch, n] -> 2x + 1, [batch, n]."""
    return x * 2 + 1


@kernel("same", inputs={"x": Tensor()}, max_batch_size=8)
def same(x: torch.Tensor) -> torch.Tensor:
    """x: [batch, ...] -> x."""
    return x

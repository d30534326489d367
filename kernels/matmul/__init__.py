"""Matrix products, one per task."""

import torch

from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput
from penstock.kernels.inputs import FLOATS, Tensor
from penstock.kernels.spec import Cost


@kernel(
    "matmul",
    inputs={"a": Tensor(dtypes=FLOATS, rank=2), "b": Tensor(dtypes=FLOATS, rank=2)},
    cost=Cost(base_ms=0.03, per={"a.numel": 5e-6, "b.numel": 5e-6}),
    combine="sum",
    max_batch_size=64,
)
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of each task's matrices.

    a: float `[batch, m, k]`; b: `[batch, k, n]` of the same dtype. Returns `[batch, m, n]`; zeros if k is 0. Tolerance
    whatever shares the batch: |error| <= 2e-6 (|a| @ |b|) in float32 (float64: 1e-14, bfloat16: 1e-2, float16: 2e-3):
    the order of summation may differ. Source: torch.bmm.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[2] != b.shape[1]:
        raise InvalidInput(
            f"matmul: b must have as many rows as a has columns; got a {list(a.shape[1:])} and b {list(b.shape[1:])}"
        )
    if a.dtype != b.dtype:
        raise InvalidInput(f"matmul: a and b must have one dtype; got {_name(a.dtype)} and {_name(b.dtype)}")
    return torch.bmm(a, b)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

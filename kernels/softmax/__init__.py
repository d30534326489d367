"""Softmax along one axis."""

import torch

from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.inputs import FLOATS, Tensor
from penstock.kernels.spec import Cost


@kernel(
    "softmax",
    inputs={"x": Tensor(dtypes=FLOATS)},
    cost=Cost(base_ms=0.02, per={"x.numel": 1e-6}),
    combine="sum",
    max_batch_size=256,
)
def softmax(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """exp(x) / sum(exp(x)) along `axis`, computed without overflow.

    x: float `[batch, ...]`. `axis`: an axis of one task's array, so 0 is the first one after the batch dimension;
    negative ones count from the end. Returns the shape and dtype of x. An array without elements stays one; a line with
    NaN, or of -inf only, is NaN. Tolerance: 1e-6 relative in float32 whatever shares the batch; against exact arithmetic
    2e-5 down to 1e-30 (x - max is rounded, and that is exponentiated). float16 and bfloat16 are computed in float32 and
    rounded once. Source: torch.softmax.
    """
    rank = x.ndim - 1
    if type(axis) is not int or not -rank <= axis < rank:
        raise InvalidInput(f"softmax: axis must be {-rank} to {rank - 1} for arrays of rank {rank}; got {shown(axis)}")
    return torch.softmax(x, axis + 1 if axis >= 0 else axis)

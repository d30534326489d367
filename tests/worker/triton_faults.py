"""A Triton kernel that writes where nothing is. Imported on CUDA devices only."""

import torch
import triton
import triton.language as tl


@triton.jit
def _write(x_ptr, offset, SIZE: tl.constexpr):
    tl.store(x_ptr + offset + tl.arange(0, SIZE).to(tl.int64), 1.0)


def write_far_away(x: torch.Tensor) -> None:
    _write[(1,)](x, 1 << 44, SIZE=32)

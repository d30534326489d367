"""What follows a matrix product, in one pass over it: activation, then residual."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,import-untyped"

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _epilogue_kernel(y_ptr, residual_ptr, num_elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < num_elements
    y = tl.load(y_ptr + i, mask=is_there, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.math.erf(y * 0.7071067811865476))
    else:
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # (1 + tanh(z)) / 2 = sigmoid(2 z)
    total = y + tl.load(residual_ptr + i, mask=is_there, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=is_there)


def activate_and_add_(y: torch.Tensor, activation: str, residual: torch.Tensor) -> torch.Tensor:
    """activation(y) + residual in y's memory (contiguous), computed in float32; returns y."""
    if y.numel():
        grid = (triton.cdiv(y.numel(), BLOCK),)
        _epilogue_kernel[grid](y, residual.contiguous(), y.numel(), ACTIVATION=activation, BLOCK=BLOCK)
    return y

"""The product with a quantised weight in Triton: integers are restored in registers, group by group.

Knows the layout of `layout.py`. A group's sum of q x is exact in the dot's operands (integers up to 255 have exact
bfloat16 and float16 forms), and scale and zero are applied to the group's sum in float32. The depth is split among
programs so that few rows still keep the memory busy; the parts are summed in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,import-untyped"

import torch
import triton
import triton.language as tl

from penstock.kernels import backends

PROGRAMS = 512
"""About four per processor of a large GPU."""


@triton.jit
def _dot(a, b, total, INTERPRETED: tl.constexpr):
    b = b.to(tl.float32) if INTERPRETED else b.to(a.dtype)
    a = a.to(tl.float32) if INTERPRETED else a  # the interpreter gets bfloat16 products wrong
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _matmul_kernel(
    parts_ptr, x_ptr, q_ptr, scales_ptr, zeros_ptr, num_rows, num_outputs, num_inputs, num_groups, group_size, steps,
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """parts[split] = x (q - zeros) * scales over this split's `steps` steps of BLOCK_K inputs, each within one group."""
    HALF: tl.constexpr = BLOCK_K // 2
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    is_row, is_output = m < num_rows, n < num_outputs
    x_row = x_ptr + m.to(tl.int64)[:, None] * num_inputs
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        start = step * BLOCK_K
        group = tl.minimum(start // group_size, num_groups - 1)
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if BITS == 8:
            k = start + tl.arange(0, BLOCK_K)
            is_k = k < num_inputs
            x = tl.load(x_row + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            q_ptrs = q_ptr + n.to(tl.int64)[None, :] * num_inputs + k[:, None]
            q = tl.load(q_ptrs, mask=is_k[:, None] & is_output[None, :], other=0)
            part = _dot(x, q, part, INTERPRETED)
            sum_x = tl.sum(x.to(tl.float32), 1)
            zero = tl.zeros([BLOCK_N], tl.float32)
        else:
            k = start + tl.arange(0, HALF)  # of the first half of the group; BLOCK_K is the group
            is_k = k < num_inputs
            q_ptrs = q_ptr + n.to(tl.int64)[None, :] * (num_inputs // 2) + (step * HALF + tl.arange(0, HALF))[:, None]
            q = tl.load(q_ptrs, mask=is_k[:, None] & is_output[None, :], other=0)
            is_x = is_row[:, None] & is_k[None, :]
            low = tl.load(x_row + k[None, :], mask=is_x, other=0.0)
            high = tl.load(x_row + k[None, :] + HALF, mask=is_x, other=0.0)
            part = _dot(low, q & 15, part, INTERPRETED)
            part = _dot(high, q >> 4, part, INTERPRETED)
            sum_x = tl.sum(low.to(tl.float32), 1) + tl.sum(high.to(tl.float32), 1)
            zero = tl.zeros([BLOCK_N], tl.float32) + 8.0
        place = n.to(tl.int64) * num_groups + group
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + place, mask=is_output, other=0.0)
        scale = tl.load(scales_ptr + place, mask=is_output, other=0.0)
        if HAS_ZEROS or BITS == 4:
            part -= sum_x[:, None] * zero[None, :]
        total += part * scale[None, :]
    out_ptrs = parts_ptr + (split * num_rows + m).to(tl.int64)[:, None] * num_outputs + n[None, :]
    tl.store(out_ptrs, total, mask=is_row[:, None] & is_output[None, :])


@triton.jit
def _sum_kernel(
    out_ptr, parts_ptr, bias_ptr, num_elements, num_outputs, num_splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(parts_ptr + split * num_elements + i, mask=is_there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % num_outputs, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=is_there)


def multiply(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    bits: int,
    group_size: int | None,
) -> torch.Tensor:
    """x `[rows, in]`, contiguous, times the weight, plus bias; `[rows, out]` in x's dtype."""
    (num_rows, num_inputs), num_outputs = x.shape, len(qweight)
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    block_n = 32 if num_rows <= 16 else 64
    block_k = group_size or 128
    steps = triton.cdiv(num_inputs, block_k)
    tiles = triton.cdiv(num_rows, block_m) * triton.cdiv(num_outputs, block_n)
    steps_per_split = triton.cdiv(steps, max(1, min(PROGRAMS // tiles, steps // 4)))
    num_splits = triton.cdiv(steps, steps_per_split)
    parts = torch.empty(num_splits, num_rows, num_outputs, device=x.device)
    _matmul_kernel[(triton.cdiv(num_outputs, block_n), triton.cdiv(num_rows, block_m), num_splits)](
        parts, x, qweight.contiguous(), scales.contiguous(), scales if zeros is None else zeros.contiguous(),
        num_rows, num_outputs, num_inputs, scales.shape[1], group_size or num_inputs, steps_per_split,
        BITS=bits, HAS_ZEROS=zeros is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        INTERPRETED=backends.is_interpreted(), num_warps=4, num_stages=4,
    )  # fmt: skip
    out = x.new_empty(num_rows, num_outputs)
    block = 1024
    _sum_kernel[(triton.cdiv(out.numel(), block),)](
        out, parts, parts if bias is None else bias, out.numel(), num_outputs, num_splits,
        HAS_BIAS=bias is not None, BLOCK=block,
    )  # fmt: skip
    return out

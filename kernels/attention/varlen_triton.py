# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""Packed attention as one Triton kernel: a block of one sequence's queries, over its keys with a running softmax.

Knows the packed layout only. The host never looks at the lengths: there are as many programs as blocks could be at
most, and each finds its sequence by bisection. FlashAttention-2 (Dao 2023) is the source of the loop.
"""

import math

import torch
import triton
import triton.language as tl

from penstock.kernels import backends


@triton.jit
def _attend_block(
    acc, row_max, row_sum, q, k_ptr, v_ptr, k_row, v_row, first, len_k, last_seen, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, IS_EDGE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax over the keys from `first` on. IS_EDGE: not all of them exist, or not every row sees them."""
    keys = first + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D_PAD)
    mask = dims[None, :] < D
    if IS_EDGE:
        mask = mask & (keys[:, None] < len_k)
    k = tl.load(k_ptr + keys.to(tl.int64)[:, None] * k_row + dims[None, :], mask=mask, other=0.0)
    v = tl.load(v_ptr + keys.to(tl.int64)[:, None] * v_row + dims[None, :], mask=mask, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if IS_EDGE:
        scores = tl.where((keys[None, :] < len_k) & (keys[None, :] <= last_seen[:, None]), scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = tl.where(new_max == -float("inf"), 0.0, new_max)  # of a row that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _varlen_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, bounds_q, bounds_k, num_sequences, scale_log2,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP
    # Sequence i owns the blocks from bounds[i] // BLOCK_M + i on: at least as many as it fills.
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        is_right = tl.load(bounds_q + middle) // BLOCK_M + middle <= block
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle)
    start_q = tl.load(bounds_q + low).to(tl.int64)
    start_k = tl.load(bounds_k + low).to(tl.int64)
    len_q = (tl.load(bounds_q + low + 1) - start_q).to(tl.int32)
    len_k = (tl.load(bounds_k + low + 1) - start_k).to(tl.int32)
    first_row = (block - (start_q // BLOCK_M + low)).to(tl.int32) * BLOCK_M
    if first_row >= len_q:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D_PAD)
    mask = (rows[:, None] < len_q) & (dims[None, :] < D)
    at = (start_q + rows)[:, None]
    q = tl.load(q_ptr + at * q_row + head * q_head + dims[None, :], mask=mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_ptr += start_k * k_row + kv_head * k_head
    v_ptr += start_k * v_row + kv_head * v_head

    # Keys below `inner` are seen by every row of the block, those from `stop` on by none.
    stop = len_k
    inner = len_k
    last_seen = tl.zeros([BLOCK_M], tl.int32) + len_k
    if IS_CAUSAL:
        last_seen = rows + (len_k - len_q)
        stop = tl.maximum(tl.minimum(len_k, first_row + BLOCK_M + len_k - len_q), 0)
        inner = tl.maximum(tl.minimum(len_k, first_row + 1 + len_k - len_q), 0)
    inner = inner // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    row_max = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, inner, BLOCK_N):
        acc, row_max, row_sum = _attend_block(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_row, v_row, first, len_k, last_seen, scale_log2,
            D, D_PAD, BLOCK_N, False, UPCAST, PRECISION,
        )  # fmt: skip
    for first in range(inner, stop, BLOCK_N):
        acc, row_max, row_sum = _attend_block(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_row, v_row, first, len_k, last_seen, scale_log2,
            D, D_PAD, BLOCK_N, True, UPCAST, PRECISION,
        )  # fmt: skip
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(out_ptr + at * out_row + head * out_head + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def _config(d_pad: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages); float32 has twice the bytes and no tensor cores."""
    if backends.is_interpreted():
        return 32, 16, 1, 1
    if dtype is torch.float32:
        return (64, 32, 4, 2) if d_pad <= 64 else (32, 32, 4, 2)
    if d_pad <= 64:
        return 128, 64, 4, 3
    return (128, 64, 8, 3) if d_pad <= 128 else (64, 32, 4, 2)


def varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """As `attention_varlen`, checked; D up to 256, float16, bfloat16 or float32, the last dimension contiguous."""
    total, heads, d = q.shape
    num_sequences = len(bounds_q) - 1
    d_pad = max(16, triton.next_power_of_2(d))
    block_m, block_n, num_warps, num_stages = _config(d_pad, q.dtype)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    scale = 1 / math.sqrt(d) if scale is None else scale
    _varlen_forward[(total // block_m + num_sequences, heads)](
        q, k, v, out, bounds_q, bounds_k, num_sequences, scale * math.log2(math.e),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        GROUP=heads // k.shape[1], D=d, D_PAD=d_pad, BLOCK_M=block_m, BLOCK_N=block_n, IS_CAUSAL=causal,
        UPCAST=backends.is_interpreted(), PRECISION="ieee", num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out

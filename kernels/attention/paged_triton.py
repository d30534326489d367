# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""Decoding over a paged cache as two Triton kernels: parts of each context in parallel, then their merging.

Knows caches and tables. The grid depends on shapes alone and the lengths are read on the device, so that the kernels can
be captured into a CUDA graph and replayed for other lengths. Flash-Decoding (Dao et al. 2023) is the source: a part
leaves its own softmax's result and log-sum-exp, and parts are averaged by their shares of the whole sum.
"""

import math

import torch
import triton
import triton.language as tl

from penstock.kernels import backends

MAX_SPLITS = 64
MIN_SPLIT_TOKENS = 128
MAX_HEADS = 64
"""Of one program: query heads that share a key head are the rows of its matrix product."""


@triton.jit
def _decode_part(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table, context_lens, part_ptr, lse_ptr,
    num_blocks, capacity, num_splits, scale_log2,
    q_row, q_head, k_block, k_slot, k_head, v_block, v_slot, v_head, scale_block, scale_slot, scale_head, table_row,
    GROUP: tl.constexpr, HEAD_TILES: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, IS_QUANTISED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = (tl.program_id(1) // HEAD_TILES).to(tl.int64)
    split = tl.program_id(2)
    in_group = (tl.program_id(1) % HEAD_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + in_group
    is_head = in_group < GROUP
    dims = tl.arange(0, D_PAD)
    is_dim = dims < D

    length = tl.load(context_lens + row)
    is_bad = (length < 0) | (length > capacity)
    length = tl.where(is_bad, 0, length).to(tl.int32)
    per_split = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N
    start = split * per_split
    stop = tl.minimum(start + per_split, length)

    q_at = q_ptr + row * q_row + heads[:, None] * q_head + dims[None, :]
    q = tl.load(q_at, mask=is_head[:, None] & is_dim[None, :], other=0.0).to(COMPUTE)
    acc = tl.zeros([BLOCK_H, D_PAD], tl.float32)
    row_max = tl.zeros([BLOCK_H], tl.float32) - float("inf")
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    num_bad = tl.zeros([BLOCK_N], tl.int32) + is_bad.to(tl.int32)
    for first in range(start, stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < stop
        block = tl.load(table + row * table_row + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
        is_there = is_token & (block >= 0) & (block < num_blocks)
        num_bad += (is_token & (is_there == 0)).to(tl.int32)
        slot = (tokens % BLOCK_SIZE).to(tl.int64)
        mask = is_there[:, None] & is_dim[None, :]
        k_at = k_ptr + block * k_block + slot * k_slot + kv_head * k_head
        v_at = v_ptr + block * v_block + slot * v_slot + kv_head * v_head
        k = tl.load(k_at[:, None] + dims[None, :], mask=mask, other=0.0).to(COMPUTE)
        v = tl.load(v_at[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if IS_QUANTISED:  # the steps are exact in every dtype; scaled weights, though, could underflow in float16
            scale_at = block * scale_block + slot * scale_slot + kv_head * scale_head
            scores *= tl.load(k_scale_ptr + scale_at, mask=is_there, other=0.0)[None, :]
            v = v.to(tl.float32) * tl.load(v_scale_ptr + scale_at, mask=is_there, other=0.0)[:, None]
        scores = tl.where(is_token[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(row_max - base)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(COMPUTE), v.to(COMPUTE), input_precision=PRECISION)
        row_max = new_max

    has_sum = row_sum != 0.0
    acc = acc / tl.where(has_sum, row_sum, 1.0)[:, None]
    lse = tl.where(has_sum, row_max + tl.log2(tl.where(has_sum, row_sum, 1.0)), -float("inf"))
    is_bad_part = tl.sum(num_bad, 0) > 0  # it is merged with any finite share, so the row becomes NaN
    acc = tl.where(is_bad_part, float("nan"), acc)
    lse = tl.where(is_bad_part, 0.0, lse)
    at = (row * HEADS + heads) * num_splits + split
    tl.store(part_ptr + at[:, None] * D + dims[None, :], acc, mask=is_head[:, None] & is_dim[None, :])
    tl.store(lse_ptr + at, lse, mask=is_head)


@triton.jit
def _merge(
    part_ptr, lse_ptr, out_ptr, num_splits, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # sequence and head
    splits = tl.arange(0, SPLITS_PAD)
    dims = tl.arange(0, D_PAD)
    lse = tl.load(lse_ptr + row * num_splits + splits, mask=splits < num_splits, other=-float("inf"))
    largest = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(largest == -float("inf"), 0.0, largest))
    mask = (lse != -float("inf"))[:, None] & (dims[None, :] < D)
    part = tl.load(part_ptr + (row * num_splits + splits)[:, None] * D + dims[None, :], mask=mask, other=0.0)
    total = tl.sum(share, 0)
    out = tl.sum(part * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)


def num_splits_for(num_programs: int, capacity: int, device: torch.device) -> int:
    """Into how many parts to cut each context: four programs per multiprocessor, by shapes alone."""
    if device.type != "cuda":
        return 4
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-wanted // num_programs), -(-capacity // MIN_SPLIT_TOKENS), MAX_SPLITS))


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    """As `paged_decode`, checked; D up to 256."""
    q, k_cache, v_cache, block_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache, block_table))
    batch, heads, d = q.shape
    num_blocks, block_size, kv_heads, _ = k_cache.shape
    group, d_pad = heads // kv_heads, max(16, triton.next_power_of_2(d))
    is_wide = q.dtype is torch.float32  # no tensor cores: smaller pieces
    block_h = min(16 if is_wide else MAX_HEADS, max(16, triton.next_power_of_2(group)))
    head_tiles = triton.cdiv(group, block_h)
    capacity = block_table.shape[1] * block_size
    num_splits = num_splits_for(batch * kv_heads * head_tiles, capacity, q.device)
    part = torch.empty(batch, heads, num_splits, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, num_splits, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, d, dtype=q.dtype, device=q.device)
    scales = (q, q) if k_scale is None or v_scale is None else (k_scale.contiguous(), v_scale.contiguous())
    compute = tl.float32 if is_wide or backends.is_interpreted() else getattr(tl, str(q.dtype).removeprefix("torch."))
    _decode_part[(batch, kv_heads * head_tiles, num_splits)](
        q, k_cache, v_cache, *scales, block_table, context_lens.contiguous(), part, lse,
        num_blocks, capacity, num_splits, (1 / math.sqrt(d) if scale is None else scale) * math.log2(math.e),
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_size * kv_heads, kv_heads, 1,
        block_table.stride(0), GROUP=group, HEAD_TILES=head_tiles, HEADS=heads, BLOCK_H=block_h,
        BLOCK_N=32 if is_wide or d_pad > 128 else 64, BLOCK_SIZE=block_size, D=d, D_PAD=d_pad,
        IS_QUANTISED=k_scale is not None, COMPUTE=compute, PRECISION="ieee", num_warps=4,
        num_stages=2 if is_wide else 3,
    )  # fmt: skip
    _merge[(batch * heads,)](
        part, lse, out, num_splits, D=d, D_PAD=d_pad, SPLITS_PAD=triton.next_power_of_2(num_splits), num_warps=4
    )
    return out

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""The scatter of `cache.py` as a Triton kernel, one program per token and head; nothing is read back by the host."""

import torch
import triton
import triton.language as tl

from penstock.kernels.attention.inputs import LARGEST


@triton.jit
def _write(
    x_ptr, cache_ptr, scale_ptr, slots, num_slots,
    x_row, x_head, x_dim, cache_slot, cache_head, cache_dim, scale_slot,
    D: tl.constexpr, D_PAD: tl.constexpr, LARGEST: tl.constexpr, IS_INTEGER: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        dims = tl.arange(0, D_PAD)
        mask = dims < D
        x = tl.load(x_ptr + token * x_row + head * x_head + dims * x_dim, mask=mask, other=0.0)
        if LARGEST > 0:
            x = x.to(tl.float32)
            # A maximum may pass over NaN, a sum does not: x - x is NaN for NaN and infinity, else 0.
            scale = tl.max(tl.abs(x), 0) / LARGEST + tl.sum(x - x, 0)
            x = tl.where(scale > 0.0, x / tl.where(scale > 0.0, scale, 1.0), 0.0)  # 0 x NaN is NaN when it is read
            if IS_INTEGER:
                x = tl.floor(x + 0.5)
            tl.store(scale_ptr + slot * scale_slot + head, scale)
        tl.store(
            cache_ptr + slot * cache_slot + head * cache_head + dims * cache_dim, x.to(cache_ptr.dtype.element_ty), mask=mask
        )


def write(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, scales: torch.Tensor | None) -> None:
    """As `write_kv` for one of the two caches, checked."""
    n, heads, d = x.shape
    if x.numel():
        _write[(n, heads)](
            x, cache, cache if scales is None else scales, slots.contiguous(), cache.shape[0] * cache.shape[1],
            *x.stride(), *cache.stride()[1:], heads,
            D=d, D_PAD=triton.next_power_of_2(d), LARGEST=0.0 if scales is None else LARGEST[cache.dtype],
            IS_INTEGER=cache.dtype is torch.int8, num_warps=1,
        )  # fmt: skip

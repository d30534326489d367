# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped, no-any-return"
"""Lookup, position and norm in one pass in Triton: a row of the table is read once, a row of the output written once.

`penstock.kernels.tokens` has the contract. No id reads outside of the tables: such a row becomes NaN.
"""

import torch
import triton
import triton.language as tl

_NORMS = {None: 0, "layer": 1, "rms": 2}


def token_transform(
    ids: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    norm: str | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    scale: float,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """The public function, of checked inputs."""
    hidden = table.shape[1]
    out = torch.empty(*ids.shape, hidden, dtype=table.dtype, device=table.device)
    block = triton.next_power_of_2(hidden)
    num_tokens = max(1, min(16, 1024 // block))  # of one program
    given = [
        table if tensor is None else tensor.contiguous()
        for tensor in (positions, position_ids, norm_weight, norm_bias, lengths)
    ]
    if out.numel():
        _token_transform[(triton.cdiv(ids.numel(), num_tokens),)](
            ids.contiguous(), table.contiguous(), *given, out,
            ids.numel(), ids.shape[-1], hidden, len(table), 0 if positions is None else len(positions), eps, scale,
            HAS_POSITIONS=positions is not None, HAS_IDS=position_ids is not None, HAS_WEIGHT=norm_weight is not None,
            HAS_BIAS=norm_bias is not None, HAS_LENGTHS=lengths is not None, NORM=_NORMS[norm], TOKENS=num_tokens,
            BLOCK=block, num_warps=4 if block <= 2048 else 8 if block <= 4096 else 16,
        )  # fmt: skip
    return out


@triton.jit
def _token_transform(
    ids, table, positions, position_ids, norm_weight, norm_bias, lengths, out,
    num_ids, length, hidden, vocab, num_positions, eps, scale,
    HAS_POSITIONS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)[None, :]
    is_there = token < num_ids
    is_real = is_there
    if HAS_LENGTHS:
        is_real &= token % length < tl.load(lengths + token // length, mask=is_there, other=0)
    row = tl.load(ids + token, mask=is_real, other=0).to(tl.int64)
    is_known = (row >= 0) & (row < vocab)
    mask = (is_real & is_known)[:, None] & (column < hidden)
    x = tl.load(table + row[:, None] * hidden + column, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_POSITIONS:
        position = token % length
        if HAS_IDS:
            position = tl.load(position_ids + token, mask=is_real, other=0).to(tl.int64)
        is_known &= (position >= 0) & (position < num_positions)
        mask = (is_real & is_known)[:, None] & (column < hidden)
        x += tl.load(positions + position[:, None] * hidden + column, mask=mask, other=0.0).to(tl.float32)
    if NORM == 1:
        x = tl.where(column < hidden, x - tl.sum(x, 1)[:, None] / hidden, 0.0)
    if NORM > 0:
        x *= tl.math.rsqrt(tl.sum(x * x, 1)[:, None] / hidden + eps)
    if HAS_WEIGHT:
        x *= tl.load(norm_weight + column, mask=column < hidden, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(norm_bias + column, mask=column < hidden, other=0.0).to(tl.float32)
    x = tl.where(is_known[:, None], x, float("nan"))
    x = tl.where(is_real[:, None], x, 0.0)
    tl.store(out + token[:, None] * hidden + column, x.to(out.dtype.element_ty), mask=is_there[:, None] & (column < hidden))

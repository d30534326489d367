"""Attention by its definition, in float64: dense, packed and over a paged cache.

Knows shapes and the alignment of causal masks; knows no backend and is in no hurry.
"""

import math

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale q k^T) v per head. q: `[B, Hq, Lq, D]`; k, v: `[B, Hkv, Lk, D]`; a query that sees no key gives zeros.

    Query head h reads key head h // (Hq / Hkv). `causal`: query i sees the keys up to i + Lk - Lq, so the last sees all.
    """
    group = q.shape[1] // k.shape[1]
    num_queries, num_keys = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    wide_k, wide_v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = scale * q.double() @ wide_k.transpose(2, 3)
    if causal:
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).triu(num_keys - num_queries + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    if num_keys == 0:
        return torch.zeros_like(q)
    sees_any = scores.amax(3, keepdim=True) > -math.inf
    weights = torch.where(sees_any, torch.softmax(scores, 3), 0.0)
    return (weights @ wide_v).to(q.dtype)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """`attention` of each sequence alone. q: `[total_q, Hq, D]`; k, v: `[total_k, Hkv, D]`; bounds: `[batch + 1]`."""
    out = torch.zeros_like(q)
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        one = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        out[rows] = attention(*one, causal=causal, scale=scale)[0].transpose(0, 1)
    return out


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` of one query over each sequence's tokens, looked up one by one.

    q: `[B, Hq, D]`; caches: `[blocks, block_size, Hkv, D]`, times their scales `[blocks, block_size, Hkv]`; token t of
    sequence b is at block_table[b, t // block_size], t % block_size.
    """
    block_size = k_cache.shape[1]
    out = torch.zeros_like(q)
    for i, length in enumerate(context_lens.tolist()):
        at = [(int(block_table[i, t // block_size]), t % block_size) for t in range(length)]
        if at:
            k, v = (
                torch.stack([cache[place].double() * (1.0 if scales is None else scales[place][:, None]) for place in at])
                for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
            )
            wide = attention(q[i, None, :, None].double(), k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale)
            out[i] = wide[0, :, 0].to(q.dtype)
    return out


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Puts token i at slot slots[i], one by one; -1 is skipped. See `cache.write_kv`."""
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            place = divmod(slot, k_cache.shape[1])
            for x, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
                if scales is None:
                    cache[place] = x[i]
                    continue
                wide, is_integer = x[i].float(), cache.dtype is torch.int8
                largest = wide.abs().amax(1)
                scales[place] = torch.where(largest.isfinite(), largest / (127.0 if is_integer else 448.0), math.nan)
                is_some = scales[place] > 0  # neither zeros only nor NaN
                steps = torch.where(is_some[:, None], wide / scales[place][:, None], 0.0)
                cache[place] = ((steps + 0.5).floor() if is_integer else steps).to(cache.dtype)

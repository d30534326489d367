"""Attention of one query token per sequence over keys and values in a paged cache.

Knows blocks, tables and slots; does not know who owns a block (the engine). Letters in shapes: B sequences, G = Hq / Hkv.

Caches of int8 or float8_e4m3fn have one scale per token and head: a token is written once and never touched again,
while a scale per block would change with later tokens and those before would have to be quantised anew.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from penstock.kernels import backends
from penstock.kernels.attention.inputs import FLOATS, INTEGERS, LARGEST, check_caches, check_options, fits_triton
from penstock.kernels.errors import InvalidInput

MAX_GROUP_BYTES = 1 << 21
"""On a CPU: sequences share a call of SDPA while their gathered keys stay below this. Memory that was just used is warm;
large pieces of memory must be mapped anew each time."""

MAX_PADDING_BYTES = 1 << 18
"""… and while so little of that is padding that one call more would take longer."""


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
    """`attention` of one query per sequence over its first context_lens[b] cached tokens.

    q: float `[B, Hq, D]`; k_cache, v_cache: `[blocks, block_size, Hkv, D]` of the dtype of q, Hq a multiple of Hkv.
    block_table: int32 or int64 `[B, max_blocks]`: token t of sequence b is in block block_table[b, t // block_size] at
    t % block_size; entries beyond the context may hold anything and are not looked up, nor are the slots behind it.
    context_lens: int32 or int64 `[B]`, 0 to max_blocks * block_size; 0 gives zeros. `scale`: None = 1 / sqrt(D).
    Caches of int8 or float8_e4m3fn come with k_scale, v_scale: float32 `[blocks, block_size, Hkv]`, a value is the
    cached one times its scale. Returns `[B, Hq, D]` in the dtype of q.

    Raises InvalidInput; a length or a block out of range is refused on the CPU, and elsewhere makes its row NaN, for the
    Triton form does not wait for the device and can be captured into a CUDA graph.

    Tolerance whatever shares the batch: as `attention`, against the values that the cache holds. Source: PagedAttention
    (Kwon et al. 2023), Flash-Decoding (Dao et al. 2023).
    """
    check_options("paged_decode", False, scale)
    check_caches("paged_decode", k_cache, v_cache, (k_scale, v_scale))
    _check_query(q, k_cache, block_table, context_lens)
    if not q.numel():
        return torch.empty_like(q)
    usable = [name for name in backends.torch_or_triton(q.device) if name == "torch" or fits_triton(q, k_cache.dtype)]
    if backends.choose("paged_decode", q.device, usable) == "triton":
        from penstock.kernels.attention.paged_triton import decode

        return decode(q, k_cache, v_cache, block_table, context_lens, scale, k_scale, v_scale)
    lengths = _checked_lengths(block_table, context_lens, *k_cache.shape[:2])
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for members in _groups(lengths, k_cache):
        at = torch.tensor(members, device=q.device)
        shortest, longest = (pick(lengths[i] for i in members) for pick in (min, max))
        is_there = torch.arange(longest, device=q.device) < context_lens[at, None]  # [n, longest]
        has_block = is_there[:, :: k_cache.shape[1]]
        table = torch.where(has_block, block_table[at, : has_block.shape[1]], 0)  # what is gathered for 0 is zeroed
        keys, values = (
            _gathered(cache, scales, table, is_there, shortest, q.dtype)
            for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
        )
        # The heads that share keys are queries of one head.
        folded = q[at].view(len(members), k_cache.shape[2], -1, q.shape[2])
        mask = None if shortest == longest else is_there[:, None, None, :]
        out[at] = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)
    return out


def _check_query(q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, context_lens: torch.Tensor) -> None:
    _, _, kv_heads, d = k_cache.shape
    if q.ndim != 3 or q.shape[2] != d or kv_heads == 0 or q.shape[1] % kv_heads:
        raise InvalidInput(
            f"paged_decode: q must be [B, Hq, D], D that of the caches and Hq a multiple of their heads; got"
            f" {list(q.shape)} and caches {list(k_cache.shape)}"
        )
    if q.dtype not in FLOATS or (k_cache.dtype != q.dtype and k_cache.dtype not in LARGEST):
        raise InvalidInput(f"paged_decode: caches must have the dtype of q, int8 or fp8; got {q.dtype}, {k_cache.dtype}")
    if block_table.ndim != 2 or context_lens.ndim != 1 or not len(q) == len(block_table) == len(context_lens):
        raise InvalidInput(
            f"paged_decode: block_table must be [B, max_blocks] and context_lens [B] with B = {len(q)}; got"
            f" {list(block_table.shape)} and {list(context_lens.shape)}"
        )
    if block_table.dtype not in INTEGERS or context_lens.dtype not in INTEGERS:
        raise InvalidInput(
            f"paged_decode: block_table and context_lens must be int32 or int64; got {block_table.dtype}, {context_lens.dtype}"
        )


def _checked_lengths(block_table: torch.Tensor, context_lens: torch.Tensor, num_blocks: int, block_size: int) -> list[int]:
    lengths: list[int] = context_lens.tolist()
    capacity = block_table.shape[1] * block_size
    for i, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise InvalidInput(f"paged_decode: row {i} has a context of {length}; its blocks hold 0 to {capacity}")
    bad = uses_bad_block(block_table, context_lens, num_blocks, block_size)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise InvalidInput(f"paged_decode: row {i} of block_table names a block that is not one of the {num_blocks}")
    return lengths


def uses_bad_block(block_table: torch.Tensor, context_lens: torch.Tensor, num_blocks: int, block_size: int) -> torch.Tensor:
    """bool `[B]`: an entry of the table within the context is no block of the cache."""
    is_used = torch.arange(block_table.shape[1], device=block_table.device) * block_size < context_lens[:, None]
    return (is_used & ((block_table < 0) | (block_table >= num_blocks))).any(1)


def _groups(lengths: list[int], cache: torch.Tensor) -> list[list[int]]:
    """Sequences of like length together, the longest first; the empty ones in none."""
    block_bytes = cache[0].numel() * cache.itemsize
    num_bytes = {i: -(-length // cache.shape[1]) * block_bytes for i, length in enumerate(lengths) if length}
    groups: list[list[int]] = []
    longest = padding = 0
    for i in sorted(num_bytes, key=num_bytes.__getitem__, reverse=True):
        padding += longest - num_bytes[i]
        if groups and padding <= MAX_PADDING_BYTES and (len(groups[-1]) + 1) * longest <= MAX_GROUP_BYTES:
            groups[-1].append(i)
        else:
            groups.append([i])
            longest, padding = num_bytes[i], 0
    return groups


def _gathered(
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    is_there: torch.Tensor,
    shortest: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[n, Hkv, longest, D] in `dtype`: the table's blocks one after another, zeros behind the context."""
    # index_select copies whole blocks; indexing by a table was five times slower.
    x = cache.index_select(0, table.flatten()).view(len(table), -1, *cache.shape[2:])[:, : is_there.shape[1]]
    if scales is not None:
        steps = scales.index_select(0, table.flatten()).view(len(table), -1, cache.shape[2])[:, : is_there.shape[1]]
        x = (x.float() * steps[..., None]).to(dtype)
    x[:, shortest:].masked_fill_(~is_there[:, shortest:, None, None], 0.0)
    return x.transpose(1, 2)

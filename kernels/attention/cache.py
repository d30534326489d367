"""Writes keys and values of new tokens into a paged cache, quantised on the way where the cache is.

Knows slots: slot s is block s // block_size, place s % block_size; does not know who owns a block (the engine).
"""

import torch

from penstock.kernels import backends
from penstock.kernels.attention.inputs import INTEGERS, LARGEST, check_caches, fits_triton
from penstock.kernels.errors import InvalidInput


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
    """Puts the keys and values of token i at slot slots[i] of the caches, in place.

    k, v: float `[n, Hkv, D]`; k_cache, v_cache: `[blocks, block_size, Hkv, D]`, the first two dimensions without gaps
    between; slots: int32 or int64 `[n]`, all different, -1 = write nothing. Caches in a float dtype are cast to. Caches
    of int8 or float8_e4m3fn come with k_scale, v_scale, float32 `[blocks, block_size, Hkv]`, contiguous, which are written
    as well: the largest magnitude of a token and head becomes 127 or 448, an int8 is within half a step of
    scale = max|x| / 127. NaN and infinity come back as NaN.

    Raises InvalidInput; a slot out of range is refused on the CPU, and elsewhere nothing is written for it.
    """
    check_caches("write_kv", k_cache, v_cache, (k_scale, v_scale))
    if k.ndim != 3 or v.shape != k.shape or v.dtype != k.dtype or k.shape[1:] != k_cache.shape[2:]:
        raise InvalidInput(
            f"write_kv: k and v must be [n, Hkv, D] like the caches; got {list(k.shape)}, {list(v.shape)} and caches"
            f" {list(k_cache.shape)}"
        )
    if slots.shape != k.shape[:1] or slots.dtype not in INTEGERS:
        raise InvalidInput(f"write_kv: slots must be int32 or int64 [{len(k)}]; got {slots.dtype} {list(slots.shape)}")
    caches = ((k, k_cache, k_scale), (v, v_cache, v_scale))
    for _, cache, scales in caches:
        if cache.stride(0) != cache.shape[1] * cache.stride(1) or not (scales is None or scales.is_contiguous()):
            raise InvalidInput("write_kv: the blocks of a cache must follow one another without gaps, its scales likewise")
    usable = [name for name in backends.torch_or_triton(k.device) if name == "torch" or fits_triton(k, k_cache.dtype)]
    if backends.choose("write_kv", k.device, usable) == "triton":
        from penstock.kernels.attention.cache_triton import write

        for x, cache, scales in caches:
            write(x, cache, slots, scales)
        return
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    if bool(((slots < -1) | (slots >= num_slots)).any()):
        raise InvalidInput(f"write_kv: slots must be -1 to {num_slots - 1}")
    rows = (slots >= 0).nonzero()[:, 0]
    at = slots[rows].long()
    for x, cache, scales in caches:
        flat = cache.flatten(0, 1)
        if scales is None:
            flat[at] = x[rows].to(cache.dtype)
        else:
            flat[at], scales.flatten(0, 1)[at] = _quantised(x[rows], cache.dtype)


def _quantised(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in steps of its scale, the scale `[n, Hkv]`)."""
    wide = x.float()
    scale = wide.abs().amax(2) / LARGEST[dtype]
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    steps = torch.where((scale > 0.0)[..., None], wide / scale[..., None], 0.0)  # 0 x NaN is NaN when it is read
    return ((steps + 0.5).floor() if dtype is torch.int8 else steps).to(dtype), scale

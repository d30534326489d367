"""What the functions of this folder refuse, in one place and in words.

Knows shapes, dtypes and ranges; looks at values on the host only where `paged.py` and `varlen.py` say so.
"""

import math

import torch

from penstock.kernels.errors import InvalidInput, shown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The dtypes of quantised caches, and what the largest magnitude of a token and head becomes in them."""

MAX_TRITON_HEAD_SIZE = 256
"""Of what the Triton forms keep in registers."""


def check_options(op: str, causal: object, scale: object) -> None:
    """`causal` and `scale` may come from a client: any value can be there."""
    if not isinstance(causal, bool):
        raise InvalidInput(f"{op}: causal must be True or False; got {shown(causal)}")
    if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):  # type: ignore[arg-type]
        raise InvalidInput(f"{op}: scale must be a finite number, or None for 1 / sqrt(D); got {shown(scale)}")


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rank: int, head_axis: int) -> None:
    """q and k, v are of one dtype and D, k and v of one shape, the heads of q a multiple of theirs."""
    if q.ndim != rank or k.ndim != rank or v.shape != k.shape or k.shape[-1] != q.shape[-1]:
        raise InvalidInput(
            f"{op}: q, k and v must have {rank} dimensions, k and v one shape, and all the same last dimension; got"
            f" q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    heads, kv_heads = q.shape[head_axis], k.shape[head_axis]
    if kv_heads == 0 or heads % kv_heads:
        raise InvalidInput(f"{op}: the heads of q must be a multiple of those of k and v; got {heads} and {kv_heads}")
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise InvalidInput(f"{op}: q, k and v must have one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")


def check_caches(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, scales: tuple[torch.Tensor | None, ...]) -> None:
    """Both caches `[blocks, block_size, Hkv, D]` of one dtype; scales `[blocks, block_size, Hkv]` iff it is quantised."""
    if k_cache.ndim != 4 or v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype or k_cache.shape[1] == 0:
        raise InvalidInput(
            f"{op}: k_cache and v_cache must be [blocks, block_size, Hkv, D] alike; got {list(k_cache.shape)}"
            f" {k_cache.dtype} and {list(v_cache.shape)} {v_cache.dtype}"
        )
    is_quantised = k_cache.dtype in LARGEST
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if is_quantised != (scale is not None):
            raise InvalidInput(
                f"{op}: {name} belongs to caches of int8 or float8_e4m3fn and to no others; they are {k_cache.dtype}"
            )
        if scale is not None and (scale.shape != k_cache.shape[:3] or scale.dtype != torch.float32):
            raise InvalidInput(f"{op}: {name} must be float32 {list(k_cache.shape[:3])}; got {scale.dtype} {list(scale.shape)}")


def fits_triton(x: torch.Tensor, cache_dtype: torch.dtype | None = None) -> bool:
    """True if the Triton forms take heads of this size and dtype, over a cache of `cache_dtype` if there is one."""
    if cache_dtype is torch.float8_e4m3fn and x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 9):
        return False  # the compiler has no conversion
    return x.dtype is not torch.float64 and x.shape[-1] <= MAX_TRITON_HEAD_SIZE

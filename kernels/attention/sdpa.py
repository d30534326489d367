"""Dense attention by torch's scaled_dot_product_attention (SDPA), with one meaning of causal on every backend.

Knows which of SDPA's kernels suits which input, and how to ask for it; does not check shapes (`inputs.py`). Letters in
shapes: B sequences, H heads, L tokens, D size of a head.
"""

from contextlib import nullcontext

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from penstock.kernels import backends

TILE_QUERIES = 256
"""On a CPU a mask for more keys than queries is made for so many queries at a time: memory is linear in the keys."""

MIN_CUDNN_QUERIES = 256
"""cuDNN is fastest for long queries, but plans anew for every shape; FlashAttention splits the keys for short ones."""

MAX_FOLDED_QUERIES = 16
"""Without a mask, the heads that share keys are more queries of one head. On CUDA folding them costs copies, which pay
for a few queries, and where no kernel takes fewer key heads than query heads."""

_CAN_USE = {"cudnn": can_use_cudnn_attention, "flash": can_use_flash_attention, "efficient": can_use_efficient_attention}
_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_HALF = (torch.float16, torch.bfloat16)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> torch.Tensor:
    """q: `[B, Hq, Lq, D]`, k and v: `[B, Hkv, Lk, D]`, checked; causal is aligned with the last query and the last key."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if not (q.numel() and num_keys):
        return q.new_zeros(q.shape)
    if causal and num_queries > num_keys:  # the first rows see nothing, the others are square
        out = q.new_zeros(q.shape)
        out[:, :, num_queries - num_keys :] = attend(q[:, :, num_queries - num_keys :], k, v, True, scale)
        return out
    causal = causal and num_queries > 1  # a single query is the last one
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    group, is_half_on_cuda = q.shape[1] // k.shape[1], q.device.type == "cuda" and q.dtype in _HALF
    if group > 1 and not causal and (num_queries <= MAX_FOLDED_QUERIES or not is_half_on_cuda):
        b, _, _, d = q.shape
        return attend(q.reshape(b, k.shape[1], group * num_queries, d), k, v, False, scale).reshape(q.shape)
    if group > 1 and not (q.device.type == "cpu" or is_half_on_cuda):
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if q.device.type == "cuda":
        return _on_cuda(q, k, v, causal, scale)
    backends.choose("attention", q.device, ["torch"])
    if causal and num_queries < num_keys:
        return _in_tiles(q, k, v, scale)
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _in_tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Causal with more keys than queries: each tile of queries with the keys that its last one sees."""
    num_queries, shift = q.shape[2], k.shape[2] - q.shape[2]
    is_gqa = q.shape[1] != k.shape[1]
    out = torch.empty_like(q)
    for start in range(0, num_queries, TILE_QUERIES):
        end = min(start + TILE_QUERIES, num_queries)
        seen = torch.ones(end - start, end + shift, dtype=torch.bool, device=q.device).tril(start + shift)
        keys, values = k[:, :, : end + shift], v[:, :, : end + shift]
        out[:, :, start:end] = scaled_dot_product_attention(
            q[:, :, start:end], keys, values, attn_mask=seen, scale=scale, enable_gqa=is_gqa
        )
    return out


def _lower_right(num_queries: int, num_keys: int) -> torch.Tensor:
    from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler with it, which takes a second

    return causal_lower_right(num_queries, num_keys)


def _on_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> torch.Tensor:
    """Runs the first kernel that takes these inputs; "math" takes all, "torch" leaves the choice to SDPA."""
    num_queries, num_keys, is_gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    is_square = num_queries == num_keys
    bias = _lower_right(num_queries, num_keys) if causal and not is_square else None
    params = SDPAParams(q, k, v, None, 0.0, causal and is_square, is_gqa)
    usable = [name for name, can_use in _CAN_USE.items() if can_use(params)]
    if "cudnn" in usable and (bias is not None or num_queries < MIN_CUDNN_QUERIES):
        usable.remove("cudnn")
        usable += ["cudnn"] if bias is None else []
    name = backends.choose("attention", q.device, [*usable, "math", "torch"])
    with nullcontext() if name == "torch" else sdpa_kernel(_KERNELS[name]):
        return scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal and is_square, scale=scale, enable_gqa=is_gqa
        )

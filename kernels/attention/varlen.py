"""Attention of sequences of different lengths, packed one after another: no padding is computed or stored.

Knows the packed layout and its backends; the alignment of causal masks is that of `sdpa.py`, for each sequence.
"""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import torch
from torch.backends.cuda import is_flash_attention_available

from penstock.kernels import backends
from penstock.kernels.attention.inputs import INTEGERS, check_heads, check_options, fits_triton
from penstock.kernels.attention.sdpa import attend
from penstock.kernels.errors import InvalidInput

MAX_FLASH_HEAD_SIZE = 256


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> torch.Tensor:
    """`attention` of every sequence with itself only.

    q: float `[total_q, Hq, D]`; k, v: `[total_k, Hkv, D]` of the same dtype, Hq a multiple of Hkv. cu_seqlens_q: int32
    or int64 `[batch + 1]`, from 0 to total_q: sequence i has the rows from cu_seqlens_q[i] to cu_seqlens_q[i + 1];
    cu_seqlens_k likewise, None = the same. Sequences may be empty. `causal`: a sequence's last query sees all its keys,
    query i those up to i + Lk - Lq. Returns `[total_q, Hq, D]`; a query that sees no key gives zeros.

    `max_seqlen_q`, `max_seqlen_k`: no sequence is longer; without them some backends on CUDA wait for the device once
    to learn them. Raises InvalidInput; the values of cu_seqlens are checked only by the form that looks at
    them, SDPA sequence by sequence, which is the one on the CPU.

    Tolerance: as `attention`. Source: FlashAttention-2 (Dao 2023).
    """
    check_options("attention_varlen", causal, scale)
    check_heads("attention_varlen", q, k, v, rank=3, head_axis=1)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds.shape != cu_seqlens_q.shape or bounds.ndim != 1 or not len(bounds) or bounds.dtype not in INTEGERS:
            raise InvalidInput(
                f"attention_varlen: {name} must be int32 or int64 [batch + 1]; got {bounds.dtype} {list(bounds.shape)}"
            )
    if not (q.numel() and k.numel()):
        return q.new_zeros(q.shape)
    backend = backends.choose("attention_varlen", q.device, _usable(q))
    if backend == "torch":
        return _by_runs(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    if backend == "triton":
        from penstock.kernels.attention.varlen_triton import varlen_forward

        return varlen_forward(q, k, v, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), causal, scale)
    if max_seqlen_q is None or max_seqlen_k is None:
        max_seqlen_q, max_seqlen_k = torch.stack([cu_seqlens_q, cu_seqlens_k]).diff().amax(1).tolist()
    layout = (cu_seqlens_q.int().contiguous(), cu_seqlens_k.int().contiguous(), max_seqlen_q, max_seqlen_k)
    flash = _flash()
    assert flash is not None
    out: torch.Tensor = flash(q, k, v, layout, causal, scale)
    return out


@cache
def _flash() -> Callable[..., Any] | None:
    """torch's packed kernel (query, key, value, layout, causal, scale), whose options have changed names; None: it has none.

    Its module brings torch's compiler with it, which takes a second to import: not before it is needed.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = inspect.signature(varlen_attn).parameters
    # Those without such an option take fewer key heads than query heads as they are.
    grouped = {"enable_gqa": True} if "enable_gqa" in options else {}
    has_window = "window_size" in options
    kernel: Callable[..., Any] = varlen_attn

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any, causal: bool, scale: float | None) -> Any:
        masked = {"window_size": (-1, 0 if causal else -1)} if has_window else {"is_causal": causal}
        return kernel(q, k, v, *layout, scale=scale, **masked, **grouped)

    return call if "scale" in options else None


def _usable(q: torch.Tensor) -> list[str]:
    """FlashAttention's packed kernel where it takes the input, then ours, then SDPA sequence by sequence."""
    names = [name for name in backends.torch_or_triton(q.device) if name == "torch" or fits_triton(q)]
    return ["varlen_attn", *names] if q.device.type == "cuda" and _fits_flash(q) else names


def _fits_flash(q: torch.Tensor) -> bool:
    if _flash() is None or not is_flash_attention_available() or torch.cuda.get_device_capability(q.device) < (8, 0):
        return False
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= MAX_FLASH_HEAD_SIZE


def _by_runs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """SDPA for each run of neighbours that are equally long: a batch without a copy, on one sequence as well."""
    len_q = _lengths("q", cu_seqlens_q.tolist(), len(q))
    len_k = _lengths("k", cu_seqlens_k.tolist(), len(k))
    runs = [(pair, len(list(run))) for pair, run in groupby(zip(len_q, len_k, strict=True))]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows, keys = [n * pair[0] for pair, n in runs], [n * pair[1] for pair, n in runs]
    parts = zip(runs, *(torch.split(x, n) for x, n in ((out, rows), (q, rows), (k, keys), (v, keys))), strict=True)
    for ((num_rows, num_keys), n), *run in parts:
        out_run, q_run, k_run, v_run = (
            x.view(n, length, *x.shape[1:]).transpose(1, 2)
            for x, length in zip(run, (num_rows, num_rows, num_keys, num_keys), strict=True)
        )
        out_run.copy_(attend(q_run, k_run, v_run, causal, scale))
    return out


def _lengths(name: str, bounds: list[int], total: int) -> list[int]:
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise InvalidInput(f"attention_varlen: cu_seqlens_{name} must rise from 0 to {total}, the length of {name}")
    return lengths

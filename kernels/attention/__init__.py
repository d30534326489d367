"""Attention: dense here, packed in `varlen.py`, over a paged cache in `paged.py`; `tasks.py` has the broker's forms."""

import torch

from penstock.kernels.attention.inputs import check_heads, check_options
from penstock.kernels.attention.sdpa import attend
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput
from penstock.kernels.inputs import FLOATS, Tensor
from penstock.kernels.spec import Cost


@kernel(
    "attention",
    inputs={name: Tensor(dtypes=FLOATS, rank=3) for name in ("q", "k", "v")},
    cost=Cost(base_ms=0.05, per={"q.numel": 2e-6, "k.numel": 2e-6}),
    combine="sum",
    max_batch_size=64,
)
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale q k^T) v, for every head.

    q: float `[B, Hq, Lq, D]`; k, v: `[B, Hkv, Lk, D]` of the same dtype, Hq a multiple of Hkv: query head h reads key
    head h // (Hq / Hkv). `causal`: the last query sees all keys, query i those up to i + Lk - Lq. `scale`: None =
    1 / sqrt(D). Returns `[B, Hq, Lq, D]`; a query that sees no key gives zeros. Raises InvalidInput.

    Tolerance whatever shares the batch, for scores within 30 of 0: |error| <= 1e-5 max|v| in float32, 2e-3 in float16,
    1.6e-2 in bfloat16, 1e-12 in float64. No gradients on every backend. Source: Vaswani et al. 2017; causal as in
    FlashAttention since 2.1, unlike `is_causal` of torch where Lq != Lk.
    """
    check_options("attention", causal, scale)
    check_heads("attention", q, k, v, rank=4, head_axis=1)
    if q.shape[0] != k.shape[0]:
        raise InvalidInput(f"attention: q has a batch of {q.shape[0]}, k and v of {k.shape[0]}; they must be equal")
    return attend(q, k, v, causal, scale)

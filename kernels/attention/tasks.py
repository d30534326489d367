"""The broker's forms of packed attention and of decoding over a paged cache: one task, one sequence.

Knows how tasks are joined; the computing is `varlen.py` and `paged.py`. Both look at lengths or tables on the host once,
before they compute, so that what one task sends never makes it read the keys of another.
"""

import torch

from penstock.kernels.attention.paged import paged_decode, uses_bad_block
from penstock.kernels.attention.varlen import attention_varlen
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput
from penstock.kernels.inputs import FLOATS, Row, Tensor
from penstock.kernels.spec import Cost


@kernel(
    "attention_varlen",
    inputs={name: Tensor(dtypes=FLOATS, rank=3, ragged="pack") for name in ("q", "k", "v")},
    cost=Cost(base_ms=0.05, per={"q.numel": 2e-6, "k.numel": 2e-6}),
    combine="sum",
    max_batch_size=64,
)
def attention_varlen_tasks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    v_offsets: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> dict[str, list[torch.Tensor]]:
    """softmax(scale q k^T) v, for every head, of sequences whose lengths may differ.

    q: float `[Lq, Hq, D]` per task; k, v: `[Lk, Hkv, D]` of the same dtype, Hq a multiple of Hkv: query head h reads key
    head h // (Hq / Hkv). `causal`: the last query sees all keys, query i those up to i + Lk - Lq. `scale`: None =
    1 / sqrt(D). Returns `[Lq, Hq, D]`; a query that sees no key gives zeros. Tolerance and source: as `attention`.
    """
    bounds = torch.stack([q_offsets, k_offsets, v_offsets])
    lengths_q, lengths_k, lengths_v = bounds.diff().tolist()
    if lengths_k != lengths_v:
        raise InvalidInput("attention_varlen: k and v of a task must have the same length")
    out = attention_varlen(
        q, k, v, q_offsets, k_offsets, causal=causal, scale=scale, max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k)
    )
    return {"out": list(torch.split(out, lengths_q))}


@kernel(
    "paged_decode",
    inputs={
        "q": Tensor(dtypes=FLOATS, rank=2),
        "k_cache": Tensor(dtypes=FLOATS, rank=4),
        "v_cache": Tensor(dtypes=FLOATS, rank=4),
        "block_table": Tensor(dtypes=("int32", "int64"), rank=1),
        "context_len": Row(minimum=0),
    },
    cost=Cost(base_ms=0.05, per={"k_cache.numel": 1e-6}),
    combine="sum",
    max_batch_size=64,
)
def paged_decode_tasks(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of one query over the first `context_len` tokens of the task's own paged cache.

    q: float `[Hq, D]` per task; k_cache, v_cache: `[blocks, block_size, Hkv, D]` of the same dtype, Hq a multiple of Hkv;
    block_table: `[max_blocks]`: token t is in block block_table[t // block_size] at t % block_size; entries beyond the
    context may hold anything. Returns `[Hq, D]`; zeros for a context of 0. Tolerance and source: as `paged_decode`.
    """
    num_tasks, num_blocks, block_size = k_cache.shape[:3]
    # A context of more tokens than the cache has would repeat blocks: a small table could ask for any amount of work.
    capacity = min(block_table.shape[1], num_blocks) * block_size
    is_length = (context_len >= 0) & (context_len <= capacity) & (context_len == context_len.floor())
    lengths = torch.where(is_length, context_len, 0.0).to(torch.int32)
    is_bad_table = uses_bad_block(block_table, lengths, num_blocks, block_size)
    if bool((~is_length | is_bad_table).any()):
        raise InvalidInput(
            f"paged_decode: context_len must be an integer from 0 to {capacity}, what table and cache hold, and"
            f" block_table must hold numbers of blocks, 0 to {num_blocks - 1}, up to there"
        )
    # Entries beyond the context may point anywhere; they are never looked up.
    tables = block_table.long() + torch.arange(num_tasks, device=q.device)[:, None] * num_blocks
    return paged_decode(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), tables, lengths, scale=scale)

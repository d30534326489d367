"""Experts in Triton: pairs aligned to blocks per expert on the device, then two grouped products; nothing waits.

Knows pairs, blocks and experts; does not know which experts are chosen for what reason. The grid is as large as the
worst distribution of the pairs could need; blocks without pairs return at once.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,import-untyped"

import torch
import triton
import triton.language as tl

from penstock.kernels import backends
from penstock.kernels.moe.routing import logits

_CHUNK = 1024


@triton.jit
def _route_kernel(
    logits_ptr, weights_ptr, experts_ptr, num_experts, top_k,
    RENORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """One token: softmax, then the largest probability top_k times, the lowest expert where several are equal."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    j = tl.arange(0, TOP_K)
    logit = tl.load(logits_ptr + token * num_experts + e, mask=e < num_experts, other=-float("inf"))
    power = tl.exp(logit - tl.max(logit, 0))
    total = tl.sum(power, 0)
    probs = tl.where(e < num_experts, power / total, -1.0)
    weights = tl.zeros([TOP_K], tl.float32)
    experts = tl.zeros([TOP_K], tl.int32)
    for i in range(top_k):
        largest = tl.max(probs, 0)
        # NaN equals nothing, and a maximum may pass it over: such a token goes anywhere, and its weights are made NaN.
        chosen = tl.minimum(tl.min(tl.where(probs == largest, e, EXPERTS), 0), num_experts - 1)
        weights = tl.where(j == i, largest + 0.0 * total, weights)
        experts = tl.where(j == i, chosen, experts)
        probs = tl.where(e == chosen, -1.0, probs)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 0)
    tl.store(weights_ptr + token * top_k + j, weights, mask=j < top_k)
    tl.store(experts_ptr + token * top_k + j, experts.to(tl.int64), mask=j < top_k)


@triton.jit
def _align_kernel(
    experts_ptr, pairs_ptr, block_expert_ptr, num_pairs, num_experts, max_blocks,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program e lays out expert e's pairs in whole blocks, padded with `num_pairs`; the last one closes unused blocks."""
    e = tl.program_id(0)
    bins = tl.arange(0, BINS)
    i = tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        expert = tl.load(experts_ptr + start + i, mask=start + i < num_pairs, other=num_experts).to(tl.int32)
        counts += tl.histogram(tl.minimum(expert, num_experts), BINS)
    blocks = tl.where(bins < num_experts, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(bins < e, blocks, 0), 0)
    own = tl.sum(tl.where(bins == e, blocks, 0), 0)
    if e == num_experts:
        own = max_blocks - first
    for start in range(0, own, CHUNK):
        tl.store(block_expert_ptr + first + start + i, e + tl.zeros([CHUNK], tl.int32), mask=start + i < own)
    if e < num_experts:
        taken = 0
        for start in range(0, num_pairs, CHUNK):
            expert = tl.load(experts_ptr + start + i, mask=start + i < num_pairs, other=num_experts).to(tl.int32)
            is_mine = (expert == e).to(tl.int32)
            rank = taken + tl.cumsum(is_mine, 0) - 1
            tl.store(pairs_ptr + first * BLOCK_M + rank, start + i, mask=is_mine != 0)
            taken += tl.sum(is_mine, 0)
        m = (own - 1) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(pairs_ptr + first * BLOCK_M + m, num_pairs + tl.zeros([BLOCK_M], tl.int32), mask=m >= taken)


@triton.jit
def _dot(a, b, total, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter gets bfloat16 products wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _gate_up_kernel(
    hidden_ptr, x_ptr, w_ptr, pairs_ptr, block_expert_ptr, place_ptr,
    num_pairs, num_experts, num_places, top_k, hidden_size, inter,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PLACE: tl.constexpr,
):  # fmt: skip
    """hidden[pair] = silu(gate) * up: one block of an expert's pairs, BLOCK_N columns."""
    block = tl.program_id(0)
    at = tl.load(block_expert_ptr + block)
    if at == num_experts:  # an unused block
        return
    if HAS_PLACE:
        at = tl.load(place_ptr + at)
    if at >= num_places:
        return
    pair = tl.load(pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_pair = pair < num_pairs
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pair // top_k).to(tl.int64)[:, None] * hidden_size + k[None, :]
    gate_row = at.to(tl.int64) * 2 * inter + n
    gate_ptrs = w_ptr + gate_row[None, :] * hidden_size + k[:, None]  # [BLOCK_K, BLOCK_N]
    up_ptrs = w_ptr + (gate_row + inter)[None, :] * hidden_size + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        is_k = start + k < hidden_size
        is_weight = is_k[:, None] & (n < inter)[None, :]
        x = tl.load(x_ptrs + start, mask=is_pair[:, None] & is_k[None, :], other=0.0)
        gate = _dot(x, tl.load(gate_ptrs + start, mask=is_weight, other=0.0), gate, INTERPRETED)
        up = _dot(x, tl.load(up_ptrs + start, mask=is_weight, other=0.0), up, INTERPRETED)
    value = gate * tl.sigmoid(gate) * up
    out_ptrs = hidden_ptr + pair.to(tl.int64)[:, None] * inter + n[None, :]
    tl.store(out_ptrs, value.to(hidden_ptr.dtype.element_ty), mask=is_pair[:, None] & (n < inter)[None, :])


@triton.jit
def _down_kernel(
    y_ptr, hidden_ptr, w_ptr, pairs_ptr, block_expert_ptr, place_ptr,
    num_pairs, num_experts, num_places, hidden_size, inter,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PLACE: tl.constexpr,
):  # fmt: skip
    """y[pair] = w_down[expert] hidden[pair]: one block of an expert's pairs, BLOCK_N columns."""
    block = tl.program_id(0)
    at = tl.load(block_expert_ptr + block)
    if at == num_experts:  # an unused block
        return
    if HAS_PLACE:
        at = tl.load(place_ptr + at)
    if at >= num_places:
        return
    pair = tl.load(pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_pair = pair < num_pairs
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden_ptr + pair.to(tl.int64)[:, None] * inter + k[None, :]
    w_ptrs = w_ptr + (at.to(tl.int64) * hidden_size + n)[None, :] * inter + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inter, BLOCK_K):
        is_k = start + k < inter
        hidden = tl.load(hidden_ptrs + start, mask=is_pair[:, None] & is_k[None, :], other=0.0)
        w = tl.load(w_ptrs + start, mask=is_k[:, None] & (n < hidden_size)[None, :], other=0.0)
        total = _dot(hidden, w, total, INTERPRETED)
    out_ptrs = y_ptr + pair.to(tl.int64)[:, None] * hidden_size + n[None, :]
    tl.store(out_ptrs, total.to(y_ptr.dtype.element_ty), mask=is_pair[:, None] & (n < hidden_size)[None, :])


@triton.jit
def _combine_kernel(out_ptr, y_ptr, weights_ptr, hidden_size, top_k, BLOCK_N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for j in range(top_k):
        pair = token * top_k + j
        row = tl.load(y_ptr + pair * hidden_size + n, mask=n < hidden_size, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair) * row
    tl.store(out_ptr + token * hidden_size + n, total.to(out_ptr.dtype.element_ty), mask=n < hidden_size)


def route(x: torch.Tensor, router_w: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `routing.route`."""
    scores = logits(x, router_w)
    weights = torch.empty(len(x), top_k, device=x.device)
    experts = torch.empty(len(x), top_k, dtype=torch.int64, device=x.device)
    num_experts = len(router_w)
    _route_kernel[(len(x),)](
        scores, weights, experts, num_experts, top_k,
        RENORMALIZE=renormalize, EXPERTS=_power_of_two(num_experts), TOP_K=_power_of_two(top_k),
        num_warps=1 if num_experts <= 256 else 4,
    )  # fmt: skip
    return weights, experts


def fill(
    y: torch.Tensor,
    x: torch.Tensor,
    experts: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    place: torch.Tensor | None = None,
) -> None:
    """As `sorted_gemm.fill`."""
    num_pairs, num_experts = experts.numel(), len(w_down) if place is None else len(place)
    hidden_size, inter = w_down.shape[1:]
    block_m, block_n, block_k, num_warps, num_stages = _blocks(num_pairs / num_experts)
    max_blocks = min(num_pairs, num_experts) + num_pairs // block_m
    pairs = torch.empty(max_blocks * block_m, dtype=torch.int32, device=x.device)
    block_expert = torch.empty(max_blocks, dtype=torch.int32, device=x.device)
    _align_kernel[(num_experts + 1,)](
        experts, pairs, block_expert, num_pairs, num_experts, max_blocks,
        BLOCK_M=block_m, BINS=max(_power_of_two(num_experts + 1), 128), CHUNK=_CHUNK,  # a bin per thread at least
    )  # fmt: skip
    hidden = torch.empty(num_pairs, inter, dtype=x.dtype, device=x.device)
    settings = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "INTERPRETED": backends.is_interpreted(),
        "HAS_PLACE": place is not None, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip
    _gate_up_kernel[(max_blocks, triton.cdiv(inter, block_n))](
        hidden, x.contiguous(), w_gate_up.contiguous(), pairs, block_expert, pairs if place is None else place,
        num_pairs, num_experts, len(w_down), experts.shape[1], hidden_size, inter, **settings,
    )  # fmt: skip
    _down_kernel[(max_blocks, triton.cdiv(hidden_size, block_n))](
        y, hidden, w_down.contiguous(), pairs, block_expert, pairs if place is None else place,
        num_pairs, num_experts, len(w_down), hidden_size, inter, **settings,
    )  # fmt: skip


def combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `routing.combine`."""
    num_tokens, top_k = weights.shape
    out = y.new_empty(num_tokens, y.shape[1])
    block_n = 1024
    _combine_kernel[(num_tokens, triton.cdiv(y.shape[1], block_n))](out, y, weights, y.shape[1], top_k, BLOCK_N=block_n)
    return out


def _blocks(pairs_per_expert: float) -> tuple[int, int, int, int, int]:
    """(rows, columns, depth, warps, stages): few rows stream weights, many rows feed the tensor cores."""
    if pairs_per_expert <= 16:
        return 16, 32, 128, 4, 4
    if pairs_per_expert <= 64:
        return 64, 64, 64, 4, 3
    return 128, 64, 64, 8, 3


def _power_of_two(n: int) -> int:
    return max(2, 1 << (n - 1).bit_length())

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped, no-any-return"
"""Sampling and verification in Triton: one program per row, nothing sorted, nothing looked at on the host.

`penstock.kernels.sampling` has the contract. Every filter is a largest distance below the row's maximum. First a bound
from above: the k-th largest of the lanes' own maxima (k tokens are above it at least), or for top-p the units that the
discarded tail must lie below. What passes it, mostly little more than what is kept, is packed into a scratch row in order;
there the exact distances are searched between four pivots at a time, over the bits of the distance. Sums are integers, so
that the result depends on the row only. Source for pivots instead of sorting: FlashInfer, Ye et al. 2025.
"""

import torch
import triton
import triton.language as tl

UNIT = tl.constexpr(1099511627776.0)  # as in draw.py
INFINITY_BITS = tl.constexpr(0x7F800000)
MAX_BLOCK = 4096


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor | float,
    top_k: torch.Tensor | int,
    top_p: torch.Tensor | float,
    min_p: torch.Tensor | float,
    seeds: torch.Tensor,
) -> torch.Tensor:
    """int64 `[batch]`. Parameters are numbers or `[batch]` tensors of any dtype."""
    batch, vocab = logits.shape
    parameters = [
        value.contiguous() if isinstance(value, torch.Tensor) else value for value in (temperature, top_k, top_p, min_p)
    ]
    is_row = [isinstance(value, torch.Tensor) for value in parameters]
    has_filter = is_row[1] or is_row[2] or bool(top_k) or bool(top_p < 1)
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    scratch = [
        torch.empty((batch, vocab) if has_filter else 1, dtype=dtype, device=logits.device)
        for dtype in (torch.float32, torch.int32)
    ]
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if batch:
        _sample[(batch,)](
            logits, *parameters, seeds, *scratch, out, logits.stride(0), vocab,
            *is_row, HAS_FILTER=has_filter, BLOCK=_block(vocab), num_warps=_num_warps(vocab),
        )  # fmt: skip
    return out


def speculative_verify(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, target_probs: torch.Tensor, seeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_accepted, tokens), as the public function, of checked inputs."""
    batch, g = draft_tokens.shape
    vocab = target_probs.shape[2]
    num_accepted = torch.empty(batch, dtype=torch.int64, device=seeds.device)
    tokens = torch.empty(batch, g + 1, dtype=torch.int64, device=seeds.device)
    has_probs = draft_probs is not None
    target = target_probs.contiguous()
    if batch:
        _verify[(batch,)](
            draft_tokens.contiguous(), draft_probs.contiguous() if draft_probs is not None else target, target,
            seeds, num_accepted, tokens, g, vocab,
            HAS_PROBS=has_probs, BLOCK=_block(vocab), num_warps=_num_warps(vocab),
        )  # fmt: skip
    return num_accepted, tokens


def _block(vocab: int) -> int:
    return min(max(triton.next_power_of_2(vocab), 128), MAX_BLOCK)


def _num_warps(vocab: int) -> int:
    return 16 if vocab > 2048 else 4


@triton.jit(do_not_specialize=["top_k"])
def _sample(
    logits, temperature, top_k, top_p, min_p, seeds, scratch_x, scratch_token, out, stride, vocab,
    IS_ROW_T: tl.constexpr, IS_ROW_K: tl.constexpr, IS_ROW_P: tl.constexpr, IS_ROW_M: tl.constexpr,
    HAS_FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t = _at(temperature, row, IS_ROW_T, tl.float32)
    least_units = tl.ceil(_at(min_p, row, IS_ROW_M, tl.float32).to(tl.float64) * UNIT).to(tl.int64)
    least_units = tl.minimum(tl.maximum(least_units, 0), 1 << 40)
    u = tl.where(t > 0, _uniform(tl.load(seeds + row), 0), 0.0)
    inverse_t = tl.where(t > 0, tl.math.div_rn(1.0, tl.maximum(t, 1e-38)), float("inf"))
    logits += row * stride

    best = tl.full([BLOCK], float("-inf"), tl.float32)  # of each lane
    has_nan = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, x)
        has_nan |= (x != x).to(tl.int32)
    top = tl.max(best, 0)
    is_good = (tl.max(has_nan, 0) == 0) & (tl.abs(top) < float("inf"))
    n = tl.where(is_good, vocab, 0)  # a row without a distribution has no tokens

    token = tl.full((), -1, tl.int64)
    if HAS_FILTER:
        k = tl.maximum(_at(top_k, row, IS_ROW_K, tl.int64), 0)
        p = tl.minimum(tl.maximum(_at(top_p, row, IS_ROW_P, tl.float32), 0.0), 1.0).to(tl.float64)
        has_k = (k > 0) & (k < vocab)
        bound = tl.full((), INFINITY_BITS, tl.int32)
        if has_k & (k <= BLOCK) & is_good:
            bound = _nearest(_distance(_score(best, top, inverse_t)), k)
        total = tl.full((), 0, tl.int64)
        tail = tl.full((), -1, tl.int64)
        if (p < 1) & ((k == 0) | (k >= vocab)):
            total = _sum(logits, n, top, inverse_t, bound, 0, BLOCK)
            tail = (0.999 * (1.0 - p) * total.to(tl.float64) / vocab).to(tl.int64)
        scratch_x += row * vocab
        scratch_token += row * vocab
        n = _pack(logits, n, top, inverse_t, bound, tail, scratch_x, scratch_token, BLOCK)
        tl.debug_barrier()
        # The scratch row holds scores, whose maximum is 0 and whose temperature is 1.
        farthest = tl.full((), INFINITY_BITS, tl.int32)
        if has_k:
            farthest = _search(scratch_x, n, k, farthest, False, BLOCK)
            total = _sum(scratch_x, n, 0.0, 1.0, farthest, 0, BLOCK)
        if p < 1:
            limit = tl.maximum(tl.ceil(p * total.to(tl.float64)).to(tl.int64), 1)
            farthest = _search(scratch_x, n, limit, farthest, True, BLOCK)
        index = _draw(scratch_x, n, 0.0, 1.0, farthest, least_units, u, BLOCK)
        if index >= 0:
            token = tl.load(scratch_token + index).to(tl.int64)
    else:
        token = _draw(logits, n, top, inverse_t, INFINITY_BITS, least_units, u, BLOCK)
    tl.store(out + row, token)


@triton.jit(do_not_specialize=["g"])
def _verify(
    draft_tokens, draft_probs, target_probs, seeds, num_accepted, tokens, g, vocab,
    HAS_PROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds + row)
    target_probs += row * (g + 1) * vocab
    draft_probs += row * g * vocab
    draft_tokens += row * g
    tokens += row * (g + 1)

    n = tl.full((), 0, tl.int32)
    rejected = tl.full((), -1, tl.int64)
    is_open = g > 0
    while is_open:
        draft = tl.load(draft_tokens + n)
        is_token = (draft >= 0) & (draft < vocab)
        p = _clean(tl.load(target_probs + n.to(tl.int64) * vocab + draft, mask=is_token, other=0.0))
        q = tl.full((), 1.0, tl.float32)
        if HAS_PROBS:
            q = _clean(tl.load(draft_probs + n.to(tl.int64) * vocab + draft, mask=is_token, other=0.0))
        is_accepted = is_token & (_uniform(seed, n) * q.to(tl.float64) < p.to(tl.float64))
        if is_accepted:
            tl.store(tokens + n, draft)
            n += 1
        else:
            rejected = tl.where(is_token, draft, -1)
        is_open = is_accepted & (n < g)

    target_probs += n.to(tl.int64) * vocab
    draft_probs += n.to(tl.int64) * vocab
    total = _residual_sum(target_probs, draft_probs, rejected, vocab, HAS_PROBS, BLOCK)
    if total == 0:  # target and draft are equal, but for rounding: of the target
        rejected = tl.full((), -1, tl.int64)
        total = _residual_sum(target_probs, draft_probs, rejected, vocab, HAS_PROBS, BLOCK)
    goal = _goal(_uniform(seed, g), total)
    token = tl.full((), -1, tl.int64)
    reached = tl.full((), 0, tl.int64)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        units = _residual(target_probs, draft_probs, rejected, column, vocab, HAS_PROBS)
        token, reached = _step(units, start, token, reached, goal)
    tl.store(tokens + n, token)
    for position in range(n + 1, g + 1):
        tl.store(tokens + position, tl.full((), -1, tl.int64))
    tl.store(num_accepted + row, n.to(tl.int64))


@triton.jit
def _at(value, row, IS_ROW: tl.constexpr, dtype: tl.constexpr):
    return tl.load(value + row).to(dtype) if IS_ROW else tl.full((), value, dtype)


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _uniform(seed, counter):
    """`noise.uniform`."""
    golden = tl.full((), -7046029254386353131, tl.int64)
    bits = _mixed(_mixed(seed.to(tl.int64) + golden) + golden * counter)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _score(x, top, inverse_t):
    z = tl.where(x == top, -1.0, x - top) * inverse_t  # the largest must not meet an infinite factor
    return tl.where(x == top, 0.0, z)


@triton.jit
def _distance(z):
    """Bits of the distance below the maximum: they rise with it."""
    return tl.abs(z).to(tl.int32, bitcast=True)


@triton.jit
def _units(z):
    return (tl.exp(z) * UNIT).to(tl.int64)


@triton.jit
def _scores(source, start, n, top, inverse_t, BLOCK: tl.constexpr):
    """Tile of scores, -inf beyond n."""
    column = start + tl.arange(0, BLOCK)
    x = tl.load(source + column, mask=column < n, other=float("-inf")).to(tl.float32)
    return _score(x, top, inverse_t)


@triton.jit
def _kept(z, farthest, least_units):
    units = _units(z)
    return tl.where((_distance(z) <= farthest) & (units >= least_units), units, 0)


@triton.jit
def _sum(source, n, top, inverse_t, farthest, least_units, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n, BLOCK):
        sums += _kept(_scores(source, start, n, top, inverse_t, BLOCK), farthest, least_units)
    return tl.sum(sums, 0)


@triton.jit
def _draw(source, n, top, inverse_t, farthest, least_units, u, BLOCK: tl.constexpr):
    """The index that u falls to, -1 if there is none."""
    goal = _goal(u, _sum(source, n, top, inverse_t, farthest, least_units, BLOCK))
    index = tl.full((), -1, tl.int64)
    reached = tl.full((), 0, tl.int64)
    for start in range(0, n, BLOCK):
        units = _kept(_scores(source, start, n, top, inverse_t, BLOCK), farthest, least_units)
        index, reached = _step(units, start, index, reached, goal)
    return index


@triton.jit
def _goal(u, total):
    """The unit to draw, from 0 to total - 1."""
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _step(units, start, index, reached, goal):
    """One tile of an inversion: the index where the sum of all units so far passes `goal`, which is -1 for no units."""
    after = reached + tl.sum(units, 0)
    if (goal >= reached) & (goal < after):
        index = start + tl.sum((reached + tl.cumsum(units, 0) <= goal).to(tl.int64), 0)
    return index, after


@triton.jit
def _nearest(distance, k):
    """The k-th smallest of a tile of distances."""
    low = tl.full((), -1, tl.int32)
    high = tl.full((), INFINITY_BITS, tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum((distance <= middle).to(tl.int32), 0) >= k:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _pack(source, n, top, inverse_t, bound, tail, scratch_x, scratch_token, BLOCK: tl.constexpr):
    """Scores and tokens within `bound` and above `tail` units, in order; their number."""
    num_packed = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = _scores(source, start, n, top, inverse_t, BLOCK)
        is_in = (column < n) & (_distance(z) <= bound) & (_units(z) > tail)
        place = num_packed + tl.cumsum(is_in.to(tl.int32), 0) - 1
        tl.store(scratch_x + place, z, mask=is_in)
        tl.store(scratch_token + place, column, mask=is_in)
        num_packed += tl.sum(is_in.to(tl.int32), 0)
    return num_packed


@triton.jit
def _search(source, n, goal, high, IS_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest distance within which there are `goal` tokens, or units; `high` at the most."""
    low = tl.full((), -1, tl.int32)
    while high - low > 1:
        step = tl.maximum((high - low) // 5, 1)
        p1 = low + step
        p2 = tl.minimum(p1 + step, high)
        p3 = tl.minimum(p2 + step, high)
        p4 = tl.minimum(p3 + step, high)
        n1 = tl.zeros([BLOCK], tl.int64)
        n2 = tl.zeros([BLOCK], tl.int64)
        n3 = tl.zeros([BLOCK], tl.int64)
        n4 = tl.zeros([BLOCK], tl.int64)
        for start in range(0, n, BLOCK):
            z = _scores(source, start, n, 0.0, 1.0, BLOCK)
            distance = _distance(z)
            weight = _units(z) if IS_MASS else (start + tl.arange(0, BLOCK) < n).to(tl.int64)
            n1 += tl.where(distance <= p1, weight, 0)
            n2 += tl.where(distance <= p2, weight, 0)
            n3 += tl.where(distance <= p3, weight, 0)
            n4 += tl.where(distance <= p4, weight, 0)
        low, high = _narrowed(low, high, p4, tl.sum(n4, 0) >= goal)
        low, high = _narrowed(low, high, p3, tl.sum(n3, 0) >= goal)
        low, high = _narrowed(low, high, p2, tl.sum(n2, 0) >= goal)
        low, high = _narrowed(low, high, p1, tl.sum(n1, 0) >= goal)
    return high


@triton.jit
def _narrowed(low, high, pivot, is_reached):
    return tl.where(is_reached, low, tl.maximum(low, pivot)), tl.where(is_reached, tl.minimum(high, pivot), high)


@triton.jit
def _clean(probability):
    """As float32 in [0, 1], NaN as 0."""
    p = probability.to(tl.float32)
    return tl.where(p > 0, tl.minimum(p, 1.0), 0.0)


@triton.jit
def _residual(target_probs, draft_probs, rejected, column, vocab, HAS_PROBS: tl.constexpr):
    """Units of max(p - q, 0), or of p if no draft was rejected (-1)."""
    p = _clean(tl.load(target_probs + column, mask=column < vocab, other=0.0))
    if HAS_PROBS:
        num_q = tl.where(rejected >= 0, vocab, 0)
        q = _clean(tl.load(draft_probs + column, mask=column < num_q, other=0.0))
    else:
        q = tl.where(column == rejected, 1.0, 0.0)
    return (tl.maximum(p - q, 0.0) * UNIT).to(tl.int64)


@triton.jit
def _residual_sum(target_probs, draft_probs, rejected, vocab, HAS_PROBS: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        sums += _residual(target_probs, draft_probs, rejected, start + tl.arange(0, BLOCK), vocab, HAS_PROBS)
    return tl.sum(sums, 0)

"""Sampling in torch: every filter is a least score, found from the few largest scores, and one pass draws.

Knows rows of one chunk; `penstock.kernels.sampling` has the contract. Only as many scores are sorted as can matter: the k
largest, or for top-p those above the share that the discarded tail must lie below, (1 - p) / vocab.
"""

import torch

from penstock.kernels.sampling.draw import UNIT, pick, to_units
from penstock.kernels.sampling.noise import uniform

CHUNK_ELEMENTS = 1 << 18
"""Elements handled at a time, so that a chunk's half a dozen passes stay in a core's cache."""


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
) -> torch.Tensor:
    """int64 `[batch]`. The parameters are `[batch]`: float32, top_k int64. Looks at values on the host."""
    u = torch.where(temperature > 0, uniform(seeds), 0.0)
    num_rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    out = torch.empty_like(seeds)
    for start in range(0, len(logits), num_rows):
        part = slice(start, start + num_rows)
        out[part] = _sample(logits[part], temperature[part], top_k[part], top_p[part], min_p[part], u[part])
    return out


def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    u: torch.Tensor,
) -> torch.Tensor:
    """The same for one chunk, `[n, vocab]`, with u float64 `[n]` instead of seeds."""
    logits = logits.float()
    top = logits.amax(1, keepdim=True)
    is_bad = ~top.isfinite()  # a NaN is the maximum of its row
    if has_bad := bool(is_bad.any()):
        logits, top = logits.masked_fill(is_bad, 0.0), top.masked_fill(is_bad, 0.0)
    z = (logits - top).mul_(temperature.clamp_min(1e-38).reciprocal()[:, None])
    if bool((temperature <= 0).any()):
        z.masked_fill_((temperature <= 0)[:, None] & (logits < top), -torch.inf)
    units = to_units(z.exp())
    if bool(((top_k > 0) | (top_p < 1)).any()):
        units.masked_fill_(z < _least_score(z, units, top_k, top_p)[:, None], 0)
    if bool((min_p > 0).any()):
        units.masked_fill_(units < (min_p.double() * UNIT).ceil()[:, None], 0)
    token = pick(units, u)
    return token.masked_fill_(is_bad[:, 0], -1) if has_bad else token


def _least_score(z: torch.Tensor, units: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest score that top-k and then top-p keep, `[n]`; -inf if neither is on."""
    vocab = z.shape[1]
    top_k = torch.where(top_k > 0, top_k, vocab).clamp_max(vocab)
    has_k, has_p = top_k < vocab, top_p < 1
    total = units.sum(1)
    num_needed = torch.where(has_k, top_k, 1)
    if bool((has_p & ~has_k).any()):
        tail = 0.999 * (1.0 - top_p.double()) * total / vocab  # all that have so few units are less than the tail together
        num_needed = torch.where(has_p & ~has_k, (units > tail[:, None]).sum(1), num_needed)
    best, index = z.topk(int(num_needed.max()), dim=1)  # falling
    least = torch.where(has_k, best.gather(1, (num_needed - 1)[:, None])[:, 0], -torch.inf)
    if not bool(has_p.any()):
        return least
    if bool((has_k & has_p).any()):
        total = torch.where(has_k, units.masked_fill(z < least[:, None], 0).sum(1), total)
    best_units = units.gather(1, index)
    before = best_units.cumsum(1) - best_units
    limit = (top_p.double() * total.double()).ceil().clamp_min(1.0)
    num_kept = (before < limit[:, None]).sum(1, keepdim=True)
    return torch.where(has_p, torch.maximum(least, best.gather(1, num_kept - 1)[:, 0]), least)

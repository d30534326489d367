"""Sampling and verification by their definitions, one row at a time, sorted and summed in float64."""

import math

import torch

from penstock.kernels.sampling.noise import uniform

Parameter = float | torch.Tensor


def sample(
    logits: torch.Tensor,
    *,
    temperature: Parameter = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: Parameter = 1.0,
    min_p: Parameter = 0.0,
    seeds: torch.Tensor,
) -> torch.Tensor:
    """One token per row of `logits` `[batch, vocab]`, from `probabilities` and the row's seed."""
    parameters = [_per_row(value, len(logits)) for value in (temperature, top_k, top_p, min_p)]
    tokens = []
    for row, seed, *values in zip(logits, seeds, *parameters, strict=True):
        share = probabilities(row, *values)
        tokens.append(_invert(share, 0.0 if values[0] == 0 else float(uniform(seed))))
    return torch.tensor(tokens, dtype=torch.int64)


def probabilities(row: torch.Tensor, temperature: float, top_k: float, top_p: float, min_p: float) -> torch.Tensor:
    """The distribution float64 `[vocab]` that a row is drawn from: zeros if it has none (see `sample`)."""
    row = row.float()
    top = row.max()
    if row.isnan().any() or not top.isfinite():
        return torch.zeros(len(row), dtype=torch.float64)
    if temperature == 0:
        z = torch.where(row == top, 0.0, -torch.inf)
    else:
        z = (row - top) * torch.tensor(temperature).clamp_min(1e-38).reciprocal()
    weights = z.double().exp()
    if top_k > 0:
        kept = z >= z.sort(descending=True).values[min(int(top_k), len(z)) - 1]
        weights = torch.where(kept, weights, 0.0)
    if top_p < 1:
        # The mass of all tokens that are more likely, tokens of equal scores being reached together.
        order = z.argsort(descending=True)
        before = (weights[order].cumsum(0) - weights[order])[torch.searchsorted(-z[order], -z)]
        weights = torch.where((before < top_p * weights.sum()) | (z == 0), weights, 0.0)
    weights = torch.where(z.double().exp() >= min_p, weights, 0.0)
    return weights / weights.sum()


def speculative_verify(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, target_probs: torch.Tensor, seeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts drafts one after another; see `penstock.kernels.sampling.speculative_verify`."""
    batch, g = draft_tokens.shape
    vocab = target_probs.shape[2]
    num_accepted = torch.zeros(batch, dtype=torch.int64)
    tokens = torch.full((batch, g + 1), -1, dtype=torch.int64)
    for b in range(batch):
        q = torch.zeros(vocab, dtype=torch.float64)
        n = 0
        while n < g:
            token, p = int(draft_tokens[b, n]), _clean(target_probs[b, n])
            if not 0 <= token < vocab:
                break
            if draft_probs is None:
                q = torch.zeros(vocab, dtype=torch.float64)
                q[token] = 1.0
            else:
                q = _clean(draft_probs[b, n])
            if not float(uniform(seeds[b], n)) * q[token] < p[token]:
                break
            tokens[b, n] = token
            q = torch.zeros(vocab, dtype=torch.float64)
            n += 1
        p = _clean(target_probs[b, n])
        residual = (p - q).clamp_min(0.0)
        tokens[b, n] = _invert(residual if residual.sum() > 0 else p, float(uniform(seeds[b], g)))
        num_accepted[b] = n
    return num_accepted, tokens


def _clean(row: torch.Tensor) -> torch.Tensor:
    return row.double().nan_to_num(0.0).clamp(0.0, 1.0)


def _per_row(value: Parameter, batch: int) -> list[float]:
    """Parameters count in float32."""
    values: list[float] = torch.as_tensor(value, dtype=torch.float32).expand(batch).tolist()
    return values


def _invert(weights: torch.Tensor, u: float) -> int:
    sums = weights.cumsum(0)
    if not math.fsum(weights.tolist()) > 0:
        return -1
    return int(torch.searchsorted(sums, u * sums[-1], right=True))

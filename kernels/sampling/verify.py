"""Verification of drafts in torch: all positions at once, then one draw per row.

`penstock.kernels.sampling` has the contract.
"""

import torch

from penstock.kernels.sampling.draw import pick, to_units
from penstock.kernels.sampling.noise import uniform


def speculative_verify(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, target_probs: torch.Tensor, seeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_accepted, tokens), as the public function, of checked inputs. Does not look at values on the host."""
    batch, g = draft_tokens.shape
    vocab = target_probs.shape[2]
    is_token = (draft_tokens >= 0) & (draft_tokens < vocab)
    draft = draft_tokens.where(is_token, 0)
    u = uniform(seeds[:, None], torch.arange(g + 1, device=seeds.device))
    p = _clean(target_probs[:, :g].gather(2, draft[:, :, None])[:, :, 0])
    q = torch.ones_like(p) if draft_probs is None else _clean(draft_probs.gather(2, draft[:, :, None])[:, :, 0])
    is_accepted = is_token & (u[:, :g] * q.double() < p.double())
    num_accepted = is_accepted.cumprod(1).sum(1)

    # What follows the accepted ones: of p - q where a draft was rejected, of p where there was none.
    rows, n = torch.arange(batch, device=seeds.device), num_accepted
    weights = _clean(target_probs[rows, n])
    has_draft = torch.nn.functional.pad(is_token, (0, 1)).gather(1, n[:, None])
    if g and draft_probs is not None:
        q = _clean(draft_probs[rows, n.clamp_max(g - 1)])
        residual = (weights - q.mul_(has_draft)).clamp_min_(0.0)
    else:
        rejected = torch.nn.functional.pad(draft, (0, 1)).gather(1, n[:, None])
        residual = weights.scatter(1, rejected, weights.gather(1, rejected).masked_fill(has_draft, 0.0))
    token = pick(to_units(residual), u[:, g])
    again = pick(to_units(weights), u[:, g])  # where target and draft are equal, but for rounding
    token = torch.where(token < 0, again, token)
    tokens = torch.nn.functional.pad(draft_tokens, (0, 1))
    position = torch.arange(g + 1, device=seeds.device)
    tokens = torch.where(position < n[:, None], tokens, -1)
    return num_accepted, tokens.scatter(1, n[:, None], token[:, None])


def _clean(probabilities: torch.Tensor) -> torch.Tensor:
    """As float32 in [0, 1], NaN as 0; always a copy."""
    return probabilities.to(torch.float32, copy=True).nan_to_num_(0.0).clamp_(0.0, 1.0)

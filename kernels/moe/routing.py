"""Which experts a token goes to, and what becomes of their answers.

Knows probabilities and indices; does not know experts' weights. A *pair* is a token and one of its experts; pair
`token * top_k + j` is the token's j-th choice.
"""

import torch


def route(x: torch.Tensor, router_w: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32, experts int64), `[tokens, top_k]` each, by falling probability; equal ones by rising expert.

    x: `[tokens, hidden]`, router_w: `[experts, hidden]`. Logits, softmax and weights are float32.
    """
    probs = torch.softmax(logits(x, router_w), 1)
    last = probs.shape[1] - 1
    # No probability is negative, so their bits sort as they do; the reversed index below them settles ties.
    key = (probs.view(torch.int32).long() << 32) | torch.arange(last, -1, -1, device=x.device)
    experts = last - (key.topk(top_k, dim=1).values & 0xFFFFFFFF)
    weights = probs.gather(1, experts)
    return (weights / weights.sum(1, keepdim=True) if renormalize else weights), experts


def logits(x: torch.Tensor, router_w: torch.Tensor) -> torch.Tensor:
    """x @ router_w.T with float32 sums, float32 `[tokens, experts]`."""
    if x.device.type == "cuda" and x.dtype != torch.float32 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(x, router_w.T, out_dtype=torch.float32)  # no float32 copy of the weights
    return x.float() @ router_w.float().T


def combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token's weighted sum of its pairs' rows, in float32, always in the same order.

    y: `[tokens * top_k, hidden]`, weights: float32 `[tokens, top_k]`. Returns `[tokens, hidden]` in y's dtype.
    """
    y = y.view(*weights.shape, y.shape[1])
    out = y[:, 0].float() * weights[:, :1]
    for j in range(1, weights.shape[1]):
        out.addcmul_(y[:, j].float(), weights[:, j : j + 1])
    return out.to(y.dtype)

"""A mixture of experts by its definition: token by token, expert by expert, in float32."""

import torch


def moe(
    x: torch.Tensor,
    router_w: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool = True,
) -> torch.Tensor:
    """sum over a token's `top_k` experts of p_e w_down[e] (silu(gate) * up), rounded once. x: `[tokens, hidden]`."""
    out = torch.zeros_like(x)
    for t, token in enumerate(x.float()):
        probs = torch.softmax(router_w.float() @ token, 0).tolist()
        chosen = sorted(range(len(probs)), key=lambda e: (-probs[e], e))[:top_k]
        total = sum(probs[e] for e in chosen) if renormalize else 1.0
        mixed = torch.zeros_like(token)
        for e in chosen:
            gate, up = (w_gate_up[e].float() @ token).chunk(2)
            mixed += probs[e] / total * (w_down[e].float() @ (gate * torch.sigmoid(gate) * up))
        out[t] = mixed.to(x.dtype)
    return out

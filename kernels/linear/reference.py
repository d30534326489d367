"""A linear layer by its definition, in float64, rounded once."""

import math

import torch


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x @ weight.T + bias) + residual. x: `[..., in]`, weight: `[out, in]`."""
    y = (x.double()[..., None, :] * weight.double()).sum(-1)
    if bias is not None:
        y = y + bias.double()
    if activation == "relu":
        y = torch.where(y < 0, 0.0, y)
    elif activation == "silu":
        y = y / (1 + torch.exp(-y))
    elif activation == "gelu":
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    elif activation == "gelu_tanh":
        y = y * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    if residual is not None:
        y = y + residual.double()
    return y.to(x.dtype)

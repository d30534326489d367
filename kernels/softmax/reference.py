"""Softmax by its definition."""

import torch


def softmax(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """exp(x) / sum(exp(x)) along `axis` of each task's array, in float64. x: `[batch, ...]`."""
    axis = axis + 1 if axis >= 0 else axis
    if x.numel() == 0:
        return x.clone()
    wide = x.double()
    powers = (wide - wide.amax(axis, keepdim=True)).exp()
    return (powers / powers.sum(axis, keepdim=True)).to(x.dtype)

"""A mixture of experts whose weights lie elsewhere, by its definition: every expert is brought when it is its turn."""

from collections.abc import Mapping

import torch

from penstock.kernels.moe import reference


def moe_offloaded(
    x: torch.Tensor,
    router_w: torch.Tensor,
    experts: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    *,
    top_k: int,
    renormalize: bool = True,
) -> torch.Tensor:
    """`moe` with experts from a dict: number -> (w_gate_up `[2 * inter, hidden]`, w_down `[hidden, inter]`) on any device."""
    w_gate_up = torch.stack([experts[e][0].to(x.device) for e in range(len(experts))])
    w_down = torch.stack([experts[e][1].to(x.device) for e in range(len(experts))])
    return reference.moe(x, router_w, w_gate_up, w_down, top_k=top_k, renormalize=renormalize)

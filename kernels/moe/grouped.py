"""Experts by `torch.nn.functional.grouped_mm`: one ragged matrix product over all experts, sizes known to the device only.

Knows the layout that it demands; does not know when it is the best choice.
"""

import torch
from torch.nn import functional


def can_group(x: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> bool:
    """True if torch has the product for these: bfloat16 with rows of whole 16 bytes, on sm90 or later, or on a CPU.

    Before sm90 torch takes a loop that waits for the device once per call.
    """
    if not hasattr(functional, "grouped_mm") or x.dtype != torch.bfloat16:
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    is_aligned = all(size % 8 == 0 for size in (x.shape[1], w_down.shape[2]))
    return x.device.type in ("cpu", "cuda") and is_aligned and w_gate_up.is_contiguous() and w_down.is_contiguous()


def fill(y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> None:
    """As `sorted_gemm.fill`, with expert e's weights at e.

    (The product leaves rows beyond the last group unwritten; as all pairs are in groups, there are none.)
    """
    top_k, inter = experts.shape[1], w_down.shape[2]
    ordered, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(len(w_down), device=x.device), right=True, out_int32=True)
    gate_up = functional.grouped_mm(x[order // top_k], w_gate_up.transpose(1, 2), offs=ends)
    hidden = functional.silu(gate_up[:, :inter]) * gate_up[:, inter:]
    y.index_copy_(0, order, functional.grouped_mm(hidden, w_down.transpose(1, 2), offs=ends))

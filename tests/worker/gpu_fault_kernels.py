"""Kernels that break, fill or occupy a CUDA device, for tests on one. What the largest value says, happens."""

import torch

from penstock.kernels import Context, kernel

FINE, ASSERT, SPIN, ILLEGAL = range(4)
FOREVER_CYCLES = 10**14
"""Of the device's clock: half a day."""


@kernel("wild", max_batch_size=8)
def wild(x: torch.Tensor) -> torch.Tensor:
    what = int(x.max())
    if what == ASSERT:
        index = torch.full((32,), 1 << 20, device=x.device)
        return x + torch.zeros(4, device=x.device)[index].sum()  # past the end, which a kernel on the device finds out
    if what == SPIN:
        torch.cuda._sleep(FOREVER_CYCLES)
    if what == ILLEGAL:
        from triton_faults import write_far_away

        write_far_away(x)
    return x + 1


@kernel("wide", max_batch_size=8)
def wide(x: torch.Tensor, context: Context, share: float = 0.3) -> torch.Tensor:
    """Takes `share` of the device's memory for each row."""
    total = torch.cuda.get_device_properties(context.device).total_memory
    room = torch.empty(int(len(x) * share * total), dtype=torch.uint8, device=x.device)
    return x + room[:1].float() * 0

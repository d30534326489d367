"""The product by tiles of rows of the weight, each restored just before it is used: never the whole weight in memory.

Knows torch only; the form for CPUs, and for many rows anywhere.
"""

import torch
from torch.nn import functional

from penstock.kernels.quantized.layout import dequantize

TILE_WEIGHTS = {"cpu": 1 << 23}
"""Weights per tile by device type; elsewhere 2**26. Tiles that would stay in a core's cache are slower on several cores."""


def multiply(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    bits: int,
    group_size: int | None,
) -> torch.Tensor:
    """x `[rows, in]` times the weight; `[rows, out]` in x's dtype."""
    num_rows = max(TILE_WEIGHTS.get(x.device.type, 1 << 26) // x.shape[1], 16)
    if num_rows >= len(qweight):
        return functional.linear(x, dequantize(qweight, scales, zeros, bits=bits, group_size=group_size, dtype=x.dtype))
    out = x.new_empty(len(x), len(qweight))
    for start in range(0, len(qweight), num_rows):
        tile = slice(start, start + num_rows)
        zero = None if zeros is None else zeros[tile]
        weight = dequantize(qweight[tile], scales[tile], zero, bits=bits, group_size=group_size, dtype=x.dtype)
        out[:, tile] = functional.linear(x, weight)
    return out

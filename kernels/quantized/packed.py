"""torch's own products with packed weights on the CPU: faster than bfloat16 weights for a few rows, slower for many.

Knows two private operators of torch, so each is tried against the definition before it is trusted, and never assumed.
"""

from functools import cache

import torch

from penstock.kernels.quantized.layout import dequantize, quantize_weight, unpack

MAX_ROWS = 4
"""Rows up to which they win (measured: 1.6 to 1.8 times bfloat16 weights at 1 row, 0.6 to 0.7 at 8)."""


def multiply_int8(x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x `[rows, in]` times an 8-bit weight with one scale per output, `[out, 1]`, and no zeros."""
    product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, qweight, scales[:, 0].to(x.dtype))
    return product


class PackedInt4:
    """A 4-bit weight, packed again as torch's product for this CPU wants it; half a byte per weight more."""

    def __init__(self, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> None:
        q = unpack(qweight, group_size).flatten(1)
        offsets = (8.0 - zeros) * scales if zeros is not None else torch.zeros_like(scales)  # theirs is (q - 8) s + offset
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        self._scales_and_offsets = torch.stack([scales.T, offsets.T], 2).to(torch.bfloat16).contiguous()  # [groups, out, 2]
        self._group_size = group_size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[rows, in]`, bfloat16, times the weight."""
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._weight, self._group_size, self._scales_and_offsets
        )
        return product


def can_multiply_int8(x: torch.Tensor, qweight: torch.Tensor) -> bool:
    """True if `multiply_int8` works here for few rows like these, and gains.

    Where `in` is no multiple of 16 the operator of torch 2.13 reads past the end of the weight; 64 leaves wider vectors room.
    """
    is_fit = x.device.type == "cpu" and x.dtype == torch.bfloat16 and 1 <= len(x) <= MAX_ROWS
    return is_fit and qweight.shape[1] % 64 == 0 and qweight.is_contiguous() and _works(8)


def can_pack_int4(qweight: torch.Tensor) -> bool:
    """True if `PackedInt4` works here for a weight like this."""
    return qweight.device.type == "cpu" and len(qweight) % 64 == 0 and _works(4)


@cache
def _works(bits: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    group_size = None if bits == 8 else 32
    quantized = quantize_weight(torch.randn(64, 64, generator=generator), bits=bits, group_size=group_size)
    x = torch.randn(2, 64, generator=generator).to(torch.bfloat16)
    weight = dequantize(*quantized, bits=bits, group_size=group_size)
    try:
        got = multiply_int8(x, *quantized[:2]) if bits == 8 else PackedInt4(*quantized, 32)(x)
    except (AttributeError, NotImplementedError, RuntimeError):  # this torch has no such operator, or not for this CPU
        return False
    return bool(((got.float() - x.float() @ weight.T).abs() <= 0.02 * (x.float().abs() @ weight.abs().T)).all())

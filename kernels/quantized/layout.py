"""How quantised weights lie in memory, and what they stand for.

A weight `[out, in]` is cut along `in` into groups of `group_size` (None: the whole row is one group). Weight (o, i) of
group g stands for `(q - zeros[o, g]) * scales[o, g]`; `scales` and `zeros` are float32 `[out, groups]`. Without `zeros`
they are 0 for 8 bits and 8 for 4.

8 bits: `qweight` is int8 `[out, in]`, q from -128 to 127. 4 bits: uint8 `[out, in / 2]`, q from 0 to 15; byte j of a group
holds its weight j in the low half and its weight j + group_size / 2 in the high half, so that each half is a run of
neighbours.
"""

import torch

from penstock.kernels.errors import InvalidInput, shown

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_weight(
    weight: torch.Tensor, *, bits: int, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(qweight, scales, zeros) of a weight `[out, in]`, nearest values; zeros are None for 8 bits.

    weight: float32, bfloat16 or float16, finite. `bits`: 8, symmetric, the largest magnitude of a group becomes 127; or 4,
    from the smallest (or 0) to the largest (or 0) of a group in 15 steps, so that 0 stays 0. `group_size`: 32, 64 or 128,
    which must divide `in`, or None, for 8 bits. Each value is off by at most 0.5 scales for 8 bits and 1 for 4 (the zero is
    rounded too). Raises InvalidInput.
    """
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in FLOAT_DTYPES:
        raise InvalidInput(
            f"quantize_weight: weight must be a float32, bfloat16 or float16 [out, in], not empty; "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    num_inputs = weight.shape[1]
    check_groups(num_inputs, bits, group_size)
    if not bool(weight.isfinite().all()):
        raise InvalidInput("quantize_weight: weight must be finite; it holds NaN or infinity")
    groups = weight.float().view(len(weight), -1, group_size or num_inputs)  # [out, groups, group_size]
    if bits == 8:
        scales = _not_zero(groups.abs().amax(2) / 127)
        q = (groups / scales[:, :, None]).round_().clamp_(-127, 127)
        return q.to(torch.int8).view(weight.shape), scales, None
    low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
    scales = _not_zero((high - low) / 15)
    zeros = (-low / scales).round_()
    q = (groups / scales[:, :, None]).add_(zeros[:, :, None]).round_().clamp_(0, 15)
    return pack(q.to(torch.uint8)), scales, zeros


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    """A group of zeros keeps a scale that can be divided by."""
    return torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)


def pack(q: torch.Tensor) -> torch.Tensor:
    """4-bit values, uint8 `[out, groups, group_size]`, as `qweight` `[out, in / 2]`."""
    low, high = q.chunk(2, dim=2)
    return (low | (high << 4)).flatten(1)


def unpack(qweight: torch.Tensor, group_size: int) -> torch.Tensor:
    """The 4-bit values of `qweight` `[out, in / 2]`, uint8 `[out, groups, group_size]`."""
    halves = qweight.view(len(qweight), -1, group_size // 2)
    return torch.cat([halves & 15, halves >> 4], 2)


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight `[out, in]` that these stand for, computed in float32."""
    q = qweight.view(*scales.shape, -1) if bits == 8 else unpack(qweight, group_size or 2 * qweight.shape[1])
    values = q.float()
    if bits == 4 or zeros is not None:
        values.sub_(8.0 if zeros is None else zeros[:, :, None])
    return values.mul_(scales[:, :, None]).flatten(1).to(dtype)


def check_groups(num_inputs: int, bits: object, group_size: object) -> None:
    """Raises InvalidInput unless weights of so many inputs can be quantised like this."""
    if type(bits) is not int or bits not in BITS:
        raise InvalidInput(f"quantized weights have 4 or 8 bits; got {shown(bits)}")
    if group_size is None and bits == 8:
        return
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        whole = " or None" if bits == 8 else ""
        raise InvalidInput(f"group_size must be 32, 64, 128{whole} for {bits} bits; got {shown(group_size)}")
    if num_inputs % group_size:
        raise InvalidInput(f"group_size must divide the {num_inputs} inputs of the weight; {group_size} does not")


def check_quantized(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group_size: int | None
) -> tuple[int, int]:
    """(out, in) of a quantised weight. Raises InvalidInput unless its parts go together."""
    if type(bits) is not int or bits not in BITS:
        raise InvalidInput(f"quantized weights have 4 or 8 bits; got {shown(bits)}")
    dtype = torch.int8 if bits == 8 else torch.uint8
    if qweight.ndim != 2 or not qweight.numel() or qweight.dtype != dtype:
        raise InvalidInput(
            f"qweight must be {dtype} [out, in{'' if bits == 8 else ' / 2'}] for {bits} bits; "
            f"got {qweight.dtype} {list(qweight.shape)}"
        )
    num_outputs, num_inputs = len(qweight), qweight.shape[1] * (8 // bits)
    check_groups(num_inputs, bits, group_size)
    shape = (num_outputs, num_inputs // (group_size or num_inputs))
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise InvalidInput(f"{name} must be float32 {list(shape)}; got {tensor.dtype} {list(tensor.shape)}")
    if {t.device for t in (scales, zeros) if t is not None} != {qweight.device}:
        raise InvalidInput("qweight, scales and zeros must be on one device")
    return num_outputs, num_inputs

"""A product with a quantised weight by its definition: every weight restored, one by one, then the product, in float64."""

import torch


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *, bits: int, group_size: int | None
) -> torch.Tensor:
    """The weight `[out, in]`, float64."""
    num_outputs, num_inputs = len(qweight), qweight.shape[1] * (8 // bits)
    group_size = group_size or num_inputs
    weight = torch.empty(num_outputs, num_inputs, dtype=torch.float64)
    for i in range(num_inputs):
        group, place = divmod(i, group_size)
        if bits == 8:
            q = qweight[:, i].long()
        else:
            byte = qweight[:, group * group_size // 2 + place % (group_size // 2)].long()
            q = byte % 16 if place < group_size // 2 else byte // 16
        zero = zeros[:, group].double() if zeros is not None else (0.0 if bits == 8 else 8.0)
        weight[:, i] = (q - zero) * scales[:, group].double()
    return weight


def quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias, rounded once. x: `[..., in]`."""
    y = x.double() @ dequantize(qweight, scales, zeros, bits=bits, group_size=group_size).T
    return (y if bias is None else y + bias.double()).to(x.dtype)

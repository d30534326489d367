"""Products with 8- and 4-bit weights against bfloat16 weights, and against restoring the weight first."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from kernel_cases import FLOOR, Case
from penstock.kernels import ops
from penstock.kernels.quantized import dequantize
from penstock.kernels.quantized.packed import PackedInt4, can_pack_int4

GOALS = {8: 1.7, 4: 2.8}


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    is_cuda = device.type == "cuda"
    shapes = [(4096, 4096), (14_336, 4096)] if is_cuda else [(2048, 2048)]
    for num_out, num_in in shapes[:1] if is_quick else shapes:
        weight = torch.randn(num_out, num_in, device=device) / num_in**0.5
        for bits, group_size in ((8, None), (4, 128)):
            for rows in (1, 32, *((512,) if is_cuda else ())):
                for dtype in (torch.bfloat16,) if is_cuda else (torch.bfloat16, torch.float32):
                    x = torch.randn(rows, num_in, device=device).to(dtype)
                    yield _case(x, weight, bits, group_size)


def _case(x: torch.Tensor, weight: torch.Tensor, bits: int, group_size: int | None) -> Case:
    quantized = ops.quantize_weight(weight, bits=bits, group_size=group_size)
    qweight, scales, zeros = quantized
    full = weight.to(x.dtype)
    kind = {"bits": bits, "group_size": group_size}

    def ours() -> torch.Tensor:
        return ops.quantized_linear(x, *quantized, **kind)

    def restored() -> torch.Tensor:
        return functional.linear(x, dequantize(*quantized, **kind, dtype=x.dtype))

    def check() -> None:
        exact = x.double() @ dequantize(*quantized, **kind).double().T
        bound = x.double().abs().view(len(x), scales.shape[1], -1).sum(2) @ (scales.double() * 2**bits).T
        error = (ours().double() - exact).abs() / bound
        assert bool((error <= (4e-3 if x.dtype == torch.bfloat16 else 1e-6)).all()), f"off by {float(error.max()):g}"

    linear = f"{'bf16' if x.dtype == torch.bfloat16 else 'fp32'} linear"
    peers: dict[str, Callable[[], Any]] = {linear: lambda: functional.linear(x, full), "restore + linear": restored}
    if bits == 4 and group_size is not None and x.dtype == torch.bfloat16 and can_pack_int4(qweight):
        packed = PackedInt4(qweight, scales, zeros, group_size)
        peers["as QuantizedLinear does, packed at load"] = lambda: packed(x)
    if importlib.util.find_spec("torchao") is not None and x.dtype == torch.bfloat16:
        peers |= _torchao(x, weight, bits, group_size)
    goals = {"restore + linear": 0.95}
    if x.is_cuda and len(x) == 1:
        goals |= {linear: GOALS[bits], FLOOR: 0.6}
    return Case(
        "quantized_linear", f"{bits} bits{f', groups of {group_size}' if group_size else ''}, {list(x.shape)} {x.dtype} x "
        f"{list(weight.shape)}".replace("torch.", ""), ours, check, peers,
        float(qweight.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes) + 2 * x.nbytes),
        2.0 * len(x) * weight.numel(), str(x.dtype).removeprefix("torch."), goals,
    )  # fmt: skip


def _torchao(x: torch.Tensor, weight: torch.Tensor, bits: int, group_size: int | None) -> dict[str, Callable[[], torch.Tensor]]:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=x.device, dtype=x.dtype)
    layer.weight = torch.nn.Parameter(weight.to(x.dtype), requires_grad=False)
    packing = "tile_packed_to_4d" if x.is_cuda else "plain"
    try:
        quantize_(
            layer,
            Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig(group_size=group_size, int4_packing_format=packing),
        )
    except ImportError:  # a package of its own that it needs for this format
        return {}
    return {"torchao": lambda: layer(x)}

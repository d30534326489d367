"""Linear layers with their epilogue against the same in single torch calls."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from kernel_cases import Case
from penstock.kernels import ops
from penstock.kernels.linear.reference import linear as reference


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    is_cuda = device.type == "cuda"
    rows, num_in, num_out = (4096, 4096, 4096) if is_cuda else (256, 768, 1024)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    x, weight, bias, residual = (
        (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)
        for shape in ((rows, num_in), (num_out, num_in), (1, num_out), (rows, num_out))
    )
    activations = ("gelu",) if is_quick else (None, "relu", "gelu", "gelu_tanh", "silu")
    for activation in activations:
        for added in (None, residual):
            yield _case(x, weight, bias[0], activation, added)


def _case(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str | None, residual: torch.Tensor | None
) -> Case:
    apply: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
        None: lambda y: y,
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        "silu": functional.silu,
    }

    def plain() -> torch.Tensor:
        y = apply[activation](functional.linear(x, weight, bias))
        return y if residual is None else y + residual

    def ours() -> torch.Tensor:
        return ops.linear(x, weight, bias, activation=activation, residual=residual)

    def check() -> None:
        added = None if residual is None else residual[:4]
        expected = reference(x[:4], weight, bias, activation=activation, residual=added).double()
        bound = x[:4].double().abs() @ weight.double().abs().T + bias.double().abs() + 1.0
        error = (ours()[:4].double() - expected).abs()
        assert bool((error <= (2e-6 if x.dtype == torch.float32 else 2e-2) * bound).all()), f"off by {float(error.max()):g}"

    peers: dict[str, Callable[[], Any]] = {"torch": plain}
    if x.is_cuda:
        peers["torch.compile"] = torch.compile(plain)
    moved = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    out_bytes = len(x) * len(weight) * x.dtype.itemsize
    return Case(
        "linear", f"[{len(x)}, {x.shape[1]}] x {list(weight.shape)} {activation}{' + residual' if moved[3:] else ''}",
        ours, check, peers, float(sum(tensor.nbytes for tensor in moved) + out_bytes), 2.0 * len(x) * weight.numel(),
        str(x.dtype).removeprefix("torch."), {"torch": 0.95},
    )  # fmt: skip

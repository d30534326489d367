"""Batched matrix products and softmax: torch's own, so the question is what our checks in front of them cost."""

from collections.abc import Iterator

import torch

from kernel_cases import FLOOR, Case
from penstock.kernels import ops
from penstock.kernels.matmul.reference import matmul as matmul_reference
from penstock.kernels.softmax.reference import softmax as softmax_reference


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    for batch, n in ((32, 1024 if is_cuda else 192), (1, 8192 if is_cuda else 768)):
        yield _matmul(batch, n // 2 if is_quick else n, dtype, device)
    for rows, columns in ((4096, 32_000 if is_cuda else 1024), (64, 131_072 if is_cuda else 32_000)):
        yield _softmax(rows // 4 if is_quick else rows, columns, dtype, device)


def _matmul(batch: int, n: int, dtype: torch.dtype, device: torch.device) -> Case:
    a, b = (torch.randn(batch, n, n, device=device).to(dtype) for _ in range(2))

    def check() -> None:
        few = a[:1, :16], b[:1, :, :16]
        bound = (2e-6 if dtype == torch.float32 else 1e-2) * (few[0].double().abs() @ few[1].double().abs())
        error = (ops.matmul(a, b)[:1, :16, :16].double() - matmul_reference(*few).double()).abs()
        assert bool((error <= bound).all()), f"off by {float(error.max()):g}"

    return Case(
        "matmul", f"{batch} x [{n}, {n}] {str(dtype).removeprefix('torch.')}", lambda: ops.matmul(a, b), check,
        {"torch": lambda: torch.bmm(a, b)}, 3 * a.nbytes, 2.0 * batch * n**3, str(dtype).removeprefix("torch."),
        {"torch": 0.95},
    )  # fmt: skip


def _softmax(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    x = (torch.randn(rows, columns, device=device) * 5).to(dtype)

    def check() -> None:
        torch.testing.assert_close(
            ops.softmax(x)[:8], softmax_reference(x[:8]), rtol=2e-5 if dtype == torch.float32 else 8e-3, atol=1e-30
        )

    return Case(
        "softmax", f"[{rows}, {columns}] {str(dtype).removeprefix('torch.')}", lambda: ops.softmax(x), check,
        {"torch": lambda: torch.softmax(x, -1)}, 2 * x.nbytes,
        goals={"torch": 0.95, **({FLOOR: 0.8} if device.type == "cuda" else {})},
    )  # fmt: skip

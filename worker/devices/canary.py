"""A small computation whose answer is known: does this device still compute?

Knows the answers, which are exact in every dtype it uses or have a stated tolerance; does not know when to ask.
"""

import math

import torch

from penstock.worker.config import DeviceFault
from penstock.worker.failures import describe

SIZE = 96
"""Sums of so many products of -1, 0 and 1 are exact in bfloat16, whose integers end at 256."""
COPY_BYTES = 1 << 20
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error of softmax, about two roundings of the dtype."""


def known_answer(device: torch.device) -> None:
    """Computes on `device`, on the current stream, what is known: products and sums bit by bit, softmax within `TOLERANCE`,
    a copy there and back through the memory that batches go through, bit by bit. Takes some ms and about 2 MiB.

    Raises:
        DeviceFault: an answer is wrong, or there is none.
        torch.OutOfMemoryError: there is no room to try.
    """
    try:
        with torch.inference_mode():
            _copy(device)
            for dtype in TOLERANCE:
                _matmul(device, dtype)
                _softmax(device, dtype)
            _reduction(device)
    except RuntimeError as e:
        if describe("canary", e).is_out_of_memory:
            raise
        raise DeviceFault(f"{device} does not answer: {e}") from e


def _require(is_right: bool, device: torch.device, what: str) -> None:
    if not is_right:
        raise DeviceFault(f"{device} computes wrongly: {what}")


def _pattern(rows: int, columns: int, step: int) -> torch.Tensor:
    """-1, 0 and 1 without a short period, on the CPU."""
    return torch.tensor([[((i * step + j * j) % 7) % 3 - 1 for j in range(columns)] for i in range(rows)])


def _matmul(device: torch.device, dtype: torch.dtype) -> None:
    a, b = _pattern(SIZE, SIZE, 3), _pattern(SIZE, SIZE, 5)
    want = a @ b  # of integers, on the CPU
    got = a.to(dtype).to(device) @ b.to(dtype).to(device)
    _require(torch.equal(got.cpu().to(torch.int64), want), device, f"a product of matrices in {dtype}")


def _softmax(device: torch.device, dtype: torch.dtype) -> None:
    """softmax of log(1), log(2), ... is 1, 2, ... over their sum; of the logarithms as `dtype` rounds them."""
    x = torch.tensor([math.log(k) for k in range(1, SIZE + 1)]).to(dtype)
    parts = [math.exp(value) for value in x.tolist()]
    want = torch.tensor([part / math.fsum(parts) for part in parts], dtype=torch.float64)
    got = torch.softmax(x.to(device), 0).cpu().to(torch.float64)
    error = float(((got - want) / want).abs().max())
    _require(error <= 2 * TOLERANCE[dtype], device, f"softmax in {dtype}, relative error {error:.1e}")


def _reduction(device: torch.device) -> None:
    """Whole numbers whose partial sums are all exact in float32, in any order."""
    got = torch.arange(4096).to(torch.float32).to(device).sum()
    _require(got.item() == 4096 * 4095 // 2, device, "a sum in float32")
    got = torch.arange(4096).to(device).sum()
    _require(got.item() == 4096 * 4095 // 2, device, "a sum in int64")


def _copy(device: torch.device) -> None:
    sent = torch.arange(COPY_BYTES, dtype=torch.int64).mul_(2654435761).bitwise_right_shift_(7).to(torch.uint8)
    received = torch.zeros_like(sent)
    if device.type == "cuda":
        sent, received = sent.pin_memory(), received.pin_memory()
    there = sent.to(device, non_blocking=True)
    received.copy_(there, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
    _require(torch.equal(sent, received), device, "a copy there and back")

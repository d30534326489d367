"""Kernels for the measurement of failure detectors: one that hangs when it is told to, and two that move a lot of bytes."""

import ctypes
import os
import time
from pathlib import Path

import torch

from penstock.kernels import Row, Tensor, kernel

ORDER = Path(os.environ.get("PENSTOCK_BENCH_ORDER", os.devnull))
"""A file that tells this worker how its next run shall end: "lock" or "sleep"."""
FOREVER_S = 3600


@kernel("stumble", inputs={"seconds": Row()}, max_batch_size=1)
def stumble(seconds: torch.Tensor) -> torch.Tensor:
    """Takes that long; forever if there is an order, with the interpreter's lock or without. Who follows the order ends it."""
    if ORDER.is_file():
        order = ORDER.read_text()
        ORDER.unlink()
        if order == "lock":
            ctypes.PyDLL(None).sleep(FOREVER_S)  # PyDLL, other than CDLL, keeps the interpreter's lock
        time.sleep(FOREVER_S)
    time.sleep(float(seconds.max()))
    return seconds


@kernel("take", inputs={"x": Tensor()}, max_batch_size=1)
def take(x: torch.Tensor) -> torch.Tensor:
    return x[:, :1]


@kernel("give", inputs={"size": Row()}, max_batch_size=1)
def give(size: torch.Tensor) -> torch.Tensor:
    return torch.rand(size.shape[0], int(size.max()))

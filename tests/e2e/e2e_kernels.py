"""Kernels that a user might have written, and some that nobody should: for tests with real processes."""

import hashlib
import os
import signal
import time

import torch

from penstock.kernels import Blob, Tensor, kernel


@kernel("scale", max_batch_size=64)
def scale(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return x * factor


@kernel("picky", max_batch_size=64)
def picky(x: torch.Tensor) -> torch.Tensor:
    """Fails as a whole if one of the batch is negative."""
    if bool((x < 0).any()):
        raise ValueError("a negative number")
    return x + 1


@kernel("slow_hash", inputs={"data": Blob("bytes")}, max_batch_size=16)
def slow_hash(data: list[bytes]) -> torch.Tensor:
    """SHA-256, and a pause per batch: time enough to kill the worker. E2E_DELAY_S makes one worker slower."""
    time.sleep(float(os.environ.get("E2E_DELAY_S", "0.03")))
    return torch.stack([torch.frombuffer(bytearray(hashlib.sha256(item).digest()), dtype=torch.uint8) for item in data])


@kernel("echo", inputs={"x": Tensor()}, max_batch_size=8)
def echo(x: torch.Tensor) -> torch.Tensor:
    return x


@kernel("echo_bytes", inputs={"data": Blob("bytes")}, max_batch_size=8)
def echo_bytes(data: list[bytes]) -> dict[str, list[bytes]]:
    return {"out": data}


@kernel("slow_echo", inputs={"x": Tensor()}, max_batch_size=1)
def slow_echo(x: torch.Tensor) -> torch.Tensor:
    """The input, after a while."""
    time.sleep(float(os.environ.get("E2E_DELAY_S", "0.3")))
    return x


@kernel("fatal", max_batch_size=2)
def fatal(x: torch.Tensor) -> torch.Tensor:
    """Ends its process if one of the batch is negative."""
    if bool((x < 0).any()):
        os.kill(os.getpid(), signal.SIGKILL)
    return x + 1


@kernel("once", idempotent=False, max_batch_size=2)
def once(x: torch.Tensor) -> torch.Tensor:
    """As `fatal`, but it must not run twice."""
    return fatal(x)

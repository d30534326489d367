"""Kernels for `scripts/chaos`: as `owned`, but what has a poisoned name ends the worker. Given to workers with `--kernels`."""

import hashlib
import os
import signal
import time

import torch

from penstock.kernels import Blob, kernel

POISON = b"poison-"
"""How the key of a task begins that ends its worker."""


@kernel("risky", inputs={"data": Blob("bytes")}, max_batch_size=16)
def risky(data: list[bytes], num_copies: int = 1, pause_ms: float = 0.0) -> torch.Tensor:
    """The SHA-256 of each task's content, `num_copies` times, after `pause_ms`: uint8 `[batch, 32 num_copies]`.

    Content begins with the client's name, a zero and the key (see `accounting.py`).
    """
    if any(item.split(b"\0", 2)[1].startswith(POISON) for item in data):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(pause_ms / 1e3)
    digests = [bytearray(hashlib.sha256(item).digest() * num_copies) for item in data]
    return torch.stack([torch.frombuffer(item, dtype=torch.uint8) for item in digests])

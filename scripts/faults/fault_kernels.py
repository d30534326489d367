"""Kernels for runs with faults: what they answer shows whose content it was. Given to workers with `--kernels`."""

import hashlib
import time

import torch

from penstock.kernels import Blob, kernel


@kernel("owned", inputs={"data": Blob("bytes")}, max_batch_size=16)
def owned(data: list[bytes], num_copies: int = 1, pause_ms: float = 0.0) -> torch.Tensor:
    """The SHA-256 of each task's content (`accounting.py`), so many times, after a pause: uint8 `[batch, 32 num_copies]`."""
    time.sleep(pause_ms / 1e3)
    digests = [bytearray(hashlib.sha256(item).digest() * num_copies) for item in data]
    return torch.stack([torch.frombuffer(item, dtype=torch.uint8) for item in digests])


@kernel("owned_once", inputs={"data": Blob("bytes")}, idempotent=False)
def owned_once(data: list[bytes]) -> torch.Tensor:
    """The same, of what must not run twice."""
    return owned(data)

"""SHA-256 of byte strings: what went through the system must come out as it went in."""

import hashlib

import torch

from penstock.kernels.declare import kernel
from penstock.kernels.inputs import Blob
from penstock.kernels.spec import Cost

DIGEST_BYTES = 32


@kernel(
    "sha256",
    inputs={"data": Blob("bytes")},
    cost=Cost(base_ms=0.01, per={"data.bytes": 2e-6}),
    combine="sum",
    max_batch_size=256,
)
def sha256(data: list[bytes]) -> torch.Tensor:
    """The digest of each task's bytes, computed on the CPU: uint8 `[batch, 32]`. Exact. Source: hashlib, FIPS 180-4."""
    digests = b"".join(hashlib.sha256(item).digest() for item in data)
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).reshape(-1, DIGEST_BYTES)

"""Token rows: lookup, position and norm, against torch's three calls."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from kernel_cases import FLOOR, Case
from penstock.kernels import ops
from penstock.kernels.tokens.reference import token_transform as reference


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    batch, length = (64, 512) if is_cuda else (32, 128)
    shapes = [("layer", 384, 30_522), ("layer", 4096 if is_cuda else 768, 30_522), ("rms", 4096 if is_cuda else 1024, 32_000)]
    for norm, hidden, vocab in shapes:
        yield _case(norm, batch // 4 if is_quick else batch, length, hidden, vocab, dtype, device)


def _case(norm: str, batch: int, length: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Case:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    ids = torch.randint(0, vocab, (batch, length), device=device)
    given: dict[str, Any] = {"table": random(vocab, hidden), "positions": random(length, hidden), "norm": norm}
    given["norm_weight"] = random(hidden)
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2

    def plain() -> torch.Tensor:
        x = functional.embedding(ids, given["table"]) + given["positions"]
        if norm == "rms":
            return functional.rms_norm(x, (hidden,), given["norm_weight"], 1e-5)
        return functional.layer_norm(x, (hidden,), given["norm_weight"], None, 1e-5)

    def check() -> None:
        few = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        expected = reference(ids[:1].cpu(), **few)
        got = ops.token_transform(ids, **given)[:1].cpu()
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))

    peers = {"torch": plain} | ({"torch.compile": torch.compile(plain)} if device.type == "cuda" else {})
    goals = {FLOOR: 0.85, "torch": 2.0} if device.type == "cuda" else {"torch": 0.95}
    return Case(
        "token_transform", f"{norm} [{batch}, {length}] x {hidden} {str(dtype).removeprefix('torch.')}",
        lambda: ops.token_transform(ids, **given), check, peers, 2 * ids.numel() * hidden * dtype.itemsize, goals=goals,
    )  # fmt: skip

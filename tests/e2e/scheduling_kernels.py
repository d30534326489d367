"""Kernels for the tests of scheduling: naps with batches of several sizes, and what people get wrong or do differently."""

import time
from collections.abc import Callable

import torch

from penstock.kernels import Cost, Row, Tensor, kernel


def naps(name: str, max_batch_size: int) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    @kernel(name, inputs={"seconds": Row(minimum=0.0)}, cost=Cost(per={"seconds": 1000.0}), max_batch_size=max_batch_size)
    def nap(seconds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sleeps for the longest of `seconds`, float64 [batch]; the monotonic times of its beginning and end, [batch]."""
        began = torch.full_like(seconds, time.monotonic())
        time.sleep(float(seconds.max()))
        return {"began": began, "ended": torch.full_like(seconds, time.monotonic())}

    return nap


nap_1 = naps("nap.1", 1)
nap_32 = naps("nap.32", 32)
other_32 = naps("other.32", 32)
nap_128 = naps("nap.128", 128)


@kernel("blocks", inputs={"x": Tensor(dtypes=("float32",), rank=2)}, max_batch_size=16)
def blocks(x: torch.Tensor) -> torch.Tensor:
    """x: [batch, rows, n] -> the sum of each row, [batch, rows]: a task that is itself a batch."""
    time.sleep(0.01)
    return x.sum(-1)


@kernel("misjudged", cost=lambda features: features["no such term"], max_batch_size=8)
def misjudged(x: torch.Tensor) -> torch.Tensor:
    """Its cost function raises when the worker starts."""
    return x + 1

"""Kernels that sleep, for the benchmarks of scheduling: a batch takes as long as its longest row."""

import os
import time
from collections.abc import Callable

import torch

from penstock.kernels import Cost, Row, kernel

SLOWNESS = float(os.environ.get("PENSTOCK_BENCH_SLOWNESS", "1"))
"""Of this worker: how many times as long as it should a nap takes here."""


def naps(name: str, max_batch_size: int) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    @kernel(
        name,
        inputs={"seconds": Row(minimum=0.0, maximum=60.0)},
        cost=Cost(per={"seconds": 1000.0}),
        combine="max",
        max_batch_size=max_batch_size,
    )
    def nap(seconds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sleeps for the longest of `seconds`, float64 [batch]; the monotonic times of its beginning and end, [batch]."""
        began = torch.full_like(seconds, time.monotonic())
        time.sleep(float(seconds.max()) * SLOWNESS)
        return {"began": began, "ended": torch.full_like(seconds, time.monotonic())}

    return nap


nap_1 = naps("nap.1", 1)
nap_16 = naps("nap.16", 16)
nap_32 = naps("nap.32", 32)
nap_128 = naps("nap.128", 128)

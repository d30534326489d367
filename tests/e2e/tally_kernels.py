"""A kernel that keeps a tally of what it was asked to do: for tests that count how often a task ran."""

import os
import time

import torch

from penstock.kernels import Row, kernel


@kernel("tally", inputs={"number": Row(), "seconds": Row()}, max_batch_size=4)
def tally(number: torch.Tensor, seconds: torch.Tensor) -> torch.Tensor:
    """Writes each number on a line of its own to the file E2E_TALLY, then takes a while."""
    lines = "".join(f"{int(n)}\n" for n in number.tolist())
    with open(os.environ["E2E_TALLY"], "ab", buffering=0) as f:
        f.write(lines.encode())
    time.sleep(float(seconds.max()))
    return number

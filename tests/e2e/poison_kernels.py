"""A kernel with large batches that some rows bring down."""

import ctypes
import os
import signal

import torch

from penstock.kernels import kernel

EXIT, SEGFAULT, KILL = -1.0, -2.0, -3.0


@kernel("brittle", max_batch_size=256)
def brittle(x: torch.Tensor) -> torch.Tensor:
    """x + 1, unless one of the batch says how this process is to end."""
    worst = float(x.min())
    if worst == EXIT:
        os._exit(0)
    if worst == SEGFAULT:
        ctypes.string_at(0)
    if worst == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    return x + 1

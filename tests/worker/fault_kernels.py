"""Kernels that nobody should write, for tests of what happens then. What the first row says, happens."""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

import torch

from penstock.kernels import Context, Row, kernel
from penstock.worker import devices
from penstock.worker.config import DeviceFault

FINE, SEGFAULT, EXIT, ILLEGAL, HANG, HANG_WITH_LOCK, ACCUSED, ASK_TO_END, END = range(9)


@kernel("fickle", max_batch_size=8)
def fickle(x: torch.Tensor, context: Context) -> torch.Tensor:
    """`x + 1`, unless the largest of the batch asks for something else."""
    what = int(x.max())
    if what == SEGFAULT:
        ctypes.string_at(0)
    elif what == EXIT:
        os._exit(86)
    elif what == ILLEGAL:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif what == HANG:
        while True:
            time.sleep(0.01)
    elif what == HANG_WITH_LOCK:
        (context.state_dir / "hangs").touch()
        ctypes.PyDLL(None).sleep(3600)  # PyDLL, other than CDLL, keeps the interpreter's lock
    elif what == ASK_TO_END:
        sys.exit(0)
    elif what == END:
        os._exit(0)
    elif what == ACCUSED:
        raise RuntimeError("CUDA error: invalid argument")
    return x + 1


@kernel("patient", inputs={"seconds": Row()}, hang_limit_s=20.0)
def patient(seconds: torch.Tensor) -> torch.Tensor:
    time.sleep(float(seconds.max()))
    return seconds


@kernel("idle")
class Idle:
    """Holds something to unload, and a cache to clear."""

    def load(self, device: torch.device) -> None:
        self.cache = torch.ones(1 << 18)

    def unload(self) -> None:
        del self.cache

    def trim(self) -> int:
        num_bytes, self.cache = self.cache.nbytes, torch.ones(0)
        return num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def fake_memory(device: torch.device) -> dict[str, float]:
    return {"used_fraction": float(Path(os.environ["FAKE_MEMORY"]).read_text())}


def fail_canary(device: torch.device) -> None:
    raise DeviceFault("the known-answer test fails: 2 + 2 gives 5")


if "BREAK_CANARY" in os.environ:
    devices.known_answer = fail_canary
if "FAKE_MEMORY" in os.environ:
    devices.memory = fake_memory
if "HANG_AT_IMPORT" in os.environ:
    threading.Event().wait()
if "HANG_IN_TEARDOWN" in os.environ:
    # A thread that never ends and is no daemon: an ordinary exit waits for it for ever.
    threading.Thread(target=threading.Event().wait).start()

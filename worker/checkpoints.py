"""What a streamed task can go on from, between a kernel's values and a block of one row, and when it is time for it.

Knows values, tensors and the clock; does not know leases, nor where checkpoints are kept.
"""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from penstock.broker.columns import Block
from penstock.kernels import Kernel
from penstock.worker.inputs import DTYPES
from penstock.worker.link import CheckpointLimits
from penstock.worker.outputs import to_row

log = logging.getLogger("penstock.worker")
MAX_SHARE = 0.05
"""Of a task's time that its checkpoints may take."""


class Saver:
    """When one task's next checkpoint is due, and the making of it. A kernel that fails at it is not asked again."""

    __slots__ = ("_rest_s", "_saved_at")

    def __init__(self) -> None:
        self._saved_at = time.perf_counter()
        self._rest_s = 0.0

    def save(self, kernel: Kernel, state: Any, limits: CheckpointLimits) -> Block | None:
        """The checkpoint, if one is due and the kernel has one to give."""
        began = time.perf_counter()
        if began - self._saved_at < max(limits.interval_s, self._rest_s):
            return None
        try:
            values = kernel.checkpoint(state)
            block = None if values is None else to_block(kernel.spec.name, values)
        except Exception as e:
            self._give_up(f"kernel {kernel.spec.name!r} could not make a checkpoint: {type(e).__name__}: {e}")
            return None
        if block is None:
            return None  # not at this moment: after the next step
        if block.nbytes > limits.max_bytes:
            name, most = kernel.spec.name, limits.max_bytes
            self._give_up(f"a checkpoint of {name!r} has {block.nbytes:,} bytes; the broker takes {most:,}")
            return None
        self._saved_at = time.perf_counter()
        self._rest_s = (self._saved_at - began) / MAX_SHARE
        return block

    def _give_up(self, why: str) -> None:
        self._rest_s = math.inf
        log.warning("%s; if this worker is lost, the task goes on from what was saved before, or begins anew", why)


def to_block(kernel: str, values: Mapping[str, Any]) -> Block:
    """A kernel's values as one row, copied: it may go on to write to its arrays. Raises BadOutput."""
    return to_row(kernel, {name: _copied(value) for name, value in values.items()})


def _copied(value: Any) -> Any:
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    if isinstance(value, str | bytes | bool | int):
        return value
    tensor = torch.as_tensor(value)
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def values_of(block: Block, device: torch.device) -> dict[str, Any]:
    """The inverse of `to_block`: tensors on the device, those without dimensions on the CPU; str and bytes as such."""
    values: dict[str, Any] = {}
    for index, column in enumerate(block.columns):
        data, lengths = block.row(index, 0), block.lengths[index]
        if column.dtype in ("str", "bytes"):
            values[column.name] = bytes(data).decode() if column.dtype == "str" else bytes(data)
            continue
        shape = column.shape if lengths is None else (lengths[0], *column.shape)
        tensor = _tensor(data, column.dtype).view(shape)
        values[column.name] = tensor.to(device) if shape else tensor
    return values


def _tensor(data: Any, dtype: str) -> torch.Tensor:
    if not len(data):
        return torch.empty(0, dtype=DTYPES[dtype])
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return flat.ne(0) if dtype == "bool" else flat.view(DTYPES[dtype])

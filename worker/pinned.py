"""Shared memory made pinned, so that a CUDA device reads it by itself, beside the processor.

Knows `cudaHostRegister`. Does not know descriptors or tasks. Where it cannot be had, rows are copied on the processor first.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch

from penstock.broker.columns import Stored
from penstock.broker.segments import Segment
from penstock.broker.shared import SharedBytes

log = logging.getLogger("penstock.worker")


class Pins:
    """The segments that are registered with a device; on any other device than CUDA none ever is."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._registered: dict[int, torch.Tensor] = {}

    def pin(self, segments: Iterable[Segment]) -> None:
        """Register them, about 0.1 s per GB; one that cannot be is read by the processor."""
        if self._is_cuda:
            for segment in segments:
                whole = torch.frombuffer(segment.map, dtype=torch.uint8)
                if register(whole):
                    self._registered[segment.inode] = whole
                    segment.is_pinned = True

    def unpin(self, segments: Iterable[Segment]) -> None:
        """Before they are unmapped; what copies from them has ended."""
        for segment in segments:
            found = self._registered.pop(segment.inode, None)
            if found is not None:
                segment.is_pinned = False
                unregister(found)


def register(memory: torch.Tensor) -> bool:
    """Pin memory of this process that is mapped for writing; whether that could be done."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status:
        _clear_error()
        log.warning("%d MiB of shared memory cannot be pinned (CUDA error %d)", memory.nbytes >> 20, status)
    return not status


def unregister(memory: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostUnregister(memory.data_ptr())):
        _clear_error()


def _clear_error() -> None:
    """A failed call leaves an error pending, which the next kernel would be blamed for: one throw-away launch takes it."""
    try:
        torch.cuda.current_stream().synchronize()
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError as e:
        log.debug("cleared: %s", e)


def are_pinned(frames: Sequence[Stored]) -> TypeGuard[Sequence[SharedBytes]]:
    """Whether a device can read all of them by itself."""
    return all(isinstance(f, SharedBytes) and isinstance(f.memory, Segment) and f.memory.is_pinned for f in frames)


def gather(rows: Sequence[SharedBytes], device: torch.device) -> torch.Tensor:
    """Pinned rows one after another on the device, `uint8 [total]`: copied on its current stream, in order with what is
    computed there, so nothing looks at the rows themselves any more."""
    whole = torch.empty(sum(map(len, rows)), dtype=torch.uint8, device=device)
    at = 0
    for row in rows:
        assert isinstance(row.memory, Segment)
        host = torch.frombuffer(row.memory.map, dtype=torch.uint8, count=row.nbytes, offset=row.offset)
        whole[at : at + row.nbytes].copy_(host, non_blocking=True)
        at += row.nbytes
    return whole

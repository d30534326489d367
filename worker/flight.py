"""One batch on its way through a device with streams: where its bytes lie at each step, and when they may lie there.

Knows the batch's tensors, the buffers that they pass through, and memory that two batches claim; does not know when a batch
may begin, what becomes of one that fails, or the lease and its answers: that is `flights.py`'s business. A batch's inputs
are copied into one pinned buffer and from there into one buffer of the device, its outputs come back into another pinned
buffer, which is lent until the answer has left.
"""

from collections.abc import Iterator
from typing import Any

import torch

from penstock.worker.batch import Batch
from penstock.worker.inputs import Inputs
from penstock.worker.pipeline import Pipeline
from penstock.worker.pool import Buffer, Pool
from penstock.worker.precision import run

ALIGN_BYTES = 256
"""Where a tensor begins in a buffer, as in CUDA's own allocations."""
DIRECT_BYTES = 64 * 1024
"""From this size on it pays to ask whether a tensor lies in pinned memory already."""


class Reused(Exception):
    """A kernel returned memory that it had returned before, while that was still being copied."""


class Flight:
    """One batch on its way through the device: a `Job` of the pipeline.

    Args:
        batched: its inputs, on the CPU.
        company: the pipeline that takes it, with what else is on its way.
        host, device: where its buffers come from.

    Attributes:
        outputs: where they will be once `copy_out` has ended.
        places: where the kernel's outputs begin on the device.
        is_forgotten: nobody waits for it; is_spoiled: another batch's kernel has taken the memory of its outputs.
    """

    def __init__(self, batch: Batch, batched: Inputs, company: "Pipeline[Flight]", host: Pool, device: Pool) -> None:
        self.batch = batch
        self.is_forgotten = self.is_spoiled = False
        self.outputs: dict[str, Any] = {}
        self.places: set[int] = set()
        self._company = company
        self._host, self._device = host, device
        self._inputs, self._direct = dict(batched), list[tuple[torch.Tensor, torch.Tensor]]()
        self._staged: Buffer | None = None
        self._there: Buffer | None = None
        self._back: Buffer | None = None
        self._kept: list[torch.Tensor] = []
        try:
            self._stage()
        except Exception:
            self.release()
            raise

    def _stage(self) -> None:
        """Take the buffers and gather the inputs in the pinned one; those that are pinned go from where they lie, and what
        came out of pinned shared memory is there already."""
        principal = self.batch.assign.principal
        tensors = {name: x for name, x in self._inputs.items() if isinstance(x, torch.Tensor) and not x.is_cuda}
        is_direct = {name: x.nbytes >= DIRECT_BYTES and x.is_pinned() for name, x in tensors.items()}
        order = sorted(tensors, key=lambda name: is_direct[name])
        offsets, num_bytes = _laid_out([tensors[name] for name in order])
        num_staged = _laid_out([tensors[name] for name in order if not is_direct[name]])[1]
        if not num_bytes:
            self._inputs |= {name: x.to(self.batch.runner.device) for name, x in tensors.items()}  # empty ones
            return
        self._there = self._device.borrow_or_allocate(num_bytes, principal)
        if num_staged:
            self._staged = self._host.borrow_or_allocate(num_staged, principal, will_fill=True)
        end = 0
        for name, offset in zip(order, offsets, strict=True):
            x = tensors[name]
            if self._staged is not None and end < offset <= num_staged:
                self._staged.bytes[end:offset].zero_()
            end = offset + x.nbytes
            self._inputs[name] = there = _view(self._there, offset, x)
            if is_direct[name]:
                self._direct.append((there, x))
            elif self._staged is not None:
                _view(self._staged, offset, x).copy_(x)

    def copy_in(self) -> None:
        if self._staged is not None and self._there is not None:
            staged = self._staged.bytes
            self._there.bytes[: len(staged)].copy_(staged, non_blocking=True)
        for there, here in self._direct:
            there.copy_(here, non_blocking=True)

    def compute(self) -> None:
        batch, runner = self.batch, self.batch.runner
        batch.clock.num_runs += 1
        runner.num_runs += 1
        inputs = {**self._inputs, **batch.fixed}
        outputs = run(batch.plan.kernel, inputs, runner.precisions.get(batch.plan.name))
        # Kept until the job is through: memory that is free may rightly be another output's.
        self._kept = [x for x in _tensors(outputs) if x.layout is torch.strided and x.numel()]
        self.places = {x.data_ptr() for x in self._kept}
        spoiled = [other for other in self._company.jobs if other is not self and other.places & self.places]
        for other in spoiled:
            other.is_spoiled = True
        if spoiled:
            raise Reused
        self.outputs = _each(outputs, _plain)

    def copy_out(self) -> None:
        """Start the copies; `outputs` then has the tensors where they will be."""
        on = self.batch.runner.device
        leaving = [x for x in _tensors(self.outputs) if x.device == on and x.layout is torch.strided and x.numel()]
        offsets, num_bytes = _laid_out(leaving)
        if not num_bytes:
            return
        self._kept += leaving
        self._back = back = self._host.borrow_or_allocate(num_bytes, self.batch.assign.principal, will_fill=True)
        arriving = {id(x): _view(back, offset, x) for x, offset in zip(leaving, offsets, strict=True)}
        for x in leaving:
            arriving[id(x)].copy_(x, non_blocking=True)
        self.outputs = _each(self.outputs, lambda x: arriving.get(id(x), x))

    def release(self) -> Buffer | None:
        """The device is done: give back what it needed. What the outputs lie in is the caller's."""
        for buffer in (self._staged, self._there):
            if buffer is not None:
                buffer.give_back()
        back, self._staged, self._there, self._back = self._back, None, None, None
        self._inputs, self._direct, self._kept = {}, [], []
        return back

    def drop(self) -> None:
        """The device is done, and nobody wants the outputs."""
        back = self.release()
        self.outputs = {}
        if back is not None:
            back.give_back()


def _tensors(outputs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in outputs.values():
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, torch.Tensor):
                yield item


def _each(outputs: dict[str, Any], change: Any) -> dict[str, Any]:
    """The outputs with every tensor changed."""

    def changed(item: Any) -> Any:
        return change(item) if isinstance(item, torch.Tensor) else item

    return {
        name: [changed(item) for item in value] if isinstance(value, list) else changed(value)
        for name, value in outputs.items()
    }


def _plain(x: torch.Tensor) -> torch.Tensor:
    """As it can be copied as bytes: contiguous, nothing left to be negated. Made on the compute stream."""
    return x.resolve_neg().contiguous() if x.layout is torch.strided else x


def _laid_out(tensors: list[torch.Tensor]) -> tuple[list[int], int]:
    """Where each begins in one buffer, and the buffer's size."""
    offsets, end = list[int](), 0
    for x in tensors:
        begin = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        offsets.append(begin)
        end = begin + x.nbytes
    return offsets, end


def _view(buffer: Buffer, offset: int, like: torch.Tensor) -> torch.Tensor:
    """The place of a tensor in a buffer."""
    return buffer.bytes[offset : offset + like.nbytes].view(like.dtype).view(like.shape)

"""Mixed precision per kernel: `embed=bf16` runs that kernel's products in bfloat16, and still returns what it promised.

Knows torch.autocast and which precisions a device has; does not know kernels' arithmetic. fp32 is the default and does
nothing. The precision is part of a kernel's digest, so that the broker never gives a task to another version of it.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from penstock.kernels import Kernel, Step
from penstock.worker.config import StartError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
OPTION = "penstock.precision"
"""Where it stands among the spec's options; no argument of a class can have that name."""
_TRIED = 32  # products of so many ones are exact in every dtype


def precisions(kernels: Mapping[str, Kernel], wanted: Mapping[str, str], device: torch.device) -> dict[str, "Precision"]:
    """What runs otherwise than by default; the specs of those kernels say so from now on.

    Raises:
        StartError: no such kernel, or the device cannot.
    """
    if unknown := sorted(set(wanted) - set(kernels)):
        raise StartError(f"a precision is given for {unknown[0]!r}, which is no kernel; there are {', '.join(sorted(kernels))}")
    found = {name: Precision(name, DTYPES[said], device) for name, said in wanted.items() if said != "fp32"}
    for name in found:
        spec = kernels[name].spec
        kernels[name].spec = spec.with_options({**spec.options, OPTION: wanted[name]})
    return found


class Precision:
    """How one kernel is called. Raises StartError if the device has no such arithmetic."""

    def __init__(self, kernel: str, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device_type = device.type
        try:
            with torch.inference_mode(), self.autocast():
                ones = torch.ones(_TRIED, _TRIED, device=device)
                made = ones @ ones
                can = made.dtype is dtype and made.float().cpu().eq(_TRIED).all().item()
        except RuntimeError as e:
            raise StartError(f"kernel {kernel!r} cannot run in {dtype} on {device}: {e}") from e
        if not can:
            raise StartError(f"kernel {kernel!r} cannot run in {dtype} on {device}: it has no such products of matrices")

    def autocast(self) -> AbstractContextManager[Any]:
        """Operators inside run in this precision where they gain from it and can bear it, as torch decides."""
        return torch.autocast(self._device_type, dtype=self._dtype)

    def run(self, kernel: Kernel, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch's outputs. What became of this dtype only by running in it is float32 again; a task that came in this
        dtype gets it back."""
        with self.autocast():
            outputs = kernel.run(**inputs)
        if any(isinstance(value, torch.Tensor) and value.dtype is self._dtype for value in inputs.values()):
            return outputs
        return {
            name: [self._restored(item) for item in value] if isinstance(value, list) else self._restored(value)
            for name, value in outputs.items()
        }

    def step(self, kernel: Kernel, states: Sequence[Any]) -> list[Step]:
        """One iteration of open tasks, what it gives in float32 again."""
        with self.autocast():
            steps = kernel.step(states)
        return [Step(self._restored_all(step.chunk), self._restored_all(step.result)) for step in steps]

    def _restored_all(self, values: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None if values is None else {name: self._restored(value) for name, value in values.items()}

    def _restored(self, value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype is self._dtype else value


def run(kernel: Kernel, inputs: Mapping[str, Any], precision: Precision | None) -> dict[str, Any]:
    """A batch's outputs, in the kernel's own precision or the one it was given."""
    return kernel.run(**inputs) if precision is None else precision.run(kernel, inputs)


def open_task(kernel: Kernel, inputs: Mapping[str, Any], precision: Precision | None) -> Any:
    """The state of a streamed task."""
    with nullcontext() if precision is None else precision.autocast():
        return kernel.open(**inputs)


def step(kernel: Kernel, states: Sequence[Any], precision: Precision | None) -> list[Step]:
    """One iteration of open tasks."""
    return kernel.step(states) if precision is None else precision.step(kernel, states)


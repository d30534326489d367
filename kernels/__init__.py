"""Batched functions of tensors, each with a spec beside it.

Knows torch and a kernel's own libraries; knows nothing of tasks, sockets, brokers or workers, and imports nothing else
of ours. Built-in kernels are imported on first use: `registry.load()` for a worker, `penstock.kernels.ops` for direct
calls of the functions.
"""

from penstock.kernels import registry
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, KernelError, LoadError, RegistryError, SpecError
from penstock.kernels.inputs import Blob, Row, Static, Tensor
from penstock.kernels.runtime import Context, Kernel, Step
from penstock.kernels.spec import Cost, KernelSpec

__all__ = [
    "Blob",
    "Context",
    "Cost",
    "InvalidInput",
    "Kernel",
    "KernelError",
    "KernelSpec",
    "LoadError",
    "RegistryError",
    "Row",
    "SpecError",
    "Static",
    "Step",
    "Tensor",
    "kernel",
    "registry",
]

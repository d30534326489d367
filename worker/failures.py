"""What went wrong in a kernel, as plain data.

Knows kinds of exceptions; does not know leases. A `Failure` holds no exception: the traceback of one keeps every
tensor of its frames alive, and out of memory could then never be recovered from.
"""

import traceback
from dataclasses import dataclass

import torch

from penstock.broker.protocol import Code, Error
from penstock.kernels import InvalidInput, LoadError
from penstock.worker.outputs import BadOutput

MAX_DETAIL = 4000
LOAD_RETRY_MS = 1000.0
_OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
_OWN_FILES = ("/worker/runner.py", "/worker/streams.py", "/kernels/runtime.py")


class DeviceFault(Exception):
    """The device's context is broken for good (an illegal access, an assert, ECC): this process must end."""


@dataclass(frozen=True, slots=True)
class Failure:
    """`can_split`: a part of the batch may still succeed, so it is worth finding the guilty item."""

    error: Error
    can_split: bool = True
    is_out_of_memory: bool = False
    is_device_fault: bool = False


def describe(kernel: str, e: Exception) -> Failure:
    """The failure that an exception of a kernel's call stands for."""
    if isinstance(e, InvalidInput):
        return Failure(Error(Code.INVALID, str(e) or f"{kernel}: invalid input"))
    if isinstance(e, BadOutput):
        return Failure(Error(Code.FAILED, str(e)), can_split=False)
    text = "".join(traceback.format_exception_only(e)).strip()  # survives a broken __str__
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or any(mark in text for mark in _OUT_OF_MEMORY):
        message = f"kernel {kernel!r} ran out of memory: {text}"
        return Failure(Error(Code.FAILED, message, None, trimmed(e)), is_out_of_memory=True)
    error = Error(Code.FAILED, f"kernel {kernel!r}: {text}", None, trimmed(e))
    return Failure(error, is_device_fault=_is_device_fault(e, text))


def describe_load(kernel: str, e: Exception) -> Error:
    """Why a kernel's state could not be loaded; the next use tries again."""
    if isinstance(e, LoadError):
        return Error(Code.UNAVAILABLE, f"kernel {kernel!r} cannot be loaded: {e}", LOAD_RETRY_MS)
    text = "".join(traceback.format_exception_only(e)).strip()
    return Error(Code.FAILED, f"kernel {kernel!r} failed to load: {text}", None, trimmed(e))


def _is_device_fault(e: Exception, text: str) -> bool:
    return isinstance(e, torch.AcceleratorError) or (isinstance(e, RuntimeError) and "CUDA error: " in text)


def trimmed(e: Exception) -> str:
    """The traceback from the kernel's first own line on, its end if it is long."""
    entries = traceback.extract_tb(e.__traceback__)
    own = 0
    for index, entry in enumerate(entries):
        if entry.filename.endswith(_OWN_FILES):
            own = index + 1
    lines = traceback.format_list(entries[own:] or entries[-1:]) + traceback.format_exception_only(e)
    return "".join(lines)[-MAX_DETAIL:]

"""What went wrong in a kernel, as plain data.

Knows kinds of exceptions; does not know leases. A `Failure` holds no exception: the traceback of one keeps every
tensor of its frames alive, and out of memory could then never be recovered from.
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from penstock.broker.protocol import Code, Error
from penstock.kernels import InvalidInput, LoadError
from penstock.worker.config import DeviceFault
from penstock.worker.outputs import BadOutput

MAX_DETAIL = 4000
LOAD_RETRY_MS = 1000.0
_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # its workspace did not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Unable to find a valid cuDNN algorithm",  # for lack of a workspace
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "HIP out of memory",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
"""Of what torch does not raise as an OutOfMemoryError."""
_DEVICE = (
    "CUDA error: ", "CUDA driver error: ", "Triton Error [CUDA]: ", "HIP error: ", "cuDNN error: ", "CUDNN_STATUS_",
    "CUSOLVER_STATUS_", "CUSPARSE_STATUS_", "CUFFT_", "device-side assert",
)  # fmt: skip
"""Marks of an error that comes from a device, or from a library that runs on one."""
_HARMLESS = (
    "invalid argument", "invalid configuration argument", "invalid device function", "invalid resource handle",
    "no kernel image is available", "too many resources requested for launch", "operation not supported",
    "stream is capturing", "_NOT_SUPPORTED", "_INVALID_VALUE", "_BAD_PARAM", "_ARCH_MISMATCH", "_INVALID_SIZE",
    "out of resource: shared memory",
)  # fmt: skip
"""... that refuses a call and leaves the context as it was. Whatever else a device says, nothing on it is to be believed."""
_HARMLESS_CODES = frozenset({1, 9, 98, 200, 209, 218, 222, 400, 500, 600, 701, 712, 713, 720, 801, *range(900, 909)})
"""The same as codes of cudaError_t."""
_MEMORY_CODE = 2
MAX_CHAIN = 8
_OWN_FILES = ("/worker/batch.py", "/worker/runner.py", "/worker/streams.py", "/kernels/runtime.py")


@dataclass(frozen=True, slots=True)
class Failure:
    """`can_split`: a part of the batch may still succeed, so it is worth finding the guilty item.

    `is_device_fault`: the process must end. `is_device_error`: the device refused something, and may have been harmed.
    """

    error: Error
    can_split: bool = True
    is_out_of_memory: bool = False
    is_device_fault: bool = False
    is_device_error: bool = False


def describe(kernel: str, e: Exception) -> Failure:
    """The failure that an exception of a kernel's call stands for."""
    fault = device_fault(e)
    if fault is not None:
        return Failure(Error(Code.FAILED, f"kernel {kernel!r}: {fault}", None, trimmed(e)), is_device_fault=True)
    if isinstance(e, InvalidInput):
        return Failure(Error(Code.INVALID, str(e) or f"{kernel}: invalid input"))
    if isinstance(e, BadOutput):
        return Failure(Error(Code.FAILED, str(e)), can_split=False)
    text = _text(e)
    if is_out_of_memory(e):
        message = f"kernel {kernel!r} ran out of memory: {text}"
        return Failure(Error(Code.FAILED, message, None, trimmed(e)), is_out_of_memory=True)
    error = Error(Code.FAILED, f"kernel {kernel!r}: {text}", None, trimmed(e))
    return Failure(error, is_device_error=_is_of_device(e))


def describe_load(kernel: str, e: Exception) -> Error:
    """Why a kernel's state could not be loaded; the next use tries again."""
    if isinstance(e, LoadError):
        return Error(Code.UNAVAILABLE, f"kernel {kernel!r} cannot be loaded: {e}", LOAD_RETRY_MS)
    text = _text(e)
    return Error(Code.FAILED, f"kernel {kernel!r} failed to load: {text}", None, trimmed(e))


def is_out_of_memory(e: BaseException) -> bool:
    """Whether it means that memory ran short, under whatever name."""
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or _code(e) == _MEMORY_CODE:
        return True
    return isinstance(e, RuntimeError) and any(mark in _text(e) for mark in _OUT_OF_MEMORY)


def device_fault(e: BaseException) -> str | None:
    """What an exception says of a broken device, even where a kernel has made something else of it; None if it does not."""
    return next((_text(cause) for cause in _chain(e) if _is_device_fault(cause)), None)


def _is_device_fault(e: BaseException) -> bool:
    """Whether the device's context is broken for good. Errors of an unknown kind count: a new process is cheap."""
    if isinstance(e, DeviceFault):
        return True
    if is_out_of_memory(e) or not _is_of_device(e):
        return False
    code = _code(e)
    if code is not None:
        return code not in _HARMLESS_CODES
    text = _text(e)
    return not any(mark in text for mark in _HARMLESS)


def _is_of_device(e: BaseException) -> bool:
    if isinstance(e, torch.AcceleratorError):
        return True
    return isinstance(e, RuntimeError) and any(mark in _text(e) for mark in _DEVICE)


def _code(e: BaseException) -> int | None:
    """The cudaError_t of an exception, where torch says it."""
    code = getattr(e, "error_code", None) if isinstance(e, torch.AcceleratorError) else None
    return code if isinstance(code, int) and code > 0 else None


def _chain(e: BaseException) -> Iterator[BaseException]:
    """The exception, and those that it was raised from or while handling."""
    link: BaseException | None = e
    for _ in range(MAX_CHAIN):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _text(e: BaseException) -> str:
    return "".join(traceback.format_exception_only(e)).strip()  # survives a broken __str__


def trimmed(e: Exception) -> str:
    """The traceback from the kernel's first own line on, its end if it is long."""
    entries = traceback.extract_tb(e.__traceback__)
    own = 0
    for index, entry in enumerate(entries):
        if entry.filename.endswith(_OWN_FILES):
            own = index + 1
    lines = traceback.format_list(entries[own:] or entries[-1:]) + traceback.format_exception_only(e)
    return "".join(lines)[-MAX_DETAIL:]

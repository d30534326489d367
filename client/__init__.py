"""What users hold: the SDK and the command line.

    from penstock.client import Client

    with Client() as ps:
        y = ps.call("softmax", x=x)

Importing it never imports torch.
"""

from penstock.client.aio import AsyncClient
from penstock.client.aio_task import AsyncStream, AsyncTask
from penstock.client.client import Client
from penstock.client.completed import as_completed
from penstock.client.config import ClientConfig
from penstock.client.errors import (
    Cancelled,
    Conflict,
    Dead,
    DeadlineExceeded,
    InvalidInput,
    KernelFailed,
    NotAuthorised,
    Overloaded,
    PenstockError,
    ProtocolFault,
    ResultGone,
    Unavailable,
    UnknownKernel,
    UnknownTask,
    WorkerLost,
)  # fmt: skip
from penstock.client.executor import Executor
from penstock.client.task import Stream, Task

__all__ = [
    "AsyncClient", "AsyncStream", "AsyncTask", "Cancelled", "Client", "ClientConfig", "Conflict", "Dead",
    "DeadlineExceeded", "Executor", "InvalidInput", "KernelFailed", "NotAuthorised", "Overloaded", "PenstockError",
    "ProtocolFault", "ResultGone", "Stream", "Task", "Unavailable", "UnknownKernel", "UnknownTask", "WorkerLost",
    "as_completed",
]  # fmt: skip

"""Everything that can go wrong with a task, as one tree.

    PenstockError
    ├── Overloaded        the broker has no room, now or in time; try again after `retry_after` seconds
    ├── DeadlineExceeded  the task's time limit was over before its outcome came
    ├── Cancelled         somebody cancelled it, or the client was closed
    ├── InvalidInput      the arguments do not fit the kernel (also a ValueError)
    ├── UnknownKernel     no worker offers a kernel of that name
    ├── KernelFailed      the kernel raised; `detail` has the traceback's end
    ├── WorkerLost        its worker vanished, and the kernel must not run twice
    ├── Dead              it brought down several workers; `detail` has the evidence
    ├── Conflict          the same id or idempotency key, but other content
    ├── ResultGone        it ended, but its result is no longer kept
    ├── UnknownTask       no durable task of this user has that id or key, or it is kept no longer
    ├── NotAuthorised     this client may not do that
    ├── Unavailable       no broker answers, or it does not speak our protocol
    └── ProtocolFault     the broker could not read what this client sent

Knows the codes on the wire; does not know tasks or sockets. `TimeoutError` from `result(timeout)` is Python's own: the
task goes on.
"""

from typing import ClassVar

from penstock.broker.protocol import Code, Error


class PenstockError(Exception):
    """Base of all errors of this package.

    `message` is one line for people; `retry_after` is seconds or None; `detail` is longer evidence or empty.
    """

    code: ClassVar[str] = ""

    def __init__(self, message: str, *, retry_after: float | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.detail = detail


class Overloaded(PenstockError):
    """The broker has no room; `retry_after` says when to try again, if it could tell.

    It is raised only where the client's own retries (`ClientConfig.max_retries`) could not help: the time limit leaves no
    room for them, there were too many already, or the client held the task back because the broker has refused most of
    its last ones.
    """

    code = Code.OVERLOADED


class DeadlineExceeded(PenstockError):
    """The time limit given as `timeout` was over before the outcome came."""

    code = Code.DEADLINE


class Cancelled(PenstockError):
    """The task was cancelled, or its client was closed."""

    code = Code.CANCELLED


class InvalidInput(PenstockError, ValueError):
    """The arguments do not fit what the kernel declares, or the kernel refused their values."""

    code = Code.INVALID


class UnknownKernel(PenstockError):
    """No worker offers a kernel of that name."""

    code = Code.UNKNOWN_KERNEL


class KernelFailed(PenstockError):
    """The kernel raised an exception for this task; `detail` has the end of its traceback."""

    code = Code.FAILED


class WorkerLost(PenstockError):
    """The worker vanished while it held the task, and the kernel is not one that may run twice."""

    code = Code.WORKER_LOST


class Dead(PenstockError):
    """The task brought down workers while running alone; `detail` has the evidence."""

    code = Code.DEAD


class Conflict(PenstockError):
    """The same submission id or idempotency key was used with other content."""

    code = Code.CONFLICT


class ResultGone(PenstockError):
    """The task ended, but the broker no longer keeps its result."""

    code = Code.RESULT_GONE


class UnknownTask(PenstockError):
    """No durable task of this user has that id or idempotency key, or it is kept no longer."""

    code = Code.UNKNOWN_TASK


class NotAuthorised(PenstockError):
    """This client may not do that."""

    code = Code.NOT_AUTHORISED


class Unavailable(PenstockError):
    """No broker answers, or the one that does cannot serve this task any more."""

    code = Code.UNAVAILABLE


class ProtocolFault(PenstockError):
    """The broker could not read what this client sent: most likely their versions differ."""

    code = Code.PROTOCOL


BY_CODE: dict[str, type[PenstockError]] = {cls.code: cls for cls in PenstockError.__subclasses__()}


def from_wire(error: Error) -> PenstockError:
    """The exception for an error that arrived; a code of a newer protocol becomes a plain `PenstockError`."""
    cls = BY_CODE.get(error.code, PenstockError)
    retry_after = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    return cls(error.message, retry_after=retry_after, detail=error.detail)

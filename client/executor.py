"""`Executor`: a `concurrent.futures.Executor` whose work is kernels.

    with Executor() as pool:
        future = pool.submit("softmax", x=x)
        results = list(pool.map("softmax", items))      # items: dicts of arguments

Functions cannot be submitted: a kernel's name takes their place.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

from penstock.client.client import Client, Verbs
from penstock.client.errors import Cancelled, InvalidInput
from penstock.client.task import Task


class KernelFuture(futures.Future[Any]):
    """A future of a task; `cancel` asks the broker and does not wait, so it is True only if the task had ended so."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        if not self.done():
            self.task.ask_cancel()
        return isinstance(self.exception(), Cancelled) if self.done() else False


class Executor(futures.Executor):
    """See the module. Takes a `Client` (or `client.options(...)`), which it leaves open, or makes its own."""

    def __init__(self, client: Verbs | None = None, **arguments: Any) -> None:
        if client is not None and arguments:
            raise TypeError("give a client, or the arguments for a new one")
        self._own = None if client is not None else Client(**arguments)
        self._verbs: Verbs = client if client is not None else self._own  # type: ignore[assignment]
        self._open: set[KernelFuture] = set()
        self._is_shut = False

    def submit(self, kernel: Any, /, *args: Any, **inputs: Any) -> futures.Future[Any]:
        """Start one task of the kernel `kernel`; its arguments are given by keyword.

        Raises:
            InvalidInput: a function instead of a kernel's name, or arguments that do not fit.
            RuntimeError: after `shutdown`.
        """
        if self._is_shut:
            raise RuntimeError("cannot submit after shutdown")
        if not isinstance(kernel, str) or args:
            raise InvalidInput('submit("kernel", name=value, ...): a kernel\'s name, then arguments by keyword')
        task = self._verbs.submit(kernel, **inputs)
        future = KernelFuture(task)
        self._open.add(future)
        task.add_done_callback(lambda _: self._finish(future))
        return future

    def _finish(self, future: KernelFuture) -> None:
        self._open.discard(future)
        error = future.task.exception()
        if error is not None:
            future.set_exception(error)
        else:
            try:
                value = future.task.result()
            except Exception as e:
                future.set_exception(e)
            else:
                future.set_result(value)

    def map(  # type: ignore[override]  # kernels have names, functions are not sent
        self, kernel: str, *iterables: Iterable[Any], timeout: float | None = None, **_: Any
    ) -> Iterator[Any]:
        """One task per item of one iterable of dicts of arguments; values come in order.

        `timeout` is the tasks' time limit here. `chunksize` is ignored: the client sizes its messages itself.
        """
        if not isinstance(kernel, str) or len(iterables) != 1:
            raise InvalidInput('map("kernel", items): a kernel\'s name, then one iterable of dicts of arguments')
        items: Iterable[Mapping[str, Any]] = iterables[0]
        verbs = self._verbs if timeout is None else self._verbs.options(timeout=timeout)
        return verbs.map(kernel, items)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more tasks. `wait` for those under way; `cancel_futures` asks for their end first. Without `wait` they are
        cancelled if the client is this executor's own."""
        self._is_shut = True
        unfinished = list(self._open)
        if cancel_futures:
            for future in unfinished:
                future.cancel()
        if wait:
            futures.wait(unfinished)
        if self._own is not None:
            self._own.close()

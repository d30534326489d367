"""The verbs that ask the broker, and tell it what an operator wants: for threads and for event loops.

Knows questions and what comes of their answers; does not know tasks of this client, nor how a line waits.
"""

from collections.abc import Mapping
from typing import Any

from penstock.client import reports
from penstock.client.aio_line import AsyncLine
from penstock.client.line import Line
from penstock.client.verbs import BaseVerbs, ask_status, ask_task, ask_tasks, ask_to_drain, ask_to_reload


class Asking(BaseVerbs[Line]):
    """What `Client` may ask."""

    def status(self, *, timeout: float | None = 5.0) -> dict[str, Any]:
        """The broker's state: its queues, workers and kernels."""
        return self._line.ask(ask_status, timeout)

    def tasks(self, *, timeout: float | None = 5.0) -> list[dict[str, Any]]:
        """The reports of this user's open submissions, of all clients, the most urgent first; at most 100."""
        return reports.of_open(self._line.ask(ask_tasks, timeout))

    def task(self, id: str, *, timeout: float | None = 5.0) -> dict[str, Any]:
        """The report of one submission of this user, of any client, by the `id` of a task or report."""
        return reports.of_broker(self._line.ask(ask_task(reports.submission_id(id)), timeout))

    def reload(self, *, timeout: float | None = 5.0) -> None:
        """Let the broker read its configuration again. Raises InvalidInput, and nothing changes, if it cannot be used."""
        self._line.ask(ask_to_reload, timeout)

    def drain(self, worker: str, *, timeout: float | None = 5.0) -> None:
        """Let a worker, by its name in `status`, finish what it holds and end. Raises InvalidInput for an unknown name."""
        self._line.ask(ask_to_drain(worker), timeout)

    def kernels(self, *, timeout: float | None = 5.0) -> dict[str, Mapping[str, Any]]:
        """The kernels on offer now: name -> spec (`inputs`, `modes`, ...)."""
        version = self._line.session.specs_version
        self._catalog.update(self.status(timeout=timeout), version)
        return dict(self._catalog.specs)


class AsyncAsking(BaseVerbs[AsyncLine]):
    """What `AsyncClient` may ask; see `Asking`."""

    async def status(self, *, timeout: float | None = 5.0) -> dict[str, Any]:
        """The broker's state: its queues, workers and kernels."""
        return await self._line.ask(ask_status, timeout)

    async def tasks(self, *, timeout: float | None = 5.0) -> list[dict[str, Any]]:
        """The reports of this user's open submissions, of all clients, the most urgent first; at most 100."""
        return reports.of_open(await self._line.ask(ask_tasks, timeout))

    async def task(self, id: str, *, timeout: float | None = 5.0) -> dict[str, Any]:
        """The report of one submission of this user, of any client, by the `id` of a task or report."""
        return reports.of_broker(await self._line.ask(ask_task(reports.submission_id(id)), timeout))

    async def reload(self, *, timeout: float | None = 5.0) -> None:
        """Let the broker read its configuration again. Raises InvalidInput, and nothing changes, if it cannot be used."""
        await self._line.ask(ask_to_reload, timeout)

    async def drain(self, worker: str, *, timeout: float | None = 5.0) -> None:
        """Let a worker, by its name in `status`, finish what it holds and end. Raises InvalidInput for an unknown name."""
        await self._line.ask(ask_to_drain(worker), timeout)

    async def kernels(self, *, timeout: float | None = 5.0) -> dict[str, Mapping[str, Any]]:
        """The kernels on offer now: name -> spec (`inputs`, `modes`, ...)."""
        version = self._line.session.specs_version
        self._catalog.update(await self.status(timeout=timeout), version)
        return dict(self._catalog.specs)

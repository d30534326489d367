"""The verbs for durable tasks that were submitted before, by this client or another one of the same user, alive or not.

Knows questions and what comes of their answers; how a fetched task gets its outcomes is `submissions.py`'s business.
"""

import os
from pathlib import Path
from typing import Any

from penstock.client import reports
from penstock.client.aio_task import AsyncTask
from penstock.client.asking import Asking, AsyncAsking
from penstock.client.errors import Conflict, InvalidInput
from penstock.client.options import check_key
from penstock.client.questions import Request
from penstock.client.run import Run
from penstock.client.task import Task
from penstock.client.verbs import ask_about_job, ask_job, ask_jobs, ask_to_back_up, ask_to_fetch

Which = tuple[bytes | None, bytes | None]
"""(id, key), one of which is given."""


class Jobs(Asking):
    """What `Client` can do with durable tasks. They are named by their idempotency `key`, or by `id`: a task's id, or the
    submission's, which it begins with.

    All of these raise UnknownTask if this user has none of that name, or it is kept no longer.
    """

    def fetch(
        self, *, key: str | bytes | None = None, id: str | None = None, take: bool = False, timeout: float | None = 5.0
    ) -> Task:
        """A handle of a durable task, as `submit` gave it: its outcome comes to this client.

        Args:
            take: also if the task belongs to a client that is still connected, for which it then ends as Unavailable.

        Raises:
            ResultGone: it ended, but its result is no longer kept.
            Conflict: it belongs to another client, and `take` was not said.
            InvalidInput: it is one of several rows: name one as `<id>/<row>`, or use `fetch_rows`.
        """
        run = _fetched(self._line.request(ask_to_fetch(*_which(key, id), take), timeout))
        return Task(self._line, run, _row(run, id))

    def fetch_rows(
        self, *, key: str | bytes | None = None, id: str | None = None, take: bool = False, timeout: float | None = 5.0
    ) -> list[Task]:
        """As `fetch`, for all rows of a submission."""
        run = _fetched(self._line.request(ask_to_fetch(*_which(key, id), take), timeout))
        return [Task(self._line, run, row) for row in range(run.num_rows)]

    def jobs(self, *, dead: bool = False, timeout: float | None = 5.0) -> list[dict[str, Any]]:
        """The reports of this user's durable tasks: the open ones, oldest first, then those that are kept, the last to end
        first; at most 100 of each. `dead`: only those of which a row has failed."""
        return reports.of_jobs(self._line.ask(ask_jobs(dead), timeout))

    def job(
        self, *, key: str | bytes | None = None, id: str | None = None, timeout: float | None = 5.0
    ) -> dict[str, Any]:
        """The report of one durable task, with its `errors`."""
        return reports.of_jobs(self._line.ask(ask_job(*_which(key, id)), timeout))[0]

    def cancel_job(self, *, key: str | bytes | None = None, id: str | None = None, timeout: float | None = 5.0) -> None:
        """End a durable task, whichever client it belongs to. Raises InvalidInput if it has ended."""
        self._line.ask(ask_about_job("cancel", *_which(key, id)), timeout)

    def requeue(self, *, key: str | bytes | None = None, id: str | None = None, timeout: float | None = 5.0) -> str:
        """Let the rows of a durable task that failed run again; the id of the new submission, which has the key from now
        on. Raises InvalidInput if nothing of it has failed, ResultGone if its content is no longer kept."""
        return _id(self._line.ask(ask_about_job("requeue", *_which(key, id)), timeout))

    def drop(self, *, key: str | bytes | None = None, id: str | None = None, timeout: float | None = 5.0) -> None:
        """Forget a durable task that has ended: its outcome and its key. Raises InvalidInput if it has not."""
        self._line.ask(ask_about_job("drop", *_which(key, id)), timeout)

    def backup(self, folder: str | os.PathLike[str], *, timeout: float | None = None) -> None:
        """Have the broker copy its journal to a new folder on its machine, while it goes on.

        Raises:
            InvalidInput: it could not be made there. NotAuthorised: the broker runs as another user.
        """
        self._line.ask(ask_to_back_up(str(Path(folder).absolute())), timeout)


class AsyncJobs(AsyncAsking):
    """What `AsyncClient` can do with durable tasks; see `Jobs`."""

    async def fetch(
        self, *, key: str | bytes | None = None, id: str | None = None, take: bool = False, timeout: float | None = 5.0
    ) -> AsyncTask:
        """As `Client.fetch`."""
        run = _fetched(await self._line.request(ask_to_fetch(*_which(key, id), take), timeout))
        return AsyncTask(self._line, run, _row(run, id))

    async def fetch_rows(
        self, *, key: str | bytes | None = None, id: str | None = None, take: bool = False, timeout: float | None = 5.0
    ) -> list[AsyncTask]:
        """As `Client.fetch_rows`."""
        run = _fetched(await self._line.request(ask_to_fetch(*_which(key, id), take), timeout))
        return [AsyncTask(self._line, run, row) for row in range(run.num_rows)]

    async def jobs(self, *, dead: bool = False, timeout: float | None = 5.0) -> list[dict[str, Any]]:
        """As `Client.jobs`."""
        return reports.of_jobs(await self._line.ask(ask_jobs(dead), timeout))

    async def job(
        self, *, key: str | bytes | None = None, id: str | None = None, timeout: float | None = 5.0
    ) -> dict[str, Any]:
        """As `Client.job`."""
        return reports.of_jobs(await self._line.ask(ask_job(*_which(key, id)), timeout))[0]

    async def cancel_job(self, *, key: str | bytes | None = None, id: str | None = None, timeout: float | None = 5.0) -> None:
        """As `Client.cancel_job`."""
        await self._line.ask(ask_about_job("cancel", *_which(key, id)), timeout)

    async def requeue(self, *, key: str | bytes | None = None, id: str | None = None, timeout: float | None = 5.0) -> str:
        """As `Client.requeue`."""
        return _id(await self._line.ask(ask_about_job("requeue", *_which(key, id)), timeout))

    async def drop(self, *, key: str | bytes | None = None, id: str | None = None, timeout: float | None = 5.0) -> None:
        """As `Client.drop`."""
        await self._line.ask(ask_about_job("drop", *_which(key, id)), timeout)

    async def backup(self, folder: str | os.PathLike[str], *, timeout: float | None = None) -> None:
        """As `Client.backup`."""
        await self._line.ask(ask_to_back_up(str(Path(folder).absolute())), timeout)


def _which(key: str | bytes | None, id: str | None) -> Which:
    if (key is None) == (id is None):
        raise InvalidInput("name the task by its key or by its id, one of them")
    return None if id is None else reports.submission_id(id), check_key(key)


def _fetched(request: Request) -> Run:
    """The run of a fetch that was answered; raises what stands against it."""
    body, run = request.answer(), request.run
    if run is None:
        seen = f"client {body['client']!r}, last heard of {body.get('seen_ms', 0.0) / 1000.0:.0f} s ago"
        raise Conflict(f"this task belongs to {seen}; fetch it with take=True to have it all the same")
    return run


def _row(run: Run, id: str | None) -> int:
    """Which row of a submission is meant."""
    text = "" if id is None else id.partition("/")[2]
    if not text and run.num_rows == 1:
        return 0
    if not (text.isdecimal() and int(text) < run.num_rows):
        raise InvalidInput(f"{run.id.hex()} has rows 0 to {run.num_rows - 1}: name one as <id>/<row>, or use fetch_rows")
    return int(text)


def _id(body: dict[str, Any]) -> str:
    new_id: bytes = body["id"]
    return new_id.hex()

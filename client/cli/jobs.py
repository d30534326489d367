"""`penstock jobs` and its commands, and `penstock backup`: durable tasks, whoever submitted them."""

import json
import string
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from penstock.client import Client, Task
from penstock.client.cli import jobs_view, values
from penstock.client.cli.arguments import QUICK_CONNECT_S, AsJson, CommandFailed, Url
from penstock.client.cli.looking import console, encode
from penstock.client.errors import PenstockError, UnknownTask

EPILOG: Final = """\b
examples:
  penstock jobs                                 what is open, and what waits to be fetched
  penstock jobs --dead                          what failed, and may be requeued
  penstock jobs show nightly                    all that is known of the task with the key "nightly"
  penstock jobs fetch nightly --out result.npz  its result, although its client died
  penstock jobs requeue 3fa94c12                run again what failed of it

A durable task is submitted with `ps.options(durable=True, idempotency_key="nightly")`. It is named by its key, its id, or
how its id begins.
"""
BACKUP_EPILOG: Final = """\b
The broker goes on meanwhile. DIR must not exist; it is there once the copy is whole.
To restore: stop the broker, put DIR in place of its `journal` folder, start it (docs/durable.md).
"""
MIN_DIGITS: Final = 4
ID_DIGITS: Final = 32
T = TypeVar("T")
Named = Annotated[str, typer.Argument(metavar="KEY|ID", help="the task's key, its id, or how that begins")]

app = typer.Typer(
    name="jobs", epilog=EPILOG, rich_markup_mode=None, invoke_without_command=True,
    help="List durable tasks; fetch, cancel, requeue or drop one.",
)  # fmt: skip


@app.callback()
def jobs(
    context: typer.Context,
    dead: Annotated[bool, typer.Option("--dead", help="only those of which a row has failed")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> int:
    if context.invoked_subcommand is not None:
        context.obj = url
        return 0
    with _client(url) as client:
        found = client.jobs(dead=dead)
    if as_json:
        print(json.dumps(found, default=encode))
    else:
        console().print(jobs_view.render(found, dead))
    return 0


@app.command()
def show(context: typer.Context, task: Named, as_json: AsJson = False, url: Url = None) -> int:
    """Show all that is known of one durable task: states, errors, evidence."""
    report = _act(url or context.obj, task, Client.job)
    if as_json:
        print(json.dumps(report, default=encode))
    else:
        console().print(jobs_view.render_one(report))
    return 0


@app.command()
def fetch(
    context: typer.Context,
    task: Named,
    out: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="save the outputs as numpy arrays")] = None,
    take: Annotated[bool, typer.Option("--take", help="although its client is connected: that one loses it")] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="how long to wait for its end")] = 60.0,
    as_json: AsJson = False,
    url: Url = None,
) -> int:
    """Wait for a durable task's end, and print its result or save it. The result counts as fetched then."""
    with _client(url or context.obj) as client:

        def rows_of(**which: Any) -> list[Task]:
            has_row = "/" in which.get("id", "")
            return [client.fetch(**which, take=take)] if has_row else client.fetch_rows(**which, take=take)

        found = _results(_named(client, task, rows_of), time.monotonic() + timeout)
        if out is not None:
            values.save(out, found)
            print(f"{len(found)} {'row' if len(found) == 1 else 'rows'} in {out}")
            return 0
        for value in found:
            print(json.dumps(values.to_json(value)) if as_json else values.show(value), flush=True)
    return 0


@app.command()
def cancel(context: typer.Context, task: Named, url: Url = None) -> int:
    """End a durable task that has not ended."""
    _act(url or context.obj, task, Client.cancel_job)
    print(f"{task} is cancelled")
    return 0


@app.command()
def requeue(context: typer.Context, task: Named, url: Url = None) -> int:
    """Run again the rows of a durable task that failed; prints the new id. Its key names the new one."""
    print(_act(url or context.obj, task, Client.requeue))
    return 0


@app.command()
def drop(context: typer.Context, task: Named, url: Url = None) -> int:
    """Forget a durable task that has ended: its result, its errors, its key."""
    _act(url or context.obj, task, Client.drop)
    print(f"{task} is forgotten")
    return 0


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new folder, on the broker's machine")], url: Url = None
) -> int:
    """Copy the broker's journal of durable tasks while it runs."""
    with _client(url) as client:
        client.backup(folder)
    print(f"the journal is copied to {folder}")
    return 0


def _client(url: str | None) -> Client:
    return Client(url, name="penstock jobs", connect_timeout=QUICK_CONNECT_S)


def _act(url: str | None, name: str, method: Callable[..., T]) -> T:
    """What a method of the client does with the task that is meant."""
    with _client(url) as client:
        return _named(client, name, partial(method, client))


def _named(client: Client, name: str, act: Callable[..., T]) -> T:
    """What `act` does with the task that has this id, or this key, which may look like an id, or whose id begins so."""
    digits, has_row, row = name.partition("/")
    is_hex = len(digits) >= MIN_DIGITS and all(digit in string.hexdigits for digit in digits)
    for kind in ("id", "key") if is_hex and len(digits) == ID_DIGITS else ("key",):
        with suppress(UnknownTask):
            return act(**{kind: name})
    found = [job["id"] for job in client.jobs() if is_hex and job["id"].startswith(digits.lower())]
    if len(found) == 1:
        return act(id=f"{found[0]}{has_row}{row}")
    if found:
        raise CommandFailed(f"{len(found)} tasks begin with {digits}: {', '.join(found[:3])}")
    raise CommandFailed(f"no durable task of yours is called {name!r}; `penstock jobs` lists them")


def _results(tasks: list[Task], until: float) -> list[Any]:
    """Their values. Raises CommandFailed if one has failed, or not ended."""
    try:
        failed = [error for task in tasks if (error := task.exception(max(0.0, until - time.monotonic()))) is not None]
    except TimeoutError as e:
        raise CommandFailed(str(e)) from e
    if failed:
        raise CommandFailed(_why(failed, len(tasks)))
    return [task.result() for task in tasks]


def _why(failed: list[PenstockError], num_rows: int) -> str:
    first = f"{type(failed[0]).__name__}: {failed[0]}"
    return first if num_rows == 1 else f"{len(failed)} of {num_rows} rows failed, the first with {first}"

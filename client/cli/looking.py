"""The commands that look at a broker, and tell it what an operator wants."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.live import Live

from penstock.broker.address import Address
from penstock.client import Client
from penstock.client.cli import status as status_view
from penstock.client.cli import tasks as tasks_view
from penstock.client.cli.arguments import FAILED, QUICK_CONNECT_S, AsJson, CommandFailed, Url
from penstock.client.errors import PenstockError

WATCH_S: Final = 1.0
NOT_A_TERMINAL_WIDTH: Final = 160
ID_DIGITS: Final = 32

STATUS_EPILOG = """\b
exit status:
  0  a worker is ready      4  a broker, but no ready worker      5  no broker answers
"""


def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="again every second, until Ctrl-C")] = False,
    url: Url = None,
) -> int:
    """Show workers, queues and tasks."""
    with Client(url, name="penstock status", connect_timeout=QUICK_CONNECT_S) as client:
        body = client.status()
        if as_json:
            print(json.dumps(body, default=encode), flush=True)
        elif not watch:
            console().print(status_view.render(body, client.where))
        if watch and as_json:
            while True:
                time.sleep(WATCH_S)
                print(json.dumps(client.status(), default=encode), flush=True)
        elif watch:
            with Live(status_view.render(body, client.where), console=console(), auto_refresh=False) as live:
                while True:
                    time.sleep(WATCH_S)
                    live.update(status_view.render(client.status(), client.where), refresh=True)
    return status_view.exit_status(body)


def console() -> Console:
    """Names and reasons come from others: what looks like markup in them is text."""
    width = None if sys.stdout.isatty() else NOT_A_TERMINAL_WIDTH
    return Console(width=width, markup=False, emoji=False)


def encode(value: object) -> str:
    """Bytes in a report, for JSON."""
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} in a status")


def tasks(as_json: AsJson = False, url: Url = None) -> int:
    """Show your open tasks: where they stand, when they end, why they wait."""
    with Client(url, name="penstock tasks", connect_timeout=QUICK_CONNECT_S) as client:
        found = client.tasks()
    if as_json:
        print(json.dumps(found, default=encode))
    else:
        terminal = console()
        terminal.print(tasks_view.render(found, terminal.width))
    return 0


def task(
    id: Annotated[str, typer.Argument(metavar="ID", help="an open task's id, or how it begins")],
    as_json: AsJson = False,
    url: Url = None,
) -> int:
    """Show all that is known of one open task."""
    with Client(url, name="penstock task", connect_timeout=QUICK_CONNECT_S) as client:
        report = _find_task(client, id.partition("/")[0].lower())
    if as_json:
        print(json.dumps(report, default=encode))
    else:
        console().print(tasks_view.render_one(report))
    return 0


def _find_task(client: Client, digits: str) -> dict[str, Any]:
    if len(digits) == ID_DIGITS:
        report = client.task(digits)
        if report.get("state") == "unknown":
            raise CommandFailed(f"no task {digits} is open")
        return {"id": digits, **report}
    found = [report for report in client.tasks() if report["id"].startswith(digits)]
    if len(found) != 1:
        which = f": {', '.join(report['id'] for report in found[:3])}{', ...' if len(found) > 3 else ''}"
        count = f"{len(found)} of" if found else "none of"
        raise CommandFailed(f"{count} your most urgent open tasks begin with {digits!r}{which if found else ''}")
    return found[0]


def reload(url: Url = None) -> int:
    """Let the broker read its configuration again."""
    with Client(url, name="penstock reload", connect_timeout=QUICK_CONNECT_S) as client:
        client.reload()
    print("the broker works with the new configuration")
    return 0


def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="its name, as in `penstock status`")], url: Url = None
) -> int:
    """Let a worker finish what it holds, and end."""
    with Client(url, name="penstock drain", connect_timeout=QUICK_CONNECT_S) as client:
        client.drain(worker)
    print(f"{worker} takes nothing new and ends when it is done")
    return 0


def doctor(url: Url = None) -> int:
    """Look for what is wrong here, and say what to do."""
    from penstock.client.cli.doctor import WRONG, examine

    num_wrong = 0
    for finding in examine(url, _ask_status):
        num_wrong += finding.level == WRONG
        print(f"{finding.level:<5}  {finding.topic:<10}  {finding.text}", flush=True)
        if finding.advice:
            print(f"{'':<5}  {'':<10}  -> {finding.advice}", flush=True)
    print(f"\n{num_wrong} wrong" if num_wrong else "\nnothing is wrong")
    return FAILED if num_wrong else 0


def _ask_status(address: Address) -> Mapping[str, Any] | None:
    try:
        with Client(address.url, name="penstock doctor", connect_timeout=QUICK_CONNECT_S) as client:
            return client.status()
    except (PenstockError, TimeoutError):
        return None

"""Arguments, exit statuses and failures that several commands share."""

from typing import Annotated, Final

import typer

FAILED, USAGE, NOT_READY, NO_BROKER, INTERRUPTED = 1, 2, 4, 5, 130
QUICK_CONNECT_S: Final = 2.0

Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="ipc:///folder or tcp://127.0.0.1:port")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


class CommandFailed(Exception):
    """A command that cannot do what was asked; the text is one line."""

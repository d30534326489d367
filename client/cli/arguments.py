"""Arguments, exit statuses and failures that several commands share."""

from typing import Annotated, Final

import typer

FAILED, USAGE, NOT_READY, NO_BROKER, INTERRUPTED = 1, 2, 4, 5, 130
QUICK_CONNECT_S: Final = 2.0

_URL_HELP: Final = "ipc:///folder or tcp://host:port; several, with commas, are tried in their order"
Url = Annotated[str | None, typer.Option("--url", metavar="URL", help=_URL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


class CommandFailed(Exception):
    """A command that cannot do what was asked; the text is one line."""

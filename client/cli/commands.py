"""The command line `penstock`: which commands there are, and errors of one line.

Knows which module has which command; does not know what they do.
Exit statuses: 0 done, 1 failed, 2 wrong usage, 4 a broker without a ready worker, 5 no broker answers, 130 Ctrl-C.
"""

import importlib.metadata
import os
import sys
from typing import Annotated, Any, Final

import typer

from penstock.broker.address import AddressError
from penstock.broker.keys import KeyProblem
from penstock.broker.settings import SettingsError
from penstock.client.cli import calls, jobs, keys, looking, programs, values
from penstock.client.cli.arguments import FAILED, INTERRUPTED, NO_BROKER, USAGE, CommandFailed
from penstock.client.errors import InvalidInput, PenstockError, Unavailable

_UsageError: Any = typer.BadParameter.__mro__[1]

EPILOG = """\b
first steps:
  penstock up                                   a broker and a worker per device, here
  penstock call softmax x=[1,2,3]               one task, from another terminal
  penstock status                               who works on what

Addresses: --url, else PENSTOCK_URL, else [client] of penstock.toml, else the connection file of a running broker, else the
default ipc folder.
"""

app = typer.Typer(
    name="penstock", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
_PASS_ON: Final = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.callback(invoke_without_command=True)
def penstock(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and end")] = False,
) -> None:
    """A GPU work queue for one box: one broker, one worker per device."""
    if version:
        print(importlib.metadata.version("penstock"))
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command(epilog=programs.UP_EPILOG)(programs.up)
app.command(context_settings=_PASS_ON)(programs.broker)
app.command(context_settings=_PASS_ON)(programs.worker)
app.command(epilog=calls.CALL_EPILOG)(calls.call)
app.command(epilog=calls.BENCH_EPILOG)(calls.bench)
app.command(epilog=looking.STATUS_EPILOG)(looking.status)
app.command()(looking.tasks)
app.command()(looking.task)
app.add_typer(jobs.app)
app.command(epilog=jobs.BACKUP_EPILOG)(jobs.backup)
app.command()(looking.drain)
app.command()(looking.reload)
app.command()(looking.doctor)
app.command(context_settings=_PASS_ON)(programs.simulate)
app.add_typer(keys.app, name="keys")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Every error that a user can cause is one line on stderr."""
    try:
        returned = app(args=arguments, prog_name="penstock", standalone_mode=False)
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except _UsageError as e:
        return _fail(f"{_one_line(e.format_message())} (penstock {_command_of(e)}--help shows how)", USAGE)
    except (AddressError, KeyProblem, SettingsError, values.ValueProblem) as e:
        return _fail(str(e), USAGE)
    except Unavailable as e:
        return _fail(str(e), NO_BROKER)
    except TimeoutError as e:
        return _fail(str(e), NO_BROKER)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is still buffered has no reader
        return FAILED
    except InvalidInput as e:
        return _fail(str(e), FAILED)
    except PenstockError as e:
        return _fail(f"{type(e).__name__}: {e}", FAILED)
    except (CommandFailed, OSError) as e:
        return _fail(str(e), FAILED)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED


def _fail(message: str, status: int) -> int:
    print(f"penstock: {_one_line(message)}", file=sys.stderr)
    return status


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _command_of(error: Any) -> str:
    path = str(error.ctx.command_path) if error.ctx is not None else "penstock"
    name = path.removeprefix("penstock").strip()
    return f"{name} " if name else ""

"""The command line `penstock`: arguments, exit statuses and errors of one line.

Knows which command does what; broker and workers are other processes, started with `python -P -m` and never imported.
Exit statuses: 0 done, 1 failed, 2 wrong usage, 4 a broker without a ready worker, 5 no broker answers, 130 Ctrl-C.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.live import Live

from penstock.broker.address import Address, AddressError
from penstock.broker.settings import SettingsError
from penstock.client import Client
from penstock.client.cli import status as status_view
from penstock.client.cli import values
from penstock.client.cli.up import Up, UpConfig, find_address
from penstock.client.errors import InvalidInput, PenstockError, Unavailable, UnknownKernel

FAILED, USAGE, NO_BROKER, INTERRUPTED = 1, 2, status_view.NO_BROKER_STATUS, 130
QUICK_CONNECT_S: Final = 2.0
WATCH_S: Final = 1.0
NOT_A_TERMINAL_WIDTH: Final = 160
_UsageError: Any = typer.BadParameter.__mro__[1]

EPILOG = """\b
first steps:
  penstock up                                   a broker and a worker per device, here
  penstock call softmax x=[1,2,3]               one task, from another terminal
  penstock status                               who works on what

Addresses: --url, else PENSTOCK_URL, else the connection file of a running broker, else the default ipc folder.
"""
UP_EPILOG = """\b
examples:
  penstock up                                   every device found
  penstock up --device cpu --workers 2          two workers on the CPU
  penstock up --kernels my_kernels.py           kernels of your own, beside the built-in ones
  penstock up --option embed.model=/models/mini an option of a kernel

Ctrl-C lets open tasks finish; a second one ends at once.
"""
CALL_EPILOG = """\b
examples:
  penstock call softmax x=[1,2,3]               JSON values
  penstock call softmax x=@data.npy             an array from a file
  penstock call embed text="a sentence" -v      plain text, and where the time went
  echo '[[1,2],[3,4]]' | penstock call softmax x=@-
  penstock call sleep seconds=2 steps=4 --stream
"""
STATUS_EPILOG = """\b
exit status:
  0  a worker is ready      4  a broker, but no ready worker      5  no broker answers
"""
BENCH_EPILOG = """\b
examples:
  penstock bench                                softmax, 64 tasks under way, 5 s
  penstock bench --in-flight 1                  the latency of one task at a time
  penstock bench embed text="a sentence" --seconds 10
"""

app = typer.Typer(
    name="penstock", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
_PASS_ON: Final = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="ipc:///folder or tcp://127.0.0.1:port")]
Kernels = Annotated[list[str] | None, typer.Option(metavar="MODULE", help="a module or .py file with kernels; repeatable")]
KernelOptions = Annotated[list[str] | None, typer.Option(metavar="KERNEL.KEY=VALUE", help="of a kernel; repeatable")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


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


# --- programs ------------------------------------------------------------------------------------------------------


@app.command(epilog=UP_EPILOG)
def up(
    device: Annotated[list[str] | None, typer.Option(metavar="NAME", help="auto, cpu, mps, cuda:0, ...; repeatable")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="workers per device")] = 1,
    url: Url = None,
    kernels: Kernels = None,
    option: KernelOptions = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="a penstock.toml (default: the one here)")] = None,
) -> int:
    """Run a broker and its workers here, until Ctrl-C."""
    _need_torch("up")
    address = find_address(url, config)
    supervisor = Up(UpConfig(address, tuple(device or ()), workers, tuple(kernels or ()), tuple(option or ()), config), say)
    threading.Thread(target=_announce, args=(supervisor, address), daemon=True).start()
    return supervisor.run()


def say(line: str) -> None:
    """One line for whoever watches `up`; a reader that has gone is no reason to end."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def _announce(supervisor: Up, address: Address) -> None:
    """Say once that the first worker of our own broker is ready, and what to do then."""
    began = time.monotonic()
    with Client(address.url, name="penstock up", connect_timeout=1.0) as client:
        while not supervisor.is_stopping:
            try:
                body = client.status(timeout=1.0)
            except (Unavailable, TimeoutError):
                continue
            ready = [worker for worker in body.get("workers", ()) if worker["state"] in ("ready", "busy")]
            if ready and supervisor.is_broker(body.get("pid")):
                supervisor.announce(
                    f"ready after {time.monotonic() - began:.1f} s: {ready[0]['name']} on {ready[0]['device']}, "
                    f"{len(body['kernels'])} kernels. Now try, in another terminal: penstock call softmax x=[1,2,3]"
                )
                return
            time.sleep(0.05)


@app.command(context_settings=_PASS_ON)
def broker(context: typer.Context) -> None:
    """Run a broker alone. `penstock broker --help` shows its own options."""
    _become("penstock.broker", context.args)


@app.command(context_settings=_PASS_ON)
def worker(context: typer.Context) -> None:
    """Run one worker for a running broker. `penstock worker --help` shows its own options."""
    _need_torch("worker")
    _become("penstock.worker", context.args)


def _become(module: str, arguments: list[str]) -> None:
    """This process goes on as another program, so that signals and exit status are that program's."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


def _need_torch(command: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise CommandFailed(f"{command} needs torch, which is not installed: pip install 'penstock[worker]'")


# --- tasks ---------------------------------------------------------------------------------------------------------


class CommandFailed(Exception):
    """A command that cannot do what was asked; the text is one line."""


@app.command(epilog=CALL_EPILOG)
def call(
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="a kernel's name")],
    inputs: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE", help="JSON, @file.npy, @file, @- or text")] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="time limit of the task")] = 60.0,
    priority: Annotated[str | None, typer.Option(metavar="P", help="high, medium, low, or 0 (soonest) to 9")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="show partial answers as they come")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show where the time went, on stderr")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> int:
    """Run one task and print its result."""
    for argument in inputs or ():
        values.split(argument)
    with Client(url, name="penstock call") as client:
        until = time.monotonic() + timeout
        arguments = values.parse(inputs or (), _spec(client, kernel, until))
        verbs = client.options(timeout=max(0.0, until - time.monotonic()), priority=_priority(priority))
        if stream:
            chunks = verbs.stream(kernel, **arguments)
            for chunk in chunks:
                _print_value(chunk, as_json)
            task = chunks.task
        else:
            task = verbs.submit(kernel, **arguments)
        result = task.result()
        if not stream:
            _print_value(result, as_json)
        if verbose:
            print(values.show_timings(task.timings), file=sys.stderr)
    return 0


def _priority(text: str | None) -> Any:
    return int(text) if text is not None and text.isdecimal() else text


def _spec(client: Client, kernel: str, until: float) -> Mapping[str, Any]:
    """What the kernel takes, waiting for workers that are starting.

    Raises:
        UnknownKernel: there is none of that name, and none will come.
    """
    while True:
        body = client.status()
        specs: Mapping[str, Any] = body["kernels"]
        if kernel in specs:
            spec: Mapping[str, Any] = specs[kernel]
            return spec
        if body["is_settled"] or time.monotonic() >= until:
            raise UnknownKernel(f"no kernel {kernel!r}; known: {', '.join(sorted(specs)) or 'none: no worker is ready'}")
        time.sleep(0.05)


def _print_value(value: Any, as_json: bool) -> None:
    print(json.dumps(values.to_json(value)) if as_json else values.show(value), flush=True)


@app.command(epilog=BENCH_EPILOG)
def bench(
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="a kernel's name")] = "softmax",
    inputs: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE", help="as for `penstock call`")] = None,
    in_flight: Annotated[int, typer.Option(min=1, max=65_536, metavar="N", help="tasks under way at any time")] = 64,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600.0, metavar="S", help="how long")] = 5.0,
    rows: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="rows of 1,024 float32 per task, without inputs")] = 1,
    as_json: AsJson = False,
    url: Url = None,
) -> int:
    """Put load on the broker, and show where time goes."""
    from penstock.client.cli import bench as load  # numpy's random generator is only needed here

    with Client(url, name="penstock bench") as client:
        spec = _spec(client, kernel, time.monotonic() + 60.0)
        if kernel != "softmax" and not inputs:
            raise values.ValueProblem(f"{kernel} needs inputs, as in `penstock bench {kernel} name=value`")
        items = [values.parse(inputs, spec)] if inputs else load.softmax_inputs(rows)
        report = load.run_with_bar(client, kernel, items, in_flight, seconds)
    print(json.dumps(report.to_json()) if as_json else load.show(report))
    if report.num_failed:
        raise CommandFailed(f"{report.num_failed} tasks failed, the first with {report.first_error}")
    return 0


# --- looking at a broker -------------------------------------------------------------------------------------------


@app.command(epilog=STATUS_EPILOG)
def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="again every second, until Ctrl-C")] = False,
    url: Url = None,
) -> int:
    """Show workers, queues and tasks."""
    where = Address.find(url)
    with Client(where.url, name="penstock status", connect_timeout=QUICK_CONNECT_S) as client:
        body = client.status()
        if as_json:
            print(json.dumps(body, default=_encode), flush=True)
        elif not watch:
            _console().print(status_view.render(body, where.url))
        if watch and as_json:
            while True:
                time.sleep(WATCH_S)
                print(json.dumps(client.status(), default=_encode), flush=True)
        elif watch:
            with Live(status_view.render(body, where.url), console=_console(), auto_refresh=False) as live:
                while True:
                    time.sleep(WATCH_S)
                    live.update(status_view.render(client.status(), where.url), refresh=True)
    return status_view.exit_status(body)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=NOT_A_TERMINAL_WIDTH)


def _encode(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} in a status")


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="its name, as in `penstock status`")], url: Url = None
) -> int:
    """Let a worker finish what it holds, and end."""
    with Client(url, name="penstock drain", connect_timeout=QUICK_CONNECT_S) as client:
        client.drain(worker)
    print(f"{worker} takes nothing new and ends when it is done")
    return 0


@app.command()
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


# --- the boundary --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Every error that a user can cause is one line on stderr."""
    try:
        returned = app(args=arguments, prog_name="penstock", standalone_mode=False)
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except _UsageError as e:
        return _fail(f"{_one_line(e.format_message())} (penstock {_command_of(e)}--help shows how)", USAGE)
    except (AddressError, SettingsError, values.ValueProblem) as e:
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

"""The commands that put tasks on the line: `call` and `bench`."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from penstock.client import Client
from penstock.client.cli import values
from penstock.client.cli.arguments import AsJson, CommandFailed, Url
from penstock.client.errors import UnknownKernel

CALL_EPILOG = """\b
examples:
  penstock call softmax x=[1,2,3]               JSON values
  penstock call softmax x=@data.npy             an array from a file
  penstock call embed text="a sentence" -v      plain text, and where the time went
  echo '[[1,2],[3,4]]' | penstock call softmax x=@-
  penstock call sleep seconds=2 steps=4 --stream
"""
BENCH_EPILOG = """\b
examples:
  penstock bench                                softmax, 64 tasks under way, 5 s
  penstock bench --in-flight 1                  the latency of one task at a time
  penstock bench embed text="a sentence" --seconds 10
"""


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

"""`penstock simulate`: batching policies under a virtual clock. Exit statuses: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.settings import SettingsError, load
from penstock.broker.simulator import clients, plot, report, service
from penstock.broker.simulator.experiment import POLICIES, UNITS_S, Setup, run
from penstock.broker.simulator.sweep import default_tasks, max_runs, sweep

FAILED, USAGE, INTERRUPTED = 1, 2, 130

EPILOG = f"""\
services (numbers in --unit):
  {service.FORMS.replace(chr(10), chr(10) + "  ")}

clients:
  {clients.SYNTAX.replace(chr(10), chr(10) + "  ")}

examples:
  penstock simulate --service uniform:1:20 --batch 128 --bins 3 --boundaries equal --policy static
      the throughput of multi-bin batching: 9.40 tasks/s, with one bin 6.45
  penstock simulate --service lognormal:3:1 --unit ms --arrival poisson:300/s --policy dynamic --max-wait-ms 5
      this broker, which learns its bins, at 300 tasks per second
  penstock simulate --service exponential:20 --unit ms --policy dynamic --clients greedy:tasks=10000,light:closed=1
      a client with 10,000 queued tasks and one that sends one at a time
  penstock simulate --service trace:times.csv:ms --unit ms --policy dynamic --bins 4 --plot load.png
      measured times; a picture of latency and throughput against load, four bins beside one
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="penstock simulate",
        description="Run a batching policy on random or measured service times, without hardware and faster than real time.\n"
        "A batch takes as long as its longest task. Throughput is printed in tasks per unit of the service times.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    work = p.add_argument_group("work")
    work.add_argument("--service", required=True, metavar="KIND:...", help="how long tasks take alone, see below")
    work.add_argument("--unit", default="s", choices=tuple(UNITS_S), help="of all durations and rates here (default s)")
    work.add_argument("--tasks", type=int, metavar="N", help="tasks in all (default 128000; of a trace: its length)")
    work.add_argument("--arrival", default="burst", metavar="burst|poisson:RATE", help="RATE in tasks per unit, or as 800/s")
    work.add_argument("--clients", metavar="NAME:...", help="several clients with loads of their own, see below")
    work.add_argument("--timeout", type=float, metavar="T", help="time limit of a task (default none)")
    work.add_argument("--mispredict", type=float, default=0.0, metavar="P",
                      help="share of tasks whose predicted time is that of another task (default 0)")  # fmt: skip
    policy = p.add_argument_group("policy")
    policy.add_argument("--policy", default="static", choices=POLICIES,
                        help="static: full batches sealed in order of arrival per bin, as in the paper; "
                        "dynamic: this broker; continuous: --batch slots, each refilled at once (default static)")  # fmt: skip
    policy.add_argument("--batch", type=int, default=32, metavar="N", help="most tasks in a batch (default 32)")
    policy.add_argument("--bins", default=None, metavar="N|auto", help="bins by predicted time (default 1; dynamic: auto)")
    policy.add_argument("--boundaries", default="dp", choices=("equal", "dp"),
                        help="of N bins: equal shares, or least expected batch time (default dp)")  # fmt: skip
    policy.add_argument("--seal-ms", type=float, metavar="MS",
                        help="static: seal an incomplete batch so long after its first task, "
                        "even while servers are busy")  # fmt: skip
    policy.add_argument("--max-wait-ms", type=float, metavar="MS",
                        help="dynamic: hold an incomplete batch so long while a server is idle (default 0)")  # fmt: skip
    policy.add_argument("--config", type=Path, metavar="FILE", help="dynamic: [scheduling] of this penstock.toml")
    policy.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="dynamic: a setting of [scheduling]; repeatable. Batches may have --batch tasks from the start "
                        "unless first_batch_sizes is set here or in --config")  # fmt: skip
    servers = p.add_argument_group("servers")
    servers.add_argument("--servers", type=int, default=1, metavar="N", help="(default 1)")
    servers.add_argument("--slowness", metavar="F,...", help="how many times as long each server takes (default 1)")
    servers.add_argument("--credit", type=int, default=1, metavar="N",
                         help="dynamic: batches that a server may hold, running one included (default 1)")  # fmt: skip
    result = p.add_argument_group("result")
    result.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds, equal tasks (default 0)")
    result.add_argument("--warmup", type=int, default=None, metavar="N", help="leave the first N tasks out (default 0)")
    result.add_argument("--json", action="store_true", help='JSON on stdout; "unit" says what durations are in')
    result.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="run at rates from 10 to 110 %% of the capacity, with one bin and with the chosen bins, and draw "
                        "latency and throughput")  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> int:
    """The program; its exit status."""
    args = parser().parse_args(argv)
    try:
        setup = _setup(args)
        if args.plot is not None:
            plot.check(args.plot)
    except (service.ServiceError, clients.ClientsError, SettingsError, ValueError, plot.PlotError) as e:
        print(f"penstock simulate: {e}", file=sys.stderr)
        return USAGE
    gc.disable()  # as the broker does: a million tasks, and no cycles
    try:
        if args.plot is not None:
            return _draw(setup, args)
        with _bar("simulating", _num_tasks(setup)) as told:
            finished = run(setup, told)
        print(json.dumps(report.to_json(finished), indent=2) if args.json else report.show(finished), flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has enough; nor may the interpreter flush into it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RuntimeError, plot.PlotError, ValueError) as e:
        print(f"penstock simulate: {e}", file=sys.stderr)
        return FAILED
    return 0


def _draw(setup: Setup, args: argparse.Namespace) -> int:
    with _bar("runs", max_runs(setup)) as told:
        series = sweep(setup, told)
    plot.draw(setup, series, args.plot)
    if args.json:
        content = {**report.describe(setup, ()), "plot": str(args.plot), "series": [one.to_json() for one in series]}
        print(json.dumps(content, indent=2))
    else:
        capacities = ", ".join(f"{one.label} {one.capacity:.4f} tasks/{setup.unit}" for one in series)
        print(f"capacity: {capacities}; drawn in {args.plot}")
    return 0


def _setup(args: argparse.Namespace) -> Setup:
    """What the arguments ask for, or one of the errors that `main` shows."""
    times = service.parse(args.service)
    num_tasks = args.tasks
    if num_tasks is None:
        num_tasks = default_tasks(args.batch) if args.plot else 128_000 if times.trace is None else len(times.trace)
    if args.bins in (None, "auto"):
        if args.bins == "auto" and args.policy != "dynamic":
            raise ValueError("--bins auto: only --policy dynamic learns its bins")
        bins = None
    else:
        bins = _whole(args.bins, "--bins")
    return Setup(
        service=times, policy=args.policy, unit=args.unit, batch_size=args.batch, bins=bins, boundaries=args.boundaries,
        clients=tuple(clients.parse(args.clients)) if args.clients else (clients.Client(),), num_tasks=num_tasks,
        arrival_rate=_rate(args.arrival, args.unit), timeout=args.timeout, num_servers=args.servers,
        slowness=tuple(_real(f, "--slowness") for f in args.slowness.split(",")) if args.slowness else (),
        credit=args.credit, mispredict=args.mispredict, seal_ms=args.seal_ms, num_warmup=args.warmup or 0, seed=args.seed,
        config=_config(args),
    )  # fmt: skip


def _config(args: argparse.Namespace) -> SchedulingConfig:
    """Settings of the production policy. Neither the environment nor a penstock.toml that lies about has a part in it."""
    given: dict[str, Any] = {}
    for text in args.set:
        name, is_set, value = text.partition("=")
        if not is_set:
            raise ValueError(f"--set {text}: needs NAME=VALUE")
        given[name] = value
    if args.max_wait_ms is not None:
        given["max_wait_ms"] = args.max_wait_ms
    if args.config is None:
        given.setdefault("first_batch_sizes", (max(args.batch, 1),) * 3)
    return load(SchedulingConfig, "scheduling", file=args.config or Path(os.devnull), overrides=given, env={})


def _rate(arrival: str, unit: str) -> float | None:
    """Tasks per unit; None: a burst."""
    kind, _, rate = arrival.partition(":")
    if kind == "burst" and not rate:
        return None
    number, _, per = rate.partition("/")
    if kind != "poisson" or (per and per not in UNITS_S):
        raise ValueError(f"--arrival {arrival}: is burst, poisson:RATE, poisson:RATE/s or poisson:RATE/ms")
    return _real(number, "--arrival poisson") * UNITS_S[unit] / UNITS_S[per or unit]


def _whole(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a whole number") from None


def _real(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a number") from None


def _num_tasks(setup: Setup) -> int:
    bounded = [c.tasks for c in setup.clients if c.tasks is not None]
    return sum(bounded) if bounded else setup.num_tasks


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr, if that is a terminal."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        line = bar.add_task(what, total=total)
        yield lambda num: bar.update(line, completed=min(num, total))


if __name__ == "__main__":
    sys.exit(main())

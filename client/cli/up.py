"""`penstock up`: a broker and its workers as children of one process in the foreground.

Knows processes, signals and log lines; knows neither tasks nor devices beyond their names. Each worker has a supervisor of
its own, which starts it again when it fails; the supervisors and the broker are the children here, and started again by
this. They have process groups of their own, so that Ctrl-C reaches this process only, which then stops them in order: the
broker lets open tasks finish, then the workers go. Nothing outlives this process, however it ends: supervisors watch their
parent (`--parent`), and on Linux the kernel tells the broker.
"""

import contextlib
import glob
import json
import os
import selectors
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from penstock.broker.address import Address
from penstock.broker.settings import SettingsError
from penstock.client.cli.children import Child, describe

BROKER_STOP_S: Final = 40.0
WORKER_STOP_S: Final = 10.0
WORKER_GIVES_UP: Final = 87
"""Its supervisor has started it again often enough; see `penstock worker --help`."""
REFUSED_STATUS: Final = 77
CANNOT_START: Final = (1, 2, REFUSED_STATUS)
"""Of a worker: something is missing; wrong settings; the broker does not allow its key."""
BROKER_GIVES_UP: Final = (2, 3)
"""Wrong settings; the address is taken."""
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class UpConfig:
    """What `up` was asked for. Empty `devices`: the worker's own settings, else one worker per device found."""

    address: Address
    devices: tuple[str, ...] = ()
    num_per_device: int = 1
    kernels: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    file: Path | None = None
    metrics: str | None = None
    """HOST:PORT where the broker serves its metrics."""


def find_address(explicit: str | None, file: Path | None, env: Mapping[str, str] = os.environ) -> Address:
    """Where `up` opens its broker: argument > PENSTOCK_URL > the broker's own settings > the default ipc folder.

    Raises:
        AddressError, SettingsError: what was found cannot be used.
    """
    url = explicit or env.get("PENSTOCK_URL") or setting("broker", "url", file, env)
    return Address(url) if url else Address.default(env)


def setting(section: str, name: str, file: Path | None, env: Mapping[str, str] = os.environ) -> str | None:
    """One setting of another program, from the environment or the file."""
    given = env.get(f"PENSTOCK_{section}_{name}".upper())
    path = file or Path("penstock.toml")
    if given is not None or (file is None and not path.is_file()):
        return given
    try:
        with path.open("rb") as f:
            value = tomllib.load(f).get(section, {}).get(name)
    except (OSError, tomllib.TOMLDecodeError, AttributeError) as e:
        raise SettingsError(f"{path}: {e}") from e
    return value if isinstance(value, str) and value else None


# --- what to run ---------------------------------------------------------------------------------------------------


def broker_command(config: UpConfig) -> list[str]:
    command = [sys.executable, "-P", "-m", "penstock.broker", "--url", config.address.url]
    command += ["--config", str(config.file)] if config.file else []
    return command + (["--metrics", config.metrics] if config.metrics else [])


def worker_command(config: UpConfig, name: str, device: str | None, num_threads: int | None) -> list[str]:
    command = [sys.executable, "-P", "-m", "penstock.worker", "--broker", config.address.url, "--name", name]
    command += ["--parent", str(os.getpid())]
    if device is not None:
        command += ["--device", device]
    if num_threads is not None:
        command += ["--threads", str(num_threads)]
    for module in config.kernels:
        command += ["--kernels", module]
    for option in config.options:
        command += ["--option", option]
    return command + (["--config", str(config.file)] if config.file else [])


def has_several_devices() -> bool:
    """Whether it is worth asking torch for more devices than the first: there are signs of them.

    The first worker starts at once in any case, because to ask takes as long as to start.
    """
    return len(glob.glob("/dev/nvidia[0-9]*")) > 1 or os.path.exists("/dev/kfd")


def _threads_each(num_workers: int) -> int | None:
    """Threads per worker where several share the CPU; None: torch's own choice."""
    return None if num_workers < 2 else max(1, (os.cpu_count() or 1) // num_workers)


# --- up ------------------------------------------------------------------------------------------------------------


class Up:
    """Runs a broker and workers until told to stop.

    Args:
        say: writes one line for the user.
    """

    def __init__(self, config: UpConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._broker = Child("broker", broker_command(config), is_leashed=True)
        self._workers: list[Child] = []
        self._lister: Child | None = None
        self._listed = ""
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._num_signals = 0
        self._stop_at: float | None = None
        self._is_stopping_workers = False
        self.is_ready = False
        self.exit_status = 0

    def run(self) -> int:
        """Serve; the exit status comes back, and every child is gone."""
        old = self._catch_signals()
        try:
            self._start_all()
            while self._step():
                pass
        finally:
            for child in self._children():
                self._kill(child)
            signal.set_wakeup_fd(-1)
            for number, handler in old.items():
                signal.signal(number, handler)
            self._selector.close()
            self._wake_reader.close()
            self._wake_writer.close()
        return self.exit_status

    def announce(self, line: str) -> None:
        """The first worker is ready. May be called from another thread."""
        self.is_ready = True
        self._say(line)

    def is_broker(self, pid: object) -> bool:
        """Whether a status came from the broker that runs here."""
        process = self._broker.process
        return process is not None and process.pid == pid

    @property
    def is_stopping(self) -> bool:
        return self._stop_at is not None

    # --- start ---------------------------------------------------------------------------------------------------

    def _start_all(self) -> None:
        config, now = self._config, time.monotonic()
        self._start(self._broker, now)
        devices: list[str | None] = [*config.devices]
        if not devices:
            own = setting("worker", "device", config.file, os.environ)
            devices = [None]
            if own in (None, "auto") and has_several_devices():
                command = [sys.executable, "-P", "-m", "penstock.worker", "--list-devices"]
                self._lister = Child("devices", command)
                self._start(self._lister, now)
        self._add_workers(devices, now)

    def _add_workers(self, devices: Sequence[str | None], now: float) -> None:
        wanted = [device for device in devices for _ in range(self._config.num_per_device)]
        num_threads = _threads_each(sum(device in (None, "auto", "cpu") for device in wanted))
        for device in wanted:
            name = f"worker-{len(self._workers) + 1}"
            on_cpu = device in (None, "auto", "cpu")
            command = worker_command(self._config, name, device, num_threads if on_cpu else None)
            self._workers.append(Child(name, command))
            self._start(self._workers[-1], now)

    def _start(self, child: Child, now: float) -> None:
        child.start(now)
        os.set_blocking(child.pipe.fileno(), False)
        self._selector.register(child.pipe, selectors.EVENT_READ, child)

    def _children(self) -> list[Child]:
        return [self._broker, *self._workers, *([self._lister] if self._lister else [])]

    # --- signals -------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> dict[int, Any]:
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        old: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        if old[signal.SIGHUP] is signal.SIG_IGN:  # under nohup, which is there to outlive the terminal
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)  # it only wakes the loop
        return old

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1

    # --- the loop ------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Wait for something, act upon it; False when everything has ended."""
        for key, _ in self._selector.select(self._wait_s()):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wake_reader.recv(4096)
            else:
                self._log(key.data)
        now = time.monotonic()
        if self._num_signals and not self.is_stopping:
            self._say("stopping: open tasks may finish; Ctrl-C again ends at once")
            self._stop(now)
        for child in self._children():
            if child.process is not None and child.process.poll() is not None:
                self._ended(child, now)
            elif child.restart_at is not None and now >= child.restart_at:
                self._start(child, now)
        return self._go_on_stopping(now) if self.is_stopping else True

    def _wait_s(self) -> float | None:
        dues = [child.restart_at for child in self._children() if child.restart_at is not None]
        if self._stop_at is not None:
            dues.append(self._stop_at)
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _log(self, child: Child, is_end: bool = False) -> None:
        lines = child.lines(is_end)
        if child is self._lister:
            self._listed += "".join(lines)
            return
        for line in lines:
            self._say(f"{child.name:<8} | {line}")

    def _ended(self, child: Child, now: float) -> None:
        assert child.process is not None
        status = child.process.returncode
        self._log(child, is_end=True)
        self._selector.unregister(child.pipe)
        child.pipe.close()
        child.process = None
        if self.is_stopping:
            return
        if child is self._lister:
            self._on_devices(status, now)
        elif child is self._broker and status in BROKER_GIVES_UP:
            self._give_up(status, now)
        elif child is not self._broker and status in CANNOT_START and not self.is_ready:
            self._give_up(1, now)  # it has said why; another try would say the same
        elif child is not self._broker and status == 0:
            self._say(f"{child.name} was drained and has ended")
        elif child is not self._broker and status in (WORKER_GIVES_UP, REFUSED_STATUS):
            self._say(f"{child.name} has given up, as told above; the others go on")
            self.exit_status = 1
            if not any(worker.is_running or worker.restart_at is not None for worker in self._workers):
                self._give_up(1, now)
        else:
            pause = child.plan_restart(now)
            self._say(f"{child.name} has ended ({describe(status)}); it starts again in {pause:.0f} s")

    def _on_devices(self, status: int, now: float) -> None:
        """The first device has its worker; the others get theirs."""
        if status:
            self._say(f"the other devices cannot be listed ({describe(status)}): {self._listed[-300:]}")
            return
        devices: list[str] = json.loads(self._listed)
        self._add_workers(devices[1:], now)

    # --- stop ----------------------------------------------------------------------------------------------------

    def _give_up(self, status: int, now: float) -> None:
        self.exit_status = status
        self._stop(now)

    def _stop(self, now: float) -> None:
        for child in self._children():
            child.restart_at = None
        self._stop_at = now + BROKER_STOP_S
        self._broker.signal(signal.SIGTERM)
        if self._lister is not None:
            self._lister.signal(signal.SIGTERM)

    def _go_on_stopping(self, now: float) -> bool:
        """First the broker, then the workers; who takes too long is killed. False when all are gone."""
        assert self._stop_at is not None
        running = [child for child in self._children() if child.is_running]
        if not running:
            return False
        if self._num_signals > 1:
            for child in running:
                child.signal(signal.SIGKILL)
            self._stop_at = now + WORKER_STOP_S
        elif not self._is_stopping_workers and (not self._broker.is_running or now >= self._stop_at):
            self._is_stopping_workers = True
            self._stop_at = now + WORKER_STOP_S
            for child in running:
                child.signal(signal.SIGKILL if child is self._broker else signal.SIGTERM)
        elif self._is_stopping_workers and now >= self._stop_at:
            for child in running:
                self._say(f"{child.name} does not end: killed")
                child.signal(signal.SIGKILL)
            self._stop_at = now + WORKER_STOP_S
        return True

    def _kill(self, child: Child) -> None:
        """Whatever happened: leave nothing behind."""
        if child.process is not None:
            child.process.kill()
            child.process.wait()
            child.pipe.close()
            child.process = None

"""Real processes for a test: a broker and workers on folders of their own, always stopped. Knows no kernels."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from penstock.client import Client, Unavailable

KERNELS = Path(__file__).with_name("e2e_kernels.py")
LIMIT_S = 60.0
STOP_S = 15.0
CLI = [sys.executable, "-P", "-m", "penstock.client.cli"]


def until(is_true: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Poll until something is true, and return it."""
    end = time.monotonic() + limit_s
    while True:
        value = is_true()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit_s:.0f} s: {what}")
        time.sleep(0.02)


def private_env(folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a machine on which nobody else runs Penstock."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return env | {"XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder / "state"), **(extra or {})}


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Running:
    """One broker and its workers. `extra` is added to every process's environment."""

    def __init__(self, folder: Path, extra: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.env = private_env(folder, {"PENSTOCK_WORKER_THREADS": "1", **(extra or {})})
        self.url = f"ipc://{folder}/penstock"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    # --- processes -----------------------------------------------------------------------------------------------

    def start(self, name: str, command: Sequence[str], extra: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A process with its output in `<name>.log`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.env | dict(extra or {}), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self.processes[name] = process
        return process

    def start_broker(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "penstock.broker", "--url", self.url, *arguments]
        return self.start("broker", command)

    def start_worker(self, name: str, *arguments: str, extra: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "penstock.worker", "--broker", self.url, "--device", "cpu", "--name", name]
        return self.start(name, [*command, *arguments], extra)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str) -> None:
        """SIGKILL, and wait for the end, also of the worker that ends with its supervisor."""
        process = self.processes.pop(name)
        children = psutil.Process(process.pid).children()
        process.kill()
        process.wait(STOP_S)
        until(lambda: all(is_gone(child.pid) for child in children), f"the processes of {name} ended", STOP_S)

    def stop(self) -> None:
        """End everything, however it stands."""
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self.processes.values():
            process.wait(STOP_S)

    # --- what a user has -----------------------------------------------------------------------------------------

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"connect_timeout": LIMIT_S, "timeout": LIMIT_S, **options})

    def cli(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        """`penstock ...`, to its end."""
        done = subprocess.run(
            [*CLI, *arguments], env=self.env, input=stdin, capture_output=True, timeout=LIMIT_S, check=False, cwd=self.folder
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def wait_ready(self, *names: str) -> dict[str, Any]:
        """Until these workers (or, without names, any) are ready; the status comes back."""

        def status() -> dict[str, Any] | None:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended:\n{self.log(name)}"
            try:
                body = client.status(timeout=1.0)
            except (Unavailable, TimeoutError):
                return None
            ready = {worker["name"] for worker in body["workers"] if worker["state"] in ("ready", "busy")}
            return body if ready and ready.issuperset(names) else None

        with self.client(connect_timeout=0.5) as client:
            body: dict[str, Any] = until(status, f"workers {names} ready")
        return body


@contextmanager
def running(
    folder: Path, *names: str, broker: Sequence[str] = (), worker: Sequence[str] = (), extra: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A broker and these workers, ready, with the kernels of `e2e_kernels.py`."""
    run = Running(folder, extra)
    try:
        run.start_broker(*broker)
        for name in names:
            run.start_worker(name, "--kernels", str(KERNELS), *worker)
        if names:
            run.wait_ready(*names)
        yield run
    finally:
        run.stop()


def worker_of(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One worker's row of a status."""
    found: dict[str, Any] = next(worker for worker in body["workers"] if worker["name"] == name)
    return found

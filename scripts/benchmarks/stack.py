"""A private broker and workers for a benchmark, started as processes and stopped at the end."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from penstock.broker.keys import ROLES, KeyFolder
from penstock.client import Client

HERE = Path(__file__).parent


def free_port(host: str = "127.0.0.1") -> int:
    """A port whose successor, for the workers, is free, too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind((host, 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind((host, port + 1))
                return port


class Stack:
    """Broker and workers on a folder of their own; a context manager.

    Args:
        toml: the broker's penstock.toml.
        worker_env: what each worker has in its environment beside everybody's.
        url: where to be, if not at an ipc address; has_keys: with keys there, one per role in `keys`.
    """

    def __init__(
        self,
        folder: Path,
        num_workers: int = 1,
        broker_args: Sequence[str] = (),
        worker_args: Sequence[str] = (),
        toml: str = "",
        worker_env: Sequence[Mapping[str, str]] = (),
        url: str = "",
        has_keys: bool = False,
    ) -> None:
        self.url = url or f"ipc://{folder}"
        self.keys: dict[str, Path] = {}
        self._env = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(folder),
            "XDG_STATE_HOME": str(folder / "state"),
            "PYTHONSAFEPATH": "1",
        }
        self._broker_args = list(broker_args)
        self._worker_args = ["--kernels", str(HERE / "bench_kernels.py"), "--state-dir", str(folder / "state"), *worker_args]
        self._worker_env = [*worker_env, *[{}] * (num_workers - len(worker_env))]
        self._num_workers = num_workers
        self.broker: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if has_keys:
            self.keys = {role: folder / f"{role}.key" for role in ROLES}
            for role, path in self.keys.items():
                KeyFolder(folder / "state" / "penstock").new(f"bench-{role}", role, path)
            self._worker_args += ["--key", str(self.keys["worker"])]
        if toml:
            (folder / "penstock.toml").write_text(toml)
            self._broker_args += ["--config", str(folder / "penstock.toml")]

    def __enter__(self) -> "Stack":
        self.broker = self._start({}, "penstock.broker", "--url", self.url, "--log-level", "warning", *self._broker_args)
        for i, env in enumerate(self._worker_env):
            args = ("--broker", self.url, "--name", f"cpu-{i}", "--device", "cpu", "--log-level", "warning", *self._worker_args)
            self.workers.append(self._start(env, "penstock.worker", *args))
        try:
            self._wait_ready(60.0)
        except BaseException:
            self.close()
            raise
        return self

    def _start(self, env: Mapping[str, str], module: str, *args: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-P", "-m", module, *args], env=self._env | dict(env))

    def _wait_ready(self, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        with Client(self.url, connect_timeout=limit_s, key=self.keys.get("client")) as client:
            while sum(w["state"] == "ready" for w in client.status()["workers"]) < self._num_workers:
                if time.monotonic() > end:
                    raise SystemExit("the workers did not become ready")
                time.sleep(0.1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all of them."""
        for p in [*self.workers, *([self.broker] if self.broker else [])]:
            p.terminate()
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()

"""A broker as a process of its own, with private sockets and a private connection file."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from plain_peer import PlainPeer


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll until it holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"did not come true within {timeout_s} s"
        time.sleep(0.01)


class BrokerProcess:
    """`python -m penstock.broker` at an address; its output is kept."""

    def __init__(self, folder: Path, url: str | None = None, *args: str) -> None:
        self.folder = folder
        self.url = url or f"ipc://{folder}/b"
        env = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
        env.pop("PENSTOCK_URL", None)
        command = [sys.executable, "-m", "penstock.broker", "--url", self.url, *args]
        self.process = subprocess.Popen(
            command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
        )
        self.peers: list[PlainPeer] = []

    @property
    def connection_file(self) -> Path:
        return self.folder / "penstock" / "connection.json"

    def endpoint(self, side: str) -> str:
        if self.url.startswith("ipc"):
            return f"{self.url}/{'clients' if side == 'front' else 'workers'}.sock"
        host, _, port = self.url.rpartition(":")
        return f"{host}:{int(port) + (side == 'back')}"

    def peer(self, side: str = "front", key: tuple[bytes, bytes, bytes] | None = None) -> PlainPeer:
        peer = PlainPeer(self.endpoint(side), key)
        self.peers.append(peer)
        return peer

    def client(self) -> PlainPeer:
        peer = self.peer()
        peer.hello()
        return peer

    def worker(self, name: str = "plain") -> PlainPeer:
        peer = self.peer("back")
        peer.become_worker(name)
        return peer

    def finish(self, timeout_s: float = 20.0) -> tuple[int, str]:
        """Wait for its end: (exit status, output)."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        return self.finish()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextmanager
def broker(folder: Path, url: str | None = None, *args: str) -> Iterator[BrokerProcess]:
    made = BrokerProcess(folder, url, *args)
    try:
        wait_for(lambda: made.connection_file.exists() or made.process.poll() is not None)
        yield made
    finally:
        made.close()

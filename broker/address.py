"""Where a broker is: one URL for both of its sockets, and the file that says it to clients on the same machine."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_IPC_PATH = 100
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_TCP = re.compile(r"tcp://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(\d{1,5})")


class AddressError(ValueError):
    """An address that cannot be used; the text says why and what would do."""


def runtime_dir(env: Mapping[str, str] = os.environ) -> Path:
    """The folder of the default sockets: per user, not shared."""
    base = env.get("XDG_RUNTIME_DIR")
    return Path(base, "penstock") if base else Path(tempfile.gettempdir(), f"penstock-{os.getuid()}")


def connection_file(env: Mapping[str, str] = os.environ) -> Path:
    return runtime_dir(env) / "connection.json"


@dataclass(frozen=True, slots=True)
class Address:
    """A broker's URL: `ipc:///folder` with clients.sock and workers.sock, or `tcp://host:port` (workers: port + 1)."""

    url: str

    def __post_init__(self) -> None:
        if self.is_ipc:
            folder = self.url.removeprefix("ipc://")
            if not folder.startswith("/") or len(folder) > MAX_IPC_PATH - len("/clients.sock"):
                raise AddressError(f"{self.url}: an ipc address is ipc:///folder with a path under {MAX_IPC_PATH} characters")
            return
        match = _TCP.fullmatch(self.url)
        if not match or not 0 < int(match[2]) < 65535:
            raise AddressError(f"{self.url!r} is no address: use ipc:///folder or tcp://host:port")

    @property
    def is_ipc(self) -> bool:
        return self.url.startswith("ipc://")

    @property
    def folder(self) -> Path:
        """The folder of the ipc sockets."""
        return Path(self.url.removeprefix("ipc://"))

    @property
    def is_local(self) -> bool:
        """Reachable from this machine only."""
        return self.is_ipc or self._host_and_port()[0] in LOOPBACK

    @property
    def front(self) -> str:
        """The clients' endpoint."""
        return f"ipc://{self.folder}/clients.sock" if self.is_ipc else self.url

    @property
    def back(self) -> str:
        """The workers' endpoint."""
        if self.is_ipc:
            return f"ipc://{self.folder}/workers.sock"
        host, port = self._host_and_port()
        return f"tcp://{host}:{port + 1}"

    def _host_and_port(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("tcp://").rpartition(":")
        return host, int(port)

    @classmethod
    def default(cls, env: Mapping[str, str] = os.environ) -> "Address":
        return cls(f"ipc://{runtime_dir(env)}")

    @classmethod
    def find(cls, explicit: str | None = None, env: Mapping[str, str] = os.environ) -> "Address":
        """The broker to use: the argument, else PENSTOCK_URL, else the connection file, else the default ipc folder.

        Raises:
            AddressError: what was found is no address.
        """
        url = explicit or env.get("PENSTOCK_URL") or read_connection(env).get("url")
        return cls(url) if url else cls.default(env)


def read_connection(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the connection file says: `url`, `pid`, and `server_key` if the broker wants keys there; {} without a file.

    Raises:
        AddressError: it is not what a broker writes.
    """
    path = connection_file(env)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise AddressError(f"the connection file {path} cannot be read: {e}") from e
    if not isinstance(content, dict) or not isinstance(content.get("url"), str):
        raise AddressError(f"the connection file {path} names no url: remove it, or start the broker again")
    return content


def write_connection(path: Path, address: Address, pid: int, server_key: str = "") -> None:
    """Publish the address, and the broker's public key if it wants keys there; mode 0600, replacing an older file at once."""
    new = path.with_suffix(f".{pid}")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
        json.dump({"url": address.url, "pid": pid} | ({"server_key": server_key} if server_key else {}), f)
    new.replace(path)


def remove_connection(path: Path, pid: int) -> None:
    """Take the file away if it is still the one that `pid` wrote."""
    try:
        if json.loads(path.read_text())["pid"] == pid:
            path.unlink()
    except (OSError, ValueError, LookupError, TypeError):
        return  # gone, or somebody else's: not ours to clean

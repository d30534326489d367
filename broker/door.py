"""One bound ROUTER: clients or workers at one address, who they are, and what limits their connections.

Knows socket options and where a peer's name comes from: on ipc from the kernel, on tcp from the key that the gate let in. What
a peer says of itself in its handshake counts for nothing. Does not know messages.
"""

import fcntl
import os
from collections import Counter
from typing import Any, Final

import zmq

from penstock.broker.address import Address
from penstock.broker.connections import Connections
from penstock.broker.detectors import detect
from penstock.broker.gate import Gate
from penstock.broker.state import BACK

MAX_SEND_BACKLOG: Final = 20_000
MAX_HANDSHAKE_MS: Final = 5000
MAX_PENDING_CONNECTIONS: Final = 1024
LOOPBACK_PRINCIPAL: Final = "loopback"
_SRCFD: Final = int(zmq.SRCFD)


class AlreadyRunning(RuntimeError):
    """Another broker owns the address."""


def lock(address: Address) -> Any:
    """Take an ipc address, for as long as the file that comes back is open: a second bind of its path would silently steal it.

    Raises:
        AlreadyRunning: another broker has it.
    """
    address.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    f = open(address.folder / "broker.lock", "w")  # noqa: SIM115 - held for the life of the process
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        f.close()
        raise AlreadyRunning(f"a broker is already running at {address.url}") from e
    return f


class Door:
    """See the module. `tag` is the first byte of the routes of everybody who comes through it."""

    def __init__(self, tag: int, side: str, address: Address, gate: Gate | None, context: "zmq.Context[Any]") -> None:
        self.tag = bytes((tag,))
        self.side = side
        self.is_ipc = address.is_ipc
        self.endpoint = address.back if side == BACK else address.front
        self.gate = None if address.is_ipc else gate
        self.connections: Connections | None = None
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)

    def open(self, max_message_bytes: int, group_access: bool = False) -> None:
        """Bind; `group_access`: on ipc members of the process's group may connect, too.

        Raises:
            AlreadyRunning: the address is taken.
            ValueError: it cannot be had.
        """
        s = self.socket
        s.set(zmq.ROUTER_MANDATORY, 1)
        s.set(zmq.IPV6, int("[" in self.endpoint))
        s.set(zmq.SNDHWM, MAX_SEND_BACKLOG)
        s.set(zmq.RCVHWM, MAX_SEND_BACKLOG)
        s.set(zmq.MAXMSGSIZE, max_message_bytes)
        s.set(zmq.LINGER, 1000)
        detect(s)
        s.set(zmq.HANDSHAKE_IVL, MAX_HANDSHAKE_MS)
        s.set(zmq.BACKLOG, MAX_PENDING_CONNECTIONS)
        if self.gate is not None:
            self.gate.guard(s, self.side)
        old_umask = os.umask(0o077)
        try:
            s.bind(self.endpoint)
            if self.is_ipc and group_access:
                os.chmod(self.endpoint.removeprefix("ipc://"), 0o660)
        except zmq.ZMQError as e:
            if e.errno == zmq.EADDRINUSE:
                raise AlreadyRunning(f"{self.endpoint} is in use: a broker is running there") from e
            raise ValueError(f"cannot listen at {self.endpoint}: {e.strerror}") from e
        finally:
            os.umask(old_umask)

    def watch(self, max_partial_bytes: int, counters: Counter[str]) -> None:
        """Count and limit connections from now on, where they come over tcp."""
        if not self.is_ipc:
            self.connections = Connections(self.socket, max_partial_bytes, counters)

    def hear(self, frame: zmq.Frame, must_go: bool = False) -> bool:
        """A whole message has come over its connection; False if that is unknown, so that no limit could hold for it."""
        if self.connections is None:
            return True
        try:
            descriptor = int(frame.get(_SRCFD))
        except zmq.ZMQError:
            return False
        self.connections.heard(descriptor, must_go)
        return True

    def identify(self, frame: zmq.Frame) -> tuple[str, int]:
        """Who sent it, and the process where the kernel vouches for it, else 0. No name: its key is allowed no more, or
        nobody vouches for it, as ZeroMQ does not for who speaks an older ZMTP."""
        if not self.is_ipc and self.gate is None:
            return LOOPBACK_PRINCIPAL, 0
        try:
            said = str(frame.get("Peer-Address" if self.is_ipc else "User-Id"))
        except zmq.ZMQError:
            return "", 0
        if self.gate is not None:
            return self.gate.principal(said, self.side), 0
        _, uid, _, pid = said.rsplit(":", 3)
        return f"uid:{uid}", int(pid)

    def close(self) -> None:
        if self.connections is not None:
            self.connections.close()
        self.socket.close()

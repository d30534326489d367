"""A ZMTP 3 peer by hand, over a plain tcp socket: it can do what libzmq never would. Nothing of ours imported."""

import socket
import struct
from urllib.parse import urlsplit

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"


def greeting(mechanism: bytes = b"NULL") -> bytes:
    return SIGNATURE + bytes((3, 0)) + mechanism.ljust(20, b"\0") + bytes(32)


def command(name: bytes, body: bytes = b"") -> bytes:
    content = bytes((len(name),)) + name + body
    is_short = len(content) < 256
    return (b"\x04" + bytes((len(content),)) if is_short else b"\x06" + struct.pack("!Q", len(content))) + content


def prop(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + struct.pack("!I", len(value)) + value


def frame(data: bytes, more: bool = False) -> bytes:
    if len(data) < 256:
        return bytes((int(more), len(data))) + data
    return bytes((2 | int(more),)) + struct.pack("!Q", len(data)) + data


def connect(endpoint: str) -> socket.socket:
    """A connection, without a word."""
    url = urlsplit(endpoint)
    assert url.hostname is not None
    return socket.create_connection((url.hostname, url.port or 0), timeout=10.0)


def join(endpoint: str) -> socket.socket:
    """A DEALER of the mechanism NULL, ready to send frames."""
    s = connect(endpoint)
    s.sendall(greeting())
    received = b""
    while len(received) < 64:
        received += s.recv(64 - len(received))
    s.sendall(command(b"READY", prop(b"Socket-Type", b"DEALER")))
    s.recv(2)  # the head of its READY
    return s


def is_closed(s: socket.socket, timeout_s: float = 10.0) -> bool:
    """Whether the other side ends the connection in time; what it says until then is read."""
    s.settimeout(timeout_s)
    try:
        while s.recv(65536):
            continue
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def old_join(endpoint: str) -> socket.socket:
    """A DEALER of ZMTP 2.0, as libzmq 3 was: of its messages ZeroMQ does not say whose they are."""
    if endpoint.startswith("ipc://"):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(10.0)
        s.connect(endpoint.removeprefix("ipc://"))
    else:
        s = connect(endpoint)
    s.sendall(SIGNATURE + b"\x01" + b"\x05" + frame(b""))
    return s

"""Ports for brokers that are started on purpose. Knows what is free now; cannot keep it free."""

import itertools
import os
import socket
from contextlib import suppress

PORTS = range(20_000, 32_000, 2)
"""Below what systems give to connections that go out: a broker that is started again finds its port still free."""
_numbers = itertools.count(os.getpid() * 97)  # processes begin apart, and none gets the same one twice in a row


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that is free like its successor, which is the workers'. Raises OSError if there is none."""
    for _ in PORTS:
        port = PORTS[next(_numbers) % len(PORTS)]
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind((host, port))
            second.bind((host, port + 1))
            return port
    raise OSError("no two free ports")

"""A peer's side of CURVE: its key on a socket, and in words why a connection did not come about.

Knows socket options and the monitor's events. Does not know files (`keys.py`), nor who is allowed (`gate.py`).
"""

from typing import Any, Final

import zmq

from penstock.broker.keys import OwnKey

FAILED_EVENTS: Final = int(
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_REFUSED: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)


def show_key(socket: "zmq.Socket[Any]", key: OwnKey | None) -> None:
    """Before `connect`: talk encrypted, as the owner of this key, and only to the broker that the key names."""
    if key is not None:
        socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public.encode())
        socket.setsockopt(zmq.CURVE_SERVERKEY, key.server.encode())


def is_refusal(event: int) -> bool:
    """Whether it says that the broker knows this key and does not want it: trying again would not help."""
    return event == _REFUSED


def reason(event: int, key: OwnKey | None) -> str:
    """What one of `FAILED_EVENTS` most likely means, in one line."""
    if event == _REFUSED and key is not None:
        return f"the broker refuses the key {key.name!r} here: it is revoked, unknown to it, or of another role than {key.role}"
    if key is None:
        return "the handshake failed, it wants a key (PENSTOCK_KEY=FILE, made by `penstock keys new`)"
    return "the handshake failed, it has another key than the one that the key file names, or uses no keys"

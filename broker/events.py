"""What the shell tells the core: everything that can happen to a broker, as plain data.

Knows no more than what is told. Does not know how it was found out, nor what follows from it.
"""

from penstock.broker.sessions import Route
from penstock.broker.wire import Message, record


@record
class Received:
    """A message of the protocol. `pid` is the peer's process where the kernel vouches for it, else 0."""

    side: str
    route: Route
    principal: str
    message: Message
    pid: int = 0


@record
class Malformed:
    """Bytes that are no message."""

    side: str
    route: Route
    reason: str


@record
class PeerLost:
    """Nobody is at this address any more."""

    side: str
    route: Route


@record
class ProcessEnded:
    """The kernel says that a process has ended: a worker's, or that of a client that shares memory."""

    pid: int


@record
class Turn:
    """Everything that had arrived is taken in: expire, sweep, form batches."""


@record
class Stop:
    """Take nothing new; what is open may finish."""


@record
class Copied:
    """A backup of the journal has ended; `error` is empty if it was made."""

    folder: str
    error: str


Event = Received | Malformed | PeerLost | ProcessEnded | Turn | Stop | Copied

"""Serves pages over HTTP to those who ask, inside somebody else's poll loop.

Knows sockets and descriptors that become ready; what comes over them is known to `http.py`. No call waits: a peer that is
slow, silent or rude keeps one of a few places for some seconds and nothing else.
"""

import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

import zmq

from penstock.broker.http import MAX_REQUEST_BYTES, Page, Pages, respond

log = logging.getLogger("penstock.broker")

MAX_CONNECTIONS: Final = 32
MAX_CONNECTION_S: Final = 5.0
MAX_DISCARDED_BYTES: Final = 65536
ACCEPT_PAUSE_S: Final = 1.0
KEPT_S: Final = 0.1
"""For so long a page is given again as it is: whoever asks in a loop does not keep the broker from its work."""
_IN, _OUT = int(zmq.POLLIN), int(zmq.POLLOUT)


class Poller(Protocol):
    """What a `zmq.Poller` does for descriptors."""

    def register(self, socket: int, flags: int) -> None: ...
    def unregister(self, socket: int) -> None: ...


class _State(Enum):
    READING, WRITING, LINGERING = range(3)


class _Connection:
    """One peer. Lingering: everything is sent, and closing before the peer does could destroy it on the way."""

    __slots__ = ("ends_at", "inbox", "num_discarded", "outbox", "socket", "state")

    def __init__(self, s: socket.socket, now: float) -> None:
        self.socket = s
        self.ends_at = now + MAX_CONNECTION_S
        self.state = _State.READING
        self.inbox = b""
        self.outbox = memoryview(b"")
        self.num_discarded = 0


class Responder:
    """Listens at an address, and answers when its descriptors are ready. Every method returns at once."""

    def __init__(self, pages: Pages) -> None:
        self._pages: Pages = {path: _kept(make) for path, make in pages.items()}
        self._listener: socket.socket | None = None
        self._poller: Poller | None = None
        self._connections: dict[int, _Connection] = {}  # in the order of their ends
        self._is_accepting = False
        self._resumes_at: float | None = None

    def open(self, host: str, port: int) -> int:
        """Listen; the port comes back, which matters for port 0.

        Raises:
            ValueError: the address cannot be had.
        """
        s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            s.setblocking(False)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((host, port))
            s.listen(MAX_CONNECTIONS)
        except OSError as e:
            s.close()
            raise ValueError(f"metrics: cannot listen at {host}:{port}: {e.strerror}") from e
        self._listener = s
        chosen: int = s.getsockname()[1]
        return chosen

    def attach(self, poller: Poller) -> None:
        """Have the descriptors watched; call after `open`."""
        self._poller = poller
        self._accept_more()

    def close(self) -> None:
        """Let everything go; may be called at any time."""
        for fd in list(self._connections):
            self._drop(fd)
        if self._listener is not None:
            self._pause()
            self._listener.close()
            self._listener = None

    def owns(self, fd: int) -> bool:
        return fd in self._connections or (self._listener is not None and fd == self._listener.fileno())

    def handle(self, fd: int, now: float) -> None:
        """A descriptor of ours is ready."""
        connection = self._connections.get(fd)
        if connection is None:
            self._accept(now)
            return
        try:
            self._go_on(fd, connection, now)
        except BlockingIOError:
            return
        except OSError:
            self._drop(fd)

    def next_deadline(self) -> float | None:
        """When `sweep` has something to do; None without connections."""
        if not self._connections:
            return self._resumes_at
        first = next(iter(self._connections.values())).ends_at
        return first if self._resumes_at is None else min(first, self._resumes_at)

    def sweep(self, now: float) -> None:
        """End connections whose time is over."""
        for fd, connection in list(self._connections.items()):
            if connection.ends_at > now:
                break
            self._drop(fd)
        if self._resumes_at is not None and now >= self._resumes_at:
            self._accept_more()

    # --- connections -----------------------------------------------------------------------------------------------

    def _accept(self, now: float) -> None:
        assert self._listener is not None and self._poller is not None
        while len(self._connections) < MAX_CONNECTIONS:
            try:
                s, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as e:  # no descriptors left, most likely: to try again at once would be a busy loop
                log.warning("metrics: cannot accept a connection: %s", errno.errorcode.get(e.errno or 0, e))
                self._pause()
                self._resumes_at = now + ACCEPT_PAUSE_S
                return
            s.setblocking(False)
            self._connections[s.fileno()] = _Connection(s, now)
            self._poller.register(s.fileno(), _IN)
        self._pause()

    def _accept_more(self) -> None:
        self._resumes_at = None
        if not self._is_accepting and self._listener is not None and self._poller is not None:
            self._is_accepting = True
            self._poller.register(self._listener.fileno(), _IN)

    def _pause(self) -> None:
        """Leave new connections to the system's queue until a place is free."""
        if self._is_accepting and self._listener is not None and self._poller is not None:
            self._is_accepting = False
            self._poller.unregister(self._listener.fileno())

    def _drop(self, fd: int) -> None:
        connection = self._connections.pop(fd)
        if self._poller is not None:
            self._poller.unregister(fd)
        connection.socket.close()
        self._accept_more()

    def _go_on(self, fd: int, c: _Connection, now: float) -> None:
        """Read, write or wait for the end, as far as it goes now. Raises OSError."""
        if c.state is _State.WRITING:
            self._write(fd, c)
            return
        data = c.socket.recv(MAX_REQUEST_BYTES)
        if not data:
            self._drop(fd)
        elif c.state is _State.LINGERING:
            c.num_discarded += len(data)
            if c.num_discarded > MAX_DISCARDED_BYTES:
                self._drop(fd)
        else:
            c.inbox += data
            answer = respond(c.inbox, self._pages, now)
            if answer is not None:
                c.inbox, c.outbox, c.state = b"", memoryview(answer), _State.WRITING
                self._write(fd, c)

    def _write(self, fd: int, c: _Connection) -> None:
        assert self._poller is not None
        with contextlib.suppress(BlockingIOError):
            c.outbox = c.outbox[c.socket.send(c.outbox) :]
        if c.outbox:
            self._poller.register(fd, _OUT)
            return
        c.socket.shutdown(socket.SHUT_WR)
        c.state = _State.LINGERING
        self._poller.register(fd, _IN)


def _kept(make: Callable[[float], Page]) -> Callable[[float], Page]:
    """The page, made anew once it is older than `KEPT_S`."""
    page, made_at = Page(200, ""), float("-inf")

    def kept(now: float) -> Page:
        nonlocal page, made_at
        if now - made_at >= KEPT_S:
            try:
                page, made_at = make(now), now
            except Exception:  # a bug of ours, but tasks are not to suffer from it
                log.exception("a page cannot be made")
                return Page(500, "this page cannot be made; the broker's log says why\n")
        return page

    return kept

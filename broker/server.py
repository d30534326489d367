"""The broker's shell: the only file with the broker's sockets. Polls, drains, hands events to the core, performs actions.

Knows ZeroMQ, signals and processes. Decides nothing.
"""

import fcntl
import gc
import logging
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import Any

import zmq

from penstock.broker.address import Address, connection_file, remove_connection, write_connection
from penstock.broker.config import BrokerConfig
from penstock.broker.core import Core, Malformed, PeerLost, ProcessEnded, Received, Stop, Turn
from penstock.broker.protocol import FROM_CLIENT, FROM_WORKER, Attach, Hello, WorkerHeartbeat, WorkerHello
from penstock.broker.state import BACK, FRONT, Send
from penstock.broker.wire import MAX_FRAMES, ProtocolError, decode, encode

log = logging.getLogger("penstock.broker")

# Plain integers: pyzmq's enum flags cost more than the calls they are given to.
_SNDMORE, _NOBLOCK, _EVENTS, _POLLIN = int(zmq.SNDMORE), int(zmq.NOBLOCK), int(zmq.EVENTS), int(zmq.POLLIN)
MAX_MESSAGES_PER_TURN = 128
MAX_SEND_BACKLOG = 20_000
COPIED_BYTES = 2048
"""Up to here a received frame is copied: keeping a frame object costs more memory than the copy takes time."""


class AlreadyRunning(RuntimeError):
    """Another broker owns the address."""


class Server:
    """One broker process.

    Args:
        address: where to listen; beyond this machine is refused.
    """

    def __init__(self, config: BrokerConfig, address: Address) -> None:
        if not address.is_local:
            raise ValueError(f"{address.url}: the broker binds to ipc and loopback only")
        self.address = address
        self.config = config
        self.core = Core(config, int.from_bytes(os.urandom(4), "big") >> 1, time.monotonic(), pid=os.getpid())
        self.longest_turn_s = 0.0
        self._lock: Any = None
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._unread = {FRONT: True, BACK: True}
        self._types = {FRONT: FROM_CLIENT, BACK: FROM_WORKER}
        self._processes: dict[int, tuple[int, int]] = {}
        self._poller = select.poll()
        self._stop_at: float | None = None

    # --- life ------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the address and listen.

        Raises:
            AlreadyRunning: another broker has it.
        """
        if self.address.is_ipc:
            folder = self.address.folder
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _lock(folder / "broker.lock", self.address)
        for side, endpoint in ((FRONT, self.address.front), (BACK, self.address.back)):
            self._sockets[side] = self._bind(endpoint)

    def _bind(self, endpoint: str) -> "zmq.Socket[bytes]":
        s = self._context.socket(zmq.ROUTER)
        s.set(zmq.ROUTER_MANDATORY, 1)
        s.set(zmq.SNDHWM, MAX_SEND_BACKLOG)
        s.set(zmq.RCVHWM, MAX_SEND_BACKLOG)
        s.set(zmq.MAXMSGSIZE, self.config.max_message_bytes)
        s.set(zmq.LINGER, 1000)
        s.set(zmq.HEARTBEAT_IVL, 2000)
        s.set(zmq.HEARTBEAT_TIMEOUT, 8000)
        old_umask = os.umask(0o077)
        try:
            s.bind(endpoint)
        except zmq.ZMQError as e:
            if e.errno == zmq.EADDRINUSE:
                raise AlreadyRunning(f"{endpoint} is in use: a broker is running there") from e
            raise
        finally:
            os.umask(old_umask)
        return s

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then let what is open finish."""
        wake_reader, wake_writer = socket.socketpair()
        wake_reader.setblocking(False)
        wake_writer.setblocking(False)
        signal.set_wakeup_fd(wake_writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        published = connection_file()
        if self.address.is_ipc or self.address.is_local:
            published.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_connection(published, self.address, os.getpid())
        _tune_gc()
        log.info("broker %d listens at %s", os.getpid(), self.address.url)
        try:
            self._loop(wake_reader)
        finally:
            remove_connection(published, os.getpid())
            self.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._stop_at is None:
            self._stop_at = now + self.config.drain_s
            log.info("stopping: %d open tasks may finish within %.0f s", self.core.state.ledger.num_open, self.config.drain_s)
        else:
            self._stop_at = now

    def close(self) -> None:
        """Let go of the address."""
        for fd, _ in self._processes.values():
            os.close(fd)
        self._processes.clear()
        for s in self._sockets.values():
            s.close()
        self._context.term()
        if self._lock is not None:
            self._lock.close()

    # --- the loop --------------------------------------------------------------------------------------------------

    def _loop(self, wake: socket.socket) -> None:
        fds = {int(s.get(zmq.FD)): side for side, s in self._sockets.items()}
        for fd in (*fds, wake.fileno()):
            self._poller.register(fd, select.POLLIN)
        is_stopping = False
        while True:
            ready = self._poller.poll(self._wait_ms())
            for fd, _ in ready:
                if fd in fds:
                    self._unread[fds[fd]] = True
                elif fd == wake.fileno():
                    wake.recv(4096)
                else:
                    self._process_ended(fd)
            if self._stop_at is not None:
                if not is_stopping:
                    is_stopping = True
                    self._handle(Stop())
                if self.core.is_idle or time.monotonic() >= self._stop_at:
                    self._perform(self.core.farewell())
                    return
            self._turns()

    def _wait_ms(self) -> int | None:
        now = time.monotonic()
        due = self.core.next_deadline(now)
        if self._stop_at is not None:
            due = self._stop_at if due is None else min(due, self._stop_at)
        return None if due is None else max(0, int((due - now) * 1000.0) + (due > now))

    def _turns(self) -> None:
        """Turn until no socket has input.

        Their descriptors are edge triggered, and a send may swallow an edge: a socket is asked for input again after a
        send on it, before the loop sleeps.
        """
        self._turn()
        while any(is_unread and _has_input(self._sockets[side]) for side, is_unread in self._unread.items()):
            self._turn()

    def _turn(self) -> None:
        """Take in a bounded number of messages, then let the core act."""
        started = time.monotonic()
        for side, s in self._sockets.items():
            if not self._unread[side]:
                continue
            num_left = MAX_MESSAGES_PER_TURN
            while num_left and _has_input(s):
                num_left -= 1
                self._receive(side, s)
            self._unread[side] = not num_left
        self._handle(Turn())
        took = time.monotonic() - started
        if took > self.longest_turn_s:
            self.longest_turn_s = took
            self.core.state.counters["longest_turn_us"] = int(took * 1e6)

    def _receive(self, side: str, s: "zmq.Socket[bytes]") -> None:
        route = s.recv(_NOBLOCK)
        first: Any = s.recv(_NOBLOCK, copy=False)
        frame, frames = first, list[Any]()
        frames.append(first.bytes)
        while frame.more:
            frame = s.recv(_NOBLOCK, copy=False)
            if len(frames) <= MAX_FRAMES:
                frames.append(frame if len(frame) > COPIED_BYTES else frame.bytes)
        try:
            message = decode(self._types[side], frames)
        except ProtocolError as e:
            self._handle(Malformed(side, route, str(e)))
            return
        principal, pid = "", 0
        if isinstance(message, Hello | Attach | WorkerHello | WorkerHeartbeat):
            principal, pid = self._identify(first)
        if isinstance(message, WorkerHello):
            self._watch(pid)
        self._handle(Received(side, route, principal, message, pid))

    def _identify(self, frame: zmq.Frame) -> tuple[str, int]:
        """Who sent it, as the kernel knows: on ipc the peer's uid and process."""
        peer = str(frame.get("Peer-Address"))
        if self.address.is_ipc:
            _, uid, _, pid = peer.split(":")
            return f"uid:{uid}", int(pid)
        return "loopback", 0

    def _handle(self, event: Any) -> None:
        self._perform(self.core.handle(event, time.monotonic()))

    def _perform(self, actions: list[Send]) -> None:
        for action in actions:
            s = self._sockets[action.side]
            self._unread[action.side] = True
            try:
                s.send(action.route, _SNDMORE | _NOBLOCK)
            except zmq.ZMQError as e:
                # Unroutable, or so far behind that it counts as gone: it comes back with an attach.
                if e.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._perform(self.core.handle(PeerLost(action.side, action.route), time.monotonic()))
                continue
            frames = encode(action.message)
            last = frames.pop()
            for frame in frames:
                s.send(frame, _SNDMORE, copy=not isinstance(frame, zmq.Frame))  # only a received frame is worth it
            s.send(last, 0, copy=not isinstance(last, zmq.Frame))

    # --- processes -------------------------------------------------------------------------------------------------

    def _watch(self, pid: int) -> None:
        """Learn at once when a worker on this machine dies; elsewhere its silence tells."""
        if pid == 0 or pid in self._processes or not hasattr(os, "pidfd_open"):
            return
        try:
            fd = os.pidfd_open(pid)
        except OSError as e:
            log.warning("cannot watch process %d: %s", pid, e)
            return
        self._processes[pid] = (fd, pid)
        self._poller.register(fd, select.POLLIN)

    def _process_ended(self, fd: int) -> None:
        pid = next(p for f, p in self._processes.values() if f == fd)
        del self._processes[pid]
        self._poller.unregister(fd)
        os.close(fd)
        self._unread[BACK] = True
        self._turns()  # what it sent before its end comes first
        log.info("worker process %d has ended", pid)
        self._handle(ProcessEnded(pid))


def _has_input(s: "zmq.Socket[bytes]") -> bool:
    events: Any = s.get(_EVENTS)
    return bool(events & _POLLIN)


def _lock(path: Path, address: Address) -> Any:
    """A second bind of the same ipc path would silently steal it, so a lock file goes first."""
    f = open(path, "w")  # noqa: SIM115 - held for the life of the process
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        f.close()
        raise AlreadyRunning(f"a broker is already running at {address.url}") from e
    return f


def _tune_gc() -> None:
    """Full collections over a million tasks would stop the loop for seconds; the core leaves no cycles behind."""
    gc.collect()
    gc.freeze()
    gc.disable()

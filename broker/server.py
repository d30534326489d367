"""The broker's shell: the only file with the broker's sockets. Polls, drains, hands events to the core, performs actions.

Knows ZeroMQ, signals and processes. Decides nothing.
"""

import fcntl
import gc
import logging
import os
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

# Plain integers: pyzmq's enum flags cost more than the calls they are given to. So does asking a socket for EVENTS, which
# is why the poller, one call for everything, is asked instead.
_SNDMORE, _NOBLOCK = int(zmq.SNDMORE), int(zmq.NOBLOCK)
MAX_MESSAGES_PER_TURN = 128
MAX_INTAKE_S = 0.005
MAX_SEND_BACKLOG = 20_000
FAREWELL_S = 0.2
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
        self._sides: dict[Any, str] = {}
        self._wake: Any = None
        self._ended: list[int] = []
        self._types = {FRONT: FROM_CLIENT, BACK: FROM_WORKER}
        self._processes: dict[int, int] = {}  # descriptor -> process
        self._poller = zmq.Poller()
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
            self._sockets[side] = s = self._bind(endpoint)
            self._sides[s] = side

    def _bind(self, endpoint: str) -> "zmq.Socket[bytes]":
        s = self._context.socket(zmq.ROUTER)
        s.set(zmq.ROUTER_MANDATORY, 1)
        s.set(zmq.IPV6, int("[" in endpoint))
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
            raise ValueError(f"cannot listen at {endpoint}: {e.strerror}") from e
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
        for fd in self._processes:
            os.close(fd)
        self._processes.clear()
        for s in self._sockets.values():
            s.close()
        self._context.term()
        if self._lock is not None:
            self._lock.close()

    # --- the loop --------------------------------------------------------------------------------------------------

    def _loop(self, wake: socket.socket) -> None:
        self._wake = wake
        for source in (*self._sockets.values(), wake.fileno()):
            self._poller.register(source, zmq.POLLIN)
        while self._stop_at is None:
            self._turn(self._wait_ms())
        self._handle(Stop())
        while not self.core.is_idle and time.monotonic() < self._stop_at:
            self._turn(self._wait_ms())
        self._perform(self.core.farewell())
        # A peer drops what it has not read when its connection ends, so the last messages get a moment to be read.
        end = time.monotonic() + FAREWELL_S
        while (left := end - time.monotonic()) > 0:
            self._turn(int(1000.0 * left) + 1)

    def _wait_ms(self) -> int | None:
        now = time.monotonic()
        due = self.core.next_deadline(now)
        if self._stop_at is not None:
            due = self._stop_at if due is None else min(due, self._stop_at)
        return None if due is None else max(0, int((due - now) * 1000.0) + (due > now))

    def _turn(self, wait_ms: int | None) -> None:
        """Wait for input, take in a bounded number of messages, then let the core act."""
        ready = self._poller.poll(wait_ms)
        started = time.monotonic()
        num_left = MAX_MESSAGES_PER_TURN
        while ready and num_left > 0 and time.monotonic() - started < MAX_INTAKE_S:
            num_left -= len(ready)
            for source, _ in ready:
                if isinstance(source, int):
                    self._take_signal(source)
                else:
                    self._receive(self._sides[source], source)
            ready = self._poller.poll(0)
        if not ready and self._ended:
            self._report_ended()  # what a process sent before its end has come first
        self._handle(Turn())
        took = time.monotonic() - started
        if took > self.longest_turn_s:
            self.longest_turn_s = took
            self.core.state.counters["longest_turn_us"] = int(took * 1e6)

    def _take_signal(self, fd: int) -> None:
        """Something other than a message: a signal of ours, or the end of a worker's process."""
        if fd == self._wake.fileno():
            self._wake.recv(4096)
        else:
            self._poller.unregister(fd)
            self._ended.append(fd)

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
            s, frames = self._sockets[action.side], encode(action.message)
            try:
                s.send(action.route, _SNDMORE | _NOBLOCK)
            except zmq.ZMQError as e:
                # Unroutable, or so far behind that it counts as gone: it comes back with an attach.
                if e.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._perform(self.core.handle(PeerLost(action.side, action.route), time.monotonic()))
                continue
            last = frames.pop()
            for frame in frames:
                s.send(frame, _SNDMORE, copy=not isinstance(frame, zmq.Frame))  # only a received frame is worth it
            s.send(last, 0, copy=not isinstance(last, zmq.Frame))

    # --- processes -------------------------------------------------------------------------------------------------

    def _watch(self, pid: int) -> None:
        """Learn at once when a worker on this machine dies; elsewhere its silence tells."""
        if pid == 0 or pid in self._processes.values() or not hasattr(os, "pidfd_open"):
            return
        try:
            fd = os.pidfd_open(pid)
        except OSError as e:
            log.warning("cannot watch process %d: %s", pid, e)
            return
        self._processes[fd] = pid
        self._poller.register(fd, zmq.POLLIN)

    def _report_ended(self) -> None:
        for fd in self._ended:
            pid = self._processes.pop(fd)
            os.close(fd)
            log.info("worker process %d has ended", pid)
            self._handle(ProcessEnded(pid))
        self._ended.clear()


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

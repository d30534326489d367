"""The broker's shell: the file with the broker's ZeroMQ sockets. Polls, drains, hands events to the core, performs actions.

Knows ZeroMQ, signals and whom to ask when something else is ready. Decides nothing.
"""

import fcntl
import gc
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from penstock.broker import selftest
from penstock.broker.address import Address, connection_file, remove_connection, write_connection
from penstock.broker.config import BrokerConfig
from penstock.broker.configuration import Configuration, Settings
from penstock.broker.core import Copied, Core, Malformed, PeerLost, ProcessEnded, Received, Stop, Turn
from penstock.broker.durable import DurableJournal
from penstock.broker.files import Keeper, Learner, broker_folder, default_state_dir
from penstock.broker.journal import Journal
from penstock.broker.metrics import Metrics, NoMetrics
from penstock.broker.notify import Notifier
from penstock.broker.pages import pages_of
from penstock.broker.processes import Processes
from penstock.broker.promises import Promises
from penstock.broker.protocol import FROM_CLIENT, FROM_WORKER, Attach, Hello, Share, WorkerHeartbeat, WorkerHello
from penstock.broker.responder import Responder
from penstock.broker.segments import host_memory
from penstock.broker.signals import Signals
from penstock.broker.state import BACK, FRONT, Send
from penstock.broker.storage.sqlite import SqliteStore
from penstock.broker.storage.store import Store
from penstock.broker.wire import MAX_FRAMES, ProtocolError, decode, encode

log = logging.getLogger("penstock.broker")

# Plain integers: pyzmq's enum flags cost more than the calls they are given to. So does asking a socket for EVENTS, which
# is why the poller, one call for everything, is asked instead.
_SNDMORE, _NOBLOCK = int(zmq.SNDMORE), int(zmq.NOBLOCK)
MAX_MESSAGES_PER_TURN = 128
MAX_INTAKE_S = 0.005
MAX_SEND_BACKLOG = 20_000
FAREWELL_S = 0.2
SELF_TEST_S = 10.0
CLOSE_S = 30.0
"""What is left to do when no task is open any more, mostly to write files, may take so long."""
ROOM_S = 2.0
"""How often the space on the journal's disk is looked at."""
COPIED_BYTES = 2048
"""Up to here a received frame is copied: keeping a frame object costs more memory than the copy takes time."""


class AlreadyRunning(RuntimeError):
    """Another broker owns the address."""


class Server:
    """One broker process.

    Args:
        address: where to listen; beyond this machine is refused.
        load: reads all settings again.
    """

    def __init__(self, settings: Settings, address: Address, load: Callable[[], Settings]) -> None:
        if not address.is_local:
            raise ValueError(f"{address.url}: the broker binds to ipc and loopback only")
        now = time.monotonic()
        self.address = address
        self.core = Core(
            settings.broker, int.from_bytes(os.urandom(4), "big") >> 1, now, journal=_journal(settings.broker, now),
            pid=os.getpid(), configuration=Configuration(settings, load, now),
            metrics=Metrics() if settings.broker.metrics else NoMetrics(), memory=host_memory() if address.is_ipc else None,
            owner=f"uid:{os.geteuid()}",
        )  # fmt: skip
        self.longest_turn_s = 0.0
        self._lock: Any = None
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._sides: dict[Any, str] = {}
        self._types = {FRONT: FROM_CLIENT, BACK: FROM_WORKER}
        self._poller = zmq.Poller()
        self._processes = Processes(self._poller)
        self._responder = Responder(pages_of(self.core))
        self._keepers: list[Keeper] = []
        self._store: Store | None = None
        self._promises = Promises(None, self._send)
        self._signals = Signals()
        self._notifier = Notifier()
        self._stop_at: float | None = None
        self._looked_at = now

    @property
    def config(self) -> BrokerConfig:
        """As it is now."""
        return self.core.state.config

    # --- life ------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the address and listen.

        Raises:
            AlreadyRunning: another broker has it.
            ValueError: an address that cannot be had.
        """
        if self.address.is_ipc:
            folder = self.address.folder
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _lock(folder / "broker.lock", self.address)
        for side, endpoint in ((FRONT, self.address.front), (BACK, self.address.back)):
            self._sockets[side] = s = self._bind(endpoint)
            self._sides[s] = side
        if self.config.metrics:
            host, port = self.config.metrics_endpoint()
            port = self._responder.open(host, port)
            log.info("metrics at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)
        self.keep("predictions", self.core.state.policy.predictor)
        self._open_journal()

    @property
    def _folder(self) -> Path:
        """Where this broker's files are; ours once the address is."""
        return broker_folder(self.config.state_dir or default_state_dir(), self.address.url)

    def _open_journal(self) -> None:
        """Take up the durable tasks of earlier brokers. Raises StorageError."""
        if not self.core.state.journal.is_durable:
            return
        began = time.monotonic()
        self._store = store = SqliteStore(self._folder / "journal", self.config.min_free_bytes)
        self._promises = Promises(store, self._send)
        num_open = self.core.restore(store.load(), began)
        self._poller.register(store.fileno(), zmq.POLLIN)
        read_s = time.monotonic() - began
        log.info("journal in %s: %d durable tasks go on, read in %.1f s", self._folder / "journal", num_open, read_s)

    def keep(self, name: str, learner: Learner) -> None:
        """Have what it learns outlive this process, in a folder that is ours once the address is."""
        keeper = Keeper(self._folder / f"{name}.json", learner, time.monotonic())
        keeper.restore()
        self._keepers.append(keeper)

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
            if self.address.is_ipc and self.config.group_access:
                os.chmod(endpoint.removeprefix("ipc://"), 0o660)
        except zmq.ZMQError as e:
            if e.errno == zmq.EADDRINUSE:
                raise AlreadyRunning(f"{endpoint} is in use: a broker is running there") from e
            raise ValueError(f"cannot listen at {endpoint}: {e.strerror}") from e
        finally:
            os.umask(old_umask)
        return s

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then let what is open finish."""
        self._signals.install()
        published = connection_file()
        published.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_connection(published, self.address, os.getpid())
        _tune_gc()
        log.info("broker %d listens at %s", os.getpid(), self.address.url)
        try:
            self._loop()
        finally:
            remove_connection(published, os.getpid())
            self.close()

    def close(self) -> None:
        """Let go of the address, and leave what was learned behind."""
        for keeper in self._keepers:
            keeper.close()
        self._responder.close()
        self._processes.close()
        for s in self._sockets.values():
            s.close()
        self._context.term()
        if self._store is not None:
            self._store.close()
        if self._lock is not None:
            self._lock.close()

    # --- the loop --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        for source in (*self._sockets.values(), self._signals.fd):
            self._poller.register(source, zmq.POLLIN)
        self._responder.attach(self._poller)
        self._test_itself()
        self._notifier.ready(self._status())
        while not self._signals.num_stops:
            self._turn(self._wait_ms())
        self._stop_at = time.monotonic() + self.config.drain_s
        self._notifier.stopping(f"stopping: {self._status()}", self.config.drain_s + CLOSE_S)
        log.info("stopping: %d open tasks may finish within %.0f s", self.core.state.ledger.num_open, self.config.drain_s)
        self._handle(Stop())
        while not self.core.is_idle and self._signals.num_stops == 1 and time.monotonic() < self._stop_at:
            self._turn(self._wait_ms())
        self._perform(self.core.farewell())
        # A peer drops what it has not read when its connection ends, so the last messages get a moment to be read.
        end = time.monotonic() + FAREWELL_S
        while (left := end - time.monotonic()) > 0:
            self._turn(int(1000.0 * left) + 1)

    def _test_itself(self) -> None:
        """Take part as a stranger would, before anybody is told that this broker is ready. Raises SelfTestFailed."""
        end = time.monotonic() + SELF_TEST_S

        def turn() -> bool:
            self._turn(10)
            return time.monotonic() < end

        selftest.check(self._context, self.address.front, self.address.back, turn)
        self.core.state.counters["unattached"] -= 1  # that was us

    def _status(self) -> str:
        state = self.core.state
        return f"{state.ledger.num_open} open tasks, {len(state.workers)} workers, at {self.address.url}"

    def _wait_ms(self) -> int | None:
        now = time.monotonic()
        dues = (
            self.core.next_deadline(now), self._responder.next_deadline(), self._notifier.next_deadline(), self._stop_at,
        )  # fmt: skip
        due = min((at for at in dues if at is not None), default=None)
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
                    self._take_other(source)
                else:
                    self._receive(self._sides[source], source)
            ready = self._poller.poll(0)
        if not ready:
            for pid in self._processes.ended():  # what a process sent before its end has come first
                self._handle(ProcessEnded(pid))
        if self._signals.take_reload():
            self._notifier.reloading()
            self.core.reload(time.monotonic())
            self._notifier.ready(self._status())
        self._handle(Turn())
        self._responder.sweep(started)
        for keeper in self._keepers:
            keeper.turn(started)
        if self._store is not None and started - self._looked_at > ROOM_S:
            self._looked_at, self.core.state.journal.has_room = started, self._store.has_room()
        took = time.monotonic() - started
        if took > self.longest_turn_s:
            self.longest_turn_s = took
            self.core.state.counters["longest_turn_us"] = int(took * 1e6)
        if self._notifier.is_due(started):  # here and nowhere else: this turn is done
            self._notifier.alive(started, self._status())

    def _take_other(self, fd: int) -> None:
        """Something other than a message: a signal of ours, the end of a peer's process, or somebody with HTTP."""
        if self._store is not None and fd == self._store.fileno():
            self._promises.release()
            for folder, error in self._store.take_copies():
                self._handle(Copied(folder, error))
        elif fd == self._signals.fd:
            self._signals.drain()
        elif self._responder.owns(fd):
            self._responder.handle(fd, time.monotonic())
        elif self._processes.owns(fd):
            self._processes.handle(fd)

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
        if isinstance(message, Hello | Attach | WorkerHello | WorkerHeartbeat | Share):
            principal, pid = self._identify(first)
        if isinstance(message, WorkerHello | Share):
            self._processes.watch(pid)
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
        self._promises.perform(actions, self.core.take_writes())

    def _send(self, action: Send) -> None:
        s, frames = self._sockets[action.side], encode(action.message)
        try:
            s.send(action.route, _SNDMORE | _NOBLOCK)
        except zmq.ZMQError as e:
            # Unroutable, or so far behind that it counts as gone: it comes back with an attach.
            if e.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._handle(PeerLost(action.side, action.route))
            return
        last = frames.pop()
        for frame in frames:
            s.send(frame, _SNDMORE, copy=not isinstance(frame, zmq.Frame))  # only a received frame is worth it
        s.send(last, 0, copy=not isinstance(last, zmq.Frame))


def _journal(config: BrokerConfig, now: float) -> Journal:
    if config.journal == "memory":
        return Journal(config.dedup_window_s, config.dedup_bytes)
    return DurableJournal(
        config.dedup_window_s, config.dedup_bytes, config.result_ttl_s, config.max_kept_bytes, time.time() - now
    )


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

"""The broker's shell: its life, and the loop around its doors. Polls, drains, hands events to the core, performs actions.

Knows signals, and whom to ask when something is ready. Does not know what a socket says (`doors.py`). Decides nothing.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq

from penstock.broker import selftest
from penstock.broker.address import Address, connection_file, remove_connection, write_connection
from penstock.broker.config import BrokerConfig
from penstock.broker.configuration import Configuration, Settings
from penstock.broker.core import Core
from penstock.broker.door import lock
from penstock.broker.doors import Doors
from penstock.broker.durable import DurableJournal
from penstock.broker.events import Copied, PeerLost, ProcessEnded, Received, Stop, Turn
from penstock.broker.failpoints import ARMED, hit, hit_message
from penstock.broker.files import Keeper, Learner, broker_folder, default_state_dir
from penstock.broker.gate import Gate, wants_keys
from penstock.broker.journal import Journal
from penstock.broker.keys import KeyFolder
from penstock.broker.metrics import Metrics, NoMetrics
from penstock.broker.notify import Notifier
from penstock.broker.pages import pages_of
from penstock.broker.processes import Processes
from penstock.broker.promises import Promises
from penstock.broker.responder import Responder
from penstock.broker.segments import host_memory
from penstock.broker.signals import Signals
from penstock.broker.state import Send
from penstock.broker.storage.records import Put
from penstock.broker.storage.sqlite import SqliteStore
from penstock.broker.storage.store import Store

log = logging.getLogger("penstock.broker")

MAX_MESSAGES_PER_TURN = 128
MAX_INTAKE_S = 0.005
FAREWELL_S = 0.2
SELF_TEST_S = 10.0
CLOSE_S = 30.0
"""What is left to do when no task is open any more, mostly to write files, may take so long."""
READ_PER_SIGN, SIGN_S = 50_000, 60.0
"""While the journal is read: a sign of life every so many records, good for so long."""
ROOM_S = 2.0
"""How often the space on the journal's disk is looked at."""


class Server:
    """One broker process.

    Args:
        address: where to listen, beside the tcp address that `listen` of the settings may name.
        load: reads all settings again.
    Raises:
        ValueError: an address beyond this machine, and no keys that would keep strangers out.
    """

    def __init__(self, settings: Settings, address: Address, load: Callable[[], Settings]) -> None:
        now = time.monotonic()
        self.address = address
        self._addresses = [address, *([Address(settings.broker.listen)] if settings.broker.listen else [])]
        keys = KeyFolder(settings.broker.state_dir)
        needs_gate = wants_keys(self._addresses, settings.broker.curve, keys.has_any)
        self.core = Core(
            settings.broker, int.from_bytes(os.urandom(4), "big") >> 1, now, journal=_journal(settings.broker, now),
            pid=os.getpid(), configuration=Configuration(settings, load, now),
            metrics=Metrics() if settings.broker.metrics else NoMetrics(), memory=host_memory() if address.is_ipc else None,
            operators=frozenset(("uid:0", f"uid:{os.getuid()}")),
        )  # fmt: skip
        self.longest_turn_s = 0.0
        self._lock: Any = None
        self._context = zmq.Context()
        self._gate = Gate(self._context, keys, self.core.state.counters) if needs_gate else None
        self.core.operators.gate = self._gate
        self._poller = zmq.Poller()
        self._processes = Processes(self._poller)
        self._doors = Doors(
            self._context, self._gate, self._processes, self.core.state.counters, self._handle, self._perform
        )
        self._responder = Responder(pages_of(self.core))
        self._keepers: list[Keeper] = []
        self._store: Store | None = None
        self._promises = Promises(None, self._doors.send, self._lose)
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
            self._lock = lock(self.address)
        self._doors.open(self._addresses, self.config)
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
        if ARMED:
            hit("broker.restore.begun")
        self._store = store = SqliteStore(self._folder / "journal", self.config.min_free_bytes)
        self._promises = Promises(store, self._doors.send, self._lose)
        self.core.state.journal.has_room = store.has_room()
        num_open = self.core.restore(self._while_starting(store.load()), began)
        if ARMED:
            hit("broker.restore.done")
        self._poller.register(store.fileno(), zmq.POLLIN)
        read_s = time.monotonic() - began
        log.info("journal in %s: %d durable tasks go on, read in %.1f s", self._folder / "journal", num_open, read_s)

    def _while_starting(self, puts: Iterator[Put]) -> Iterator[Put]:
        """A service manager waits for as long as records are read."""
        for num_read, put in enumerate(puts):
            if not num_read % READ_PER_SIGN:
                self._notifier.starting(f"reading the journal: {num_read} records so far", SIGN_S)
            yield put

    def keep(self, name: str, learner: Learner) -> None:
        """Have what it learns outlive this process, in a folder that is ours once the address is."""
        keeper = Keeper(self._folder / f"{name}.json", learner, time.monotonic())
        keeper.restore()
        self._keepers.append(keeper)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then let what is open finish."""
        self._signals.install()
        published = connection_file()
        published.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        server_key = "" if self._gate is None or self.address.is_ipc else self._gate.public_key
        write_connection(published, self.address, os.getpid(), server_key)
        for address in self._addresses:
            guard = "" if address.is_ipc else ", with keys" if self._gate is not None else ", open to every account here"
            log.info("broker %d listens at %s%s", os.getpid(), address.url, guard)
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
        self._doors.close()
        self._context.term()
        if self._store is not None:
            self._store.close()
        if ARMED:
            hit("broker.stop.closed")
        if self._lock is not None:
            self._lock.close()

    # --- the loop --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        for source in (*self._doors.owners, self._signals.fd):
            self._poller.register(source, zmq.POLLIN)
        self._responder.attach(self._poller)
        self._test_itself()
        self._notifier.ready(self._status())
        while not self._signals.num_stops:
            self._turn(self._wait_ms())
        self._stop_at = time.monotonic() + self.config.drain_s
        self._notifier.stopping(f"stopping: {self._status()}", self.config.drain_s + CLOSE_S)
        text = "stopping: %d open tasks may finish within %.0f s; durable ones that wait are left to the next broker"
        log.info(text, self.core.state.ledger.num_open, self.config.drain_s)
        self._handle(Stop())
        if ARMED:
            hit("broker.stop.begun")
        while not self.core.is_idle and self._signals.num_stops == 1 and time.monotonic() < self._stop_at:
            self._turn(self._wait_ms())
        if ARMED:
            hit("broker.stop.drained")
        self._perform(self.core.farewell())
        # A peer drops what it has not read when its connection ends, so the last messages get a moment to be read.
        end = time.monotonic() + FAREWELL_S
        while (left := end - time.monotonic()) > 0:
            self._turn(int(1000.0 * left) + 1)

    def _test_itself(self) -> None:
        """Take part as a stranger would, before anybody is told that this broker is ready; where strangers need a key, the gate
        has tried that. Raises SelfTestFailed."""
        if not self.address.is_ipc and self._gate is not None:
            return
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
        dues = [
            self.core.next_deadline(now), self._responder.next_deadline(), self._notifier.next_deadline(), self._stop_at,
        ]  # fmt: skip
        dues += self._doors.next_deadlines()
        due = min((at for at in dues if at is not None), default=None)
        return None if due is None else max(0, int((due - now) * 1000.0) + (due > now))

    def _turn(self, wait_ms: int | None) -> None:
        """Wait for input, take in a bounded number of messages, then let the core act."""
        ready = self._poller.poll(wait_ms)  # one call for everything: to ask each socket for EVENTS would cost more
        started = time.monotonic()
        num_left, owners = MAX_MESSAGES_PER_TURN, self._doors.owners
        while ready and num_left > 0 and time.monotonic() - started < MAX_INTAKE_S:
            num_left -= len(ready)
            for source, _ in ready:
                if isinstance(source, int):
                    self._take_other(source)
                else:
                    owners[source]()
            ready = self._poller.poll(0)
        if not ready:
            for pid in self._processes.ended():  # what a process sent before its end has come first
                self._handle(ProcessEnded(pid))
        if self._signals.take_reload():
            self._notifier.reloading()
            self.core.operators.reload(time.monotonic())
            self._notifier.ready(self._status())
        self._handle(Turn())
        self._responder.sweep(started)
        self._doors.sweep(started)
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

    def _handle(self, event: Any) -> None:
        actions = self.core.handle(event, time.monotonic())
        if ARMED and isinstance(event, Received):
            hit_message("broker.decided", event.message)
        self._perform(actions)

    def _perform(self, actions: list[Send]) -> None:
        self._promises.perform(actions, self.core.take_writes())

    def _lose(self, action: Send) -> None:
        """Nobody is there to take it."""
        self._handle(PeerLost(action.side, action.route))


def _journal(config: BrokerConfig, now: float) -> Journal:
    if config.journal == "memory":
        return Journal(config.dedup_window_s, config.dedup_bytes)
    return DurableJournal(
        config.dedup_window_s, config.dedup_bytes, config.result_ttl_s, config.max_kept_bytes, time.time() - now
    )

"""The broker's process: the real core, journal and promises, and what its shell does around them.

Knows what `server.py` does with messages, turns, commits and failures, without sockets; the disk is `MemoryStore`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.broker import invariants
from penstock.broker import protocol as p
from penstock.broker.config import BrokerConfig
from penstock.broker.core import Core
from penstock.broker.durable import DurableJournal
from penstock.broker.events import Malformed, PeerLost, ProcessEnded, Received, Turn
from penstock.broker.promises import Promises
from penstock.broker.state import BACK, FRONT, Send
from penstock.broker.storage.records import Erase, Put, StorageError, Write, unpack
from penstock.broker.storage.store import MemoryStore
from penstock.broker.wire import ProtocolError, decode, encode
from simulation.network import Connection, Frames, Unroutable
from simulation.oracle import MAX_ATTEMPTS, Oracle, Violation

if TYPE_CHECKING:
    from simulation.world import World

CONFIG = BrokerConfig(
    heartbeat_ms=800.0, liveness_s=2.0, progress_s=4.0, session_ttl_s=4.0, worker_grace_s=2.0, window_rows=24,
    client_liveness_s=2.0, max_queue_rows=64, max_attempts=MAX_ATTEMPTS, dedup_window_s=5000.0,
)  # fmt: skip
LOOK_S = 0.5
_TYPES = {FRONT: p.FROM_CLIENT, BACK: p.FROM_WORKER}
_NAMED = (p.Hello, p.Attach, p.WorkerHello, p.WorkerHeartbeat, p.Share)
"""Messages with which the shell tells who has sent them."""


class Disk(MemoryStore):
    """A disk whose records are seen as they become safe."""

    def __init__(self, oracle: Oracle, kept: Sequence[bytes] = ()) -> None:
        super().__init__(kept)
        self._oracle = oracle

    def _apply(self, write: Write) -> None:
        super()._apply(write)
        if isinstance(write, Put):
            self._oracle.put(unpack(self._safe[-1]))
        elif isinstance(write, Erase):
            self._oracle.erased(write.task, write.kinds)

    def after_crash(self, num_kept: int) -> "Disk":
        """What a restart finds; the first of the groups that were not safe yet may be there."""
        self.commit(num_kept)
        return Disk(self._oracle, self._safe)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)


class Broker:
    """See the module. `is_up`: it runs, or is only stopped for a while."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._timeline, self._network, self._oracle = world.timeline, world.network, world.oracle
        self.disk = Disk(world.oracle)
        self.is_up = self.is_paused = False
        self.is_doomed = False
        """It will be killed when it has something to write the next time."""
        self.slow_disk_s = 0.0
        self._life = 0
        self._inbox: list[tuple[Connection, Frames]] = []
        self._due = float("inf")
        self._num_turns = 0

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A process with an epoch of its own takes up what the disk has."""
        now = self._timeline.now
        self._life += 1
        config = CONFIG
        journal = DurableJournal(
            config.dedup_window_s, config.dedup_bytes, config.result_ttl_s, config.max_kept_bytes, self._oracle.wall_offset
        )
        self.core = Core(config, self._timeline.random.getrandbits(31), now, journal=journal, pid=1)
        self._promises = Promises(self.disk, self._send, self._lose)
        num_open = self.core.restore(self.disk.load(), now)
        self._is_turn_planned = self._is_committing = False
        self._due, self._looked_at = float("inf"), now
        self.is_up = True
        self._timeline.note("broker", f"starts, epoch {self.core.state.epoch}, {num_open} durable tasks go on")
        self._plan_turn()

    def crash(self, why: str, away_s: float) -> None:
        """The process is gone; what was not safe yet is lost, all but a beginning of it perhaps."""
        if not self.is_up:
            return
        num_kept = self._timeline.random.choice((0, 0, 1, 2, 1000))
        self._timeline.note("broker", f"ends: {why}; {num_kept} of {self.disk.num_waiting} groups of writes survive")
        self._oracle.voided(list(self.core.state.ledger.leases))
        self.disk = self.disk.after_crash(num_kept)
        self.is_up = self.is_paused = False
        self._inbox.clear()
        self._life += 1
        self._network.drop_all()
        self._timeline.after(away_s, self._start_again, self._life)

    def _start_again(self, life: int) -> None:
        if life == self._life:
            self.start()

    def pause(self, seconds: float) -> None:
        """It stands still, and goes on with what it knew."""
        if self.is_up and not self.is_paused:
            self.is_paused = True
            self._timeline.note("broker", f"stands still for {seconds:.2f} s")
            self._timeline.after(seconds, self._resume, self._life)

    def _resume(self, life: int) -> None:
        if life != self._life:
            return
        self.is_paused = False
        self._timeline.note("broker", "goes on")
        inbox, self._inbox = self._inbox, []
        for connection, frames in inbox:
            self.receive(connection, frames)
        self._release()
        if self.is_up:
            self._plan_turn()

    # --- the loop --------------------------------------------------------------------------------------------------

    def receive(self, connection: Connection, frames: Frames) -> None:
        """A message has come over a connection that may be gone by now."""
        if not self.is_up:
            return
        if self.is_paused:
            self._inbox.append((connection, frames))
            return
        side, route = connection.side, connection.route
        try:
            message = decode(_TYPES[side], frames)
        except ProtocolError as e:
            self._handle(Malformed(side, route, str(e)))
            return
        owner = self._world.principals[connection.owner]
        self._timeline.note(f"{connection.owner} -> broker", message, frames)
        if not isinstance(message, p.WorkerFinal) or route in self.core.workers.by_route:  # else nobody looks at it
            self._oracle.received(message, owner)
        pid = getattr(message, "pid", 0) if isinstance(message, p.WorkerHello) else 0
        self._handle(Received(side, route, owner if isinstance(message, _NAMED) else "", message, pid))
        self._plan_turn()

    def process_ended(self, pid: int) -> None:
        if self.is_up and not self.is_paused:
            self._timeline.note("broker", f"hears that process {pid} has ended")
            self._handle(ProcessEnded(pid))
            self._plan_turn()

    def _plan_turn(self) -> None:
        if not self._is_turn_planned:
            self._is_turn_planned = True
            self._timeline.after(0.0001, self._turn, self._life)

    def _turn(self, life: int) -> None:
        if life != self._life:
            return
        self._is_turn_planned = False
        if self.is_paused:
            return
        now = self._timeline.now
        self._handle(Turn())
        if life != self._life:
            return
        if now - self._looked_at >= LOOK_S:
            self._looked_at, self.core.state.journal.has_room = now, self.disk.has_room()
        self._num_turns += 1
        if self._num_turns % self._world.check_every == 0:
            self.check()
        due = self.core.next_deadline(now)
        if due is not None and due <= now:
            self._plan_turn()
        elif due is not None and not now < self._due <= due:
            self._due = due
            self._timeline.at(due, self._on_due, life)

    def _on_due(self, life: int) -> None:
        if life == self._life and self._timeline.now >= self._due:
            self._due = float("inf")
            if not self.is_paused:
                self._plan_turn()

    def check(self) -> None:
        """Everything inside must fit together."""
        try:
            invariants.check(self.core, self._timeline.now)
        except AssertionError as e:
            raise Violation("core", str(e) or repr(e)) from e

    def _handle(self, event: Any) -> None:
        self._perform(self.core.handle(event, self._timeline.now))

    def _perform(self, actions: list[Send]) -> None:
        for action in actions:
            self._oracle.decided(action.message)
        writes = self.core.take_writes()
        try:
            self._promises.perform(actions, writes)
        except StorageError as e:
            self.crash(str(e), 0.1)
            return
        if writes and self.is_doomed:
            self.is_doomed = False
            in_s = self._timeline.random.uniform(0.0, 0.003)
            self._timeline.after(in_s, self.crash, "kill -9 before the disk was through", 0.1)
        if writes and not self._is_committing:
            self._commit_later()

    def _commit_later(self) -> None:
        self._is_committing = True
        took = self._timeline.random.uniform(0.0002, 0.004) + self.slow_disk_s * self._timeline.random.random()
        self._timeline.after(took, self._commit, self._life, self.disk.num_waiting)

    def _commit(self, life: int, num_groups: int) -> None:
        """The commit thread is through with what waited when it began."""
        if life != self._life:
            return
        self._is_committing = False
        if self.disk.failure is None:
            self.disk.commit(num_groups)
        self._timeline.note("disk", f"{self.disk.committed} groups are safe")
        if not self.is_paused:
            self._release()
        if life == self._life and self.disk.num_waiting and self.disk.failure is None:
            self._commit_later()

    def _release(self) -> None:
        try:
            self._promises.release()
        except StorageError as e:
            self.crash(str(e), 0.1)

    @property
    def num_held(self) -> int:
        """Messages that wait for the disk."""
        return len(self._promises)

    def _send(self, action: Send) -> bool:
        frames = [bytes(f) for f in encode(action.message)]
        connection = self._network.routes.get((action.side, action.route))
        owner = "nobody" if connection is None else connection.owner
        self._timeline.note(f"broker -> {owner}", action.message, frames)
        if action.side == FRONT and connection is not None:
            self._oracle.sent(action.message, self._world.principals[owner])
        try:
            self._network.send(action.side, action.route, frames)
        except Unroutable:
            return False
        return True

    def _lose(self, action: Send) -> None:
        self._handle(PeerLost(action.side, action.route))

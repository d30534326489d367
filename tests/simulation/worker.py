"""A worker's process: the real session, link, work and heartbeats on a simulated device.

Knows what `loop.py` and `heartbeat.py` do in a turn, without sockets and threads, and how processes end. While a kernel runs
on a device without slots, the process takes in nothing.
"""

from collections import deque
from typing import TYPE_CHECKING

from penstock.broker.peer_memory import PeerMemory
from penstock.broker.state import BACK
from penstock.worker.config import DEVICE_FAULT_STATUS
from penstock.worker.link import MAX_WINDOW, Final, Link
from penstock.worker.pulse import Pulse
from penstock.worker.session import Refused, Session
from penstock.worker.work import Work
from simulation.engine import Engine, Run
from simulation.network import Frames, Socket
from simulation.oracle import Violation

if TYPE_CHECKING:
    from simulation.supervisor import Supervisor

MAX_BYTES = 4096
HANG_LIMIT_S = 1.5


class Worker:
    """The process of one life; `Supervisor` starts the next."""

    def __init__(self, supervisor: "Supervisor", pid: int, fault: str, ended: bytes) -> None:
        world = supervisor.world
        self._supervisor, self._timeline = supervisor, world.timeline
        self.pid, self.name = pid, supervisor.name
        self.is_over = self.is_paused = False
        self._is_awake = False
        self._inbox: deque[Frames] = deque()
        self._beat_at = 0.0
        self.pulse = Pulse(secret := world.timeline.random.randbytes(16))
        self.secret = secret
        self.link = Link(self.name, "simulated", MAX_BYTES, secret, ended, pid=pid)
        if fault:
            self.link.credit.begin_slowly()
        memory = PeerMemory(0)
        self.session = Session(self.link, memory, self._send, self, fault, world.timeline.random.random)
        self._network = world.network
        self._connect()
        self._side: Socket | None = None
        self.engine = Engine(world.timeline, world.oracle, supervisor.num_slots, supervisor.max_batch_size)
        self.engine.on_begin = self._on_begin
        self._kernel_ends_at: float | None = None
        self._memory = memory
        self._timeline.after(supervisor.load_s, self._load)

    def _load(self) -> None:
        """Torch and the kernels are there."""
        if not self.is_over:
            self.session.work = self.work = Work(
                lambda announce: self.engine, self.link, self._memory, self.session.send, lambda: self._timeline.now  # type: ignore[arg-type, return-value]
            )
            self.wake()

    # --- sockets ---------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._data = Socket(self._network, BACK, self.name, self._on_frames, self.wake)
        self.session.connected("simulated", self._timeline.now)

    def _seek(self) -> None:
        """No broker answers here: a new connection."""
        self.session.seek()
        self._data.close(False)
        self._connect()

    def _send(self, frames: Frames) -> bool:
        return self._data.send(frames)

    def _on_frames(self, frames: Frames) -> None:
        self._inbox.append(frames)
        self.wake()

    def cut(self) -> None:
        """The data connection breaks."""
        self._data.cut()

    # --- heartbeats ------------------------------------------------------------------------------------------------

    def begin(self, interval_ms: float) -> None:
        """A session: beats go over a socket of their own, a new one for each."""
        self.pulse.begin(interval_ms)
        if self._side is not None:
            self._side.close()
        self._side = Socket(self._supervisor.world.network, BACK, self.name, self._on_beat_answered, lambda: None)
        self._beat(self.pulse.num_sessions)

    def pause(self) -> None:
        self.pulse.pause()

    def _beat(self, session: int) -> None:
        """What the side thread does once in a while: beat, and look at the broker's silence."""
        pulse, now = self.pulse, self._timeline.now
        if self.is_over or session != pulse.num_sessions or pulse.interval_s is None or self._side is None:
            return
        if not self.is_paused:
            if now >= self._beat_at and self._side.can_send:
                progress = 0 if self.session.work is None else self.session.work.progress
                self._side.send(pulse.beat(progress, self.engine.memory(), now))
                self._beat_at = now + pulse.interval_s
            pulse.look(now)
            if pulse.is_lost:
                self.wake()
                return
        wait_s = max(self._beat_at - now, 0.05) if pulse.interval_s else 0.5
        self._timeline.after(wait_s, self._beat, session)

    def _on_beat_answered(self, frames: Frames) -> None:
        if not self.is_paused and not self.is_over:
            self.pulse.receive(frames)
            if self.pulse.is_lost:
                self.wake()

    # --- the loop --------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to do."""
        if not self._is_awake:
            self._is_awake = True
            self._timeline.after(0.00005, self._turn)

    def _turn(self) -> None:
        self._is_awake = False
        if self.is_over or self.is_paused or self._kernel_ends_at is not None:
            return
        now = self._timeline.now
        try:
            self._act(now)
        except Refused as e:
            self.end(f"refused: {e}", 77)
            return
        if self.is_over:
            return
        self._check()
        dues = [due for due in self.session.dues() if due > now]
        if dues:
            self._timeline.at(min(dues) + 0.001, self.wake)

    def _check(self) -> None:
        """What is held is within the credit, and waits, runs or is on its way out; nothing else does."""
        held, work = self.link.held.keys(), self.session.work
        if len(held) > MAX_WINDOW + self.link.credit.num_slots - 1:
            raise Violation("credit", f"{self.name} holds {len(held)} leases")
        if work is None:
            return
        waiting = {assign.lease for assign, _ in work._waiting}
        running = {run.assign.lease for run in self.engine.running()}
        leaving = {item.lease for item in self.session.outbox if isinstance(item, Final)}
        if not waiting <= held or not held <= waiting | running | leaving:
            raise Violation("worker", f"{self.name} holds {sorted(held)}; {waiting=}, {running=}, {leaving=}")

    def _act(self, now: float) -> None:
        """One turn of the data loop."""
        session = self.session
        if self.pulse.is_lost:
            self.pulse.is_lost = False
            session.lose("it does not answer heartbeats", now)
            self._data.close(False)
            self._connect()
        if self._supervisor.is_stopping and not session.is_draining:
            session.drain(now)
        if self._data.has_broken:
            self._data.has_broken = False
            session.lose("the connection is closed", now)
        while self._inbox:
            session.receive(self._inbox.popleft(), now)
        session.get_ready(now)
        if session.must_seek(now):
            self._seek()
        if session.is_sending and self._data.can_send:
            session.send_some(now)
        if session.work is not None:
            self._run_batches(session.work)
        if not self.is_over and self._kernel_ends_at is None and session.can_end(now):
            self.close("drained", is_fault=False)

    def _run_batches(self, work: Work) -> None:
        if self.engine.flights is None:
            if work._waiting:
                self.engine.current = run = self.engine.begin(work._waiting[0][0])
                self._kernel_ends_at = run.ends_at
                self._on_begin(run)
                if not run.hangs:
                    self._timeline.at(run.ends_at, self._kernel_ended)
            return
        while work.run_batch():
            continue
        self._look_at_fault(work)

    def _on_begin(self, run: Run) -> None:
        """A batch is on the device: it will be through, or be the end of this process."""
        if run.assign.lease >> 32 != self.link.epoch:
            raise Violation("old lease", f"{self.name} begins with one of a broker that is gone")
        if run.kills:
            self._timeline.at(run.began_at + 0.5 * run.took_s, self.end, "killed by a row", 139)
        elif run.hangs:
            self._timeline.at(run.began_at + HANG_LIMIT_S, self.end, "killed by the supervisor: it hangs", 137)
        elif self.engine.flights is not None:
            self._timeline.at(run.ends_at + 1e-6, self.wake)

    def _kernel_ended(self) -> None:
        """On a device without slots the batch is answered, and the loop goes on."""
        if self.is_over:
            return
        if self.is_paused:
            self._timeline.after(0.05, self._kernel_ended)
            return
        self._kernel_ends_at = None
        if self._data.has_broken:  # the loop looks at its connection before it sends
            self._data.has_broken = False
            self.session.lose("the connection is closed", self._timeline.now)
        work = self.session.work
        assert work is not None
        work.run_batch()
        self._look_at_fault(work)
        self.wake()

    def _look_at_fault(self, work: Work) -> None:
        if work.fault is not None and not self.is_over:
            self.close("the device is broken", is_fault=True, status=DEVICE_FAULT_STATUS)

    # --- the end ---------------------------------------------------------------------------------------------------

    def close(self, reason: str, is_fault: bool, status: int = 0) -> None:
        """Say goodbye, and end."""
        if self._kernel_ends_at is not None and self.session.work is not None:
            self.session.work._waiting.popleft()  # it had begun
        self.session.close(reason, is_fault)
        self.end(reason, status, is_gentle=True)

    def end(self, why: str, status: int, is_gentle: bool = False) -> None:
        """The process is gone."""
        if self.is_over:
            return
        self.is_over = True
        self._timeline.note(self.name, f"process {self.pid} ends, status {status}: {why}")
        last = self._data.close(is_gentle)
        if self._side is not None:
            self._side.close()
        self._supervisor.ended(self, status, why, last)

"""The worker's data loop: one thread that owns the task socket and runs the kernels itself.

Knows sockets, signals, when to wait, and how the process ends; what messages mean is `session.py`'s business. There is no
hand-off between threads on a task's way: that would cost more than a small batch does.
"""

import gc
import logging
import select
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING

import zmq

from penstock.broker.columns import Buffer
from penstock.broker.detectors import RECONNECT_MS
from penstock.broker.peer_memory import PeerMemory
from penstock.broker.ways import Ways
from penstock.worker.config import DEVICE_FAULT_STATUS, DeviceFault, WorkerConfig
from penstock.worker.heartbeat import Heart
from penstock.worker.link import ATTACHED, AWAY, WELCOME, Link
from penstock.worker.pressure import Pressure
from penstock.worker.session import MAX_OUTBOX, NotAllowed, Refused, Session
from penstock.worker.transport import (
    POLLIN,
    POLLOUT,
    Monitor,
    Socket,
    Wake,
    can_receive,
    dealer,
    is_ready,
    receive,
    send,
)
from penstock.worker.watch import Watch

if TYPE_CHECKING:
    from penstock.worker.work import Work

log = logging.getLogger("penstock.worker")
FIRST_WELCOME_S = 1.0
MAX_MESSAGES_PER_TURN = 64
MAX_REASON = 1000
LOOK_S = RECONNECT_MS / 4e3
SPIN_S = 30e-6
NAP_S = 20e-6
MAX_WATCH_S = 0.05
CANARY_S = 3600.0
LEAVE_S = 3.0
"""Where the device is broken, threads may hang in it: so long they have to end before the process does."""


class Worker:
    """One worker process, from the first hello to goodbye.

    Args:
        config: the settings; ways: where the broker is.
        watch: is told what this process does.
        fault: why the worker before this one has ended, if that was a failure: this one begins slowly, and tells the broker.
        secret, ended: of this process's session and of the one before, see `Link`.
    """

    def __init__(
        self, config: WorkerConfig, ways: Ways, watch: Watch, fault: str = "", secret: bytes = b"", ended: bytes = b""
    ) -> None:
        self._config = config
        self._ways = ways
        self._watch = watch
        self._pressure = Pressure(config.memory_high)
        self._device_fault: str | None = None
        self._link = Link(config.session_name, config.device, config.max_bytes, secret, ended)
        self._memory = PeerMemory(config.shared_bytes, is_writable=config.device not in ("cpu", "mps"))
        self._context: zmq.Context[Socket] = zmq.Context()
        self._wake = Wake()
        self._heart = Heart(
            self._context, ways.now.address.back, self._link.secret, self._wake, self._facts, config.parent,
            self._on_orphaned, ways.now.key,
        )  # fmt: skip
        self._session = Session(self._link, self._memory, self._transmit, self._heart, fault)
        self._poller = select.poll()
        self._poller.register(self._wake.fd, select.POLLIN)
        self._connect()
        self._looked_at = 0.0
        self._num_signals = 0
        self._exit_status = 0
        self._is_orphaned = False
        self._canary_at = time.monotonic() + CANARY_S
        if fault:
            self._link.credit.begin_slowly()

    # --- the process's life ---------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until drained. Returns the exit status: 0 drained, 86 broken device, 128 + n a second signal n, 1 failed.

        Raises:
            StartError: the broker refuses this worker, or what `Engine` says.
        """
        self._heart.start()
        reason = ""
        try:
            self._greet()
            self._session.work = work = self._get_to_work()
            self._watch.is_ready = True
            gc.collect()
            gc.freeze()  # torch's some hundred thousand objects are not walked again by every full collection
            engine = work.engine
            log.info(
                "worker %s ready on %s: %d kernels, broker %s",
                self._config.session_name, engine.device, len(engine.specs), self._url,
            )  # fmt: skip
            reason = self._serve(work)
        except Refused:
            self._link.state = AWAY  # no goodbye to a broker that does not know us
            raise
        except DeviceFault as e:
            self._device_fault = str(e)
        except Exception as e:
            known = self._session.work
            self._device_fault = known.engine.device_fault(e) if known is not None else None
            if self._device_fault is None:
                raise
        except SystemExit:
            if self._num_signals > 1:  # ours: see `on_signal`
                raise
            log.exception("a kernel has asked this process to end")
            self._exit_status = 1
        finally:
            self._watch.end()
            if self._device_fault is not None:
                self._leave(f"the device is broken: {self._device_fault}")
            elif reason or self._num_signals > 1:
                self._close(reason or "interrupted")
            else:
                self._close("failed", is_fault=bool(self._link.held))
        return self._exit_status

    def _get_to_work(self) -> "Work":
        from penstock.worker.engine import Engine  # torch is loaded while the broker knows us as starting
        from penstock.worker.work import Work

        return Work(
            lambda announce: Engine(self._config, announce, self._watch), self._link, self._memory, self._session.send
        )

    def _leave(self, reason: str) -> None:
        """Tell what can still be told, without waiting for a thread that hangs in the device."""
        self._exit_status = DEVICE_FAULT_STATUS
        log.error("%s", reason)
        closing = threading.Thread(target=self._close, args=(reason[:MAX_REASON], True), daemon=True)
        closing.start()
        closing.join(LEAVE_S)

    def _greet(self) -> None:
        """Say hello and wait a moment for the welcome; without a broker, it comes later."""
        limit = time.monotonic() + FIRST_WELCOME_S
        while self._link.state != WELCOME and not self._num_signals and (left := limit - time.monotonic()) > 0:
            self._poll(left)
            self._receive()

    def _serve(self, work: "Work") -> str:
        """The main loop; the reason for its end."""
        if self._num_signals:
            return "stopped while starting"
        self._watch.turn()
        while self._num_signals < 2:
            self._check_flags()
            self._receive()
            self._session.get_ready(time.monotonic())
            if self._session.must_seek(time.monotonic()):
                self._seek()
            is_busy = work.run_batch()
            if work.has_streams and len(self._session.outbox) < MAX_OUTBOX:
                work.step_streams(may_save=not self._session.outbox)
                self._poll(0.0)  # a loop that never waits notices here that the connection is gone
                is_busy = True
            if work.fault is not None:
                raise DeviceFault(work.fault.error.message)
            if is_busy:
                continue
            if self._session.can_end(time.monotonic()):
                return "drained"
            if work.is_flying:
                self._await_device(work)
                continue
            if time.monotonic() >= self._canary_at:
                self._canary_at = time.monotonic() + CANARY_S
                work.engine.check_device()
            self._watch.rest()
            self._poll(self._next_deadline())
            self._watch.turn()
        return "interrupted"

    def _close(self, reason: str, is_fault: bool = False) -> None:
        name = self._config.session_name
        self._session.close(reason, is_fault)
        if self._link.held:
            log.warning("worker %s ended, %d leases unanswered: %s", name, len(self._link.held), reason)
        else:
            log.info("worker %s ended: %s", name, reason)
        self._heart.stop()
        self._session.release_memory()
        self._monitor.close()
        self._socket.close()
        self._context.term()
        self._wake.close()

    # --- signals and flags: set elsewhere, acted upon here --------------------------------------------------------

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """The first one drains, the second ends at once. Runs between two bytecodes of the main thread.

        Raises:
            SystemExit: at the second one, out of a running kernel.
        """
        self._num_signals += 1
        self._wake.set()
        if self._num_signals > 1:
            self._exit_status = 128 + signum
            work = self._session.work
            if work is None:
                return
            work.interrupted = self._exit_status
            if work.is_in_kernel:
                work.is_in_kernel = False
                raise SystemExit(self._exit_status)

    def _on_orphaned(self) -> None:
        self._is_orphaned = True
        self._wake.set()

    def _check_flags(self) -> None:
        if self._device_fault is not None:
            raise DeviceFault(self._device_fault)
        session, now = self._session, time.monotonic()
        if self._heart.pulse.is_lost:
            self._heart.pulse.is_lost = False
            session.lose("it does not answer heartbeats", now)
            self._begin_again()
        if self._pressure.has_news and session.work is not None:
            self._link.credit.is_pressed = self._pressure.is_high
            session.work.relieve(self._pressure)
        if self._is_orphaned and not self._num_signals:
            log.warning("the parent process is gone")
            self._num_signals = 1
        if self._num_signals and not session.is_draining:
            log.info("worker %s drains: %d leases to finish", self._config.session_name, len(self._link.held))
            session.drain(now)

    def _next_deadline(self) -> float:
        """Seconds until something is due without any message."""
        now = time.monotonic()
        return max(min(self._canary_at, now + self._watch.rest_s, *self._session.dues()) - now, 0.0) + 0.001

    # --- the socket -----------------------------------------------------------------------------------------------

    @property
    def _url(self) -> str:
        return self._ways.now.address.url

    def _connect(self) -> None:
        """A socket by the way that is in use now."""
        way = self._ways.now
        self._socket = dealer(self._context, way.address.back, way.key)
        self._monitor = Monitor(self._socket, way.key)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        for fd in (self._fd, self._monitor.fd):
            self._poller.register(fd, select.POLLIN)
        self._heart.move(way)
        self._session.connected(way.address.url, time.monotonic())

    def _reconnect(self) -> None:
        for fd in (self._fd, self._monitor.fd):
            self._poller.unregister(fd)
        self._monitor.close()
        self._socket.close()
        self._connect()

    def _begin_again(self) -> None:
        self._ways.begin()
        self._reconnect()

    def _seek(self) -> None:
        """No broker answers here: by the next way, or anew by the only one."""
        self._session.seek()
        self._ways.move_on()
        self._reconnect()

    def _poll(self, timeout_s: float | None) -> None:
        """Wait for a message, a wake-up, a change of the connection, or room to send what waits."""
        is_sending = self._session.is_sending
        wanted = POLLIN | POLLOUT if is_sending else POLLIN
        # The socket's descriptor tells of changes only, so its state is asked before every wait. One system call, where
        # zmq_poll makes several.
        if not is_ready(self._socket, wanted):
            ready = dict(self._poller.poll(None if timeout_s is None else timeout_s * 1e3))
            if self._wake.fd in ready:
                self._wake.clear()
            if self._monitor.fd in ready:
                self._look()
        if is_sending and is_ready(self._socket, POLLOUT):
            self._session.send_some(time.monotonic())

    def _await_device(self, work: "Work") -> None:
        """Wait until the oldest batch in flight is through, or for what `_poll` waits for.

        The device has no descriptor to poll, and a thread that waits for it would hand over through the interpreter's lock.
        So: spin for as long as the shortest batches take, then look, nap, look: a nap takes 20 us and the system's slack
        of about 50, which is what an answer may lie there for, and looking costs a fifth of a core while the device works.
        """
        began = time.perf_counter()
        while not work.has_landed():
            wanted = POLLIN | POLLOUT if self._session.is_sending else POLLIN
            waited_s = time.perf_counter() - began
            if is_ready(self._socket, wanted) or waited_s > MAX_WATCH_S:
                break
            if waited_s > SPIN_S and select.select((self._fd, self._wake.fd, self._monitor.fd), (), (), NAP_S)[0]:
                break
        self._poll(0.0)

    def _look(self) -> None:
        """Has the connection broken? A new one may stand already, to a broker that does not know its address."""
        self._looked_at = time.monotonic()
        was_there, has_broken = not self._session.is_seeking, self._monitor.has_disconnected()
        if self._monitor.refusal and self._ways.refuse():
            raise NotAllowed(f"{self._url}: {self._monitor.refusal}")
        if has_broken:
            self._session.lose(self._monitor.problem or "the connection is closed", self._looked_at)
            if was_there and len(self._ways) > 1:
                self._begin_again()

    def _receive(self) -> None:
        """Take what has come."""
        for _ in range(MAX_MESSAGES_PER_TURN):
            if not can_receive(self._socket):
                return
            self._session.receive(receive(self._socket), time.monotonic())

    def _transmit(self, frames: list[Buffer]) -> bool:
        """Send a message if it can go now, and the broker knows this connection as far as can be told."""
        if self._link.state == ATTACHED and time.monotonic() - self._looked_at > LOOK_S:
            self._look()  # a kernel may have run for longer than connecting again takes
            if self._link.state != ATTACHED:
                return False
        return send(self._socket, frames)

    # --- the side thread --------------------------------------------------------------------------------------------

    def _facts(self) -> tuple[int, Mapping[str, float]]:
        """Progress and memory for a heartbeat; called by its thread."""
        work = self._session.work
        if work is None:
            return 0, {}
        try:
            memory = work.engine.memory()
        except RuntimeError as e:  # what is asked here fails first when a device breaks while nothing runs
            self._device_fault = work.engine.device_fault(e) or self._device_fault
            self._wake.set()
            return work.progress, {}
        if self._pressure.observe(memory.get("used_fraction", 0.0)):
            self._wake.set()
        return work.progress, memory

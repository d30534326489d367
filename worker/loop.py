"""The worker's data loop: one thread that owns the task socket and runs the kernels itself.

Knows when to receive, run, send, wait and end; what messages mean is `link.py`'s business, what becomes of leases is
`work.py`'s. There is no hand-off between threads on a task's way: that would cost more than a small batch does.
"""

import gc
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import zmq

from penstock.broker import protocol
from penstock.broker.address import Address
from penstock.broker.columns import Buffer
from penstock.broker.keys import OwnKey
from penstock.broker.peer_memory import PeerMemory
from penstock.broker.protocol import Answer, Assign, CancelLease, Code, Error, Fault, Welcome
from penstock.broker.segments import Segment
from penstock.broker.wire import Message, ProtocolError, decode, encode
from penstock.worker.config import DEVICE_FAULT_STATUS, REFUSED_STATUS, DeviceFault, StartError, WorkerConfig
from penstock.worker.heartbeat import Heart
from penstock.worker.link import ATTACHED, AWAY, GREETED, WELCOME, Final, Link
from penstock.worker.pressure import Pressure
from penstock.worker.transport import (
    POLLIN,
    POLLOUT,
    RECONNECT_MS,
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
    from penstock.worker.work import Outgoing, Work

log = logging.getLogger("penstock.worker")
HELLO_AGAIN_S = 2.0
FIRST_WELCOME_S = 1.0
DRAIN_LIMIT_S = 2.0
MAX_MESSAGES_PER_TURN = 64
MAX_REASON = 1000
MAX_OUTBOX = 256
"""Streams pause while so many messages wait for the broker; answers to batches are bounded by the credit."""
LOOK_S = RECONNECT_MS / 2e3
SPIN_S = 30e-6
NAP_S = 20e-6
MAX_WATCH_S = 0.05
CANARY_S = 3600.0
LEAVE_S = 3.0
"""Where the device is broken, threads may hang in it: so long they have to end before the process does."""


class Refused(StartError):
    """The broker does not take this worker; the text says why."""


class NotAllowed(Refused):
    """Nor will it: that is for its owner to change."""

    status = REFUSED_STATUS


class Worker:
    """One worker process, from the first hello to goodbye.

    Args:
        config: the settings; address: where the broker is.
        watch: is told what this process does.
        fault: why the worker before this one has ended, if that was a failure: this one begins slowly, and tells the broker.
        key: what to show the broker, if it wants one.
    """

    def __init__(
        self, config: WorkerConfig, address: Address, watch: Watch, fault: str = "", key: OwnKey | None = None
    ) -> None:
        self._config = config
        self._address = address
        self._watch = watch
        self._fault = fault
        self._pressure = Pressure(config.memory_high)
        self._device_fault: str | None = None
        self._link = Link(config.session_name, config.device, config.max_bytes)
        self._memory = PeerMemory(config.shared_bytes, is_writable=config.device not in ("cpu", "mps"))
        self._context: zmq.Context[Socket] = zmq.Context()
        self._socket = dealer(self._context, address.back, key)
        self._monitor = Monitor(self._socket, key)
        self._wake = Wake()
        self._heart = Heart(
            self._context, address.back, self._link.secret, self._wake, self._facts, config.parent, self._on_orphaned,
            key,
        )  # fmt: skip
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._poller = select.poll()
        for fd in (self._fd, self._wake.fd, self._monitor.fd):
            self._poller.register(fd, select.POLLIN)
        self._work: Work | None = None
        self._outbox: deque[Outgoing] = deque()
        self._greeted_at = 0.0
        self._looked_at = 0.0
        self._is_away_logged = False
        self._num_signals = 0
        self._exit_status = 0
        self._drain_asked_at: float | None = None
        self._is_drained = False
        self._is_orphaned = False
        self._was_welcome = False
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
            from penstock.worker.work import Work  # torch is loaded while the broker knows us as starting

            self._work = Work(self._config, self._link, self._memory, self._send, self._watch)
            self._watch.is_ready = True
            gc.collect()
            gc.freeze()  # torch's some hundred thousand objects are not walked again by every full collection
            engine = self._work.engine
            log.info(
                "worker %s ready on %s: %d kernels, broker %s",
                self._config.session_name, engine.device, len(engine.specs), self._address.url,
            )  # fmt: skip
            reason = self._serve(self._work)
        except Refused:
            self._link.state = AWAY  # no goodbye to a broker that does not know us
            raise
        except DeviceFault as e:
            self._device_fault = str(e)
        except Exception as e:
            self._device_fault = self._work.engine.device_fault(e) if self._work is not None else None
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
            if self._link.state == WELCOME:
                self._get_ready(work)
            is_busy = work.run_batch()
            if work.has_streams and len(self._outbox) < MAX_OUTBOX:
                work.step_streams(may_save=not self._outbox)
                self._poll(0.0)  # a loop that never waits notices here that the connection is gone
                is_busy = True
            if work.fault is not None:
                raise DeviceFault(work.fault.error.message)
            if is_busy:
                continue
            if self._can_end(work):
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
        self._flush()
        may_go_back = is_fault or self._work is None or self._work.end_begun()
        if self._link.state in (ATTACHED, WELCOME) and may_go_back:  # else the broker sees that this process has ended
            send(self._socket, encode(protocol.Goodbye(reason=reason, is_fault=is_fault)))
        if self._link.held:
            log.warning("worker %s ended, %d leases unanswered: %s", name, len(self._link.held), reason)
        else:
            log.info("worker %s ended: %s", name, reason)
        self._heart.stop()
        self._unpin(self._memory.close())
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
            if self._work is not None and self._work.is_in_kernel:
                self._work.is_in_kernel = False
                raise SystemExit(self._exit_status)

    def _on_orphaned(self) -> None:
        self._is_orphaned = True
        self._wake.set()

    def _check_flags(self) -> None:
        if self._device_fault is not None:
            raise DeviceFault(self._device_fault)
        if self._heart.is_lost:
            self._heart.is_lost = False
            self._lose("it does not answer heartbeats")
        if self._pressure.has_news and self._work is not None:
            self._link.credit.is_pressed = self._pressure.is_high
            self._work.relieve(self._pressure)
        if self._is_orphaned and not self._num_signals:
            log.warning("the parent process is gone")
            self._num_signals = 1
        if self._num_signals and self._drain_asked_at is None:
            self._drain_asked_at = time.monotonic()
            self._memory.is_ending = True  # the broker may look at the last answers when this process is gone
            log.info("worker %s drains: %d leases to finish", self._config.session_name, len(self._link.held))
            if self._link.state == ATTACHED:
                self._send(encode(protocol.Drain()))
        if self._link.state == GREETED and time.monotonic() - self._greeted_at > HELLO_AGAIN_S:
            self._link.lost()

    def _can_end(self, work: "Work") -> bool:
        """Nothing is held, and nothing will be: the broker said so, had its time to, or is not there."""
        if not work.is_empty:
            return False
        is_late = self._drain_asked_at is not None and time.monotonic() - self._drain_asked_at > DRAIN_LIMIT_S
        if self._outbox:
            return is_late and self._link.state != ATTACHED
        is_alone = self._drain_asked_at is not None and self._link.state == AWAY  # nobody is there to say so
        return self._is_drained or is_late or is_alone

    def _next_deadline(self) -> float:
        """Seconds until something is due without any message."""
        dues = [self._canary_at, time.monotonic() + self._watch.rest_s]
        if self._link.state == GREETED:
            dues.append(self._greeted_at + HELLO_AGAIN_S)
        if self._drain_asked_at is not None:
            dues.append(self._drain_asked_at + DRAIN_LIMIT_S)
        return max(min(dues) - time.monotonic(), 0.0) + 0.001

    # --- the socket -----------------------------------------------------------------------------------------------

    def _poll(self, timeout_s: float | None) -> None:
        """Wait for a message, a wake-up, a change of the connection, or room to send what waits."""
        is_sending = self._is_sending()
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
            if self._link.state == AWAY:
                self._hello()
            else:
                self._flush()

    def _is_sending(self) -> bool:
        return bool(self._outbox and self._link.state == ATTACHED) or self._link.state == AWAY

    def _await_device(self, work: "Work") -> None:
        """Wait until the oldest batch in flight is through, or for what `_poll` waits for.

        The device has no descriptor to poll, and a thread that waits for it would hand over through the interpreter's lock.
        So: spin for as long as the shortest batches take, then look, nap, look: a nap takes 20 us and the system's slack
        of about 50, which is what an answer may lie there for, and looking costs a fifth of a core while the device works.
        """
        began = time.perf_counter()
        while not work.has_landed():
            wanted = POLLIN | POLLOUT if self._is_sending() else POLLIN
            waited_s = time.perf_counter() - began
            if is_ready(self._socket, wanted) or waited_s > MAX_WATCH_S:
                break
            if waited_s > SPIN_S and select.select((self._fd, self._wake.fd, self._monitor.fd), (), (), NAP_S)[0]:
                break
        self._poll(0.0)

    def _look(self) -> None:
        """Has the connection broken? A new one may stand already, to a broker that does not know its address."""
        self._looked_at = time.monotonic()
        if self._monitor.has_disconnected():
            self._lose(self._monitor.problem or "the connection is closed")
        if self._monitor.refusal:
            raise NotAllowed(f"{self._address.url}: {self._monitor.refusal}")

    def _receive(self) -> None:
        """Take what has come."""
        for _ in range(MAX_MESSAGES_PER_TURN):
            if not can_receive(self._socket):
                return
            frames = receive(self._socket)
            try:
                message = decode(protocol.TO_WORKER, frames)
            except ProtocolError as e:
                log.warning("ignored a malformed message from the broker: %s", e)
                continue
            self._on_message(message)

    def _send(self, item: "Outgoing") -> None:
        """Send now, or keep in order until there is a session and room."""
        self._outbox.append(item)
        self._flush()

    def _flush(self) -> None:
        outbox = self._outbox
        if time.monotonic() - self._looked_at > LOOK_S:  # a kernel may have run for longer than connecting again takes
            self._look()
        while outbox and self._link.state == ATTACHED:
            item = outbox[0]
            if not isinstance(item, Final):
                if not send(self._socket, item):
                    return
            elif all(self._send_answers(frames, answers) for frames, answers in self._link.encode(item)):
                self._link.sent(item)
            else:
                return  # as a whole once more: the broker drops what it has had
            outbox.popleft()

    def _send_answers(self, frames: list[Buffer], answers: Sequence[Answer]) -> bool:
        if not send(self._socket, frames):
            return False
        self._memory.lend(answer.block for answer in answers if answer.block is not None)
        return True

    # --- the session ----------------------------------------------------------------------------------------------

    def _hello(self) -> None:
        message = encode(self._link.hello())
        self._greeted_at = time.monotonic()
        if not send(self._socket, message):
            self._link.lost()

    def _lose(self, why: str) -> None:
        self._link.lost()
        self._heart.pause()
        if not self._is_away_logged:
            self._is_away_logged = True
            log.warning("the broker %s is away (%s): trying again", self._address.url, why)

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Assign):
            self._take(message)
        elif isinstance(message, CancelLease):
            if self._work is not None:
                self._work.cancel(message.lease)
        elif isinstance(message, Welcome):
            self._on_welcome(message)
        elif isinstance(message, protocol.Release):
            self._unpin(self._memory.release(message))
        elif isinstance(message, protocol.Drain):
            self._is_drained = self._memory.is_ending = True
            self._drain_asked_at = self._drain_asked_at or time.monotonic()
        elif isinstance(message, protocol.Goodbye):
            log.info("the broker says goodbye: %s", message.reason or "no reason given")
        elif isinstance(message, Fault):
            self._on_fault(message.error)

    def _on_welcome(self, welcome: Welcome) -> None:
        num_held = len(self._link.held)
        if not self._link.on_welcome(welcome):
            self._forget()
            if num_held:
                log.warning("the broker does not know of %d leases held here: they are dropped", num_held)
        if self._link.state != WELCOME:
            return
        self._unpin(self._memory.welcome(welcome.shared))
        self._heart.begin(welcome.heartbeat_ms)
        if self._is_away_logged:
            how = "with the same session" if welcome.is_resumed else "with a new session"
            log.info("the broker is back %s, epoch %d", how, welcome.epoch)
        self._is_away_logged, self._was_welcome = False, True

    def _unpin(self, segments: list[Segment]) -> None:
        if self._work is not None:
            self._work.engine.pins.unpin(segments)

    def _take(self, assign: Assign) -> None:
        if self._work is None:
            log.warning("ignored lease %d: it came before this worker was ready", assign.lease)
        else:
            self._work.take(assign)

    def _forget(self) -> None:
        self._outbox.clear()
        if self._work is not None:
            self._work.forget()

    def _get_ready(self, work: "Work") -> None:
        """Offer the kernels and say what is held; then everything that waited for the session."""
        engine = work.engine
        if self._memory.is_on and not send(self._socket, encode(self._memory.share())):
            self._link.lost()
            return
        facts = {**engine.facts, "fault": self._fault} if self._fault else engine.facts
        message = encode(self._link.ready(engine.specs, engine.runner.resident, facts))
        if not send(self._socket, message):
            self._link.lost()
            return
        self._fault = ""
        self._flush()
        if self._num_signals:
            self._send(encode(protocol.Drain()))

    def _on_fault(self, error: Error) -> None:
        if error.code == Code.UNATTACHED:
            if self._link.state == ATTACHED:
                self._lose("it does not know this session")
            return
        if not self._was_welcome or error.code == Code.NOT_AUTHORISED:
            kind = NotAllowed if error.code == Code.NOT_AUTHORISED else Refused
            raise kind(f"the broker refused this worker: {error.message}")
        log.error("the broker reports: %s (%s)", error.message, error.code)

    def _facts(self) -> tuple[int, Mapping[str, float]]:
        """Progress and memory for a heartbeat; called by its thread."""
        work = self._work
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

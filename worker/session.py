"""A worker's session: what each word of the broker does to link, work and what waits to be sent; and when it may end.

Knows what follows from what, and ties together who knows the rest: `link.py` the leases and the credit, `work.py` what runs,
`pulse.py` the heartbeats. Does not know sockets, signals or clocks: `now` is monotonic seconds, and frames leave through a
callable. `loop.py` drives it.
"""

import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from penstock.broker import protocol
from penstock.broker.columns import Buffer
from penstock.broker.failpoints import ARMED, hit, hit_message
from penstock.broker.peer_memory import PeerMemory
from penstock.broker.protocol import Answer, Assign, CancelLease, Code, Drain, Error, Fault, Welcome
from penstock.broker.segments import Segment
from penstock.broker.wire import Message, ProtocolError, decode, encode
from penstock.worker.config import REFUSED_STATUS, StartError
from penstock.worker.link import ATTACHED, AWAY, GREETED, WELCOME, Encoded, Final, Link

if TYPE_CHECKING:
    from penstock.worker.work import Outgoing, Work

log = logging.getLogger("penstock.worker")
FIRST_SEEK_S = 1.0
MAX_SEEK_S = 4.0
"""A broker that does not answer has so long, at first and at most, and up to twice that by chance; then comes the next."""
DRAIN_LIMIT_S = 2.0
MAX_OUTBOX = 256
"""Streams pause while so many messages wait for the broker; answers to batches are bounded by the credit."""


class Refused(StartError):
    """The broker does not take this worker; the text says why."""


class NotAllowed(Refused):
    """Nor will it: that is for its owner to change."""

    status = REFUSED_STATUS


class Heartbeats(Protocol):
    """Are sent while there is a session."""

    def begin(self, interval_ms: float) -> None: ...

    def pause(self) -> None: ...


class Session:
    """See the module.

    Args:
        send: whether a message has left; False if there is no connection, or no room. It may call `lose`.
        heart: beats while there is a session.
        fault: why the worker before this one has ended, if that was a failure: the broker is told once.
        draw: a number from 0 to 1.

    Attributes:
        work: what runs; None while the worker starts.
        outbox: what waits for a session and room, in order.
        is_drained: the broker assigns nothing more.
    """

    def __init__(
        self,
        link: Link,
        memory: PeerMemory,
        send: Callable[[list[Buffer]], bool],
        heart: Heartbeats,
        fault: str = "",
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.link = link
        self.memory = memory
        self.work: Work | None = None
        self.outbox: deque[Outgoing] = deque()
        self.is_drained = False
        self._transmit = send
        self._heart = heart
        self._fault = fault
        self._draw = draw
        self._url = ""
        self._seek_s = FIRST_SEEK_S
        self._seek_at = 0.0
        self._drain_asked_at: float | None = None
        self._is_away_logged = False
        self._was_welcome = False
        self._rest: list[Encoded] = []
        """Of the answer that is first in the outbox, what is left to send over this connection."""

    # --- the way out ----------------------------------------------------------------------------------------------

    @property
    def is_sending(self) -> bool:
        """Something is to be sent as soon as the connection takes it: call `send_some` then."""
        return bool(self.outbox and self.link.state == ATTACHED) or self.link.state == AWAY

    def send_some(self, now: float) -> None:
        """The connection takes messages."""
        if self.link.state == AWAY:
            self._hello()
        else:
            self.flush()

    def send(self, item: "Outgoing") -> None:
        """Send now, or keep in order until there is a session and room."""
        self.outbox.append(item)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as it goes."""
        outbox = self.outbox
        while outbox and self.link.state == ATTACHED:
            item = outbox[0]
            if not isinstance(item, Final):
                if not self._transmit(item):
                    return
            elif not self._send_final(item):
                return
            outbox.popleft()

    def _send_final(self, final: Final) -> bool:
        """Send the answer to a lease, from where it stopped for want of room; over another connection it goes whole again."""
        self._rest = self._rest or self.link.encode(final)
        while self._rest:
            if not self._send_answers(*self._rest[0]):
                return False
            del self._rest[0]
        self.link.sent(final)
        return True

    def _send_answers(self, frames: list[Buffer], answers: Sequence[Answer]) -> bool:
        if ARMED:
            hit("worker.sending.final")
        if not self._transmit(frames):
            return False
        if ARMED:
            hit("worker.sent.final")
        self.memory.lend(answer.block for answer in answers if answer.block is not None)
        return True

    def _hello(self) -> None:
        message = encode(self.link.hello())
        if ARMED:
            hit("worker.sending.hello")
        if not self._transmit(message):
            self.link.lost()

    def get_ready(self, now: float) -> None:
        """After a welcome: offer the kernels and say what is held; then send what waited for the session."""
        link, work = self.link, self.work
        if link.state != WELCOME or work is None:
            return
        if self.memory.is_on and not self._transmit(encode(self.memory.share())):
            self.lose("it takes nothing", now)
            return
        facts = {**work.engine.facts, "fault": self._fault} if self._fault else work.engine.facts
        message = encode(link.ready(work.engine.specs, work.engine.runner.resident, facts))
        if ARMED:
            hit("worker.sending.ready")
        if not self._transmit(message):
            self.lose("it takes nothing", now)
            return
        if ARMED:
            hit("worker.sent.ready")
        self._fault, self._rest = "", []
        self.flush()
        if self._drain_asked_at is not None and not self.is_drained:
            self.send(encode(Drain()))

    # --- the end --------------------------------------------------------------------------------------------------

    @property
    def is_draining(self) -> bool:
        return self._drain_asked_at is not None

    def drain(self, now: float) -> None:
        """Ask the broker to assign nothing more."""
        self._drain_asked_at = now
        self.memory.is_ending = True  # the broker may look at the last answers when this process is gone
        if ARMED:
            hit("worker.stop.begun")
        if self.link.state == ATTACHED:
            self.send(encode(Drain()))

    def can_end(self, now: float) -> bool:
        """Nothing is held, and nothing will be: the broker said so, had its time to, or is not there."""
        if self.work is not None and not self.work.is_empty:
            return False
        asked_at = self._drain_asked_at
        is_late = asked_at is not None and now - asked_at > DRAIN_LIMIT_S
        if self.outbox:
            return is_late and self.link.state != ATTACHED
        is_alone = asked_at is not None and self.link.state == AWAY  # nobody is there to say so
        return self.is_drained or is_late or is_alone

    def close(self, reason: str, is_fault: bool) -> None:
        """Send what can still go, and say goodbye."""
        self.flush()
        may_go_back = is_fault or self.work is None or self.work.end_begun()
        if self.link.state in (ATTACHED, WELCOME) and may_go_back:  # else the broker sees that this process has ended
            self._transmit(encode(protocol.Goodbye(reason=reason, is_fault=is_fault)))

    def release_memory(self) -> None:
        """Let go of what is shared."""
        self._unpin(self.memory.close())

    # --- connections ----------------------------------------------------------------------------------------------

    def connected(self, url: str, now: float) -> None:
        """The driver has a new connection, or is making it."""
        self._url = url
        self._seek_at = now + self._seek_s * (1.0 + self._draw())

    @property
    def is_seeking(self) -> bool:
        """There is no session."""
        return self.link.state in (AWAY, GREETED)

    def must_seek(self, now: float) -> bool:
        """No broker answers here: it is time for another connection. Call `seek`, then `connected`."""
        return self.is_seeking and now >= self._seek_at

    def seek(self) -> None:
        """The connection is given up; the next one has more time."""
        self.link.lost()
        self._seek_s = min(2.0 * self._seek_s, MAX_SEEK_S)

    def dues(self) -> list[float]:
        """When something is due without any message."""
        dues = [self._seek_at] if self.is_seeking else []
        return dues if self._drain_asked_at is None else [*dues, self._drain_asked_at + DRAIN_LIMIT_S]

    # --- what the broker says -------------------------------------------------------------------------------------

    def lose(self, why: str, now: float) -> None:
        """The connection or the session is gone."""
        self.link.lost()
        self._heart.pause()
        self._seek_at = now + self._seek_s * (1.0 + self._draw())
        if not self._is_away_logged:
            self._is_away_logged = True
            log.warning("the broker %s is away (%s): trying again", self._url, why)

    def receive(self, frames: Sequence[Buffer], now: float) -> None:
        """Act on a message from the broker. Raises Refused."""
        try:
            message = decode(protocol.TO_WORKER, frames)
        except ProtocolError as e:
            log.warning("ignored a malformed message from the broker: %s", e)
        else:
            if ARMED:
                hit_message("worker.received", message)
            self._on_message(message, now)

    def _on_message(self, message: Message, now: float) -> None:
        if isinstance(message, Assign):
            self._take(message)
        elif isinstance(message, CancelLease):
            if self.work is not None:
                self.work.cancel(message.lease)
        elif isinstance(message, Welcome):
            self._on_welcome(message)
        elif isinstance(message, protocol.Release):
            self._unpin(self.memory.release(message))
        elif isinstance(message, Drain):
            self.is_drained = self.memory.is_ending = True
            self._drain_asked_at = self._drain_asked_at or now
        elif isinstance(message, protocol.Goodbye):
            log.info("the broker says goodbye: %s", message.reason or "no reason given")
        elif isinstance(message, Fault):
            self._on_fault(message.error, now)

    def _on_welcome(self, welcome: Welcome) -> None:
        if not self.link.is_expected(welcome):
            return
        num_held = len(self.link.held)
        if not self.link.on_welcome(welcome):
            self._forget()
            if num_held:
                log.warning("the broker does not know of %d leases held here: they are dropped", num_held)
        self._unpin(self.memory.welcome(welcome.shared))
        self._heart.begin(welcome.heartbeat_ms)
        if self._is_away_logged:
            how = "with the same session" if welcome.is_resumed else "with a new session"
            log.info("the broker is back %s, epoch %d, at %s", how, welcome.epoch, self._url)
        self._is_away_logged, self._was_welcome, self._seek_s = False, True, FIRST_SEEK_S

    def _unpin(self, segments: list[Segment]) -> None:
        if self.work is not None:
            self.work.engine.pins.unpin(segments)

    def _take(self, assign: Assign) -> None:
        if self.work is None:
            log.warning("ignored lease %d: it came before this worker was ready", assign.lease)
        else:
            self.work.take(assign)

    def _forget(self) -> None:
        self.outbox.clear()
        if self.work is not None:
            self.work.forget()

    def _on_fault(self, error: Error, now: float) -> None:
        if error.code == Code.UNATTACHED:
            if self.link.state == ATTACHED:
                self.lose("it does not know this session", now)
            return
        if not self._was_welcome or error.code == Code.NOT_AUTHORISED:
            kind = NotAllowed if error.code == Code.NOT_AUTHORISED else Refused
            raise kind(f"the broker refused this worker: {error.message}")
        log.error("the broker reports: %s (%s)", error.message, error.code)

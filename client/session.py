"""The client's half of the protocol as a state machine: events and the time in, messages out.

Knows which message follows from what, and ties together who knows the rest: `submissions.py` the runs, `connection.py`
the broker's presence, `receipts.py` the numbered messages, `questions.py` requests. Does not know sockets, threads,
clocks or numpy: `now` (monotonic seconds) and randomness are arguments. `line.py` and `aio_line.py` drive it: after
anything that they do to it they send what `take` gives while the socket can send, and they call `tick` when
`next_deadline` is over.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from penstock.broker import protocol
from penstock.broker.columns import Buffer, any_shared
from penstock.broker.failpoints import ARMED, hit_message
from penstock.broker.peer_memory import PeerMemory
from penstock.broker.protocol import Code, Error
from penstock.broker.segments import SegmentError
from penstock.broker.shared import DescriptorError
from penstock.broker.wire import Message, ProtocolError, VersionError, decode, encode
from penstock.client.config import ClientConfig
from penstock.client.connection import ENDED, GREETING, NEW, READY, Connection
from penstock.client.errors import NotAuthorised, PenstockError, Unavailable, from_wire
from penstock.client.questions import Questions, Request
from penstock.client.receipts import Receipts
from penstock.client.run import CLOSED, SENT, Options, Row, Run, submit_message
from penstock.client.submissions import Submissions, says_whose

log = logging.getLogger("penstock.client")
Numbered = TypeVar("Numbered", protocol.Results, protocol.Partial)


class Session:
    """See the module. Public attributes are for reading only.

    Args:
        draw: n -> n random bytes.
    """

    def __init__(self, config: ClientConfig, name: str, draw: Callable[[int], bytes]) -> None:
        self.connection = Connection(name, draw)
        self.memory = PeerMemory(config.shared_bytes)
        self.submissions = Submissions(config, draw, self._fault)
        self.backlog, self.news = self.submissions.backlog, self.submissions.news
        self._in_flight = self.submissions.flight.runs
        self.error: PenstockError | None = None
        """Why the session has ended for good, if it has."""
        self.last_fault = self._kept_out = ""
        self.can_send = True
        """Told by the driver: what is due to be sent does not count as due while the socket cannot."""
        self.specs_version = 0
        """Grows when what is known of kernels may be out of date."""
        self.taken: Message | None = None
        """The last message that `take` gave, where failpoints are armed."""
        self._receipts = Receipts()
        self._questions = Questions()
        self._outbox: deque[Message] = deque()

    # --- what the user wants ---------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Something waits for the broker."""
        return bool(self._in_flight or self.backlog.num_rows or self._questions or self.connection.state == GREETING)

    @property
    def must_listen(self) -> bool:
        """Incoming messages matter even if no caller waits: callbacks, or tasks that wait for credit."""
        return bool(self.news.num_watched or self.backlog.waiting or self.connection.state == GREETING)

    @property
    def has_met_broker(self) -> bool:
        """It has answered once, or there is no use in waiting for it."""
        return self.connection.epoch is not None or self.connection.state == ENDED

    def open(self, now: float) -> None:
        """Start to greet the broker, on first use."""
        if self.connection.state == NEW:
            self._greet(now)

    def submit(self, row: Row, options: Options, now: float) -> tuple[Run, int]:
        """Take one task: the run that it is part of, and its row there."""
        if not self.backlog.num_rows and not self.is_busy:
            self.connection.expect(now)
        return self.submissions.submit(row, options, now)

    def send(self, run: Run, now: float) -> None:
        """Take a whole run; it goes out as soon as the broker grants it."""
        if not self.is_busy:
            self.connection.expect(now)
        self.submissions.send(run, now)

    def flush(self) -> None:
        """Somebody waits: let nothing wait for company any more."""
        self.backlog.flush()

    def cancel(self, run: Run, start: int, stop: int) -> None:
        """End rows [start, stop): at once while they are still here, else by asking the broker."""
        if run.state == CLOSED:
            return
        self.submissions.cancel(run, start, stop)
        if run.state == SENT and self.connection.state == READY:
            self._outbox.append(protocol.Cancel(id=run.id, start=start, stop=stop))

    def ask(self, make: Callable[[int], Message], now: float) -> Request:
        """Put a question (`make(request number)`: a Status, Fetch or Control) to the broker."""
        if not self.is_busy:
            self.connection.expect(now)
        request = self._questions.add(make)
        if self.submissions.final_error is not None:
            self._questions.end(self.submissions.final_error)
        elif self.connection.state == READY:
            self._outbox.append(request.message)
        return request

    def forget(self, request: Request) -> None:
        """Nobody waits for this reply any more."""
        self._questions.forget(request)

    def close(self) -> None:
        """Say goodbye: the broker ends what is open, and so does this."""
        state = self.connection.state
        if state != ENDED:
            self._end(Unavailable("the client was closed"), Error(Code.CANCELLED, "the client was closed"))
            if state == READY:
                if self._receipts.has_news:
                    self._outbox.append(protocol.Ack(seq=self._receipts.ack()))
                self._outbox.append(protocol.Goodbye(reason="closed"))

    # --- the transport ---------------------------------------------------------------------------------------------

    def take(self, now: float) -> list[Buffer] | None:
        """The next message to send, as frames; None if there is none now. Call it only if the socket can send."""
        while (message := self._next_message(now)) is not None:
            try:
                frames = encode(message)
            except ProtocolError as e:
                if type(message) is not protocol.Submit:
                    raise
                run = self._in_flight[message.id]
                self.submissions.take_back(run, Error(Code.INVALID, f"it cannot travel: {e}"))
            else:
                if type(message) is protocol.Submit and message.block.layout.num_framed:
                    self.memory.lend([message.block])
                self.connection.last_sent = now
                if ARMED:
                    self.taken = message
                    hit_message("client.sending", message)
                return frames
        return None

    def _next_message(self, now: float) -> Message | None:
        connection = self.connection
        if connection.must_greet:
            return connection.greeting(self._receipts.ackable, self.submissions.flight.ids(), now)
        if self._outbox:
            return self._outbox.popleft()
        if connection.state != READY:
            return None
        if self.memory.must_tell:
            return self.memory.share()
        if self.backlog.waiting:
            run = self.submissions.next_to_send(now)
            if run is not None:
                self._repeat_cancels(run)
                if run.shape.layout.num_framed and run.block is not None:
                    run.block = self.memory.lendable(run.block)
                return submit_message(run, self._receipts.ack(), now)
        return protocol.Ack(seq=self._receipts.ack()) if self._receipts.must_ack else None

    def _repeat_cancels(self, run: Run) -> None:
        """The broker has, or is about to get, rows that nobody wants."""
        for start, stop in run.cancels:
            self._outbox.append(protocol.Cancel(id=run.id, start=start, stop=stop))

    def receive(self, frames: Sequence[Buffer], now: float) -> None:
        """Act on a message from the broker."""
        self.connection.last_heard = now
        if self.error is not None:
            return
        try:
            message = decode(protocol.TO_CLIENT, frames)
        except VersionError as e:
            self._end(Unavailable(f"the broker cannot be used: {e}"))
        except ProtocolError as e:
            self._fault(f"a message that cannot be read came from the broker: {e}")
        else:
            if ARMED:
                hit_message("client.received", message)
            _HANDLERS[type(message)](self, message, frames, now)
            if ARMED:
                hit_message("client.taken", message)

    def tick(self, now: float) -> None:
        """Do what is due by the clock."""
        if now >= self.backlog.flush_at:
            self.backlog.flush()
        if now >= self.backlog.wake_at:
            self.backlog.wake(now)
        self.submissions.expire(now)
        if self.connection.tick(self.is_busy, self.can_send, now):
            self._outbox.append(protocol.Heartbeat(ack=self._receipts.ack()))
            self.memory.tick(now)

    def next_deadline(self) -> float:
        """When `tick` has something to do by the clock; infinity if never."""
        due = self.connection.next_deadline(self.is_busy, self.can_send)
        return min(due, self.backlog.flush_at, self.backlog.wake_at, self.submissions.deadlines.next)

    def reconnected(self, now: float) -> None:
        """The driver has a new socket."""
        self.connection.must_reconnect = False
        if self.connection.state in (GREETING, READY):
            self._greet(now)

    # --- what the broker says --------------------------------------------------------------------------------------

    def _take_new(self, m: Numbered, frames: Sequence[Buffer], now: float) -> Numbered | None:
        """A numbered message if it is to be acted upon, with all bytes our own; it then counts as received."""
        if m.seq != self._receipts.received + 1 and not self._may_skip_to(m.seq, now):
            return None
        is_shared = any_shared([o.block for o in m.outcomes])
        if is_shared:
            try:
                m = self._taken_out(m)
            except (SegmentError, DescriptorError) as e:
                self.memory.turn_off(str(e))
                self._greet(now)  # it comes once more, in frames
                return None
        self._receipts.note(m.seq, frames, is_shared)
        return m

    def _taken_out(self, m: Numbered) -> Numbered:
        outcomes = [o if o.block is None else replace(o, block=self.memory.take_out(o.block)) for o in m.outcomes]
        return replace(m, outcomes=outcomes)

    def _may_skip_to(self, seq: int, now: float) -> bool:
        """After a gap the broker is asked to send again; what it cannot send however often it is asked is given up."""
        received = self._receipts.received
        if seq <= received or self.connection.state == GREETING:
            return False
        if self._receipts.asks_again():
            log.warning("message %d came after %d; asking for what is missing", seq, received)
            self._greet(now)
            return False
        self._fault(f"the broker does not send again what is missing between its messages {received} and {seq}")
        return True

    def _on_results(self, m: protocol.Results, frames: Sequence[Buffer], now: float) -> None:
        if (taken := self._take_new(m, frames, now)) is not None:
            is_known = self.submissions.take_results(taken)
            if not is_known and self._questions.has_fetch:
                self._receipts.hold()  # it may be what was asked for, and the reply that says so was lost: it comes again

    def _on_partial(self, m: protocol.Partial, frames: Sequence[Buffer], now: float) -> None:
        if (taken := self._take_new(m, frames, now)) is not None:
            self.submissions.take_partials(taken)

    def _on_release(self, m: protocol.Release, frames: Sequence[Buffer], now: float) -> None:
        self.memory.release(m)

    def _on_welcome(self, m: protocol.Welcome, frames: Sequence[Buffer], now: float) -> None:
        connection = self.connection
        if connection.state != GREETING:
            return
        is_new_epoch = connection.epoch != m.epoch
        if is_new_epoch and connection.epoch is not None:
            self.specs_version += 1
        connection.welcome(m, now)
        if not m.is_resumed:
            self._receipts.restart()
        for run in self.submissions.welcome(m, is_new_epoch):
            self._repeat_cancels(run)
        self.memory.welcome(m.shared)
        if self.memory.is_on:
            self._outbox.append(self.memory.share())
        for id_ in sorted(self.submissions.strays):
            self._questions.add(lambda number, id_=id_: protocol.Fetch(request=number, id=id_))  # type: ignore[misc]
        self._outbox.extend(self._questions.messages())

    def _on_accepted(self, m: protocol.Accepted, frames: Sequence[Buffer], now: float) -> None:
        self.submissions.accepted(m)

    def _on_refused(self, m: protocol.Refused, frames: Sequence[Buffer], now: float) -> None:
        if m.error.code in (Code.INVALID, Code.UNKNOWN_KERNEL):
            self.specs_version += 1
        if m.error.code == Code.UNSHARED:
            self.memory.turn_off(m.error.message)
        self.submissions.refused(m, now)

    def _on_reply(self, m: protocol.Reply, frames: Sequence[Buffer], now: float) -> None:
        request = self._questions.settle(m.request, m.error, dict(m.body))
        if request is None:
            return
        if type(request.message) is protocol.Fetch:  # its outcomes may be in the next message
            if m.error is None and not says_whose(m.body):
                request.error = Error(Code.PROTOCOL, "the broker's answer to a fetch cannot be understood")
                self._fault(request.error.message)
            request.run = self.submissions.fetched(request.message.id, request.error, m.body)
            if not self._questions.has_fetch:
                self._receipts.release()
        self.news.num_events += 1

    def _on_fault(self, m: protocol.Fault, frames: Sequence[Buffer], now: float) -> None:
        error, state = m.error, self.connection.state
        if error.code == Code.UNATTACHED:
            if state == READY:
                self._greet(now)
        elif error.code == Code.NOT_AUTHORISED or (error.code == Code.PROTOCOL and state == GREETING):
            self._end(from_wire(error), error)
        else:
            self._fault(f"the broker says: {error.message}")

    def _on_heartbeat(self, m: protocol.Heartbeat, frames: Sequence[Buffer], now: float) -> None:
        """That it came is all that it says."""

    def _on_goodbye(self, m: protocol.Goodbye, frames: Sequence[Buffer], now: float) -> None:
        log.info("the broker said goodbye: %s", m.reason)
        if self.connection.state == READY:
            self._outbox.clear()
            self.connection.lose(now)

    def _fault(self, message: str) -> None:
        self.last_fault = message
        log.error("%s", message)

    # --- beginning and end -----------------------------------------------------------------------------------------

    def _greet(self, now: float) -> None:
        self._outbox.clear()
        self.connection.greet(now)

    def kept_out(self, why: str, is_final: bool) -> None:
        """The driver's connection came to no handshake."""
        if is_final and self.error is None:
            self._end(NotAuthorised(why))
        elif not is_final:
            self._kept_out = why

    def unreachable(self, where: str) -> Unavailable:
        """What to raise when no broker has answered at the address `where`."""
        if self._kept_out:
            return Unavailable(f"the broker at {where} cannot be used: {self._kept_out}")
        why = f" ({self.last_fault})" if self.last_fault else ""
        return Unavailable(f"no broker at {where}{why}; start one with `penstock up`")

    def _end(self, reason: PenstockError, error: Error | None = None) -> None:
        """Nothing more can be done on this session: everything open ends with `error`, or for the same `reason`."""
        self.error = reason
        self.connection.end()
        self._outbox.clear()
        final_error = Error(reason.code, reason.message)
        self._questions.end(error or final_error)
        self.submissions.end(error or final_error, final_error)
        self.memory.close()

    def check(self) -> None:
        """Assert what must hold between any two events; tests call it after every one."""
        self.submissions.check()
        self._receipts.check()
        assert (self.error is None) == (self.connection.state != ENDED)
        assert not self._outbox or self.connection.state in (READY, ENDED)


_HANDLERS: Final[dict[type[Message], Any]] = {
    protocol.Results: Session._on_results,
    protocol.Welcome: Session._on_welcome,
    protocol.Accepted: Session._on_accepted,
    protocol.Refused: Session._on_refused,
    protocol.Partial: Session._on_partial,
    protocol.Release: Session._on_release,
    protocol.Reply: Session._on_reply,
    protocol.Fault: Session._on_fault,
    protocol.Heartbeat: Session._on_heartbeat,
    protocol.Goodbye: Session._on_goodbye,
}

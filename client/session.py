"""The client's half of the protocol as a state machine: events and the time in, messages out.

Knows runs, coalescing, credit, acknowledgements, reconnection and deadlines. Does not know sockets, threads, clocks or
numpy: `now` (monotonic seconds) and randomness are arguments. `line.py` and `aio.py` drive it: after anything that
they do to it they send what `take` gives while the socket can send, and they call `tick` when `next_deadline` is over.

States: NEW -> GREETING (hello or attach is out) -> READY -> CLOSED; any loss leads from READY back to GREETING.
"""

import heapq
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from penstock.broker import protocol
from penstock.broker.columns import Buffer, frame_bytes
from penstock.broker.protocol import Code, Error, Outcome
from penstock.broker.wire import Message, ProtocolError, VersionError, decode, encode
from penstock.client.config import ClientConfig
from penstock.client.errors import PenstockError, Unavailable, from_wire
from penstock.client.run import CLOSED, PENDING, SENT, WAITING, Options, Part, Row, Run, deadline_of

log = logging.getLogger("penstock.client")

NEW: Final = "new"
GREETING: Final = "greeting"
READY: Final = "ready"
ENDED: Final = "closed"

MAX_IDLE_RUNS: Final = 4
"""With fewer runs than this under way the line counts as idle, and a task goes out at once."""
MAX_TOLERANCE_S: Final = 0.005
"""Tasks whose deadlines differ by this much (and by 1 % of their time limit) may share a run."""
MAX_INTERNED: Final = 1024
ACK_MESSAGES: Final = 16
ACK_BYTES: Final = 1 << 20
SILENT_HEARTBEATS: Final = 3
FIRST_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 5.0


class Request:
    """A question to the broker, and its reply once it came."""

    __slots__ = ("body", "error", "is_done", "message", "watchers")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.is_done = False
        self.body: dict[str, Any] = {}
        self.error: Error | None = None
        self.watchers: list[Callable[[], object]] = []


class Session:
    """See the module. Public attributes are for reading only.

    Args:
        draw: n -> n random bytes.
    """

    def __init__(self, config: ClientConfig, name: str, draw: Callable[[int], bytes]) -> None:
        self._config = config
        self._name = name
        self._draw = draw
        self._secret = draw(protocol.SECRET_BYTES)
        self.state = NEW
        self.error: PenstockError | None = None
        """Why the session has ended for good, if it has."""
        self.must_reconnect = False
        """The broker does not answer on this socket; the driver shall make a new one and call `reconnected`."""
        self.can_send = True
        """Told by the driver: what is due to be sent does not count as due while the socket cannot."""
        self.num_events = 0
        """Grows with everything that somebody may wait for."""
        self.num_watched = 0
        """Open runs whose end will be told to a callback."""
        self.epoch: int | None = None
        self.specs_version = 0
        """Grows when what is known of kernels may be out of date."""
        self.last_fault = ""
        self.changed: deque[Run] = deque()
        """Runs with callbacks that have news."""
        self.waiting_rows = self.waiting_bytes = 0
        self.window_rows, self.window_bytes = config.max_rows_per_run, config.max_run_bytes  # until a welcome says
        self._options: dict[Options, Options] = {}
        self._open: dict[bytes, Run] = {}
        self._ghosts: dict[bytes, list[int]] = {}  # ended here, not yet by the broker: id -> [rows left, rows, bytes]
        self._pending: dict[Any, Run] = {}
        self._waiting: list[tuple[int, int, Run]] = []
        self._outbox: deque[Message] = deque()
        self._requests: dict[int, Request] = {}
        self._deadlines: list[list[Any]] = []
        self._num_dead = self._num_drawn = 0
        self._granted_rows = self._granted_bytes = self._sent_rows = self._sent_bytes = 0
        self._received = self._acked = self._unacked_bytes = self._gap_at = 0
        self._heartbeat_s = 1.0
        self._last_sent = self._last_beat = self._heard = 0.0
        self._flush_at = math.inf
        self._must_greet = False
        self._retry_at, self._retry_s = math.inf, FIRST_RETRY_S

    # --- what the user wants ---------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Something waits for the broker."""
        return bool(self._open or self._waiting or self._pending or self._requests or self.state == GREETING)

    @property
    def must_listen(self) -> bool:
        """Incoming messages matter even if no caller waits: callbacks, or tasks that wait for credit."""
        return bool(self.num_watched or self._waiting or self.state == GREETING)

    def open(self, now: float) -> None:
        """Start to greet the broker, on first use."""
        if self.state == NEW:
            self._greet(now)

    @property
    def max_rows_per_run(self) -> int:
        """As configured, but no more than the broker grants at once."""
        return min(self._config.max_rows_per_run, self.window_rows)

    @property
    def max_run_bytes(self) -> int:
        """As configured, but no more than the broker grants at once."""
        return min(self._config.max_run_bytes, self.window_bytes)

    def draw_id(self) -> bytes:
        return self._draw(protocol.ID_BYTES)

    def intern(self, options: Options) -> Options:
        """One object for equal options: only tasks with the same one share runs."""
        if len(self._options) >= MAX_INTERNED:
            self._options.clear()
        return self._options.setdefault(options, options)

    def has_room(self, num_rows: int, num_bytes: int) -> bool:
        """Whether so much more may wait here; a single submission always may if nothing else waits."""
        if self.error is not None or self.waiting_rows == 0:
            return True
        return (
            self.waiting_rows + num_rows <= self._config.max_waiting
            and self.waiting_bytes + num_bytes <= self._config.max_waiting_bytes
        )

    def submit(self, row: Row, options: Options, now: float) -> tuple[Run, int]:
        """Take one task: it goes out at once on an idle line, else it may wait `flush_s` for company."""
        shape, deadline = row.shape, deadline_of(options, now)
        key = (shape, id(options))
        run = self._pending.get(key)
        if run is not None:
            tolerance = min(MAX_TOLERANCE_S, 0.01 * (deadline - now))
            is_near = deadline == run.deadline or abs(deadline - run.deadline) <= tolerance
            if is_near and run.nbytes + row.nbytes <= self.max_run_bytes:
                index = run.add(row)
                self._count_waiting(1, row.nbytes)
                if run.num_rows >= min(self.max_rows_per_run, shape.max_rows):
                    self._seal(run)
                return run, index
            self._seal(run)
        run = Run(self.draw_id(), shape, options, deadline)
        run.add(row)
        is_full = run.num_rows >= min(self.max_rows_per_run, shape.max_rows)
        if is_full or options.key is not None or (self._is_idle and not self._pending):
            self.send(run, now)
        else:
            self._accept(run, now)
            run.key = key
            self._pending[key] = run
            self._flush_at = min(self._flush_at, now + self._config.flush_s)
        return run, 0

    def send(self, run: Run, now: float) -> None:
        """Take a whole run; it goes out as soon as the broker grants it."""
        self._accept(run, now)
        if run.state == PENDING:
            self._seal(run)

    def flush(self) -> None:
        """Somebody waits: let nothing wait for company any more."""
        if self._pending:
            for run in list(self._pending.values()):
                self._seal(run)
        self._flush_at = math.inf

    def cancel(self, run: Run, start: int, stop: int, now: float) -> None:
        """End rows [start, stop): at once while they are still here, else by asking the broker."""
        if run.state == CLOSED:
            return
        run.cancels.append((start, stop))
        if run.state == SENT:
            self._note_busy(now)
            self._outbox.append(protocol.Cancel(id=run.id, start=start, stop=stop))
        else:
            self._end_rows(run, start, stop, Error(Code.CANCELLED, "cancelled before it was sent"))

    def ask(self, make: Callable[[int], Message], now: float) -> Request:
        """Put a question (`make(request number)`: a Status or Control) to the broker."""
        self._note_busy(now)
        self._num_drawn += 1
        request = Request(make(self._num_drawn))
        self._requests[self._num_drawn] = request
        if self.error is not None:
            self._answer(self._num_drawn, self._final_error(), {})
        elif self.state == READY:
            self._outbox.append(request.message)
        return request

    def forget(self, request: Request) -> None:
        """Nobody waits for this reply any more."""
        self._requests.pop(getattr(request.message, "request", 0), None)

    def watch(self, run: Run, row: int, callback: Callable[[], object]) -> bool:
        """Have `callback` come out of `callbacks` once the row has its outcome; False if it already has."""
        if run.slots[row] is not None:
            return False
        if run.callbacks is None:
            run.callbacks = {}
            run.watchers = [*(run.watchers or ()), self.changed]
            self.num_watched += 1
        run.callbacks.setdefault(row, []).append(callback)
        return True

    def callbacks(self) -> list[Callable[[], object]]:
        """Those whose rows have got their outcome since the last time."""
        ready: list[Callable[[], object]] = []
        while self.changed:
            run = self.changed.popleft()
            callbacks = run.callbacks
            if callbacks:
                rows = list(callbacks) if run.state == CLOSED else [r for r in callbacks if run.slots[r] is not None]
                for row in rows:
                    ready += callbacks.pop(row)
        return ready

    def close(self) -> None:
        """Say goodbye: the broker ends what is open, and so does this."""
        if self.state == ENDED:
            return
        was_ready = self.state == READY
        self._end(Unavailable("the client was closed"), Error(Code.CANCELLED, "the client was closed"))
        if was_ready:
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
                run = self._open[message.id]
                self._end_rows(run, 0, run.num_rows, Error(Code.INVALID, f"it cannot travel: {e}"))
            else:
                self._last_sent = now
                return frames
        return None

    def _next_message(self, now: float) -> Message | None:
        if self._must_greet:
            self._must_greet = False
            self._retry_at = now + self._retry_s
            return self._greeting()
        if self._outbox:
            return self._outbox.popleft()
        if self.state != READY:
            return None
        submit = self._next_submit(now) if self._waiting else None
        if submit is not None:
            return submit
        if self._received - self._acked >= ACK_MESSAGES or self._unacked_bytes >= ACK_BYTES:
            return protocol.Ack(seq=self._ack())
        if now >= self._beat_at:
            self._last_beat = now
            return protocol.Heartbeat(ack=self._ack())
        return None

    def receive(self, frames: Sequence[Buffer], now: float) -> None:
        """Act on a message from the broker."""
        self._heard = now
        if self.state == ENDED:
            return
        try:
            message = decode(protocol.TO_CLIENT, frames)
        except VersionError as e:
            self._end(Unavailable(f"the broker cannot be used: {e}"))
            return
        except ProtocolError as e:
            self._fault(f"a message that cannot be read came from the broker: {e}")
            return
        if type(message) is protocol.Results:
            if self._is_new(message.seq, frames, now):
                self._grant(message.credit)
                for outcome in message.outcomes:
                    self._on_outcome(outcome)
                if self._pending and self._is_idle:
                    self.flush()
            return
        _HANDLERS[type(message)](self, message, frames, now)

    def tick(self, now: float) -> None:
        """Do what is due by the clock."""
        if now >= self._flush_at:
            self.flush()
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            self._expire(heapq.heappop(deadlines), now)
        if self.state == GREETING and not self._must_greet and now >= self._retry_at:
            self._retry_s = min(MAX_RETRY_S, self._retry_s * 2)
            self.must_reconnect = True
        elif self.state == READY and self.is_busy and now >= self._silent_at:
            log.warning("the broker has been silent for %.1f s; connecting again", now - self._heard)
            self.must_reconnect = True

    def next_deadline(self) -> float:
        """When `tick` or `take` has something to do by the clock; `math.inf` if never."""
        due = self._flush_at
        if self._deadlines and self._deadlines[0][0] < due:
            due = self._deadlines[0][0]
        if self.state == READY:
            if self.can_send:
                due = min(due, self._beat_at)
            if self.is_busy:
                due = min(due, self._silent_at)
        elif self.state == GREETING and not self._must_greet:
            due = min(due, self._retry_at)
        return due

    def reconnected(self, now: float) -> None:
        """The driver has a new socket."""
        self.must_reconnect = False
        if self.state in (GREETING, READY):
            self._greet(now)

    # --- sending ---------------------------------------------------------------------------------------------------

    @property
    def _is_idle(self) -> bool:
        return not self._waiting and len(self._open) < MAX_IDLE_RUNS

    @property
    def _beat_at(self) -> float:
        at = self._last_sent + self._heartbeat_s
        if self._open or self._requests:
            at = min(at, max(self._heard, self._last_beat) + self._heartbeat_s)
        return at

    @property
    def _silent_at(self) -> float:
        return self._heard + SILENT_HEARTBEATS * self._heartbeat_s

    def _note_busy(self, now: float) -> None:
        """Silence counts from the moment that there is something to hear of."""
        if not self.is_busy:
            self._heard = max(self._heard, now)

    def _accept(self, run: Run, now: float) -> None:
        self._note_busy(now)
        self._count_waiting(run.num_rows, run.nbytes)
        if self.error is not None:
            self._end_rows(run, 0, run.num_rows, self._final_error())
        elif run.deadline <= now:
            self._end_rows(run, 0, run.num_rows, Error(Code.DEADLINE, "the time limit is already over"))
        elif run.deadline < math.inf:
            self._num_drawn += 1
            run.entry = [run.deadline, self._num_drawn, run]
            heapq.heappush(self._deadlines, run.entry)

    def _seal(self, run: Run) -> None:
        if run.key is not None:
            self._pending.pop(run.key, None)
            run.key = None
        if run.state == PENDING:
            run.seal()
            self._wait(run)

    def _wait(self, run: Run) -> None:
        run.state = WAITING
        self._num_drawn += 1
        heapq.heappush(self._waiting, (run.options.priority, self._num_drawn, run))

    def _count_waiting(self, num_rows: int, num_bytes: int) -> None:
        self.waiting_rows += num_rows
        self.waiting_bytes += num_bytes

    def _next_submit(self, now: float) -> Message | None:
        while self._waiting:
            run = self._waiting[0][2]
            if run.state != WAITING:
                heapq.heappop(self._waiting)
                continue
            block = run.block
            assert block is not None
            rows, nbytes = self._sent_rows + run.num_rows, self._sent_bytes + block.nbytes
            # With nothing under way no more credit will come: then the broker shall say why it is too much.
            if (rows > self._granted_rows or nbytes > self._granted_bytes) and (self._open or self._ghosts):
                return None
            heapq.heappop(self._waiting)
            self._sent_rows, self._sent_bytes = rows, nbytes
            self._count_waiting(-run.num_rows, -run.nbytes)
            run.state = SENT
            self._open[run.id] = run
            for start, stop in run.cancels:
                self._outbox.append(protocol.Cancel(id=run.id, start=start, stop=stop))
            self.num_events += 1  # there is room for who waits to submit
            return self._submit_of(run, now)
        return None

    def _submit_of(self, run: Run, now: float) -> Message:
        options, shape, block = run.options, run.shape, run.block
        assert block is not None
        return protocol.Submit(
            id=run.id, kernel=shape.kernel, block=block, statics=shape.statics, scalars=run.scalars,
            priority=options.priority,
            timeout_ms=None if run.deadline == math.inf else (run.deadline - now) * 1000.0,
            wants_partials=run.wants_partials, is_durable=options.is_durable, wants_accepted=options.is_durable,
            is_again=run.is_again, key=options.key, ack=self._ack(),
        )  # fmt: skip

    def _ack(self) -> int:
        self._acked, self._unacked_bytes = self._received, 0
        return self._received

    # --- outcomes --------------------------------------------------------------------------------------------------

    def _is_new(self, seq: int, frames: Sequence[Buffer], now: float) -> bool:
        """Whether a numbered message is the next one. After a gap the broker is asked to send again, once."""
        if seq <= self._received:
            return False
        if seq != self._received + 1:
            if self.state == GREETING:
                return False
            if self._gap_at != self._received + 1:
                self._gap_at = self._received + 1
                log.warning("message %d came after %d; asking for what is missing", seq, self._received)
                self._greet(now)
                return False
        self._received = seq
        self._unacked_bytes += sum(map(frame_bytes, frames))
        return True

    def _grant(self, credit: Sequence[int]) -> None:
        rows, num_bytes = credit
        if rows > self._granted_rows:
            self._granted_rows = rows
        if num_bytes > self._granted_bytes:
            self._granted_bytes = num_bytes

    def _on_outcome(self, outcome: Outcome) -> None:
        base, times, block = 0, outcome.queue_ms, outcome.block
        for i, (id_, start, stop) in enumerate(outcome.spans):
            run = self._open.get(id_)
            if run is not None:
                fits = 0 <= start < stop <= run.num_rows and (block is None or base + stop - start <= block.num_rows)
                if not fits or (block is None and outcome.error is None):
                    self._fault(f"the broker sent an outcome for rows {start} to {stop} that does not fit")
                    return
                part = Part(start, base, block, outcome.error, times[i] if i < len(times) else None, outcome)
                self._settle(run, start, stop, part)
            elif self._ghosts and id_ in self._ghosts:
                self._lay_ghost(id_, stop - start)
            base += stop - start

    def _lay_ghost(self, id_: bytes, num_rows: int) -> None:
        ghost = self._ghosts[id_]
        ghost[0] -= num_rows
        if ghost[0] <= 0:
            del self._ghosts[id_]

    def _settle(self, run: Run, start: int, stop: int, part: Part) -> None:
        if not run.settle(start, stop, part):
            return
        self.num_events += 1
        if run.num_open == 0:
            self._close_run(run)
        if run.watchers is not None:
            for watcher in run.watchers:
                watcher.append(run)

    def _end_rows(self, run: Run, start: int, stop: int, error: Error) -> None:
        self._settle(run, start, min(stop, run.num_rows), Part(start, error=error))

    def _close_run(self, run: Run) -> None:
        if run.state == SENT:
            self._open.pop(run.id, None)
        elif run.state in (PENDING, WAITING):
            self._count_waiting(-run.num_rows, -run.nbytes)
            if run.key is not None:
                self._pending.pop(run.key, None)
        if run.callbacks is not None:
            self.num_watched -= 1
        if run.entry is not None:
            self._num_dead += 1
        run.close()
        if self._num_dead > 64 and self._num_dead * 2 > len(self._deadlines):
            self._deadlines = [entry for entry in self._deadlines if entry[2] is not None]
            heapq.heapify(self._deadlines)
            self._num_dead = 0

    def _expire(self, entry: list[Any], now: float) -> None:
        run: Run | None = entry[2]
        if run is None:
            self._num_dead -= 1
        elif run.state == SENT and now < run.deadline + self._config.grace_s:
            entry[0] = run.deadline + self._config.grace_s
            heapq.heappush(self._deadlines, entry)
        else:
            run.entry = None
            if run.state == SENT and run.block is not None:
                self._ghosts[run.id] = [run.num_open, run.num_rows, run.block.nbytes]
            where = "the broker has not answered" if run.state == SENT else "it still waited in the client"
            self._end_rows(run, 0, run.num_rows, Error(Code.DEADLINE, f"the time limit is over; {where}"))

    # --- other messages --------------------------------------------------------------------------------------------

    def _on_partial(self, m: protocol.Partial, frames: Sequence[Buffer], now: float) -> None:
        if not self._is_new(m.seq, frames, now):
            return
        for outcome in m.outcomes:
            for i, (id_, start, _) in enumerate(outcome.spans):
                run = self._open.get(id_)
                if run is not None and run.wants_partials and outcome.block is not None:
                    run.chunks.append(Part(start, i, outcome.block, outcome=outcome))
                    self.num_events += 1
                    for watcher in run.watchers or ():
                        watcher.append(run)

    def _on_welcome(self, m: protocol.Welcome, frames: Sequence[Buffer], now: float) -> None:
        if self.state != GREETING:
            return
        is_first, is_new_epoch = self.epoch is None, m.epoch != self.epoch
        unknown = {m.unknown[i : i + protocol.ID_BYTES] for i in range(0, len(m.unknown), protocol.ID_BYTES)}
        for id_ in unknown & self._ghosts.keys():
            _, num_rows, num_bytes = self._ghosts.pop(id_)
            self._sent_rows, self._sent_bytes = self._sent_rows - num_rows, self._sent_bytes - num_bytes
        if not m.is_resumed:
            self._ghosts.clear()
            self._granted_rows = self._granted_bytes = self._sent_rows = self._sent_bytes = 0
            self._received = self._acked = 0
            self._gap_at = 0
            self.window_rows, self.window_bytes = max(1, m.credit[0]), max(1, m.credit[1])
        self.state, self.epoch, self._heartbeat_s = READY, m.epoch, max(0.01, m.heartbeat_ms / 1000)
        self._retry_s, self._retry_at = FIRST_RETRY_S, math.inf
        self._last_beat = now
        self._grant(m.credit)
        if is_new_epoch and not is_first:
            self.specs_version += 1
        for run in list(self._open.values()):
            if run.id in unknown:
                self._submit_again(run, m.is_resumed, is_new_epoch)
            else:
                self._outbox.extend(protocol.Cancel(id=run.id, start=a, stop=b) for a, b in run.cancels)
        self._outbox.extend(request.message for request in self._requests.values())
        self.num_events += 1

    def _submit_again(self, run: Run, is_resumed: bool, is_new_epoch: bool) -> None:
        assert run.block is not None
        if is_resumed:
            self._sent_rows -= run.num_rows
            self._sent_bytes -= run.block.nbytes
        if is_new_epoch or not is_resumed:
            run.is_again = True
        del self._open[run.id]
        self._count_waiting(run.num_rows, run.nbytes)
        self._wait(run)
        for start, stop in run.cancels:
            self._end_rows(run, start, stop, Error(Code.CANCELLED, "cancelled"))

    def _on_accepted(self, m: protocol.Accepted, frames: Sequence[Buffer], now: float) -> None:
        run = self._open.get(m.id)
        if run is not None:
            run.accepted = True
            self.num_events += 1
            for watcher in run.watchers or ():
                watcher.append(run)

    def _on_refused(self, m: protocol.Refused, frames: Sequence[Buffer], now: float) -> None:
        self._grant(m.credit)
        if m.error.code in (Code.INVALID, Code.UNKNOWN_KERNEL):
            self.specs_version += 1
        run = self._open.get(m.id)
        self._ghosts.pop(m.id, None)
        if run is not None:
            self._end_rows(run, 0, run.num_rows, m.error)
        if self._pending and self._is_idle:
            self.flush()

    def _on_reply(self, m: protocol.Reply, frames: Sequence[Buffer], now: float) -> None:
        self._answer(m.request, m.error, dict(m.body))

    def _answer(self, number: int, error: Error | None, body: dict[str, Any]) -> None:
        request = self._requests.pop(number, None)
        if request is not None:
            request.is_done, request.error, request.body = True, error, body
            self.num_events += 1
            for watcher in request.watchers:
                watcher()

    def _on_fault(self, m: protocol.Fault, frames: Sequence[Buffer], now: float) -> None:
        error = m.error
        if error.code == Code.UNATTACHED:
            if self.state == READY:
                self._greet(now)
        elif error.code == Code.NOT_AUTHORISED or (error.code == Code.PROTOCOL and self.state == GREETING):
            self._end(from_wire(error), error)
        else:
            self._fault(f"the broker says: {error.message}")

    def _on_heartbeat(self, m: protocol.Heartbeat, frames: Sequence[Buffer], now: float) -> None:
        """That it came is all that it says."""

    def _on_goodbye(self, m: protocol.Goodbye, frames: Sequence[Buffer], now: float) -> None:
        """The broker stops: look for the next one, but give it a moment to be gone."""
        log.info("the broker said goodbye: %s", m.reason)
        if self.state == READY:
            self._outbox.clear()
            self.state, self._retry_at = GREETING, now + self._retry_s

    def _fault(self, message: str) -> None:
        self.last_fault = message
        log.error("%s", message)

    # --- greeting and ending ---------------------------------------------------------------------------------------

    def _greet(self, now: float) -> None:
        self._outbox.clear()
        self.state, self._must_greet = GREETING, True
        jitter = self._draw(1)[0] / 255
        self._retry_at = now + self._retry_s * (1 + jitter)
        self._retry_s *= 1 + 0.25 * jitter

    def _greeting(self) -> Message:
        if self.epoch is None:
            return protocol.Hello(name=self._name, secret=self._secret)
        return protocol.Attach(
            name=self._name, secret=self._secret, epoch=self.epoch, received=self._received,
            open=b"".join((*self._open, *self._ghosts)),
        )  # fmt: skip

    def _final_error(self) -> Error:
        assert self.error is not None
        return Error(self.error.code, self.error.message)

    def _end(self, reason: PenstockError, error: Error | None = None) -> None:
        """Nothing more can be done on this session: everything open ends with `error`."""
        self.error, self.state, self._must_greet, self.must_reconnect = reason, ENDED, False, False
        self._outbox.clear()
        error = error or self._final_error()
        for run in [*self._open.values(), *self._pending.values(), *(r for _, _, r in self._waiting)]:
            if run.state != CLOSED:
                self._end_rows(run, 0, run.num_rows, error)
        self._waiting.clear()
        self._flush_at = math.inf
        for number in list(self._requests):
            self._answer(number, error, {})
        self.num_events += 1

    # --- invariants ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two events; tests call it after every one."""
        waiting = [r for _, _, r in self._waiting if r.state == WAITING]
        pending = list(self._pending.values())
        assert all(r.state == SENT and r.num_open > 0 for r in self._open.values())
        assert all(r.state == PENDING and r.num_open > 0 for r in pending)
        assert self.waiting_rows == sum(r.num_rows for r in (*waiting, *pending))
        assert self.waiting_bytes == sum(r.nbytes for r in (*waiting, *pending))
        assert self._num_dead == sum(e[2] is None for e in self._deadlines)
        for run in (*waiting, *pending, *self._open.values()):
            assert run.num_open == run.slots.count(None)
            assert len(run.slots) == run.num_rows
            assert run.deadline == math.inf or (run.entry is not None and run.entry[2] is run)
        assert not pending or self._flush_at < math.inf
        assert self._acked <= self._received


_HANDLERS: Final[dict[type[Message], Any]] = {
    protocol.Welcome: Session._on_welcome,
    protocol.Accepted: Session._on_accepted,
    protocol.Refused: Session._on_refused,
    protocol.Partial: Session._on_partial,
    protocol.Reply: Session._on_reply,
    protocol.Fault: Session._on_fault,
    protocol.Heartbeat: Session._on_heartbeat,
    protocol.Goodbye: Session._on_goodbye,
}


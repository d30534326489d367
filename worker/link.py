"""A worker's side of the protocol: session, leases held, credit, drain.

Knows what to say when and what an answer means; does not know sockets, clocks or kernels. Messages come in and go out as
values; `session.py` carries them.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.broker.columns import Buffer, gather
from penstock.broker.protocol import Answer, Assign, Ready, Welcome, WorkerFinal, WorkerHello
from penstock.broker.wire import MAX_HEADER_BYTES, ProtocolError, encode

AWAY, GREETED, WELCOME, ATTACHED = "away", "greeted", "welcome", "attached"

# state -> what may happen -> next state. Any other move is an error of ours.
MOVES = {
    AWAY: {"hello": GREETED, "lost": AWAY},
    GREETED: {"hello": GREETED, "welcome": WELCOME, "lost": AWAY},
    WELCOME: {"hello": GREETED, "welcome": WELCOME, "ready": ATTACHED, "lost": AWAY},
    ATTACHED: {"hello": GREETED, "welcome": WELCOME, "lost": AWAY},
}

FIRST_WINDOW = 2
MAX_WINDOW = 4
SLOW_MS = 500.0
AHEAD_MS = 2.0
SMOOTHING = 0.2


Encoded = tuple[list[Buffer], Sequence[Answer]]
"""The frames of a message, and the answers in it."""


class LinkError(Exception):
    """A move that the table does not allow."""


class Credit:
    """How many batches may be on their way or waiting here: more while batches are short.

    One batch ahead hides the way to the broker and back, 1 to 3 ms; a few when a batch takes less than that. The broker
    forms it only just before it is needed, as far as it can tell: so batches of more than half a second, which gain
    nothing, are not taken ahead at all; another worker may be free sooner. Times are averaged by their logarithms: they
    differ by decades between bins and kernels, and one batch of a second must not hold up the next ten of a few ms.

    Attributes:
        num_slots: batches that the device works on at once: copied in, computed, copied out.
        is_pressed: memory is short: nothing is taken ahead.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_slots = 1
        self.is_pressed = False
        self._most = MAX_WINDOW
        self._max_bytes = max_bytes
        self._log_ms: float | None = None
        self._num_answered = 0
        self._bytes_answered = 0
        self._granted = 0

    def reset(self) -> None:
        """A `ready` follows: the broker counts from the batches that it lists."""
        self._num_answered = self._bytes_answered = self._granted = 0

    def begin_slowly(self) -> None:
        """After a fault: one batch at first, twice as many after each."""
        self._most = 1

    def measure(self, took_ms: float) -> None:
        """A batch took so long, loading aside."""
        self._most = min(2 * self._most, MAX_WINDOW)
        log_ms = math.log(max(took_ms, 1e-3))
        self._log_ms = log_ms if self._log_ms is None else self._log_ms + SMOOTHING * (log_ms - self._log_ms)

    def answered(self, num_bytes: int) -> None:
        """The answer to a batch has left."""
        self._num_answered += 1
        self._bytes_answered += num_bytes

    @property
    def window(self) -> int:
        """Batches in flight, 1 to 4 on a device that works on one at a time."""
        if self.is_pressed:
            return 1
        more = self.num_slots - 1 if self._most >= MAX_WINDOW else 0
        if self._log_ms is None:
            return more + min(FIRST_WINDOW, self._most)
        typical_ms = math.exp(self._log_ms)
        if typical_ms > SLOW_MS:
            return 1
        return more + min(self._most, 1 + math.ceil(AHEAD_MS / typical_ms))

    def total(self, num_more: int = 0, more_bytes: int = 0) -> tuple[int, int]:
        """The cumulative [batches, bytes] that may be assigned, once so many more are answered.

        It never shrinks between two `ready`.
        """
        self._granted = max(self._granted, self._num_answered + num_more + self.window)
        return self._granted, self._bytes_answered + more_bytes + self._max_bytes


@dataclass(frozen=True, slots=True)
class Final:
    """The answers to a lease as a whole, before they are encoded: the credit they carry is that of their departure."""

    lease: int
    answers: Sequence[Answer]
    timings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CheckpointLimits:
    """How often this broker takes a streaming task's checkpoint, and how large one may be."""

    interval_s: float
    max_bytes: int

    @classmethod
    def of(cls, welcome: Welcome) -> "CheckpointLimits | None":
        """None: this broker takes none, or knows of none."""
        interval_ms, max_bytes = welcome.limits.get("checkpoint_ms"), welcome.limits.get("max_checkpoint_bytes")
        if not isinstance(interval_ms, int | float) or not isinstance(max_bytes, int):
            return None
        return cls(1e-3 * interval_ms, max_bytes)


@dataclass(slots=True)
class Held:
    """A lease whose answer has not left. `num_bytes` is what it takes of the credit; `is_unshared`: it goes in frames."""

    kernel: str
    is_stream: bool
    num_rows: int
    num_bytes: int
    is_unshared: bool = False


class Link:
    """The session of one worker.

    Args:
        name: as in status; device: what `--device` said.
        max_bytes: see `WorkerConfig`.
        secret: 16 bytes that prove the session; drawn here if not given.
        ended: those of the session of the process before this one, which is gone, if there was one.
        pid: of the process; this one's if not given.
    """

    def __init__(
        self, name: str, device: str, max_bytes: int, secret: bytes = b"", ended: bytes = b"", pid: int | None = None
    ) -> None:
        self.state = AWAY
        self.secret = secret or os.urandom(16)
        self.epoch = 0
        self.heartbeat_ms = 1000.0
        self.held: dict[int, Held] = {}
        self.credit = Credit(max_bytes)
        self.checkpoints: CheckpointLimits | None = None
        self._name = name
        self._device = device
        self._ended = ended
        self._pid = os.getpid() if pid is None else pid
        self._num_hellos = 0

    def _move(self, event: str) -> None:
        if event not in MOVES[self.state]:
            raise LinkError(f"{event} while {self.state}")
        self.state = MOVES[self.state][event]

    def hello(self) -> WorkerHello:
        self._move("hello")
        self._num_hellos += 1
        return WorkerHello(
            name=self._name, secret=self.secret, pid=self._pid, device=self._device, ended=self._ended, number=self._num_hellos
        )

    def is_expected(self, welcome: Welcome) -> bool:
        """Whether this answers the last hello.

        By an earlier one, it would say what it holds before it has what the broker assigned in between, which would then go to
        others.
        """
        return self.state != AWAY and welcome.number in (0, self._num_hellos)  # 0: a broker that does not count

    def on_welcome(self, welcome: Welcome) -> bool:
        """Take up one that is expected. False if what is held must be forgotten, because this broker does not know of it."""
        self._move("welcome")
        self.epoch, self.heartbeat_ms = welcome.epoch, welcome.heartbeat_ms
        self.checkpoints = CheckpointLimits.of(welcome)
        if not welcome.is_resumed:
            self.held.clear()
        return welcome.is_resumed

    def ready(self, specs: Sequence[Mapping[str, Any]], resident: Mapping[str, str], facts: Mapping[str, Any]) -> Ready:
        """Says what is on offer and what is still held, and starts the credit anew."""
        self._move("ready")
        self.credit.reset()
        for held in self.held.values():
            held.num_bytes = 0
        return Ready(specs=specs, credit=self.credit.total(), leases=list(self.held), resident=dict(resident), device=facts)

    def lost(self) -> None:
        """The connection or the session is gone; leases are kept until the next welcome tells."""
        self._move("lost")

    def on_assign(self, assign: Assign) -> bool:
        """Take a lease; False if it is held already, or of an earlier session."""
        if self.state != ATTACHED or assign.lease in self.held:
            return False
        num_rows = sum(block.num_rows for block in assign.blocks)
        num_bytes = sum(block.nbytes for block in assign.blocks)
        self.held[assign.lease] = Held(assign.kernel, assign.mode == "stream", num_rows, num_bytes, assign.is_unshared)
        return True

    def encode(self, final: Final) -> list[Encoded]:
        """The messages that answer a lease; the last one carries new credit.

        Nothing, if the lease has been forgotten meanwhile.
        """
        held = self.held.get(final.lease)
        if held is None:
            return []
        credit = (0, 0) if held.is_stream else self.credit.total(1, held.num_bytes)
        return encode_answers(final.lease, final.answers, final.timings, credit)

    def sent(self, final: Final) -> None:
        """All messages of `encode` have left: the lease is held no more. Until then, `ready` lists it."""
        held = self.held.pop(final.lease, None)
        if held is not None and not held.is_stream:
            self.credit.answered(held.num_bytes)


def encode_answers(
    lease: int, answers: Sequence[Answer], timings: Mapping[str, Any], credit: tuple[int, int]
) -> list[Encoded]:
    """The answers as `final` messages: one, or as many as the limit on headers asks for."""
    try:
        return [(encode(WorkerFinal(lease=lease, answers=answers, timings=timings, credit=credit)), answers)]
    except ProtocolError:
        first, second = _halves(answers)
    return encode_answers(lease, first, timings, (0, 0)) + encode_answers(lease, second, timings, credit)


def _halves(answers: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Answers in two parts; a single one by its rows, or without its detail if it is one row."""
    if len(answers) > 1:
        middle = len(answers) // 2
        return list(answers[:middle]), list(answers[middle:])
    one = answers[0]
    if one.stop - one.start < 2:
        raise ProtocolError(f"the answer to one row needs a header of more than {MAX_HEADER_BYTES} bytes")
    middle = (one.start + one.stop) // 2
    return [_part(one, one.start, middle)], [_part(one, middle, one.stop)]


def _part(answer: Answer, start: int, stop: int) -> Answer:
    if answer.block is None:
        return Answer(start, stop, error=answer.error)
    return Answer(start, stop, gather([(answer.block, start - answer.start, stop - answer.start)]))

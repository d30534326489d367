"""Every message that Penstock's peers exchange, and their limits. `PROTOCOL.md` beside this file says when each is sent.

Knows the fields and the closed sets of types per direction. Does not know sockets, sessions' state or what a broker does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from penstock.broker.columns import Block, Buffer
from penstock.broker.wire import (
    BLOCK,
    FLAG,
    MAP,
    MAX_ROWS,
    MAX_TEXT,
    MAYBE_BLOCK,
    SCALARS,
    Kind,
    Message,
    ProtocolError,
    Reader,
    binary,
    frame,
    integer,
    listing,
    message,
    number,
    record,
    text,
    wire,
)

ID_BYTES: Final = 16
SECRET_BYTES: Final = 16
NUM_PRIORITIES: Final = 10
DEFAULT_PRIORITY: Final = 5
MAX_TIMEOUT_MS: Final = 30 * 24 * 3600 * 1000.0
MAX_COUNT: Final = (1 << 63) - 1
MAX_STATICS_BYTES: Final = 16 * 1024
MAX_OPEN_BYTES: Final = 16 << 20
"""A million submissions."""
MAX_SPECS: Final = 256
MAX_SPANS: Final = 4096


class Code:
    """Why a task or a message was refused or ended, as it stands on the wire. The SDK has one exception per code."""

    OVERLOADED = "overloaded"
    DEADLINE = "deadline_exceeded"
    CANCELLED = "cancelled"
    INVALID = "invalid_input"
    UNKNOWN_KERNEL = "unknown_kernel"
    FAILED = "kernel_failed"
    WORKER_LOST = "worker_lost"
    DEAD = "dead"
    CONFLICT = "conflict"
    RESULT_GONE = "result_gone"
    UNKNOWN_TASK = "unknown_task"
    NOT_AUTHORISED = "not_authorised"
    UNAVAILABLE = "unavailable"
    PROTOCOL = "protocol"
    """The message itself was malformed; nothing was done."""
    UNSHARED = "unshared"
    """Shared memory that cannot be read: the same again, with the bytes in frames. Only peers that share meet it."""
    UNATTACHED = "unattached"
    """This address has no session: say `hello`, or `attach` to an old one."""


CODE = text(32, 1)
ID = binary(ID_BYTES, ID_BYTES)
MAYBE_ID = binary(ID_BYTES, ID_BYTES, can_be_nil=True)
MAYBE_KEY = binary(1, 128, can_be_nil=True)
SECRET = binary(SECRET_BYTES, SECRET_BYTES)
NAME = text(64, 1)
TEXT = text(MAX_TEXT)
COUNT = integer(0, MAX_COUNT)
ROW = integer(0, MAX_ROWS)
NUMBER = number(0.0, 1e15)
PAIR = listing(COUNT, 2, 2)
MAX_COUNTS: Final = 4096
COUNTS = listing(COUNT, MAX_COUNTS)


@record
class Error:
    """A failure as it travels: a code, one line for people, and what may help them further."""

    code: str
    message: str
    retry_after_ms: float | None = None
    detail: str = ""


def _parse_error(value: Any, reader: Reader) -> Error:
    if not isinstance(value, list) or len(value) != 4:
        raise ProtocolError("an error is [code, message, retry_after_ms, detail]")
    retry = _MAYBE_MS.parse(value[2], reader)
    return Error(CODE.parse(value[0], reader), TEXT.parse(value[1], reader), retry, _DETAIL.parse(value[3], reader))


def _write_error(error: Error | None, _: list[Buffer]) -> Any:
    return error and [error.code, _cut(error.message, MAX_TEXT), error.retry_after_ms, _cut(error.detail, MAX_DETAIL)]


def _cut(text: str, max_bytes: int) -> str:
    """Its beginning, in at most so many bytes: a header has room for one error, whatever the language."""
    if 4 * len(text) <= max_bytes:
        return text
    return text.encode(errors="replace")[:max_bytes].decode(errors="ignore")


MAX_DETAIL: Final = 16 * 1024
_MAYBE_MS = number(0.0, MAX_TIMEOUT_MS, can_be_nil=True)
_DETAIL = text(MAX_DETAIL)
ERROR = Kind(_parse_error, _write_error)
MAYBE_ERROR = Kind(lambda value, reader: None if value is None else _parse_error(value, reader), _write_error)


def _is_measure(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_MEASURE


def _parse_timings(value: Any, reader: Reader) -> Mapping[str, Any]:
    timings = MAP.parse(value, reader)
    if len(timings) > MAX_TIMINGS or not all(len(k) <= 32 and _is_measure(v) for k, v in timings.items()):
        raise ProtocolError(f"timings are at most {MAX_TIMINGS} numbers with short names")
    return cast(Mapping[str, Any], timings)


MAX_TIMINGS: Final = 16
MAX_MEASURE: Final = 1e12
TIMINGS = Kind(_parse_timings)


# --- client -> broker ----------------------------------------------------------------------------------------------


@message("hello")
class Hello(Message):
    """Opens a session. `secret` (drawn by the peer) is what a later `attach` must show."""

    name: str = wire(NAME)
    secret: bytes = wire(SECRET)


@message("attach")
class Attach(Message):
    """Takes up a session again from a new address.

    `received` is the last `seq` that arrived; `open` are the ids of submissions without an outcome, 16 bytes each.
    """

    name: str = wire(NAME)
    secret: bytes = wire(SECRET)
    epoch: int = wire(COUNT)
    received: int = wire(COUNT, default=0)
    open: bytes = wire(frame(MAX_OPEN_BYTES), default=b"")


@message("submit")
class Submit(Message):
    """A run: one or more tasks (rows) of one kernel that differ in their rows only.

    `statics` is msgpack that only the worker reads. `scalars` has a number per run or a list per row. `key` is the
    idempotency key (default: the id). `is_again` marks a submission that an earlier broker may have started.
    `ack` acknowledges as `Ack` does.
    """

    id: bytes = wire(ID)
    kernel: str = wire(NAME)
    block: Block = wire(BLOCK)
    statics: bytes = wire(binary(0, MAX_STATICS_BYTES), default=b"")
    scalars: Mapping[str, Any] = wire(SCALARS, default={})
    priority: int = wire(integer(0, NUM_PRIORITIES - 1), default=DEFAULT_PRIORITY)
    timeout_ms: float | None = wire(number(-MAX_TIMEOUT_MS, MAX_TIMEOUT_MS, can_be_nil=True), default=None)
    wants_partials: bool = wire(FLAG, default=False)
    is_durable: bool = wire(FLAG, default=False)
    wants_accepted: bool = wire(FLAG, default=False)
    is_again: bool = wire(FLAG, default=False)
    key: bytes | None = wire(MAYBE_KEY, default=None)
    ack: int = wire(COUNT, default=0)
    traceparent: str | None = wire(text(64, can_be_nil=True), default=None)


@message("cancel")
class Cancel(Message):
    """Ends rows [start, stop) of a submission, whatever state they are in."""

    id: bytes = wire(ID)
    start: int = wire(ROW, default=0)
    stop: int = wire(ROW, default=MAX_ROWS)


@message("ack")
class Ack(Message):
    """Everything up to `seq` has arrived; the broker may forget it."""

    seq: int = wire(COUNT)


@message("status")
class Status(Message):
    """Asks for the state of one submission of the same principal by its `id`; without one, of the whole broker, or of
    the principal's open submissions if `what` is "tasks"; of its durable ones ("jobs"), of those that failed ("dead"), or
    of one ("jobs" with `id` or `key`)."""

    request: int = wire(COUNT)
    id: bytes | None = wire(MAYBE_ID, default=None)
    key: bytes | None = wire(MAYBE_KEY, default=None)
    what: str = wire(text(16), default="")


@message("fetch")
class Fetch(Message):
    """Asks for a durable task of the same principal, by its id or idempotency key: its outcomes come to this session.

    A task that belongs to another session stays there, and only its state comes, unless `take` is set.
    """

    request: int = wire(COUNT)
    id: bytes | None = wire(MAYBE_ID, default=None)
    key: bytes | None = wire(MAYBE_KEY, default=None)
    take: bool = wire(FLAG, default=False)


@message("control")
class Control(Message):
    """A wish: `drain` a worker by its name (`target`), `reload` the broker's configuration, `backup` the journal into a new
    folder (`target`); `requeue`, `cancel` or `drop` a durable task by its `id` or `key`."""

    request: int = wire(COUNT)
    op: str = wire(NAME)
    target: str = wire(TEXT, default="")
    id: bytes | None = wire(MAYBE_ID, default=None)
    key: bytes | None = wire(MAYBE_KEY, default=None)


@message("heartbeat")
class Heartbeat(Message):
    """I am here. `ack` acknowledges as `Ack` does."""

    ack: int = wire(COUNT, default=0)


@message("goodbye")
class Goodbye(Message):
    """The peer leaves for good: a client's open tasks are cancelled, a worker's leases return.

    `is_fault`: the worker's device is broken, and what it holds may be why: suspects, as if it had died.
    """

    reason: str = wire(TEXT, default="")
    is_fault: bool = wire(FLAG, default=False)


@message("share")
class Share(Message):
    """This peer can read the broker's `welcome.shared` probe: it may be sent descriptors, and will send some.

    `segments` are the inodes of its own that are in use; said again when some of them are not any more.
    """

    segments: Sequence[int] = wire(COUNTS, default=())


# --- broker -> client ----------------------------------------------------------------------------------------------


@message("welcome")
class Welcome(Message):
    """Answers `hello` and `attach`. `credit` is the cumulative [rows, bytes] that the session may submit.

    `unknown` holds those of `attach.open` that this broker never accepted, or has lost with an earlier epoch.
    To a worker, `limits` has `checkpoint_ms` and `max_checkpoint_bytes`, if it may send checkpoints.
    `number` is that of the worker's `hello` which it answers.
    `shared` offers shared memory: `probe` [process, descriptor, inode], `min_bytes`, `max_bytes`, and `held`, the slots
    [descriptor, offset] that the broker still reads of this session, one after another, as often as it has each on loan.
    """

    epoch: int = wire(COUNT)
    heartbeat_ms: float = wire(NUMBER)
    is_resumed: bool = wire(FLAG, default=False)
    credit: Sequence[int] = wire(PAIR, default=(0, 0))
    limits: Mapping[str, Any] = wire(MAP, default={})
    unknown: bytes = wire(frame(MAX_OPEN_BYTES), default=b"")
    shared: Mapping[str, Any] = wire(MAP, default={})
    number: int = wire(COUNT, default=0)


@message("accepted")
class Accepted(Message):
    """The broker has taken the submission; exactly one outcome per row will follow. Sent when it was wanted."""

    id: bytes = wire(ID)
    is_durable: bool = wire(FLAG, default=False)


@message("refused")
class Refused(Message):
    """The broker has not taken the submission, and does not count it: the client takes it off its totals."""

    id: bytes = wire(ID)
    error: Error = wire(ERROR)


@record
class Outcome:
    """Rows that share their answer's columns: a block with one row after another, or one error for all.

    `spans` are (submission id, start, stop) in the block's order; `queue_ms` one value per span. `part` numbers the
    partials of a row from 0. `timings` are milliseconds and facts of the batch.
    """

    spans: Sequence[tuple[bytes, int, int]]
    block: Block | None = None
    error: Error | None = None
    queue_ms: Sequence[float] = ()
    timings: Mapping[str, Any] | None = None
    part: int = 0
    attempt: int = 0


_TIMES = listing(NUMBER, MAX_SPANS)


def _parse_span(value: Any, reader: Reader) -> tuple[bytes, int, int]:
    if not isinstance(value, list) or len(value) != 3:
        raise ProtocolError("a span is [id, start, stop]")
    return ID.parse(value[0], reader), ROW.parse(value[1], reader), ROW.parse(value[2], reader)


_SPANS = listing(Kind(_parse_span), MAX_SPANS)


def _parse_outcome(value: Any, reader: Reader) -> Outcome:
    if not isinstance(value, list) or len(value) != 7:
        raise ProtocolError("an outcome is [spans, block, error, queue_ms, timings, part, attempt]")
    spans, block, error, queue_ms, timings, part, attempt = value
    return Outcome(
        _SPANS.parse(spans, reader), MAYBE_BLOCK.parse(block, reader), MAYBE_ERROR.parse(error, reader),
        _TIMES.parse(queue_ms, reader), None if timings is None else MAP.parse(timings, reader),
        COUNT.parse(part, reader), COUNT.parse(attempt, reader),
    )  # fmt: skip


def _write_outcome(o: Outcome, frames: list[Buffer]) -> Any:
    block = None
    if o.block is not None:
        frames.extend(o.block.sent_frames)
        block = o.block.describe()
    return [o.spans, block, _write_error(o.error, frames), o.queue_ms, o.timings, o.part, o.attempt]


OUTCOMES = listing(Kind(_parse_outcome, _write_outcome), MAX_SPANS)


@message("partial")
class Partial(Message):
    """A piece of a streaming answer."""

    seq: int = wire(COUNT)
    outcomes: Sequence[Outcome] = wire(OUTCOMES)


@message("final")
class Results(Message):
    """The outcome of rows, once each; it holds everything that partials brought. Kept until acknowledged."""

    seq: int = wire(COUNT)
    outcomes: Sequence[Outcome] = wire(OUTCOMES)
    credit: Sequence[int] = wire(PAIR, default=(0, 0))


@message("release")
class Release(Message):
    """To a peer that shares: `slots` [descriptor, offset, descriptor, offset, ...] of its own are read no more, one loan each;
    `segments` (inodes) of others will not be named again."""

    slots: Sequence[int] = wire(COUNTS, default=())
    segments: Sequence[int] = wire(COUNTS, default=())


@message("reply")
class Reply(Message):
    """Answers `status`, `fetch` and `control`."""

    request: int = wire(COUNT)
    error: Error | None = wire(MAYBE_ERROR, default=None)
    body: Mapping[str, Any] = wire(MAP, default={})


@message("error")
class Fault(Message):
    """Answers a message that could not be acted upon: `protocol`, `unattached` or `not_authorised`."""

    error: Error = wire(ERROR)


# --- worker -> broker ----------------------------------------------------------------------------------------------


@message("hello")
class WorkerHello(Message):
    """Opens or takes up a worker's session. `ended`: the secret of one whose process is gone, which ends at once.

    `number` counts a session's hellos from 1: only the answer to the last one is meant. 0: the worker does not count.
    """

    name: str = wire(NAME)
    secret: bytes = wire(SECRET)
    pid: int = wire(COUNT)
    device: str = wire(NAME)
    ended: bytes = wire(binary(0, SECRET_BYTES), default=b"")
    number: int = wire(COUNT, default=0)


@message("ready")
class Ready(Message):
    """The kernels on offer and the leases still held; `credit` is the cumulative [batches, bytes] that may be assigned."""

    specs: Sequence[Mapping[str, Any]] = wire(listing(MAP, MAX_SPECS))
    credit: Sequence[int] = wire(PAIR)
    leases: Sequence[int] = wire(listing(COUNT, 4096), default=())
    resident: Mapping[str, Any] = wire(MAP, default={})
    device: Mapping[str, Any] = wire(MAP, default={})


@message("pull")
class Pull(Message):
    """More credit, as new cumulative totals."""

    credit: Sequence[int] = wire(PAIR)


@record
class Answer:
    """The answer to rows [start, stop) of a lease: a block, or one error for all of them."""

    start: int
    stop: int
    block: Block | None = None
    error: Error | None = None


def _parse_answer(value: Any, reader: Reader) -> Answer:
    if not isinstance(value, list) or len(value) != 4:
        raise ProtocolError("an answer is [start, stop, block, error]")
    start, stop = ROW.parse(value[0], reader), ROW.parse(value[1], reader)
    block, error = MAYBE_BLOCK.parse(value[2], reader), MAYBE_ERROR.parse(value[3], reader)
    if start >= stop or (block is None) == (error is None) or (block is not None and block.num_rows != stop - start):
        raise ProtocolError("an answer has rows, and a block with as many or an error")
    return Answer(start, stop, block, error)


def _write_answer(a: Answer, frames: list[Buffer]) -> Any:
    block = None
    if a.block is not None:
        frames.extend(a.block.sent_frames)
        block = a.block.describe()
    return [a.start, a.stop, block, _write_error(a.error, frames)]


@message("final")
class WorkerFinal(Message):
    """Answers to a lease, in any order and number of messages; `timings` (ms) are the batch's. `credit` as in `Pull`."""

    lease: int = wire(COUNT)
    answers: Sequence[Answer] = wire(listing(Kind(_parse_answer, _write_answer), MAX_ROWS))
    timings: Mapping[str, Any] = wire(TIMINGS, default={})
    credit: Sequence[int] = wire(PAIR, default=(0, 0))


@message("partial")
class WorkerPartial(Message):
    """A piece of a streaming answer: one row; `part` counts from 0. It renews the lease."""

    lease: int = wire(COUNT)
    part: int = wire(COUNT)
    block: Block = wire(BLOCK)


@message("checkpoint")
class Checkpoint(Message):
    """What the one row of a streaming lease can go on from; `part` is the number of its next partial. It renews the lease."""

    lease: int = wire(COUNT)
    block: Block = wire(BLOCK)
    part: int = wire(COUNT, default=0)


@message("resident")
class Resident(Message):
    """A kernel's state has changed: absent, loading, ready, failed."""

    kernel: str = wire(NAME)
    state: str = wire(NAME)
    num_bytes: int = wire(COUNT, default=0)
    load_ms: float = wire(NUMBER, default=0.0)


@message("heartbeat")
class WorkerHeartbeat(Message):
    """From a socket of its own, so that a long kernel does not silence it. `progress` grows whenever work is done."""

    session: bytes = wire(SECRET)
    progress: int = wire(COUNT, default=0)
    memory: Mapping[str, Any] = wire(MAP, default={})


# --- broker -> worker ----------------------------------------------------------------------------------------------


@message("assign")
class Assign(Message):
    """A batch under a lease: rows of the blocks, one after another. `scalars` as in `Submit`, over the whole batch.

    `is_unshared`: not all who wait for it can read shared memory, so the answers come in frames.
    """

    lease: int = wire(COUNT)
    kernel: str = wire(NAME)
    blocks: Sequence[Block] = wire(listing(BLOCK, MAX_ROWS))
    digest: bytes = wire(binary(0, 32), default=b"")
    mode: str = wire(text(16, 1), default="batch")
    statics: bytes = wire(binary(0, MAX_STATICS_BYTES), default=b"")
    scalars: Mapping[str, Any] = wire(SCALARS, default={})
    principal: str = wire(text(128), default="")
    attempt: int = wire(COUNT, default=1)
    traceparent: str | None = wire(text(64, can_be_nil=True), default=None)
    is_unshared: bool = wire(FLAG, default=False)
    predicted_ms: float = wire(NUMBER, default=0.0)
    """What the broker expects the batch to take; 0: it does not know."""
    checkpoint: Block | None = wire(MAYBE_BLOCK, default=None)
    """What the row goes on from, and the number of its next partial; only for kernels that offer checkpoints."""
    part: int = wire(COUNT, default=0)


@message("cancel")
class CancelLease(Message):
    """Nobody waits for this lease any more: a streaming kernel should stop; a batch may finish."""

    lease: int = wire(COUNT)


@message("drain")
class Drain(Message):
    """No more leases. From a worker: a wish, which the broker confirms with its own. From the broker: the last lease
    has been assigned; finish what is held, then say goodbye and end."""


FROM_CLIENT: Final[dict[str, type[Message]]] = {
    m.TYPE: m for m in (Hello, Attach, Submit, Cancel, Ack, Status, Fetch, Control, Heartbeat, Share, Goodbye)
}
TO_CLIENT: Final[dict[str, type[Message]]] = {
    m.TYPE: m for m in (Welcome, Accepted, Refused, Partial, Results, Release, Reply, Fault, Heartbeat, Goodbye)
}
FROM_WORKER: Final[dict[str, type[Message]]] = {
    m.TYPE: m
    for m in (
        WorkerHello, Ready, Pull, WorkerFinal, WorkerPartial, Checkpoint, Resident, WorkerHeartbeat, Share, Drain, Goodbye
    )
}  # fmt: skip
TO_WORKER: Final[dict[str, type[Message]]] = {
    m.TYPE: m for m in (Welcome, Assign, CancelLease, Release, Drain, Fault, Heartbeat, Goodbye)
}

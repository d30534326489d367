"""Durable tasks as records: what is written of each event, and what is read again after a restart.

Records hold messages of the protocol as they are on the wire, so what comes back is checked as anything from outside is.
Does not know when something is written, nor where.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from sys import intern

import msgpack

from penstock.broker.columns import Buffer, view
from penstock.broker.protocol import FROM_CLIENT, FROM_WORKER, TO_CLIENT, Checkpoint, Code, Outcome, Results, Submit
from penstock.broker.storage.records import Corrupt, Put
from penstock.broker.tasks import Piece, Saved
from penstock.broker.wire import MAX_HEADER_BYTES, ProtocolError, decode, encode

TAKEN, STARTED, DIED, UNTIMED, ACKED, SAVED, OUTCOME, KNOWN, NAMED = 1, 2, 3, 4, 5, 6, 7, 8, 9
"""The kinds of records. Times are seconds of the wall clock.

TAKEN: [principal, client, accepted at, deadline or nil] and the submission. STARTED: [start, stop], rows that may not run
again; there may be more, and what is idempotent once had one as well. DIED: [start, stop, how often], and what is known of
it, a line per death; such rows are suspects, even if none has died alone. OUTCOME: [when] and results with one outcome;
UNTIMED: without the time, as it was written first. ACKED: when. SAVED has a number of its own, by which the next one replaces
it: [task, row, its deaths, kernel's digest, acquittals] and the checkpoint. KNOWN: what stays of a task that is acknowledged,
beside its outcomes, in place of its submission; see `Known`. NAMED: the id of another submission with its key."""
OF_REQUEST = (TAKEN, STARTED, DIED)
"""What is not needed any more when nothing of a task can run again."""
OF_OUTCOME = (*OF_REQUEST, UNTIMED, OUTCOME, ACKED, KNOWN)
"""And when its outcome is forgotten: its names stay."""
MAX_RECORD_BYTES = 4 * MAX_HEADER_BYTES
"""Of a header in a record: it may be longer than the one that came, with numbers in wider types and what is added."""
Rows = tuple[int, int, int]
"""(start, stop, count)."""


@dataclass(slots=True)
class Known:
    """What is left of the submission of a task that is over and acknowledged."""

    key: bytes
    id: bytes
    kernel: str
    num_rows: int
    digest: bytes
    is_gone: bool


@dataclass(slots=True)
class Begun:
    """What is known of a task that was given to workers; `evidence` has by row a line per death."""

    started: list[tuple[int, int]] = field(default_factory=list)
    deaths: list[Rows] = field(default_factory=list)
    evidence: dict[int, tuple[str, ...]] = field(default_factory=dict)
    saved: dict[int, Saved] = field(default_factory=dict)


@dataclass(slots=True)
class Kept:
    """A durable task as a restart finds it, perhaps one of a million. Times are seconds of the wall clock.

    It has either `submit` or `known`.
    """

    number: int
    principal: str
    client: str
    submit: Submit | None
    accepted_at: float
    deadline: float | None
    outcomes: list[Outcome] = field(default_factory=list)
    names: tuple[bytes, ...] = ()
    begun: Begun | None = None
    ended_at: float | None = None
    acked_at: float | None = None
    known: Known | None = None

    @property
    def request(self) -> Submit:
        """Of one that is not over."""
        assert self.submit is not None
        return self.submit

    @property
    def key(self) -> bytes:
        return self.known.key if self.known is not None else self.request.key or self.request.id

    @property
    def id(self) -> bytes:
        return (self.known or self.request).id

    @property
    def kernel(self) -> str:
        return (self.known or self.request).kernel

    @property
    def num_rows(self) -> int:
        return self.known.num_rows if self.known is not None else self.request.block.num_rows

    @property
    def is_over(self) -> bool:
        """Every row has its outcome."""
        if self.known is not None:
            return True
        if not self.outcomes:
            return False
        return sum(stop - start for o in self.outcomes for _, start, stop in o.spans) >= self.num_rows


def taken(number: int, principal: str, client: str, submit: Submit, accepted_at: float, deadline: float | None) -> Put:
    """The record that a task begins with."""
    return Put(number, TAKEN, [msgpack.packb([principal, client, accepted_at, deadline]), *encode(submit, MAX_RECORD_BYTES)])


def noted(number: int, kind: int, start: int, stop: int, *more: int | str) -> Put:
    """STARTED or DIED."""
    return Put(number, kind, [msgpack.packb([start, stop, *more])])


def named(number: int, run_id: bytes) -> Put:
    return Put(number, NAMED, [run_id])


def outcome_of(number: int, outcome: Outcome, wall_s: float) -> Put:
    return Put(number, OUTCOME, [msgpack.packb(wall_s), *encode(Results(seq=0, outcomes=[outcome]), MAX_RECORD_BYTES)])


def known_of(number: int, told: tuple[str, bytes, bytes, str, str, int, float, bytes, float, bool]) -> Put:
    """`told`: principal, key, id, client, kernel, rows, accepted at, digest, acknowledged at, whether outcomes are gone."""
    return Put(number, KNOWN, [msgpack.packb(told)])


def saved_of(piece: Piece, saved: Saved) -> Put:
    """A row's checkpoint under the number it has been given."""
    head = [piece.run.number, piece.start, piece.deaths, saved.digest, saved.num_acquitted]
    checkpoint = Checkpoint(lease=0, block=saved.block, part=saved.part)
    return Put(saved.number, SAVED, [msgpack.packb(head), *encode(checkpoint, MAX_RECORD_BYTES)])


def acked(number: int, wall_s: float) -> Put:
    return Put(number, ACKED, [msgpack.packb(wall_s)])


def has_failed(outcome: Outcome) -> bool:
    """Whether its rows may be wanted again."""
    return outcome.error is not None and outcome.error.code != Code.CANCELLED


def read_all(puts: Iterable[Put]) -> tuple[dict[int, Kept], int]:
    """The tasks by their numbers, and the last number that is in use.

    Raises:
        Corrupt: no broker of this or an earlier version wrote it.
    """
    found, last = dict[int, Kept](), 0
    for put in puts:
        last = max(last, put.task)
        try:
            _read(found, put)
        except (ProtocolError, msgpack.UnpackException, ValueError, TypeError, KeyError, AttributeError) as e:
            raise Corrupt(f"record of task {put.task} cannot be understood: {e}") from e
    for kept in found.values():
        if kept.submit is None and kept.known is None:
            raise Corrupt(f"of task {kept.number} there is no submission")
    return found, last


def _read(found: dict[int, Kept], put: Put) -> None:
    if put.kind == TAKEN:
        principal, client, accepted_at, deadline = msgpack.unpackb(view(put.frames[0]))
        submit = decode(FROM_CLIENT, put.frames[1:], MAX_RECORD_BYTES)
        if not isinstance(submit, Submit):
            raise ValueError("a task without its submission")
        principal, client = intern(principal), intern(client)  # one of each, not a million
        found[put.task] = Kept(put.task, principal, client, submit, float(accepted_at), deadline)
        return
    if put.kind == SAVED:
        _read_saved(found, put)
        return
    kept = found.get(put.task)
    if kept is None:  # its submission was erased; what stays of it comes later
        kept = found[put.task] = Kept(put.task, "", "", None, 0.0, None)
    if put.kind == OUTCOME:
        kept.ended_at = float(msgpack.unpackb(view(put.frames[0])))
        _read_outcome(kept, put.frames[1:])
    elif put.kind == UNTIMED:
        _read_outcome(kept, put.frames)
    elif put.kind == ACKED:
        kept.acked_at = float(msgpack.unpackb(view(put.frames[0])))
    elif put.kind == NAMED:
        kept.names += (bytes(view(put.frames[0])),)
    elif put.kind == KNOWN:
        told = msgpack.unpackb(view(put.frames[0]))
        kept.principal, key, run_id, kept.client, kernel, num_rows, kept.accepted_at, digest, kept.acked_at, is_gone = told
        kept.known = Known(key, run_id, kernel, num_rows, digest, is_gone)
    else:
        _read_noted(kept, put)


def _read_noted(kept: Kept, put: Put) -> None:
    if put.kind not in (STARTED, DIED):
        raise ValueError(f"kind {put.kind} is of a later version; this broker knows {TAKEN} to {NAMED}")
    start, stop, *more = msgpack.unpackb(view(put.frames[0]))
    begun = kept.begun = kept.begun or Begun()
    if put.kind == STARTED:
        begun.started.append((start, stop))
        return
    count, *lines = more
    begun.deaths.append((start, stop, count))
    if lines:
        begun.evidence[start] = tuple(map(str, lines))


def _read_outcome(kept: Kept, frames: Sequence[Buffer]) -> None:
    results = decode(TO_CLIENT, frames, MAX_RECORD_BYTES)
    if not isinstance(results, Results):
        raise ValueError("an outcome without results")
    kept.outcomes += results.outcomes


def _read_saved(found: dict[int, Kept], put: Put) -> None:
    task, row, num_deaths, digest, num_acquitted = msgpack.unpackb(view(put.frames[0]))
    checkpoint = decode(FROM_WORKER, put.frames[1:], MAX_RECORD_BYTES)
    if not isinstance(checkpoint, Checkpoint) or checkpoint.block.num_rows != 1:
        raise ValueError("a checkpoint without its row")
    begun = found[task].begun = found[task].begun or Begun()
    begun.saved[row] = Saved(digest, checkpoint.block, checkpoint.part, num_acquitted, put.task)
    if any(start <= row < stop for start, stop, _ in begun.deaths):  # the deaths of a suspect may count no more
        begun.deaths.append((row, row + 1, num_deaths))

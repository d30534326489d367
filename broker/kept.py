"""Durable tasks as records: what is written of each event, and what is read again after a restart.

Records hold messages of the protocol as they are on the wire, so what comes back is checked as anything from outside is.
Does not know when something is written, nor where.
"""

from dataclasses import dataclass, field

import msgpack

from penstock.broker.columns import view
from penstock.broker.protocol import FROM_CLIENT, TO_CLIENT, Code, Outcome, Results, Submit
from penstock.broker.storage.records import Corrupt, Put
from penstock.broker.wire import ProtocolError, decode, encode

TAKEN, STARTED, DIED, OUTCOME, ACKED = 1, 2, 3, 4, 5
"""The kinds of records. TAKEN: [principal, client, accepted at, deadline or nil] and the submission. STARTED, DIED: rows
[start, stop], how often, and for DIED what is known of it, a line per death. OUTCOME: results with one outcome. ACKED:
[when]. Times are seconds of the wall clock."""
Rows = tuple[int, int, int]
"""(start, stop, count)."""


@dataclass(slots=True)
class Begun:
    """What is known of a task that was given to workers; `evidence` has by row a line per death."""

    started: list[Rows] = field(default_factory=list)
    deaths: list[Rows] = field(default_factory=list)
    evidence: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Kept:
    """A durable task as a restart finds it, perhaps one of a million. Times are seconds of the wall clock."""

    number: int
    principal: str
    client: str
    submit: Submit
    accepted_at: float
    deadline: float | None
    outcomes: list[Outcome] = field(default_factory=list)
    begun: Begun | None = None
    acked_at: float | None = None

    @property
    def key(self) -> bytes:
        return self.submit.key or self.submit.id

    @property
    def is_over(self) -> bool:
        """Every row has its outcome."""
        if not self.outcomes:
            return False
        return sum(stop - start for o in self.outcomes for _, start, stop in o.spans) >= self.submit.block.num_rows


def taken(number: int, principal: str, client: str, submit: Submit, accepted_at: float, deadline: float | None) -> Put:
    """The record that a task begins with."""
    return Put(number, TAKEN, [msgpack.packb([principal, client, accepted_at, deadline]), *encode(submit)])


def noted(number: int, kind: int, start: int, stop: int, count: int, *lines: str) -> Put:
    """STARTED or DIED."""
    return Put(number, kind, [msgpack.packb([start, stop, count, *lines])])


def outcome_of(number: int, outcome: Outcome) -> Put:
    return Put(number, OUTCOME, encode(Results(seq=0, outcomes=[outcome])))


def acked(number: int, wall_s: float) -> Put:
    return Put(number, ACKED, [msgpack.packb(wall_s)])


def has_failed(outcome: Outcome) -> bool:
    """Whether its rows may be wanted again."""
    return outcome.error is not None and outcome.error.code != Code.CANCELLED


def read(found: dict[int, Kept], put: Put) -> None:
    """Take one more record in.

    Raises:
        Corrupt: no broker of this or an earlier version wrote it.
    """
    try:
        _read(found, put)
    except (ProtocolError, msgpack.UnpackException, ValueError, TypeError, KeyError, AttributeError) as e:
        raise Corrupt(f"record of task {put.task} cannot be understood: {e}") from e


def _read(found: dict[int, Kept], put: Put) -> None:
    if put.kind == TAKEN:
        principal, client, accepted_at, deadline = msgpack.unpackb(view(put.frames[0]))
        submit = decode(FROM_CLIENT, put.frames[1:])
        if not isinstance(submit, Submit):
            raise ValueError("a task without its submission")
        found[put.task] = Kept(put.task, principal, client, submit, float(accepted_at), deadline)
        return
    kept = found[put.task]
    if put.kind == OUTCOME:
        results = decode(TO_CLIENT, put.frames)
        if not isinstance(results, Results):
            raise ValueError("an outcome without results")
        kept.outcomes += results.outcomes
    elif put.kind == ACKED:
        kept.acked_at = float(msgpack.unpackb(view(put.frames[0])))
    elif put.kind in (STARTED, DIED):
        start, stop, count, *lines = msgpack.unpackb(view(put.frames[0]))
        begun = kept.begun = kept.begun or Begun()
        (begun.started if put.kind == STARTED else begun.deaths).append((start, stop, count))
        if lines:
            begun.evidence[start] = tuple(map(str, lines))
    else:
        raise ValueError(f"kind {put.kind} is of a later version; this broker knows {TAKEN} to {ACKED}")

"""Durable tasks: which record follows which event, and what a restart makes of the records that it finds.

Records hold messages of the protocol as they are on the wire, so what comes back is checked as anything from outside is.
Knows no files (`storage/`), no sessions, and no wall clock but the offset it is given.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgpack

from penstock.broker.columns import view
from penstock.broker.journal import Entry, Journal, Key, digest_of
from penstock.broker.protocol import FROM_CLIENT, TO_CLIENT, Outcome, Results, Submit
from penstock.broker.storage.records import Corrupt, Erase, Put
from penstock.broker.tasks import Piece, Run
from penstock.broker.wire import ProtocolError, decode, encode

TAKEN, STARTED, DIED, OUTCOME, ACKED = 1, 2, 3, 4, 5
"""The kinds of records. TAKEN: [principal, client, accepted at, deadline or nil] and the submission. STARTED, DIED: rows
[start, stop] and how often. OUTCOME: results with one outcome. ACKED: [when]. Times are seconds of the wall clock."""
MAX_NAMES = 16
"""Submissions with one key whose acknowledgement counts."""
Rows = tuple[int, int, int]
"""(start, stop, count)."""


@dataclass(slots=True)
class Kept:
    """A durable task as a restart finds it."""

    number: int
    principal: str
    client: str
    submit: Submit
    accepted_at: float
    deadline: float | None
    outcomes: list[Outcome] = field(default_factory=list)
    started: list[Rows] = field(default_factory=list)
    deaths: list[Rows] = field(default_factory=list)
    acked_at: float | None = None

    @property
    def key(self) -> bytes:
        return self.submit.key or self.submit.id

    @property
    def is_over(self) -> bool:
        """Every row has its outcome."""
        return sum(stop - start for o in self.outcomes for _, start, stop in o.spans) >= self.submit.block.num_rows


class DurableJournal(Journal):
    """A journal whose durable tasks survive the broker: they have records, and outcomes stay until they are acknowledged.

    Args:
        result_ttl_s, max_result_bytes: how long, and how much in all, outcomes nobody has acknowledged are kept; past the
            bytes no durable task is taken.
        wall_offset_s: wall clock - monotonic clock.
    """

    is_durable = True

    def __init__(
        self, window_s: float, max_bytes: int, result_ttl_s: float, max_result_bytes: int, wall_offset_s: float = 0.0
    ) -> None:
        super().__init__(window_s, max_bytes)
        self.num_kept_bytes = 0
        self._result_ttl_s = result_ttl_s
        self._max_result_bytes = max_result_bytes
        self._wall_offset_s = wall_offset_s
        self._last = 0
        self._kept: OrderedDict[Key, Entry] = OrderedDict()
        self._keys: dict[tuple[str, bytes], Key] = {}
        self._ids: dict[int, list[tuple[str, bytes]]] = {}

    # --- what happens to a task ------------------------------------------------------------------------------------

    def refusal(self) -> str | None:
        """See `Journal`."""
        if not self.has_room:
            return "the disk of the broker's journal is almost full"
        if self.num_kept_bytes > self._max_result_bytes:
            return "too many results wait to be fetched: acknowledge or drop some"
        return None

    def accept(self, principal: str, key: bytes, digest: bytes, run: Run) -> Entry:
        """See `Journal`."""
        entry = super().accept(principal, key, digest, run)
        if run.is_durable:
            self._last += 1
            entry.number = run.number = self._last
            self._name(run.number, principal, run.id, (principal, key))
            deadline = None if run.deadline == float("inf") else run.deadline + self._wall_offset_s
            meta = [principal, run.session.name, run.arrived + self._wall_offset_s, deadline]
            request = run.request
            if request.block.layout.num_framed:  # what is shared may change before it is written
                request = replace(request, block=request.block.copied())
            self.writes.append(Put(run.number, TAKEN, [msgpack.packb(meta), *encode(request)]))
        return entry

    def find(self, principal: str, key: bytes, now: float) -> Entry | None:
        """See `Journal`."""
        return super().find(principal, key, now) or self._kept.get((principal, key))

    def find_by_id(self, principal: str, run_id: bytes) -> Entry | None:
        """A durable task, open or over."""
        key = self._keys.get((principal, run_id))
        return None if key is None else self._open.get(key) or self._kept.get(key) or self._closed.get(key)

    def started(self, piece: Piece) -> None:
        """See `Journal`."""
        self._note(STARTED, piece, piece.deaths + 1)

    def died(self, piece: Piece) -> None:
        """See `Journal`."""
        self._note(DIED, piece, piece.deaths)

    def _note(self, kind: int, piece: Piece, count: int) -> None:
        if piece.run.number:
            self.writes.append(Put(piece.run.number, kind, [msgpack.packb([piece.start, piece.stop, count])]))

    def record(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """See `Journal`."""
        super().record(run, outcomes)
        if run.number:
            self.writes += [Put(run.number, OUTCOME, encode(Results(seq=0, outcomes=[outcome]))) for outcome in outcomes]

    def also_known_as(self, principal: str, run_id: bytes, number: int) -> None:
        """See `Journal`."""
        names = self._ids.get(number, ())
        if names and len(names) < MAX_NAMES:
            self._name(number, principal, run_id, self._keys[names[0]])

    def _name(self, number: int, principal: str, run_id: bytes, key: Key) -> None:
        self._keys[principal, run_id] = key
        self._ids.setdefault(number, []).append((principal, run_id))

    def acknowledged(self, principal: str, run_id: bytes, now: float) -> None:
        """See `Journal`."""
        key = self._keys.get((principal, run_id))
        entry = self._kept.pop(key, None) if key is not None else None
        if key is not None and entry is not None:
            self.num_kept_bytes -= entry.num_bytes
            self.writes.append(Put(entry.number, ACKED, [msgpack.packb(now + self._wall_offset_s)]))
            super()._retire(key, entry, now)

    def expire(self, now: float) -> None:
        """See `Journal`."""
        super().expire(now)
        while self._kept:
            key, entry = next(iter(self._kept.items()))
            if entry.expires_at > now:
                return
            del self._kept[key]
            self.num_kept_bytes -= entry.num_bytes
            self._erase(entry)

    def _retire(self, key: Key, entry: Entry, now: float) -> None:
        if not entry.number:
            super()._retire(key, entry, now)
            return
        entry.expires_at = now + self._result_ttl_s
        self.num_kept_bytes += entry.num_bytes
        self._kept[key] = entry

    def _drop(self, key: Key, entry: Entry) -> None:
        super()._drop(key, entry)
        self._erase(entry)

    def _erase(self, entry: Entry) -> None:
        if entry.number:
            self.writes.append(Erase(entry.number))
            for name in self._ids.pop(entry.number, ()):
                self._keys.pop(name, None)

    # --- what a restart finds --------------------------------------------------------------------------------------

    def restore(self, puts: Iterable[Put], now: float) -> list[Kept]:
        """Take up what an earlier broker wrote: what is over is remembered here, the rest comes back in order of acceptance.

        Raises:
            Corrupt: a record that no broker of this or an earlier version wrote.
        """
        found = dict[int, Kept]()
        for put in puts:
            try:
                _read(found, put)
            except (ProtocolError, msgpack.UnpackException, ValueError, TypeError, KeyError, AttributeError) as e:
                raise Corrupt(f"record of task {put.task} cannot be understood: {e}") from e
        self._last = max(found, default=0)
        for kept in found.values():
            if kept.is_over:
                self._remember(kept, now)
        return [kept for kept in found.values() if not kept.is_over]

    def _remember(self, kept: Kept, now: float) -> None:
        entry, key = self._entry_of(kept, None), (kept.principal, kept.key)
        self._name(kept.number, kept.principal, kept.submit.id, key)
        if kept.acked_at is None:
            self._retire(key, entry, now)
        else:
            Journal._retire(self, key, entry, kept.acked_at - self._wall_offset_s)

    def reopen(self, kept: Kept, run: Run) -> None:
        """The core has opened the run of a task again."""
        run.number = kept.number
        key = (kept.principal, kept.key)
        self._open[key] = self._entry_of(kept, run)
        self._name(kept.number, kept.principal, kept.submit.id, key)

    @staticmethod
    def _entry_of(kept: Kept, run: Run | None) -> Entry:
        num_bytes = sum(o.block.nbytes for o in kept.outcomes if o.block is not None)
        return Entry(digest_of(kept.submit), run, kept.outcomes, num_bytes, number=kept.number)

    def monotonic(self, wall_s: float) -> float:
        """A time of the wall clock as one of ours."""
        return wall_s - self._wall_offset_s


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
        start, stop, count = msgpack.unpackb(view(put.frames[0]))
        (kept.started if put.kind == STARTED else kept.deaths).append((start, stop, count))
    else:
        raise ValueError(f"unknown kind {put.kind}")

"""Durable tasks: which record follows which event, and what a restart makes of the records that it finds.

Knows what is in a record only by name (`kept.py`), no files (`storage/`), no sessions, and no wall clock but the offset it
is given.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

from penstock.broker.index import MAX_NAMES, Index
from penstock.broker.journal import About, Entry, Journal, bytes_of
from penstock.broker.kept import (
    DIED,
    OF_OUTCOME,
    OF_REQUEST,
    STARTED,
    Kept,
    acked,
    has_failed,
    known_of,
    named,
    noted,
    outcome_of,
    read_all,
    saved_of,
    taken,
)
from penstock.broker.protocol import ID_BYTES, Outcome
from penstock.broker.retention import Retention
from penstock.broker.storage.records import Erase, Put
from penstock.broker.tasks import Piece, Run, Saved

SAVED_BYTES_PER_S = 8 << 20
"""What checkpoints may write, on average: acceptances and outcomes wait behind them for the same disk."""


class DurableJournal(Journal):
    """A journal whose durable tasks survive the broker: they have records, and outcomes stay until they are acknowledged.

    An entry that has a number is open, then retained, then known as one without is; at each step less of it stays on disk.

    Args:
        result_ttl_s, max_result_bytes: how long, and how much in all, outcomes nobody has acknowledged are kept; past the
            bytes no durable task is taken. What they answer counts with them.
        wall_offset_s: wall clock - monotonic clock.
    Attributes:
        retained: what is over, with outcomes that nobody has acknowledged.
    """

    is_durable = True

    def __init__(
        self, window_s: float, max_bytes: int, result_ttl_s: float, max_result_bytes: int, wall_offset_s: float = 0.0
    ) -> None:
        super().__init__(window_s, max_bytes)
        self.retained = Retention(result_ttl_s, max_result_bytes)
        self._index = Index()
        self._wall_offset_s = wall_offset_s
        self._last = 0
        self._save_at = float("-inf")

    # --- what happens to a task ------------------------------------------------------------------------------------

    def refusal(self, principal: str) -> str | None:
        """See `Journal`."""
        if not self.has_room:
            return "the disk of the broker's journal is almost full"
        return self.retained.refusal(principal)

    def accept(self, principal: str, key: bytes, digest: bytes, run: Run) -> Entry:
        """See `Journal`."""
        entry = super().accept(principal, key, digest, run)
        if run.is_durable:
            self._last += 1
            entry.number = run.number = self._last
            self._index.name(entry, run.id)
            deadline = None if run.deadline == float("inf") else run.deadline + self._wall_offset_s
            arrived, request = run.arrived + self._wall_offset_s, run.request
            if request.block.layout.num_framed and request.block.has_shared:  # it is lent for as long as the task is open
                request = replace(request, block=request.block.copied())
            entry.request = request
            self.writes.append(taken(run.number, principal, run.client, request, arrived, deadline))
        return entry

    def also_known_as(self, entry: Entry, run_id: bytes) -> None:
        """See `Journal`."""
        if entry.number and self._index.name(entry, run_id):
            self.writes.append(named(entry.number, run_id))

    def locate(self, principal: str, run_id: bytes | None, key: bytes | None, now: float) -> Entry | None:
        """A durable task by its key, else by its id, which is the key of one that was given none."""
        self.expire(now)
        if key is not None:
            entry = self._entries.get((principal, key))
        else:
            run_id = run_id or b""
            entry = self._index.named(principal, run_id) or self._entries.get((principal, run_id))
        return entry if entry is not None and entry.number else None

    def over(self, principal: str, is_failed: bool) -> Iterator[Entry]:
        """Durable tasks that are over, of which something is left to fetch; the last to end comes first.

        Args:
            is_failed: only those with a row that has failed; else also all that nobody has acknowledged.
        """
        return self._index.over(principal, is_failed)

    def started(self, piece: Piece) -> None:
        """See `Journal`."""
        if piece.run.number:
            self.writes.append(noted(piece.run.number, STARTED, piece.start, piece.stop))

    def died(self, piece: Piece) -> None:
        """See `Journal`."""
        if piece.run.number:
            self.writes.append(noted(piece.run.number, DIED, piece.start, piece.stop, piece.deaths, *piece.evidence))

    def save(self, piece: Piece, saved: Saved, now: float) -> None:
        """See `Journal`. A checkpoint has a record number of its own, so that the one before it can be erased."""
        if not piece.run.number or not self.has_room or now < self._save_at:
            return
        self._save_at = now + saved.block.nbytes / SAVED_BYTES_PER_S
        self.unsave(saved)
        self._last += 1
        saved.number = self._last
        self.writes.append(saved_of(piece, saved))

    def unsave(self, saved: Saved) -> None:
        """See `Journal`."""
        if saved.number:
            self.writes.append(Erase(saved.number))

    def record(self, run: Run, outcomes: Sequence[Outcome], now: float) -> None:
        """See `Journal`."""
        super().record(run, outcomes, now)
        if run.number:
            self.writes += [outcome_of(run.number, outcome, now + self._wall_offset_s) for outcome in outcomes]

    def close(self, run: Run, now: float) -> None:
        """See `Journal`."""
        if run.number:
            entry = self.entry(run)
            assert entry is not None
            self._end(entry, About.of(run))
        super().close(run, now)

    def _end(self, entry: Entry, about: About) -> None:
        """It is over: what can be listed, and what may be wanted again. What it answers stays on disk for now."""
        entry.about = about
        assert entry.request is not None
        entry.num_bytes += entry.request.block.nbytes
        is_failed = any(has_failed(outcome) for outcome in entry.outcomes)
        self._index.end(entry, is_failed)
        if not is_failed:
            entry.keep_digest()
            entry.request = None

    def acknowledged(self, entry: Entry, now: float) -> None:
        """See `Journal`. Not, if it was before, or is forgotten; what began again since then is another entry."""
        if entry not in self.retained:
            return
        self.retained.let_go(entry)
        entry.is_acked = True
        if entry.request is None:
            entry.num_bytes = bytes_of(entry.outcomes)
            self._index.unlist(entry)
            self.writes += [self._known_of(entry, now), Erase(entry.number, OF_REQUEST)]
        else:
            self.writes.append(acked(entry.number, now + self._wall_offset_s))
        super()._retire(entry, now)

    def expire(self, now: float) -> None:
        """See `Journal`."""
        super().expire(now)
        while (entry := self.retained.first_expired(now)) is not None:
            self.drop(entry)

    def drop(self, entry: Entry) -> None:
        """See `Journal`."""
        self.retained.let_go(entry)
        super().drop(entry)
        if entry.number:
            self.writes.append(Erase(entry.number))
            self._index.forget(entry)

    def begin_again(self, entry: Entry, now: float) -> Kept:
        """A durable task that is over begins again under another id, with the outcomes of the rows that have not failed.

        Its key stays, and its old ids are known. All that was known of its failures is forgotten.
        """
        (principal, key), about, request, outcomes = entry.key, entry.about, entry.request, entry.outcomes
        assert about is not None and request is not None
        self.drop(entry)
        self._last += 1
        new_id = blake2b(about.id, digest_size=ID_BYTES, person=b"requeued").digest()
        submit = replace(request, id=new_id, key=key, is_again=False, ack=0)
        wall_s = now + self._wall_offset_s
        deadline = None if submit.timeout_ms is None else wall_s + submit.timeout_ms / 1000.0
        kept = Kept(self._last, principal, about.client, submit, wall_s, deadline)
        kept.outcomes = [replace(o, spans=[(new_id, s, e) for _, s, e in o.spans]) for o in outcomes if not has_failed(o)]
        kept.names = tuple(run_id for run_id in (*entry.names, about.id) if run_id != key)[-MAX_NAMES + 1 :]
        self.writes.append(taken(kept.number, principal, kept.client, submit, wall_s, deadline))
        self.writes += [outcome_of(kept.number, outcome, wall_s) for outcome in kept.outcomes]
        self.writes += [named(kept.number, run_id) for run_id in kept.names]
        return kept

    def _retire(self, entry: Entry, now: float) -> None:
        if entry.number:
            self.retained.keep(entry, now)
        else:
            super()._retire(entry, now)

    def _empty(self, entry: Entry) -> None:
        if entry.number and not entry.is_gone:
            self._index.unlist(entry)
            acked_at = entry.expires_at - self._window_s
            super()._empty(entry)
            self.writes += [Erase(entry.number, OF_OUTCOME), self._known_of(entry, acked_at)]
        else:
            super()._empty(entry)

    def _known_of(self, entry: Entry, acked_at: float) -> Put:
        about = entry.about
        assert about is not None
        arrived, acked_at = about.arrived + self._wall_offset_s, acked_at + self._wall_offset_s
        (principal, key), digest, is_gone = entry.key, entry.digest, entry.is_gone
        told = (principal, key, about.id, about.client, about.kernel, about.num_rows, arrived, digest, acked_at, is_gone)
        return known_of(entry.number, told)

    # --- what a restart finds --------------------------------------------------------------------------------------

    def restore(self, puts: Iterable[Put], now: float) -> list[Kept]:
        """Take up what an earlier broker wrote: what is over is remembered here, the rest comes back in order of acceptance.

        Raises:
            Corrupt: a record that no broker of this or an earlier version wrote.
        """
        found, self._last = read_all(puts)
        over = [(self._past(kept.ended_at, now), kept) for kept in found.values() if kept.is_over]
        acked_ones = list[tuple[float, Entry]]()
        for ended_at, kept in sorted(over, key=_first):
            entry = self._remember(kept, now)
            if kept.acked_at is None:
                self._retire(entry, ended_at)
            else:
                acked_ones.append((self._past(kept.acked_at, now), entry))
        for acked_at, entry in sorted(acked_ones, key=_first):
            super()._retire(entry, acked_at)
        return [kept for kept in found.values() if not kept.is_over]

    def _past(self, wall_s: float | None, now: float) -> float:
        """A time that an earlier broker wrote as one of ours. It is not to come, whatever the clock was then."""
        return now if wall_s is None else min(self.monotonic(wall_s), now)

    def _remember(self, kept: Kept, now: float) -> Entry:
        entry = self._entry_of(kept, None)
        about = About(kept.id, kept.client, kept.kernel, kept.num_rows, self._past(kept.accepted_at, now))
        if kept.known is not None:
            entry.about, entry.digest, entry.is_gone = about, kept.known.digest, kept.known.is_gone
        else:
            self._end(entry, about)
        if kept.acked_at is not None:
            entry.is_acked = True
            if entry.request is None:
                self._index.unlist(entry)
        return entry

    def reopen(self, kept: Kept, run: Run) -> None:
        """The core has opened the run of a task again."""
        run.number = kept.number
        run.entry = self._entry_of(kept, run)

    def _entry_of(self, kept: Kept, run: Run | None) -> Entry:
        key = kept.principal, kept.key
        num_bytes = bytes_of(kept.outcomes) if kept.outcomes else 0
        entry = Entry(key, b"", run, kept.outcomes, num_bytes, number=kept.number, request=kept.submit)
        self._entries[key] = entry
        self._index.name(entry, kept.id)
        for run_id in kept.names:
            self._index.name(entry, run_id)
        return entry

    def monotonic(self, wall_s: float) -> float:
        """A time of the wall clock as one of ours."""
        return wall_s - self._wall_offset_s


def _first(pair: tuple[float, object]) -> float:
    return pair[0]

"""Durable tasks: which record follows which event, and what a restart makes of the records that it finds.

Knows what is in a record only by name (`kept.py`), no files (`storage/`), no sessions, and no wall clock but the offset it
is given.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

from penstock.broker.journal import About, Entry, Journal, Key
from penstock.broker.kept import DIED, STARTED, Kept, acked, has_failed, noted, outcome_of, read, saved_of, taken
from penstock.broker.protocol import ID_BYTES, Outcome
from penstock.broker.storage.records import Erase, Put
from penstock.broker.tasks import Piece, Run, Saved

MAX_NAMES = 16
"""Submissions with one key whose acknowledgement counts."""
SAVED_BYTES_PER_S = 8 << 20
"""What checkpoints may write, on average: acceptances and outcomes wait behind them for the same disk."""


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
        self._save_at = float("-inf")
        self._kept: OrderedDict[Key, Entry] = OrderedDict()
        self._keys: dict[Key, Key] = {}
        self._ids: dict[int, list[bytes]] = {}
        self._over: defaultdict[str, dict[bytes, Entry]] = defaultdict(dict)
        self._failed: defaultdict[str, dict[bytes, Entry]] = defaultdict(dict)

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
            self._name(run.number, run.id, (principal, key))
            deadline = None if run.deadline == float("inf") else run.deadline + self._wall_offset_s
            arrived, request = run.arrived + self._wall_offset_s, run.request
            if request.block.layout.num_framed and request.block.has_shared:  # it is lent for as long as the task is open
                request = replace(request, block=request.block.copied())
            entry.request = request
            self.writes.append(taken(run.number, principal, run.session.name, request, arrived, deadline))
        return entry

    def find(self, principal: str, key: bytes, now: float) -> Entry | None:
        """See `Journal`."""
        return super().find(principal, key, now) or self._kept.get((principal, key))

    def locate(self, principal: str, run_id: bytes | None, key: bytes | None, now: float) -> tuple[Key, Entry] | None:
        """A durable task by its key, else by its id, which is the key of one that was given none."""
        self.expire(now)
        found = (principal, key if key is not None else run_id or b"")
        if key is None and run_id is not None:
            found = self._keys.get((principal, run_id), found)
        entry = self._open.get(found) or self._kept.get(found) or self._closed.get(found)
        return None if entry is None or not entry.number else (found, entry)

    def over(self, principal: str, is_failed: bool) -> Iterator[tuple[bytes, Entry]]:
        """Durable tasks that are over, of which something is left to fetch; the last to end comes first.

        Args:
            is_failed: only those with a row that has failed; else also all that nobody has acknowledged.
        """
        for key, entry in reversed((self._failed if is_failed else self._over).get(principal, {}).items()):
            if not entry.is_gone:
                yield key, entry

    def started(self, piece: Piece) -> None:
        """See `Journal`."""
        self._note(STARTED, piece, piece.deaths + 1)

    def died(self, piece: Piece) -> None:
        """See `Journal`."""
        self._note(DIED, piece, piece.deaths, *piece.evidence)

    def _note(self, kind: int, piece: Piece, count: int, *lines: str) -> None:
        if piece.run.number:
            self.writes.append(noted(piece.run.number, kind, piece.start, piece.stop, count, *lines))

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

    def record(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """See `Journal`."""
        super().record(run, outcomes)
        if run.number:
            self.writes += [outcome_of(run.number, outcome) for outcome in outcomes]

    def close(self, run: Run, now: float) -> None:
        """See `Journal`."""
        entry = self.entry(run)
        if entry is not None and entry.number and run.key is not None:
            self._end((run.session.principal, run.key), entry, About.of(run))
        super().close(run, now)

    def _end(self, key: Key, entry: Entry, about: About) -> None:
        """It is over: what can be listed, and what may be wanted again."""
        entry.about = about
        self._over[key[0]][key[1]] = entry
        if entry.request is not None and any(has_failed(outcome) for outcome in entry.outcomes):
            entry.num_bytes += entry.request.block.nbytes
            self._failed[key[0]][key[1]] = entry
        else:
            entry.keep_digest()
            entry.request = None

    def also_known_as(self, principal: str, run_id: bytes, key: bytes, number: int) -> None:
        """See `Journal`."""
        if len(self._ids.get(number, ())) < MAX_NAMES:
            self._name(number, run_id, (principal, key))

    def _name(self, number: int, run_id: bytes, key: Key) -> None:
        """An id by which a task is known beside its key; most have none but their key."""
        name = key[0], run_id
        if name != key and self._keys.get(name) != key:
            self._keys[name] = key
            self._ids.setdefault(number, []).append(run_id)

    def acknowledged(self, principal: str, run_id: bytes, now: float) -> None:
        """See `Journal`."""
        key = self._keys.get((principal, run_id), (principal, run_id))
        entry = self._kept.pop(key, None)
        if entry is not None:
            self.num_kept_bytes -= entry.num_bytes
            self._note_acked(key, entry)
            self.writes.append(acked(entry.number, now + self._wall_offset_s))
            super()._retire(key, entry, now)

    def _note_acked(self, key: Key, entry: Entry) -> None:
        entry.is_acked = True
        if entry.request is None:
            self._over[key[0]].pop(key[1], None)

    def expire(self, now: float) -> None:
        """See `Journal`."""
        super().expire(now)
        while self._kept:
            key, entry = next(iter(self._kept.items()))
            if entry.expires_at > now:
                return
            self.drop(key, entry)

    def drop(self, key: Key, entry: Entry) -> None:
        """Forget a durable task that is over."""
        if self._kept.pop(key, None) is None:
            self._drop(key, entry)
            return
        self.num_kept_bytes -= entry.num_bytes
        self._erase(key, entry)

    def begin_again(self, key: Key, entry: Entry, now: float) -> Kept:
        """A durable task that is over begins again under another id, with the outcomes of the rows that have not failed.

        Its key stays, and its old id is known. All that was known of its failures is forgotten.
        """
        about, request, names = entry.about, entry.request, self._ids.get(entry.number, [])[: MAX_NAMES - 1]
        assert about is not None and request is not None
        kept_outcomes = [o for o in entry.outcomes if o.error is None]
        self.drop(key, entry)
        self._last += 1
        new_id = blake2b(about.id, digest_size=ID_BYTES, person=b"requeued").digest()
        submit = replace(request, id=new_id, key=key[1], is_again=False, ack=0)
        deadline = None if submit.timeout_ms is None else now + submit.timeout_ms / 1000.0 + self._wall_offset_s
        kept = Kept(self._last, key[0], about.client, submit, now + self._wall_offset_s, deadline)
        kept.outcomes = [replace(o, spans=[(new_id, s, e) for _, s, e in o.spans]) for o in kept_outcomes]
        self.writes.append(taken(kept.number, key[0], kept.client, submit, kept.accepted_at, deadline))
        self.writes += [outcome_of(kept.number, outcome) for outcome in kept.outcomes]
        for run_id in (new_id, *names):
            self._name(kept.number, run_id, key)
        return kept

    def _retire(self, key: Key, entry: Entry, now: float) -> None:
        if not entry.number:
            super()._retire(key, entry, now)
            return
        entry.expires_at = now + self._result_ttl_s
        self.num_kept_bytes += entry.num_bytes
        self._kept[key] = entry

    def _drop(self, key: Key, entry: Entry) -> None:
        super()._drop(key, entry)
        self._erase(key, entry)

    def _erase(self, key: Key, entry: Entry) -> None:
        if entry.number:
            self.writes.append(Erase(entry.number))
            self._over[key[0]].pop(key[1], None)
            self._failed[key[0]].pop(key[1], None)
            for run_id in self._ids.pop(entry.number, ()):
                self._keys.pop((key[0], run_id), None)

    # --- what a restart finds --------------------------------------------------------------------------------------

    def restore(self, puts: Iterable[Put], now: float) -> list[Kept]:
        """Take up what an earlier broker wrote: what is over is remembered here, the rest comes back in order of acceptance.

        Raises:
            Corrupt: a record that no broker of this or an earlier version wrote.
        """
        found = dict[int, Kept]()
        for put in puts:
            read(found, put)
            self._last = max(self._last, put.task)
        open_ones: list[Kept] = []
        for kept in found.values():
            if kept.is_over:
                self._remember(kept, now)
            else:
                open_ones.append(kept)
        return open_ones

    def _remember(self, kept: Kept, now: float) -> None:
        entry, key = self._entry_of(kept, None), (kept.principal, kept.key)
        self._name(kept.number, kept.submit.id, key)
        arrived = min(self.monotonic(kept.accepted_at), now)
        about = About(kept.submit.id, kept.client, kept.submit.kernel, kept.submit.block.num_rows, arrived)
        self._end(key, entry, about)
        if kept.acked_at is None:
            self._retire(key, entry, now)
        else:
            self._note_acked(key, entry)
            Journal._retire(self, key, entry, kept.acked_at - self._wall_offset_s)

    def reopen(self, kept: Kept, run: Run) -> None:
        """The core has opened the run of a task again."""
        run.number = kept.number
        key = (kept.principal, kept.key)
        self._open[key] = self._entry_of(kept, run)
        self._name(kept.number, kept.submit.id, key)

    @staticmethod
    def _entry_of(kept: Kept, run: Run | None) -> Entry:
        num_bytes = sum(o.block.nbytes for o in kept.outcomes if o.block is not None) if kept.outcomes else 0
        return Entry(b"", run, kept.outcomes, num_bytes, number=kept.number, request=kept.submit)

    def monotonic(self, wall_s: float) -> float:
        """A time of the wall clock as one of ours."""
        return wall_s - self._wall_offset_s

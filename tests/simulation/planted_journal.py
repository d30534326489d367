"""Bugs to plant: promises and journal."""

from typing import Any

from penstock.broker.core import Core
from penstock.broker.durable import DurableJournal
from penstock.broker.journal import Journal
from penstock.broker.promises import Promises
from penstock.broker.settlement import Settlement
from penstock.broker.state import BACK, BrokerState
from simulation.bugs import bug, change, disable


@bug("broker")
def accepts_before_the_commit() -> None:
    """Messages that promise something leave before the journal is safe."""

    def perform(self: Promises, actions: Any, writes: Any) -> None:
        if writes and self._store is not None:
            self._ticket = self._store.append(writes)
        for action in actions:
            self._send(action)

    Promises.perform = perform  # type: ignore[method-assign]


@bug("broker")
def releases_one_group_early() -> None:
    """A held message leaves when the group of writes before its own is safe."""

    def release(self: Promises) -> None:
        for address, held in list(self._held.items()):
            while held.queue and held.queue[0][0] <= self._store.committed + 1:  # type: ignore[union-attr]
                self._send(held.take())
            if not held.queue and self._held.get(address) is held:
                del self._held[address]

    Promises.release = release  # type: ignore[method-assign]


@bug("broker")
def forgets_what_it_held() -> None:
    """What waits for the disk behind another message to the same address is dropped with it."""

    def make(release: Any) -> Any:
        def forgetful(self: Promises) -> None:
            for held in self._held.values():
                while len(held.queue) > 1:
                    held.queue.pop()
            release(self)

        return forgetful

    change(Promises, "release", make)


@bug("broker")
def assigns_before_the_record() -> None:
    """A row that must not run twice leaves for a worker before it is on disk that it may have started."""

    def make(send: Any) -> Any:
        return lambda self, side, route, m, *, is_promise=False: send(
            self, side, route, m, is_promise=is_promise and side != BACK
        )

    change(BrokerState, "send", make)


@bug("broker")
def tells_followers_early() -> None:
    """A second submission with a key hears of the outcome before it is safe."""

    def make(end: Any) -> Any:
        def early(self: Settlement, piece: Any, start: int, stop: int, at: int) -> None:
            followers, own = [f.session for f in piece.run.followers or ()], piece.run.session
            end(self, piece, start, stop, at)
            self.durable -= {session for session in followers if session is not own}

        return early

    change(Settlement, "end", make)


@bug("journal")
def does_not_record_attempts() -> None:
    """Nothing is written when rows are given to a worker."""
    disable(DurableJournal, "started")


@bug("journal")
def records_outcomes_twice() -> None:
    """Each outcome is written two times."""

    def make(record: Any) -> Any:
        def twice(self: DurableJournal, run: Any, outcomes: Any, now: float) -> None:
            num_before = len(self.writes)
            record(self, run, outcomes, now)
            self.writes += self.writes[num_before:]

        return twice

    change(DurableJournal, "record", make)


@bug("journal")
def does_not_record_outcomes() -> None:
    """Outcomes are remembered, not written."""
    DurableJournal.record = Journal.record  # type: ignore[method-assign]


@bug("journal")
def loses_the_last_write() -> None:
    """Of many writes at once the last one is not handed to the store."""
    change(Core, "take_writes", lambda take: lambda self: (lambda w: w if len(w) < 4 else w[:-1])(take(self)))


@bug("journal")
def acknowledges_all_of_a_principal() -> None:
    """An acknowledgement forgets every outcome of its user's."""

    def make(acknowledged: Any) -> Any:
        def greedy(self: DurableJournal, entry: Any, now: float) -> None:
            acknowledged(self, entry, now)
            for other in list(self.retained):
                if other.key[0] == entry.key[0]:
                    acknowledged(self, other, now)

        return greedy

    change(DurableJournal, "acknowledged", make)


@bug("journal")
def finds_the_keys_of_others() -> None:
    """An idempotency key is looked up without its principal."""

    def make(find: Any) -> Any:
        def find_any(self: DurableJournal, principal: str, key: bytes, now: float) -> Any:
            found = find(self, principal, key, now)
            return found or next((e for (_, k), e in self._entries.items() if k == key), None)

        return find_any

    change(DurableJournal, "find", make)


@bug("journal")
def forgets_outcomes_at_a_restart() -> None:
    """Rows of an open task that had their outcome run again after a restart."""

    def make(restore: Any) -> Any:
        def forgetful(self: DurableJournal, puts: Any, now: float) -> Any:
            kept = restore(self, puts, now)
            for one in kept:
                one.outcomes = []
            return kept

        return forgetful

    change(DurableJournal, "restore", make)


@bug("journal")
def forgets_what_is_over_at_a_restart() -> None:
    """Outcomes that nobody has fetched are gone after a restart."""
    disable(DurableJournal, "_remember")


@bug("journal")
def forgets_the_last_open_task() -> None:
    """A restart takes up all open tasks but the last."""
    change(DurableJournal, "restore", lambda restore: lambda self, puts, now: restore(self, puts, now)[:-1])


@bug("journal")
def shortens_time_limits_at_a_restart() -> None:
    """Time limits are restored with the wrong clock."""
    change(DurableJournal, "monotonic", lambda monotonic: lambda self, wall_s: monotonic(self, wall_s) - 50.0)


@bug("journal")
def forgets_the_key_of_what_is_open() -> None:
    """A restored task has no entry under its key."""

    def make(reopen: Any) -> Any:
        def forgetful(self: DurableJournal, kept: Any, run: Any) -> None:
            reopen(self, kept, run)
            self._entries.pop((kept.principal, kept.key), None)

        return forgetful

    change(DurableJournal, "reopen", make)

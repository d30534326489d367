"""Outcomes of durable tasks that nobody has acknowledged: how long they stay, and how many there may be.

Knows whose they are and how large. Does not know records, nor tasks that are open or acknowledged.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator

from penstock.broker.journal import Entry, Key
from penstock.broker.scheduling.quotas import may_have_more

ENTRY_BYTES = 1024
"""What a task that is kept takes beside its payload, in memory and on disk, about."""


class Retention:
    """Entries in the order in which they ended, each for `ttl_s`; `num_bytes` is what they take."""

    def __init__(self, ttl_s: float, max_bytes: int) -> None:
        self.num_bytes = 0
        self._bytes_of = Counter[str]()
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Key, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, entry: Entry) -> bool:
        """Not, if what began again since then with its key is another entry."""
        return self._entries.get(entry.key) is entry

    def refusal(self, principal: str) -> str | None:
        """Why there can be no more of this principal."""
        if self.num_bytes > self._max_bytes:
            return "too many results wait to be fetched: acknowledge or drop some"
        if not may_have_more(self._bytes_of[principal], self.num_bytes, self._max_bytes):
            return "too many of your results wait to be fetched: acknowledge or drop some"
        return None

    def keep(self, entry: Entry, now: float) -> None:
        """It has just ended."""
        entry.expires_at = now + self._ttl_s
        self._count(entry, 1)
        self._entries[entry.key] = entry

    def let_go(self, entry: Entry) -> None:
        """Keep it no more, if it is."""
        if entry in self:
            del self._entries[entry.key]
            self._count(entry, -1)

    def first_expired(self, now: float) -> Entry | None:
        """The oldest, if its time is over."""
        first = next(iter(self._entries.values()), None)
        return first if first is not None and first.expires_at <= now else None

    def _count(self, entry: Entry, sign: int) -> None:
        principal, num_bytes = entry.key[0], sign * (ENTRY_BYTES + entry.num_bytes)
        self.num_bytes += num_bytes
        self._bytes_of[principal] += num_bytes
        if not self._bytes_of[principal]:
            del self._bytes_of[principal]

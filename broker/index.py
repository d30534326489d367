"""Where durable tasks are found: by the ids of their submissions, and per principal those that are over.

Knows which entry stands where. Does not know when one comes or goes.
"""

from collections import defaultdict
from collections.abc import Iterator

from penstock.broker.journal import Entry, Key

MAX_NAMES = 16
"""Ids by which a task is known beside its key."""


class Index:
    """See the module."""

    def __init__(self) -> None:
        self._names: dict[Key, Entry] = {}
        self._over: defaultdict[str, dict[bytes, Entry]] = defaultdict(dict)
        self._failed: defaultdict[str, dict[bytes, Entry]] = defaultdict(dict)

    def name(self, entry: Entry, run_id: bytes) -> bool:
        """Whether this is a new id of a task; most have none but their key."""
        name = entry.key[0], run_id
        if name == entry.key or self._names.get(name) is entry or len(entry.names) >= MAX_NAMES:
            return False
        self._names[name] = entry
        entry.names += (run_id,)
        return True

    def named(self, principal: str, run_id: bytes) -> Entry | None:
        """Whose id this is, beside its key."""
        return self._names.get((principal, run_id))

    def end(self, entry: Entry, is_failed: bool) -> None:
        """It is over, and can be listed; `is_failed`: a row of it has failed."""
        principal, key = entry.key
        self._over[principal][key] = entry
        if is_failed:
            self._failed[principal][key] = entry

    def over(self, principal: str, is_failed: bool) -> Iterator[Entry]:
        """See `DurableJournal`."""
        table = self._failed if is_failed else self._over
        return (entry for entry in reversed(table.get(principal, {}).values()) if not entry.is_gone)

    def unlist(self, entry: Entry) -> None:
        """Nothing of it is left to fetch."""
        for table in (self._over, self._failed):
            table[entry.key[0]].pop(entry.key[1], None)

    def forget(self, entry: Entry) -> None:
        """Neither listed nor named any more."""
        self.unlist(entry)
        for run_id in entry.names:
            if self._names.get((entry.key[0], run_id)) is entry:
                del self._names[entry.key[0], run_id]

"""Which expert is in which slot, and which one leaves: decided here, carried out elsewhere.

Knows keys, slots, references and uses; has no lock, no tensor and no clock. A slot that is referenced or being filled is
never given to another key.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

POLICIES = ("lru", "lfu")
Key = tuple[int, int]
"""(layer, expert)."""


@dataclass(slots=True, eq=False)
class Entry:
    """A key in a slot.

    `num_refs`: calls that use it now; `is_loading`: its weights are not there yet; `load`: whatever brings them.
    """

    key: Key
    slot: int
    num_refs: int = 0
    is_loading: bool = True
    last_used: int = 0
    load: Any = None


class Slots:
    """A table of `num_slots` slots.

    `policy`: what leaves first among those that may: "lru", the one not used for longest; "lfu", the one used least often
    since the beginning, the times it was elsewhere included, and among equals the one not used for longest.
    """

    def __init__(self, num_slots: int, policy: str) -> None:
        if type(num_slots) is not int or num_slots < 1:
            raise ValueError(f"num_slots must be a positive integer; got {num_slots!r}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be {' or '.join(POLICIES)}; got {policy!r}")
        self.num_slots = num_slots
        self.num_evictions = 0
        self.entries: dict[Key, Entry] = {}
        self.uses: Counter[Key] = Counter()
        self._is_lfu = policy == "lfu"
        self._free = list(range(num_slots))[::-1]
        self._by_layer: Counter[int] = Counter()
        self._tick = 0

    def num_resident(self, layer: int) -> int:
        """Experts of `layer` that have a slot."""
        return self._by_layer[layer]

    def take(self, keys: Sequence[Key]) -> tuple[list[Entry], list[Entry]] | None:
        """(entries of all keys, those among them that must be loaded now); each is referenced once more.

        None, and nothing changes, if the slots that may be given away are too few at the moment. Keys are distinct.
        """
        present = [self.entries[key] for key in keys if key in self.entries]
        num_wanted = len(keys) - len(present) - len(self._free)
        if num_wanted > 0:
            num_movable = sum(map(self._can_leave, self.entries.values())) - sum(map(self._can_leave, present))
            if num_movable < num_wanted:
                return None
        for entry in present:  # all of them first, so that none of them leaves for another of them
            entry.num_refs += 1
        added = [self._place(key) for key in keys if key not in self.entries]
        for entry in added:
            entry.num_refs += 1
        for key in keys:
            self.count_use(key)
            self.entries[key].last_used = self._tick
        return [self.entries[key] for key in keys], added

    def prefetch(self, key: Key) -> Entry | None:
        """The entry to load for a key that has none, if a slot may be given away; it is as if just used."""
        if key in self.entries or not (self._free or any(map(self._can_leave, self.entries.values()))):
            return None
        entry = self._place(key)
        self._tick += 1
        entry.last_used = self._tick
        return entry

    def admit(self, key: Key) -> Entry | None:
        """`prefetch`, unless what would leave for it has been used as often."""
        if not self._free:
            movable = [entry for entry in self.entries.values() if self._can_leave(entry)]
            if not movable or self.uses[min(movable, key=self._rank).key] >= self.uses[key]:
                return None
        return self.prefetch(key)

    def count_use(self, key: Key) -> None:
        """A use of a key, wherever its weights were."""
        self._tick += 1
        self.uses[key] += 1

    def release(self, entries: Sequence[Entry]) -> None:
        """Takes back one reference of each."""
        for entry in entries:
            entry.num_refs -= 1

    def loaded(self, entry: Entry) -> None:
        """Its weights are there."""
        entry.is_loading = False

    def failed(self, entry: Entry) -> None:
        """Its weights did not come: the key has no slot any more; who holds the entry may only release it."""
        entry.is_loading = False
        self._remove(entry)

    def check(self) -> None:
        """Every invariant; for tests."""
        slots = [entry.slot for entry in self.entries.values()] + self._free
        assert sorted(slots) == list(range(self.num_slots)), slots
        assert +self._by_layer == Counter(layer for layer, _ in self.entries)
        assert all(entry.key == key and entry.num_refs >= 0 for key, entry in self.entries.items())

    def _place(self, key: Key) -> Entry:
        if not self._free:
            victim = min(filter(self._can_leave, self.entries.values()), key=self._rank)
            self._remove(victim)
            self.num_evictions += 1
        entry = self.entries[key] = Entry(key, self._free.pop())
        self._by_layer[key[0]] += 1
        return entry

    def _remove(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self._by_layer[entry.key[0]] -= 1
        self._free.append(entry.slot)

    def _rank(self, entry: Entry) -> tuple[int, int]:
        return (self.uses[entry.key] if self._is_lfu else 0), entry.last_used

    @staticmethod
    def _can_leave(entry: Entry) -> bool:
        return not entry.num_refs and not entry.is_loading

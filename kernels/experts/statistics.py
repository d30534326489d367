"""What an expert store counts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What a store did since it was made.

    Attributes:
        hits: requests for an expert that had a slot, or was on its way to one; misses: all others.
        random_hits: the hits to be expected if each request had named an expert of its layer at random, with the slots
            as they were. `hit_rate` says something only beside `random_hit_rate`.
        on_cpu: misses that were computed on the CPU; fetches: experts copied to a slot, prefetches included;
        evictions: experts that left their slot for another; num_bytes: of all fetches;
        waits: calls that waited until a slot was given back; failures: fetches that failed.
    """

    hits: int
    misses: int
    random_hits: float
    on_cpu: int
    fetches: int
    prefetches: int
    evictions: int
    num_bytes: int
    waits: int
    failures: int

    @property
    def hit_rate(self) -> float:
        """Share of requests that were hits; 0 without requests."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def random_hit_rate(self) -> float:
        """The same for random requests: experts of the layer in slots / experts of the layer, averaged over requests."""
        return self.random_hits / max(self.hits + self.misses, 1)

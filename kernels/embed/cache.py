"""Vectors of texts seen before, kept on the device: one slab of rows, the least recently used text gives its row away.

Knows digests of texts and rows; does not know how a vector is made. A cache lives and ends with one loaded model.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch


def digest(text: str, is_unit: bool) -> bytes:
    """What identifies a vector within one model: the text and whether it is normalised."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16, salt=b"unit" if is_unit else b"").digest()


class VectorCache:
    """Digest -> vector, as many of `[width]` float32 as `max_bytes` hold.

    Attributes:
        num_hits, num_misses: digests that `find` was asked for.
    """

    def __init__(self, max_bytes: int, width: int, device: torch.device) -> None:
        self.max_vectors = max_bytes // (4 * width)
        self.num_hits = self.num_misses = 0
        self._rows = torch.zeros(self.max_vectors, width, device=device)
        self._slots: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, digests: Iterable[bytes]) -> list[int | None]:
        """The row of each digest, now the most recently used; None where there is none."""
        slots = []
        for item in digests:
            slot = self._slots.get(item)
            if slot is not None:
                self._slots.move_to_end(item)
            slots.append(slot)
        self.num_misses += slots.count(None)
        self.num_hits += len(slots) - slots.count(None)
        return slots

    def take(self, slots: Sequence[int]) -> torch.Tensor:
        """A copy of rows, `[len(slots), width]`."""
        return self._rows[torch.tensor(slots, device=self._rows.device)]

    def keep(self, digests: Sequence[bytes], vectors: torch.Tensor) -> None:
        """Keeps new vectors `[n, width]`, the last of them if not all fit."""
        first = max(len(digests) - self.max_vectors, 0)
        slots = []
        for item in digests[first:]:
            is_full = len(self._slots) == self.max_vectors
            slot = self._slots.popitem(last=False)[1] if is_full else len(self._slots)
            self._slots[item] = slot
            slots.append(slot)
        if slots:
            self._rows[torch.tensor(slots, device=self._rows.device)] = vectors[first:]

    def scrub(self) -> None:
        """Forgets everything and overwrites it."""
        self._slots.clear()
        self._rows.zero_()

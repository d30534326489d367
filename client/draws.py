"""Random ids and numbers, from random bytes that somebody else draws."""

from collections.abc import Callable
from typing import Final

from penstock.broker.protocol import ID_BYTES

NUM_DRAWN: Final = 256


class Draws:
    """`draw`: n -> n random bytes."""

    __slots__ = ("_draw", "_ids")

    def __init__(self, draw: Callable[[int], bytes]) -> None:
        self._draw = draw
        self._ids: list[bytes] = []

    def id(self) -> bytes:
        """128 random bits that nobody else has and nobody can guess, drawn many at a time: that is a system call less."""
        if not self._ids:
            random = self._draw(ID_BYTES * NUM_DRAWN)
            self._ids = [random[i : i + ID_BYTES] for i in range(0, len(random), ID_BYTES)]
        return self._ids.pop()

    def fraction(self) -> float:
        """A number in [0, 1), to 32 bits."""
        return int.from_bytes(self._draw(4), "big") / (1 << 32)

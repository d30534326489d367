"""What users want done: tasks whose rows say what becomes of them, and the kernels on offer.

A row's payload is unlike any other row's and names its owner, so that a wrong answer anywhere is seen by whoever gets it.
"""

import struct
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from penstock.broker.layout import Column
from penstock.client.run import Options, Shape

OK, RAISES, KILLS, HANGS, BREAKS = range(5)
"""What a row does to its kernel: nothing; an exception; the end of the process; no end; a broken device."""
POISON = (KILLS, HANGS, BREAKS)
_HEAD = struct.Struct("<8sIHB")
SIZES = (24, 40)
SHARED, ONCE = "hash", "once"
"""The kernels: one whose rows may run again, and one whose rows may not."""
OUT = Column("out", "uint8", (16,))


def payload(owner: str, number: int, row: int, kind: int, size: int) -> bytes:
    return _HEAD.pack(owner.encode(), number, row, kind).ljust(size, b".")


def kind_of(row: bytes) -> int:
    return int(_HEAD.unpack_from(row)[3])


def result_of(row: bytes) -> bytes:
    """What the kernels compute."""
    return blake2b(row, digest_size=16).digest()


def shown_row(row: bytes) -> str:
    owner, number, index, kind = _HEAD.unpack_from(row)
    return f"{owner.rstrip(bytes(1)).decode()}/{number}[{index}]" + ("" if kind == OK else f" kind {kind}")


def spec(name: str, max_batch_size: int) -> dict[str, Any]:
    """As a worker offers it."""
    return {
        "name": name, "version": "1", "digest": b"version1", "modes": ["batch"], "combine": "max",
        "inputs": [["x", "tensor", {"dtypes": None, "rank": 1, "ragged": "exact"}]], "idempotent": name == SHARED,
        "scoped": False, "resident": False, "max_batch_size": max_batch_size, "max_batch_cost_ms": None,
        "cost": {"base_ms": 5.0, "per": {}},
    }  # fmt: skip


SHAPES = {
    (name, size): Shape(name, (Column("x", "uint8", (size,)),), b"", (), False) for name in (SHARED, ONCE) for size in SIZES
}


@dataclass(eq=False, slots=True)
class Task:
    """One thing that a user wants, however often it has to be submitted.

    Attributes:
        is_accepted: somebody was told that it is on disk.
        told: per row the outcome that the user knows: the answer's bytes, or the code of an error.
        recorded: rows of which the broker itself has told.
        num_asked: submissions and fetches, at all clients.
        is_given_up: the user does not wait for it any more: its client is gone, and it was not durable.
        is_twin: it was submitted at two clients.
        is_forgotten: it came once more, as something new, to a broker that knows no keys of tasks which are not durable.
        is_spoiled: one of its submissions ended without an answer that others could share: cancelled, or out of time.
    """

    owner: str
    number: int
    kernel: str
    rows: list[bytes]
    options: Options
    size: int
    submitted_at: float
    is_accepted: bool = False
    is_cancelled: bool = False
    is_given_up: bool = False
    is_twin: bool = False
    is_spoiled: bool = False
    is_forgotten: bool = False
    num_asked: int = 0
    told: dict[int, bytes | str] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)

    @property
    def shape(self) -> Shape:
        return SHAPES[self.kernel, self.size]

    @property
    def is_over(self) -> bool:
        return len(self.told) == len(self.rows)

    @property
    def name(self) -> str:
        return f"{self.owner}/{self.number}"

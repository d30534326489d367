"""The submissions that the broker has, as far as this side knows.

Knows open runs by id, and *ghosts*: runs that ended here, by their deadline, before the broker said so. A ghost still
counts against the credit until the broker has answered all of it or says that it never had it.
"""

from collections.abc import Set

from penstock.broker.protocol import ID_BYTES
from penstock.client.run import SENT, Run


class Flight:
    """See the module. `runs` is id -> run."""

    def __init__(self) -> None:
        self.runs: dict[bytes, Run] = {}
        self._ghosts: dict[bytes, list[int]] = {}  # id -> [rows without an answer, rows, bytes]

    def __bool__(self) -> bool:
        return bool(self.runs or self._ghosts)

    def ids(self) -> bytes:
        """What `attach` says is open."""
        return b"".join((*self.runs, *self._ghosts))

    def haunt(self, run: Run) -> None:
        """It is about to end without the broker's word."""
        self._ghosts[run.id] = [run.num_open, run.num_rows, run.nbytes]

    def answered(self, id_: bytes, num_rows: int | None = None) -> None:
        """The broker has answered so many rows, or all, of a submission that is not open."""
        ghost = self._ghosts.get(id_)
        if ghost is not None:
            ghost[0] -= ghost[0] if num_rows is None else num_rows
            if ghost[0] <= 0:
                del self._ghosts[id_]

    def revive(self, id_: bytes) -> bool:
        """Whether it was a ghost; it is none any more, and its answers are wanted again."""
        return self._ghosts.pop(id_, None) is not None

    def forget_ghosts(self) -> None:
        """The broker's session began anew: it has none of them."""
        self._ghosts.clear()

    def take_unknown(self, unknown: Set[bytes]) -> list[tuple[int, int]]:
        """Forget the ghosts that the broker never had; the rows and bytes of each."""
        return [(ghost[1], ghost[2]) for id_ in unknown if (ghost := self._ghosts.pop(id_, None)) is not None]

    def check(self) -> None:
        assert all(run.state == SENT and run.num_open > 0 for run in self.runs.values())
        assert all(run.num_open == run.slots.count(None) for run in self.runs.values())
        assert not self.runs.keys() & self._ghosts.keys()


def split_ids(ids: bytes) -> set[bytes]:
    return {ids[i : i + ID_BYTES] for i in range(0, len(ids), ID_BYTES)}

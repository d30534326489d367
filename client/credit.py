"""What a session may submit: the broker's grants against what has gone out.

Knows the two cumulative totals of rows and payload bytes; does not know runs.
"""

from collections.abc import Sequence


class Credit:
    """Totals since the session began. A submission that would go past a grant has to wait."""

    __slots__ = ("_granted_bytes", "_granted_rows", "_sent_bytes", "_sent_rows", "window_bytes", "window_rows")

    def __init__(self, window_rows: int, window_bytes: int) -> None:
        self.window_rows, self.window_bytes = window_rows, window_bytes
        """What the broker grants to a session that has nothing under way; a guess until it has said so."""
        self._granted_rows = self._granted_bytes = self._sent_rows = self._sent_bytes = 0

    def covers(self, num_rows: int, nbytes: int) -> bool:
        return self._sent_rows + num_rows <= self._granted_rows and self._sent_bytes + nbytes <= self._granted_bytes

    def can_cover(self, num_rows: int, nbytes: int) -> bool:
        """Whether a submission of this size may ever be made: more than the window will never be granted."""
        return num_rows <= self.window_rows and nbytes <= self.window_bytes

    def spend(self, num_rows: int, nbytes: int) -> None:
        self._sent_rows += num_rows
        self._sent_bytes += nbytes

    def take_back(self, num_rows: int, nbytes: int) -> None:
        """The broker never got a submission of this size."""
        self._sent_rows -= num_rows
        self._sent_bytes -= nbytes

    def grant(self, totals: Sequence[int]) -> None:
        """Grants only grow; one that was overtaken by a later one changes nothing."""
        rows, nbytes = totals
        if rows > self._granted_rows:
            self._granted_rows = rows
        if nbytes > self._granted_bytes:
            self._granted_bytes = nbytes

    def restart(self, totals: Sequence[int]) -> None:
        """A new session on the broker's side: it counts from 0 again."""
        self._granted_rows = self._granted_bytes = self._sent_rows = self._sent_bytes = 0
        self.window_rows, self.window_bytes = max(1, totals[0]), max(1, totals[1])
        self.grant(totals)

"""What a handle of a task knows without waiting: its state, its value once it is there, the next piece of its stream.

A handle is a run and a row number. Knows how outcomes become values and errors; waiting is done in `task.py` and
`aio_task.py`, which offer these to people.
"""

from typing import Any

from penstock.broker.protocol import Code
from penstock.client.errors import PenstockError, from_wire
from penstock.client.outputs import decode
from penstock.client.run import CLOSED, SENT, Part, Run


class Handle:
    """One task: row `_row` of `_run`."""

    __slots__ = ("__weakref__", "_row", "_run")

    _run: Run
    _row: int

    @property
    def id(self) -> str:
        """The submission's id and the row in it: `<32 hex digits>/<row>`."""
        return f"{self._run.id.hex()}/{self._row}"

    @property
    def timings(self) -> dict[str, Any]:
        """Of an ended task: `queue_ms, batch_wait_ms, load_ms, h2d_ms, compute_ms, d2h_ms, batch_size, bin, worker`,
        as far as the broker told; empty before."""
        part = self._run.slots[self._row]
        if part is None:
            return {}
        timings = {} if part.queue_ms is None else {"queue_ms": part.queue_ms}
        return {**timings, **(part.timings or {})}

    @property
    def state(self) -> str:
        """`waiting` (still in the client), `open` (the broker has it), `done`, `failed` or `cancelled`."""
        part = self._run.slots[self._row]
        if part is None:
            return "open" if self._run.state == SENT else "waiting"
        if part.error is None:
            return "done"
        return "cancelled" if part.error.code == Code.CANCELLED else "failed"

    def _is_ended(self) -> bool:
        return self._run.slots[self._row] is not None

    def _value(self, part: Part) -> Any:
        if part.error is not None:
            raise from_wire(part.error)
        return decode(part, self._row, self._run.shape.is_torch)

    def _error(self, part: Part) -> PenstockError | None:
        return None if part.error is None else from_wire(part.error)

    def _must_ask_cancel(self) -> bool:
        return not self._is_ended() and (self._row, self._row + 1) not in self._run.cancels

    def _is_sent(self) -> bool:
        return self._run.state in (SENT, CLOSED)

    def _num_refused(self) -> int:
        return 0 if self._run.rest is None else self._run.rest.num_refused

    def _note_answer(self, num_refused: int) -> None:
        """A question that was put after its submission is answered: answers come in order, so it is accepted unless it
        was refused meanwhile."""
        self._run.accepted = self._num_refused() == num_refused

    def _was_accepted(self) -> bool:
        return self._run.accepted or self._is_ended()

    def _check_accepted(self, timeout: float | None) -> None:
        part = self._run.slots[self._row]
        if part is not None and part.error is not None:
            raise from_wire(part.error)
        if not self._was_accepted():
            raise TimeoutError(f"{self!r} has not been accepted after {timeout} s")

    def _status(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "state": body.get("state", self.state)}

    def _not_ended(self, timeout: float | None) -> TimeoutError:
        return TimeoutError(f"{self!r} has not ended after {timeout} s; it goes on")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._run.shape.kernel} {self.id} {self.state}>"


class Chunks:
    """The partial answers of a streaming task, each once: those of a second attempt repeat the first's."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._next_part = 0

    def has_news(self) -> bool:
        return bool(self._run.chunks) or self._run.slots[0] is not None

    def take(self) -> Part | None:
        """The next one that has arrived."""
        while self._run.chunks:
            chunk = self._run.chunks.pop(0)
            if chunk.part >= self._next_part:
                self._next_part = chunk.part + 1
                return chunk
        return None

    def is_over(self) -> bool:
        """Whether none will come any more; raises the error that the task has ended with."""
        part = self._run.slots[0]
        if part is None or self._run.chunks:  # in this order: the outcome comes after the last chunk
            return False
        if part.error is not None:
            raise from_wire(part.error)
        return True

    def value(self, chunk: Part) -> Any:
        return decode(chunk, 0, self._run.shape.is_torch)

"""What outlives a task: idempotency keys and the outcomes behind them. This journal is memory and dies with the broker.

`Journal` is the seam: the core speaks to it and to nothing else that could be on disk.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import msgpack

from penstock.broker.columns import view
from penstock.broker.protocol import Outcome, Submit
from penstock.broker.tasks import Run

MAX_KEYS = 100_000


@dataclass(slots=True)
class Entry:
    """A remembered submission: open (`run`), or over with its outcomes, or over with outcomes no longer kept."""

    digest: bytes
    run: Run | None
    outcomes: list[Outcome] = field(default_factory=list)
    num_bytes: int = 0
    is_gone: bool = False
    expires_at: float = float("inf")


class Journal(Protocol):
    """What the core asks of a journal."""

    is_durable: bool

    def find(self, principal: str, key: bytes, now: float) -> Entry | None: ...
    def accept(self, principal: str, key: bytes, digest: bytes, run: Run) -> None: ...
    def record(self, run: Run, outcomes: Sequence[Outcome]) -> None: ...
    def close(self, run: Run, now: float) -> None: ...
    def forget(self, run: Run) -> None: ...


def digest_of(m: Submit) -> bytes:
    """What makes two submissions equal: everything but id, time limit and delivery options."""
    made = blake2b(msgpack.packb([m.kernel, m.statics, m.block.content(), dict(m.scalars), m.wants_partials]), digest_size=16)
    for frame in m.block.frames:
        made.update(view(frame))
    return made.digest()


class MemoryJournal:
    """Keys for `window_s` after their outcome, the outcomes' payload within `max_bytes` (the oldest go first)."""

    is_durable = False

    def __init__(self, window_s: float, max_bytes: int) -> None:
        self._window_s = window_s
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._open: dict[tuple[str, bytes], Entry] = {}
        self._closed: OrderedDict[tuple[str, bytes], Entry] = OrderedDict()
        self._with_payload: deque[Entry] = deque()

    def find(self, principal: str, key: bytes, now: float) -> Entry | None:
        self._expire(now)
        return self._open.get((principal, key)) or self._closed.get((principal, key))

    def accept(self, principal: str, key: bytes, digest: bytes, run: Run) -> None:
        self._open[principal, key] = Entry(digest, run)

    def record(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """Remember outcomes of a run that has a key."""
        if run.key is None:
            return
        entry = self._open.get((run.session.principal, run.key))
        if entry is not None and entry.run is run:
            entry.outcomes += outcomes
            entry.num_bytes += sum(o.block.nbytes for o in outcomes if o.block is not None)

    def close(self, run: Run, now: float) -> None:
        """All of a run's rows have their outcome."""
        if run.key is None:
            return
        key = (run.session.principal, run.key)
        entry = self._open.get(key)
        if entry is None or entry.run is not run:
            return
        del self._open[key]
        entry.run, entry.expires_at = None, now + self._window_s
        self._closed[key] = entry
        self._num_bytes += entry.num_bytes
        self._with_payload.append(entry)
        while self._num_bytes > self._max_bytes or len(self._with_payload) > MAX_KEYS:
            self._drop_outcomes(self._with_payload.popleft())
        if len(self._closed) > MAX_KEYS:
            self._closed.popitem(last=False)

    def forget(self, run: Run) -> None:
        """The run ends without an answer that could serve a second submission."""
        if run.key is not None and (entry := self._open.get((run.session.principal, run.key))) and entry.run is run:
            del self._open[run.session.principal, run.key]

    def _drop_outcomes(self, entry: Entry) -> None:
        self._num_bytes -= entry.num_bytes
        entry.outcomes, entry.num_bytes, entry.is_gone = [], 0, True

    def _expire(self, now: float) -> None:
        while self._closed:
            key, entry = next(iter(self._closed.items()))
            if entry.expires_at > now:
                return
            del self._closed[key]
            self._drop_outcomes(entry)

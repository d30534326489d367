"""What outlives a task: idempotency keys and the outcomes behind them. This journal is memory and dies with the broker;
`durable.py` has the one that writes.

`Journal` is the seam: the core speaks to it and to nothing else that could be on disk.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgpack

from penstock.broker.columns import view
from penstock.broker.protocol import Outcome, Submit
from penstock.broker.storage.records import Write
from penstock.broker.tasks import Piece, Run, Saved

MAX_KEYS = 100_000
Key = tuple[str, bytes]
"""(principal, idempotency key)."""


@dataclass(frozen=True, slots=True)
class About:
    """What is told of a durable task that is over; `client` submitted it first, `arrived` is monotonic seconds."""

    id: bytes
    client: str
    kernel: str
    num_rows: int
    arrived: float

    @classmethod
    def of(cls, run: Run) -> "About":
        return cls(run.id, run.client, run.kernel, run.num_rows, run.arrived)


@dataclass(slots=True)
class Entry:
    """A remembered submission: open (`run`), or over with its outcomes, or over with outcomes no longer kept.

    `number` is that of its records on disk; 0: it has none. Those that have know more: `names`, the ids of its submissions
    but for one that is its key; `request` while it is open or a row of it has failed, since it may be wanted again; `about`
    once it is over; `is_acked` once a client has the outcomes.
    """

    key: Key
    digest: bytes
    run: Run | None
    outcomes: list[Outcome] = field(default_factory=list)
    num_bytes: int = 0
    is_gone: bool = False
    expires_at: float = float("inf")
    number: int = 0
    names: tuple[bytes, ...] = ()
    request: Submit | None = None
    about: About | None = None
    is_acked: bool = False

    def is_same(self, m: Submit) -> bool:
        """Whether a submission has the content of the first one. Of one that a restart found the digest is made when asked."""
        self.keep_digest()
        return self.digest == digest_of(m)

    def keep_digest(self) -> None:
        """The digest stays when the request goes."""
        if not self.digest and self.request is not None:
            self.digest = digest_of(self.request)


def digest_of(m: Submit) -> bytes:
    """What makes two submissions equal: everything but id, time limit and delivery options."""
    made = blake2b(msgpack.packb([m.kernel, m.statics, m.block.content(), dict(m.scalars), m.wants_partials]), digest_size=16)
    for frame in m.block.frames:
        made.update(view(frame))
    return made.digest()


def bytes_of(outcomes: Sequence[Outcome]) -> int:
    """Their payload."""
    return sum(o.block.nbytes for o in outcomes if o.block is not None)


class Journal:
    """Keys for `window_s` after their outcome, the outcomes' payload within `max_bytes` (the oldest go first).

    Attributes:
        writes: what the shell has to make safe before it sends what promises it; always empty here.
        has_room: whether there is space for more, which the shell finds out.
    """

    is_durable = False

    def __init__(self, window_s: float, max_bytes: int) -> None:
        self.writes: list[Write] = []
        self.has_room = True
        self._window_s = window_s
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: dict[Key, Entry] = {}
        self._known: OrderedDict[Key, Entry] = OrderedDict()
        self._with_payload: deque[Entry] = deque()

    def find(self, principal: str, key: bytes, now: float) -> Entry | None:
        self.expire(now)
        return self._entries.get((principal, key))

    def refusal(self, principal: str) -> str | None:
        """Why no durable task of this principal can be taken now."""
        return "this broker keeps its tasks in memory: submit with durable=False"

    def accept(self, principal: str, key: bytes, digest: bytes, run: Run) -> Entry:
        made = principal, key
        entry = self._entries[made] = run.entry = Entry(made, digest, run)
        return entry

    def also_known_as(self, entry: Entry, run_id: bytes) -> None:
        """A second submission with a durable task's key."""

    def started(self, piece: Piece) -> None:
        """Rows of a run that may not run twice are given to a worker."""

    def died(self, piece: Piece) -> None:
        """The rows have become suspects, or their count of deaths has changed."""

    def save(self, piece: Piece, saved: Saved, now: float) -> None:
        """The row can go on from here. Nothing waits for this to be safe: what is lost costs time."""

    def unsave(self, saved: Saved) -> None:
        """Nobody goes on from here any more."""

    def record(self, run: Run, outcomes: Sequence[Outcome], now: float) -> None:
        """Remember outcomes of a run that has a key."""
        entry = self.entry(run)
        if entry is not None:
            entry.outcomes += outcomes
            entry.num_bytes += bytes_of(outcomes)

    def close(self, run: Run, now: float) -> None:
        """All of a run's rows have their outcome."""
        entry = self.entry(run)
        if entry is not None:
            entry.run = run.entry = None
            self._retire(entry, now)

    @staticmethod
    def entry(run: Run) -> Entry | None:
        """The entry of an open run, if it is its own."""
        entry = run.entry
        return entry if entry is not None and entry.run is run else None

    def forget(self, run: Run) -> None:
        """The run ends without an answer that could serve a second submission."""
        entry = self.entry(run)
        if entry is not None:
            run.entry = None
            del self._entries[entry.key]

    def acknowledged(self, entry: Entry, now: float) -> None:
        """A client has all outcomes of a durable task."""

    def expire(self, now: float) -> None:
        """Forget what was kept long enough."""
        while self._known:
            entry = next(iter(self._known.values()))
            if entry.expires_at > now:
                return
            self.drop(entry)

    # --- entries that are over -------------------------------------------------------------------------------------

    def _retire(self, entry: Entry, now: float) -> None:
        """Nobody needs it but a second submission with its key."""
        entry.expires_at = now + self._window_s
        self._known[entry.key] = entry
        self._num_bytes += entry.num_bytes
        self._with_payload.append(entry)
        while self._num_bytes > self._max_bytes or len(self._with_payload) > MAX_KEYS:
            self._empty(self._with_payload.popleft())
        if len(self._known) > MAX_KEYS:
            self.drop(next(iter(self._known.values())))

    def drop(self, entry: Entry) -> None:
        """Forget an entry that is over, and its key."""
        del self._entries[entry.key]
        if self._known.pop(entry.key, None) is not None:
            self._num_bytes -= entry.num_bytes
        entry.outcomes, entry.num_bytes, entry.is_gone, entry.request = [], 0, True, None

    def _empty(self, entry: Entry) -> None:
        """Forget the outcomes; the key is still known."""
        self._num_bytes -= entry.num_bytes
        entry.keep_digest()
        entry.outcomes, entry.num_bytes, entry.is_gone, entry.request = [], 0, True, None

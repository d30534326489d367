"""What the broker keeps of each peer: a client's credit and unacknowledged results, a worker's offers and leases."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from penstock.broker.fitting import Filling
from penstock.broker.protocol import Outcome, Partial, Reply, Results
from penstock.broker.scheduling.accounts import Account
from penstock.broker.scheduling.lanes import Kind
from penstock.broker.spec import Spec
from penstock.broker.tasks import Lease, Run

if TYPE_CHECKING:
    from penstock.broker.journal import Entry
    from penstock.broker.sharing import Sharer

Route = bytes
MAX_ANSWERED = 16
"""Wishes whose answers are remembered: after a broken connection they come again."""


class RunChain:
    """The open runs of a session, linked through themselves: no table that grows with a million of them."""

    __slots__ = ("_first",)

    def __init__(self) -> None:
        self._first: Run | None = None

    def __bool__(self) -> bool:
        return self._first is not None

    def __iter__(self) -> Iterator[Run]:
        run = self._first
        while run is not None:
            yield run
            run = run.after

    def add(self, run: Run) -> None:
        run.after, run.before = self._first, None
        if self._first is not None:
            self._first.before = run
        self._first = run

    def remove(self, run: Run) -> None:
        if run.before is not None:
            run.before.after = run.after
        else:
            self._first = run.after
        if run.after is not None:
            run.after.before = run.before
        run.before = run.after = None


class ClientSession:
    """A client that may come and go. `route` is None while it is away; what it misses waits in the outbox.

    Credit is cumulative: `used` counts what was submitted, `returned` what has ended; between them lies the window.
    """

    __slots__ = (
        "account", "answered", "filling", "finished", "is_closed", "last_seen", "last_seq", "name", "num_unacked_bytes",
        "outbox", "owed", "principal", "returned_bytes", "returned_rows", "route", "runs", "secret", "sent_seq", "sharer",
        "used_bytes", "used_rows",
    )  # fmt: skip

    def __init__(
        self, principal: str, name: str, secret: bytes, route: Route | None, now: float, account: Account
    ) -> None:
        self.principal = principal
        self.name = name
        self.secret = secret
        self.account = account
        self.route: Route | None = route
        self.last_seen = now
        self.runs = RunChain()
        self.is_closed = False
        self.last_seq = self.sent_seq = 0
        self.outbox: deque[Results | Partial] = deque()
        self.finished: dict[bytes, int] = {}
        """By submission the message after which nothing more of it comes; `owed` has what is kept until that has arrived."""
        self.owed: dict[bytes, Entry] = {}
        self.filling: Filling | None = None  # the partials of the last message of the outbox, if it has not left
        self.answered: deque[Reply] = deque(maxlen=MAX_ANSWERED)
        self.num_unacked_bytes = 0
        self.sharer: Sharer | None = None
        self.used_rows = self.used_bytes = self.returned_rows = self.returned_bytes = 0

    def leave_route(self) -> None:
        """The client is away. What it was sent keeps its number and content: nothing more may join it."""
        self.route = None
        self.sent_seq = self.last_seq

    def add_result(self, outcomes: Sequence[Outcome], credit: Sequence[int]) -> Results:
        """Number a final and keep it until it is acknowledged."""
        self.last_seq += 1
        results = Results(seq=self.last_seq, outcomes=outcomes, credit=credit)
        self.outbox.append(results)
        self.num_unacked_bytes += _bytes_of(outcomes)
        return results

    def add_partial(self, outcome: Outcome) -> Partial | None:
        """Number a partial and keep it; while the client is away it joins the one before, and None comes back."""
        last = self.outbox[-1] if self.outbox else None
        self.num_unacked_bytes += _bytes_of((outcome,))
        is_unsent = self.route is None and last is not None and last.seq > self.sent_seq
        if is_unsent and isinstance(last, Partial) and self.filling is not None and self.filling.take(outcome):
            return None
        self.last_seq += 1
        self.filling = Filling(outcome) if self.route is None else None
        partial = Partial(seq=self.last_seq, outcomes=[outcome] if self.filling is None else self.filling.outcomes)
        self.outbox.append(partial)
        return partial

    def acknowledge(self, seq: int) -> "list[Entry]":
        """Forget what has arrived; the durable tasks of which everything has."""
        outbox = self.outbox
        arrived: list[Entry] = []
        while outbox and outbox[0].seq <= seq:
            message = outbox.popleft()
            self.num_unacked_bytes -= _bytes_of(message.outcomes)
            for outcome in message.outcomes:
                for run_id, _, _ in outcome.spans:
                    if self.finished.get(run_id, seq + 1) <= seq:
                        del self.finished[run_id]
                        if run_id in self.owed:
                            arrived.append(self.owed.pop(run_id))
        return arrived


def _bytes_of(outcomes: Sequence[Outcome]) -> int:
    return sum(o.block.nbytes for o in outcomes if o.block is not None)


class WorkerSession:
    """A worker process. Leases belong to it; credit is what it granted against what was assigned since its `ready`."""

    __slots__ = (
        "assigned_batches", "assigned_bytes", "batches", "credit_batches", "credit_bytes", "device", "facts", "is_draining",
        "is_ready", "kinds", "known_pid", "last_seen", "leases", "memory", "name", "num_bytes", "num_done", "num_failed", "pid",
        "principal", "progress", "progress_at", "resident", "route", "secret", "sharer", "specs", "streams",
    )  # fmt: skip

    def __init__(self, principal: str, name: str, secret: bytes, route: Route, now: float) -> None:
        self.principal = principal
        self.name = name
        self.secret = secret
        self.route: Route | None = route
        self.last_seen = self.progress_at = now
        self.pid = 0
        self.known_pid = 0  # 0: it is on another machine, or nobody vouches for what it says
        self.device = ""
        self.facts: Mapping[str, Any] = {}
        self.memory: Mapping[str, Any] = {}
        self.resident: dict[str, str] = {}
        self.specs: dict[tuple[str, bytes], Spec] = {}
        self.kinds: dict[tuple[str, bytes, str], Spec] = {}
        self.leases: dict[int, Lease] = {}
        self.streams: dict[tuple[str, bytes], int] = {}
        self.is_ready = self.is_draining = False
        self.credit_batches = self.credit_bytes = self.assigned_batches = self.assigned_bytes = 0
        self.batches = self.num_bytes = 0
        self.progress = -1
        self.num_done = self.num_failed = 0
        self.sharer: Sharer | None = None

    @property
    def state(self) -> str:
        """starting, ready, busy, draining or away."""
        if self.route is None:
            return "away"
        if self.is_draining:
            return "draining"
        if not self.is_ready:
            return "starting"
        return "busy" if self.leases else "ready"

    @property
    def has_suspect(self) -> bool:
        """It holds a task that may have brought down a worker: that one has to run alone."""
        return any(lease.pieces[0].is_isolated for lease in self.leases.values())

    @property
    def is_serving(self) -> bool:
        """It may be given work."""
        return self.is_ready and not self.is_draining and self.route is not None

    @property
    def is_slow_now(self) -> bool:
        """It runs a slow batch."""
        return any(lease.batch.is_slow for lease in self.leases.values())

    def room(self) -> Collection[Kind]:
        """The kinds of which this worker could take a batch or a stream now."""
        if not self.is_serving or self.has_suspect:
            return ()
        has_credit = self.assigned_batches < self.credit_batches
        if has_credit and not self.streams:
            return self.kinds
        return [k for k, spec in self.kinds.items() if self._has_room(k, spec, has_credit)]

    def _has_room(self, kind: tuple[str, bytes, str], spec: Spec, has_credit: bool) -> bool:
        if kind[2] == "stream":
            return self.streams.get(kind[:2], 0) < spec.max_batch_size
        return has_credit

    def hold(self, lease: Lease) -> None:
        """Take a lease, and the credit or the slot that it uses."""
        if not self.leases:
            self.progress_at = lease.assigned_at  # nobody expected progress before
        if lease.mode == "batch" and self.batches:
            lease.began_at = None
        self.leases[lease.token] = lease
        self.num_bytes += lease.num_bytes
        if lease.mode == "stream":
            kind = lease.queue.kind[:2]
            self.streams[kind] = self.streams.get(kind, 0) + 1
        else:
            self.batches += 1
            self.assigned_batches += 1
            self.assigned_bytes += lease.num_bytes

    def turn_to_next(self, now: float) -> None:
        """A batch has ended: the next one begins."""
        for lease in self.leases.values():
            if lease.mode == "batch":
                lease.began_at = now if lease.began_at is None else lease.began_at
                return

    def left_ms(self, now: float) -> float:
        """How long the batches that it holds are predicted to go on."""
        return sum(lease.left_ms(now) for lease in self.leases.values() if lease.mode == "batch")

    def soonest_ms(self, now: float) -> float:
        """When it may be done with them, at the earliest."""
        slack_ms = sum(le.batch.predicted_ms - le.batch.soonest_ms for le in self.leases.values() if le.mode == "batch")
        return self.left_ms(now) - slack_ms

    def give_up(self, lease: Lease) -> None:
        """A lease has ended. Its batch credit comes back when the worker grants more; a slot is free at once."""
        del self.leases[lease.token]
        self.num_bytes -= lease.num_bytes
        if lease.mode == "stream":
            kind = lease.queue.kind[:2]
            self.streams[kind] -= 1
            if not self.streams[kind]:
                del self.streams[kind]
        else:
            self.batches -= 1

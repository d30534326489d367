"""Bugs to plant: the broker."""

from typing import Any

from penstock.broker import clients, settlement, workers
from penstock.broker import protocol as p
from penstock.broker.clients import Clients
from penstock.broker.core import Core
from penstock.broker.durable import DurableJournal
from penstock.broker.leases import Leases
from penstock.broker.ledger import Ledger
from penstock.broker.outcomes import Outcomes
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.sessions import ClientSession, WorkerSession
from penstock.broker.settlement import Settlement
from penstock.broker.tasks import DEAD, LEASED, Lease
from penstock.broker.workers import Workers
from simulation.bugs import bug, change, disable


@bug("broker")
def resumes_what_it_does_not_know() -> None:
    """Every client's session counts as resumed, also by a broker that has never heard of it."""
    clients.Welcome = lambda **fields: p.Welcome(**{**fields, "is_resumed": True})  # type: ignore[attr-defined, misc]


@bug("broker")
def keeps_nothing_for_an_attach() -> None:
    """What was sent over a connection that broke is not sent again."""
    disable(Clients, "_send_again")


@bug("broker")
def takes_repeats_for_new() -> None:
    """A submission that comes again is another one."""
    disable(Clients, "_is_repeat", False)


@bug("broker")
def cancels_durable_tasks_with_their_client() -> None:
    """When a session ends, its durable tasks end with it."""

    def make(leave: Any) -> Any:
        def leave_with_all(self: Clients, session: ClientSession) -> None:
            numbers = {run: run.number for run in session.runs}
            for run in numbers:
                run.number = 0
            leave(self, session)
            for run, number in numbers.items():
                run.number = number

        return leave_with_all

    change(Clients, "_leave", make)


@bug("broker")
def never_expires() -> None:
    """Time limits are not looked at."""
    disable(Outcomes, "expire")


@bug("broker")
def acknowledges_one_too_many() -> None:
    """An acknowledgement takes the next message with it."""
    change(ClientSession, "acknowledge", lambda acknowledge: lambda self, seq: acknowledge(self, seq + bool(seq)))


@bug("broker")
def tells_somebody_else() -> None:
    """Now and then an outcome goes to another session."""

    def make(deliver: Any) -> Any:
        seen = dict[ClientSession, None]()

        def astray(self: Outcomes, session: ClientSession, *args: Any) -> None:
            seen[session] = None
            others = [s for s in seen if s.route is not None]
            deliver(self, others[-1] if others and session.last_seq % 7 == 6 else session, *args)

        return astray

    change(Outcomes, "deliver", make)


@bug("broker")
def shifts_rows_of_a_batch() -> None:
    """Rows get the answer of the first row of their batch."""
    change(Settlement, "end", lambda end: lambda self, piece, start, stop, at: end(self, piece, start, stop, 0))


@bug("broker")
def cancels_leave_rows_in_the_queue() -> None:
    """A row that ends while it is queued stays in its lane."""
    disable(PullPolicy, "remove")


@bug("broker")
def takes_any_answer_for_its_lease() -> None:
    """Workers go on with leases of an old broker, and an answer under such a one counts for whatever they hold now."""

    def find(self: Leases, worker: WorkerSession, token: int) -> Lease | None:
        return worker.leases.get(token) or next(iter(worker.leases.values()), None)

    Leases._find = find  # type: ignore[method-assign]
    resumes_workers_it_does_not_know()


@bug("broker")
def uses_one_epoch() -> None:
    """Every broker has the same epoch, so that its leases are called as those of the one before."""

    def make(init: Any) -> Any:
        return lambda self, config, epoch, *args, **kwargs: init(self, config, 7, *args, **kwargs)

    change(Core, "__init__", make)


@bug("broker")
def leaks_credit_on_requeue() -> None:
    """A row that returns to its queue is counted as submitted once more."""

    def make(requeue: Any) -> Any:
        def leaky(self: Ledger, piece: Any) -> None:
            piece.run.session.used_rows += 1
            requeue(self, piece)

        return leaky

    change(Ledger, "requeue", make)


@bug("broker")
def leaks_a_workers_credit() -> None:
    """A batch that has ended still counts as being with its worker."""

    def make(give_up: Any) -> Any:
        def leaky(self: WorkerSession, lease: Lease) -> None:
            give_up(self, lease)
            self.batches += lease.num_rows > 4

        return leaky

    change(WorkerSession, "give_up", make)


@bug("broker")
def blames_the_whole_batch() -> None:
    """All that a lost worker held is dead."""

    def make(recover: Any) -> Any:
        def blame(self: Leases, lease: Lease, reason: str, now: float, is_suspect: bool, *others: Any) -> None:
            if is_suspect and lease.queue.spec.is_idempotent:
                self._end([q for q in lease.pieces if q.state == LEASED], DEAD, p.Error(p.Code.DEAD, reason), now)
            recover(self, lease, reason, now, is_suspect, *others)

        return blame

    change(Leases, "recover", make)


@bug("broker")
def counts_deaths_twice() -> None:
    """One death while alone is enough for the verdict."""

    def make(died: Any) -> Any:
        def twice(self: DurableJournal, piece: Any) -> None:
            piece.deaths += 1
            died(self, piece)

        return twice

    change(DurableJournal, "died", make)


@bug("broker")
def never_loses_a_worker() -> None:
    """Neither silence nor standing still is noticed."""
    disable(Workers, "sweep")


@bug("broker")
def loses_rows_that_return() -> None:
    """A row of a lost worker is queued by name only."""

    def requeue(self: Ledger, piece: Any) -> None:
        self.move(piece, "queued")
        piece.lease = None

    Ledger.requeue = requeue  # type: ignore[method-assign]


@bug("broker")
def resumes_workers_it_does_not_know() -> None:
    """A new broker tells a worker to go on with the leases of the old one."""
    workers.Welcome = lambda **fields: p.Welcome(**{**fields, "is_resumed": True})  # type: ignore[attr-defined, misc]


@bug("broker")
def joins_blocks_wrongly() -> None:
    """Where an answer is cut for several clients, the parts are those of its end."""

    def make(gather: Any) -> Any:
        def wrong(pieces: Any) -> Any:
            return gather([(b, b.num_rows - (e - s), b.num_rows) for b, s, e in pieces])

        return wrong

    change(settlement, "gather", make)

"""Bugs to plant in the product, each as a change of one thing: the simulation has to notice every one of them.

`plant` changes classes for good, so it is for a process that does nothing else afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from penstock.broker import clients, durable, settlement, workers
from penstock.broker import protocol as p
from penstock.broker.clients import Clients
from penstock.broker.core import Core
from penstock.broker.durable import DurableJournal
from penstock.broker.journal import Journal
from penstock.broker.ledger import Ledger
from penstock.broker.promises import Promises
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.sessions import ClientSession, WorkerSession
from penstock.broker.settlement import Settlement
from penstock.broker.state import BACK, BrokerState
from penstock.broker.tasks import DEAD, LEASED, Lease
from penstock.broker.workers import Workers
from penstock.client import session as client_session
from penstock.client.receipts import Receipts
from penstock.client.run import Run
from penstock.client.submissions import Submissions
from penstock.worker.link import Credit, Link
from penstock.worker.work import Work


@dataclass(frozen=True)
class Bug:
    """`text`: what it breaks."""

    name: str
    part: str
    text: str
    plant: Callable[[], None]


BUGS: dict[str, Bug] = {}


def plant(name: str) -> None:
    """Change the product of this process."""
    BUGS[name].plant()


def bug(part: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(function: Callable[[], None]) -> Callable[[], None]:
        name = function.__name__.replace("_", "-")
        BUGS[name] = Bug(name, part, (function.__doc__ or "").strip(), function)
        return function

    return add


def change(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by what `make` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


def disable(owner: Any, name: str, answer: Any = None) -> None:
    """The method does nothing, and says this."""
    setattr(owner, name, lambda *args, **kwargs: answer)


# --- promises and journal ------------------------------------------------------------------------------------------


@bug("broker")
def accepts_before_the_commit() -> None:
    """Messages that promise something leave before the journal is safe."""

    def perform(self: Promises, actions: Any, writes: Any) -> None:
        if writes and self._store is not None:
            self._ticket = self._store.append(writes)
        for action in actions:
            self._send(action)

    Promises.perform = perform  # type: ignore[method-assign]


@bug("broker")
def releases_one_group_early() -> None:
    """A held message leaves when the group of writes before its own is safe."""

    def release(self: Promises) -> None:
        for address, queue in list(self._held.items()):
            while queue and queue[0][0] <= self._store.committed + 1:  # type: ignore[union-attr]
                self._send(queue.popleft()[1])
            if not queue:
                del self._held[address]

    Promises.release = release  # type: ignore[method-assign]


@bug("broker")
def forgets_what_it_held() -> None:
    """What waits for the disk behind another message to the same address is dropped with it."""

    def make(release: Any) -> Any:
        def forgetful(self: Promises) -> None:
            for queue in self._held.values():
                while len(queue) > 1:
                    queue.pop()
            release(self)

        return forgetful

    change(Promises, "release", make)


@bug("broker")
def assigns_before_the_record() -> None:
    """A row that must not run twice leaves for a worker before it is on disk that it may have started."""

    def make(send: Any) -> Any:
        return lambda self, side, route, m, is_promise=False: send(self, side, route, m, is_promise and side != BACK)

    change(BrokerState, "send", make)


@bug("broker")
def tells_followers_early() -> None:
    """A second submission with a key hears of the outcome before it is safe."""

    def make(end: Any) -> Any:
        def early(self: Settlement, piece: Any, start: int, stop: int, at: int) -> None:
            followers, own = [f.session for f in piece.run.followers or ()], piece.run.session
            end(self, piece, start, stop, at)
            self.durable -= {session for session in followers if session is not own}

        return early

    change(Settlement, "end", make)


@bug("journal")
def does_not_record_attempts() -> None:
    """Nothing is written when rows are given to a worker."""
    disable(DurableJournal, "started")


@bug("journal")
def records_outcomes_twice() -> None:
    """Each outcome is written two times."""

    def make(record: Any) -> Any:
        def twice(self: DurableJournal, run: Any, outcomes: Any) -> None:
            record(self, run, outcomes)
            if run.number:
                self.writes += [durable.outcome_of(run.number, outcome) for outcome in outcomes]

        return twice

    change(DurableJournal, "record", make)


@bug("journal")
def does_not_record_outcomes() -> None:
    """Outcomes are remembered, not written."""
    DurableJournal.record = Journal.record  # type: ignore[method-assign]


@bug("journal")
def loses_the_last_write() -> None:
    """Of many writes at once the last one is not handed to the store."""
    change(Core, "take_writes", lambda take: lambda self: (lambda w: w if len(w) < 4 else w[:-1])(take(self)))


@bug("journal")
def acknowledges_all_of_a_principal() -> None:
    """An acknowledgement forgets every outcome of its user's."""

    def make(acknowledged: Any) -> Any:
        def greedy(self: DurableJournal, principal: str, run_id: bytes, now: float) -> None:
            acknowledged(self, principal, run_id, now)
            for (owner, name), key in list(self._keys.items()):
                if owner == principal and key in self._kept:
                    acknowledged(self, principal, name, now)

        return greedy

    change(DurableJournal, "acknowledged", make)


@bug("journal")
def finds_the_keys_of_others() -> None:
    """An idempotency key is looked up without its principal."""

    def make(find: Any) -> Any:
        def find_any(self: DurableJournal, principal: str, key: bytes, now: float) -> Any:
            found = find(self, principal, key, now)
            return found or next((e for (_, k), e in [*self._open.items(), *self._kept.items()] if k == key), None)

        return find_any

    change(DurableJournal, "find", make)


@bug("journal")
def forgets_outcomes_at_a_restart() -> None:
    """Rows of an open task that had their outcome run again after a restart."""

    def make(restore: Any) -> Any:
        def forgetful(self: DurableJournal, puts: Any, now: float) -> Any:
            kept = restore(self, puts, now)
            for one in kept:
                one.outcomes = []
            return kept

        return forgetful

    change(DurableJournal, "restore", make)


@bug("journal")
def forgets_what_is_over_at_a_restart() -> None:
    """Outcomes that nobody has fetched are gone after a restart."""
    disable(DurableJournal, "_remember")


@bug("journal")
def forgets_the_last_open_task() -> None:
    """A restart takes up all open tasks but the last."""
    change(DurableJournal, "restore", lambda restore: lambda self, puts, now: restore(self, puts, now)[:-1])


@bug("journal")
def shortens_time_limits_at_a_restart() -> None:
    """Time limits are restored with the wrong clock."""
    change(DurableJournal, "monotonic", lambda monotonic: lambda self, wall_s: monotonic(self, wall_s) - 50.0)


@bug("journal")
def forgets_the_key_of_what_is_open() -> None:
    """A restored task has no entry under its key."""

    def make(reopen: Any) -> Any:
        def forgetful(self: DurableJournal, kept: Any, run: Any) -> None:
            reopen(self, kept, run)
            self._open.pop((kept.principal, kept.key), None)

        return forgetful

    change(DurableJournal, "reopen", make)


# --- clients' side of the broker -----------------------------------------------------------------------------------


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
    disable(Clients, "expire")


@bug("broker")
def acknowledges_one_too_many() -> None:
    """An acknowledgement takes the next message with it."""
    change(ClientSession, "acknowledge", lambda acknowledge: lambda self, seq: acknowledge(self, seq + bool(seq)))


@bug("broker")
def tells_somebody_else() -> None:
    """Now and then an outcome goes to another session."""

    def make(deliver: Any) -> Any:
        def astray(self: Clients, session: ClientSession, *args: Any) -> None:
            others = [s for s in self.sessions() if s.route is not None]
            deliver(self, others[-1] if others and session.last_seq % 7 == 6 else session, *args)

        return astray

    change(Clients, "_deliver", make)


@bug("broker")
def shifts_rows_of_a_batch() -> None:
    """Rows get the answer of the first row of their batch."""
    change(Settlement, "end", lambda end: lambda self, piece, start, stop, at: end(self, piece, start, stop, 0))


@bug("broker")
def cancels_leave_rows_in_the_queue() -> None:
    """A row that ends while it is queued stays in its lane."""
    disable(PullPolicy, "remove")


# --- workers' side of the broker -----------------------------------------------------------------------------------


@bug("broker")
def takes_any_answer_for_its_lease() -> None:
    """Workers go on with leases of an old broker, and an answer under such a one counts for whatever they hold now."""

    def find(self: Workers, worker: WorkerSession, token: int) -> Lease | None:
        return worker.leases.get(token) or next(iter(worker.leases.values()), None)

    Workers._find = find  # type: ignore[method-assign]
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
        def blame(self: Workers, lease: Lease, reason: str, now: float, is_suspect: bool, is_alone: bool = False) -> None:
            if is_suspect and lease.queue.spec.is_idempotent:
                self._end([q for q in lease.pieces if q.state == LEASED], DEAD, p.Error(p.Code.DEAD, reason), now)
            recover(self, lease, reason, now, is_suspect, is_alone)

        return blame

    change(Workers, "_recover", make)


@bug("broker")
def blames_who_is_left_of_a_batch() -> None:
    """The last row without outcome of a batch counts as having run alone."""

    def make(recover: Any) -> Any:
        def blame(self: Workers, lease: Lease, *args: Any, **fields: Any) -> None:
            lease.num_rows = sum(q.num_rows for q in lease.pieces if q.state == LEASED) or lease.num_rows
            lease.num_answered = 0
            recover(self, lease, *args, **fields)

        return blame

    change(Workers, "_recover", make)


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
def runs_again_after_a_goodbye() -> None:
    """What a worker held when it left politely goes to another one, whatever its kernel."""

    def make(recover: Any) -> Any:
        def again(self: Workers, lease: Lease, reason: str, now: float, is_suspect: bool, is_alone: bool = False) -> None:
            if is_suspect:
                recover(self, lease, reason, now, is_suspect, is_alone)
                return
            pieces = [q for q in lease.pieces if q.state == LEASED]
            self.state.ledger.close(lease)
            self.dispatch.abandoned(lease)
            for piece in pieces:
                self.state.ledger.requeue(piece)

        return again

    change(Workers, "_recover", make)


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


# --- the client ----------------------------------------------------------------------------------------------------


@bug("client")
def does_not_count_from_one() -> None:
    """With a new session on the broker's side the numbers go on from the old ones."""
    change(Receipts, "restart", lambda restart: lambda self: None if hasattr(self, "received") else restart(self))


@bug("client")
def submits_again_under_a_new_id() -> None:
    """What the broker has lost is submitted as something else."""

    def make(come_back: Any) -> Any:
        def renamed(self: Submissions, run: Run, rest_until: float | None = None) -> None:
            come_back(self, run, rest_until)
            run.id = self.draw_id()

        return renamed

    change(Submissions, "_come_back", make)


@bug("client")
def does_not_say_again() -> None:
    """What an earlier broker may have started is submitted as if it were new."""
    change(
        client_session, "submit_message",
        lambda submit: lambda run, ack, now: (setattr(run, "is_again", False), submit(run, ack, now))[1],
    )  # fmt: skip


@bug("client")
def forgets_what_the_broker_lost() -> None:
    """What the broker says that it does not have is not submitted again."""
    change(client_session.Session, "_on_welcome", _without_unknown)


def _without_unknown(on_welcome: Any) -> Any:
    def forgetful(self: Any, m: p.Welcome, frames: Any, now: float) -> None:
        on_welcome(self, p.Welcome(**{name: getattr(m, name) for name in _KEPT}), frames, now)

    client_session._HANDLERS[p.Welcome] = forgetful
    return forgetful


_KEPT = ("epoch", "heartbeat_ms", "is_resumed", "credit", "limits", "shared")


@bug("client")
def acknowledges_what_it_drops() -> None:
    """Outcomes of a fetch whose reply was lost are acknowledged before anybody has them."""
    disable(Receipts, "hold")


@bug("client")
def tells_a_row_again() -> None:
    """An outcome replaces the one that a row has."""

    def settle(self: Run, start: int, stop: int, part: Any) -> int:
        num_new = self.slots[start:stop].count(None)
        self.slots[start:stop] = [part] * (stop - start)
        self.num_open -= num_new
        return num_new

    Run.settle = settle  # type: ignore[method-assign]


# --- the worker ----------------------------------------------------------------------------------------------------


@bug("worker")
def keeps_leases_of_an_old_broker() -> None:
    """What is held goes on with a broker that does not know of it."""

    def on_welcome(self: Link, welcome: p.Welcome) -> bool:
        if self.state != "away":
            self._move("welcome")
            self.epoch, self.heartbeat_ms = welcome.epoch, welcome.heartbeat_ms
        return True

    Link.on_welcome = on_welcome  # type: ignore[method-assign]


@bug("worker")
def runs_what_it_has_forgotten() -> None:
    """Batches that wait when a session ends are run all the same."""
    disable(Work, "forget")


@bug("worker")
def never_lets_go_of_a_lease() -> None:
    """A lease counts as held when its answer has left."""
    disable(Link, "sent")


@bug("worker")
def drops_what_is_cancelled() -> None:
    """A batch that is cancelled before it began is never answered."""

    def cancel(self: Work, lease: int) -> None:
        for index, (assign, _) in enumerate(self._waiting):
            if assign.lease == lease:
                del self._waiting[index]
                return

    Work.cancel = cancel  # type: ignore[method-assign]


@bug("worker")
def grants_without_bound() -> None:
    """A worker takes as many batches as there are."""
    disable(Credit, "total", (1_000_000, 1_000_000_000))

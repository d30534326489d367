"""The stateful property test of the core, and the bugs planted to see that it would notice."""

from collections.abc import Callable
from typing import Any

import pytest
from broker_machine import check_machine

from penstock.broker.admission import Admission
from penstock.broker.leases import Leases
from penstock.broker.ledger import Ledger
from penstock.broker.outcomes import Outcomes
from penstock.broker.protocol import Outcome
from penstock.broker.scheduling.lanes import BatchQueue, Lane
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.sessions import ClientSession, WorkerSession
from penstock.broker.settlement import Settlement
from penstock.broker.tasks import LEASED, Lease, Piece, Saved

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]
FAULTS: dict[str, Fault] = {}


def fault(plant: Fault) -> Fault:
    FAULTS[plant.__name__] = plant
    return plant


def test_the_core_keeps_its_promises() -> None:
    check_machine(max_examples=450, step_count=40)


@fault
def client_credit_is_forgotten(patch: Patch) -> None:
    real = Settlement.end

    def end(self: Settlement, piece: Piece, *args: Any, **shared: Any) -> None:
        session = piece.run.session
        real(self, piece, *args, **shared)
        session.returned_rows -= 1

    patch.setattr(Settlement, "end", end)


@fault
def client_bytes_come_back_twice(patch: Patch) -> None:
    real = Settlement.end

    def end(self: Settlement, piece: Piece, *args: Any, **shared: Any) -> None:
        run = piece.run
        real(self, piece, *args, **shared)
        run.session.returned_bytes += 20 * (run.num_open == 0)

    patch.setattr(Settlement, "end", end)


@fault
def a_batch_is_not_counted(patch: Patch) -> None:
    real = WorkerSession.give_up

    def give_up(self: WorkerSession, lease: Lease) -> None:
        real(self, lease)
        self.batches += lease.mode == "batch"

    patch.setattr(WorkerSession, "give_up", give_up)


@fault
def requeued_twice(patch: Patch) -> None:
    real = Ledger.requeue

    def requeue(self: Ledger, piece: Piece) -> None:
        real(self, piece)
        if piece.num_rows > 1:
            self.policy.push(_twin(piece))

    patch.setattr(Ledger, "requeue", requeue)


def _twin(piece: Piece) -> Piece:
    return Piece(piece.run, piece.start, piece.stop)


@fault
def deadlines_are_skipped(patch: Patch) -> None:
    patch.setattr(Outcomes, "expire", lambda self, now: None)


@fault
def a_deadline_is_left_behind(patch: Patch) -> None:
    real = Ledger.end

    def end(self: Ledger, piece: Piece, start: int, stop: int, state: str) -> None:
        if state == "cancelled":
            piece.run.deadline = float("inf")
        real(self, piece, start, stop, state)

    patch.setattr(Ledger, "end", end)


@fault
def batch_keys_are_mixed(patch: Patch) -> None:
    real = PullPolicy.queue
    patch.setattr(PullPolicy, "queue", lambda self, key, s, mode: real(self, (*key[:3], b"", *key[4:]), s, mode))


@fault
def principals_are_mixed(patch: Patch) -> None:
    real = PullPolicy.queue
    patch.setattr(PullPolicy, "queue", lambda self, key, s, mode: real(self, (*key[:-1], ""), s, mode))


@fault
def batches_are_too_large(patch: Patch) -> None:
    real = BatchQueue.__init__

    def init(self: BatchQueue, *args: Any) -> None:
        real(self, *args)
        self.max_batch_size += 1

    patch.setattr(BatchQueue, "__init__", init)


@fault
def anybodys_lease_is_answered(patch: Patch) -> None:
    patch.setattr(Leases, "_find", lambda self, worker, token: self.state.ledger.leases.get(token))


@fault
def late_answers_count(patch: Patch) -> None:
    """Rows that ended while leased are answered again."""
    real = Lease.overlapping

    def overlapping(self: Lease, start: int, stop: int) -> Any:
        for piece, first, last in real(self, start, stop):
            if piece.state in ("cancelled", "expired", "done"):
                piece.state = "leased"
            yield piece, first, last

    patch.setattr(Lease, "overlapping", overlapping)


@fault
def positions_move_when_rows_end(patch: Patch) -> None:
    """The rows of a lease are counted without those that ended before."""

    def overlapping(self: Lease, start: int, stop: int) -> Any:
        at = 0
        for piece in [p for p in self.pieces if p.state == "leased"]:
            end = at + piece.num_rows
            if at < stop and start < end:
                yield piece, at, end
            at = end

    patch.setattr(Lease, "overlapping", overlapping)


@fault
def a_row_is_lost_in_a_split(patch: Patch) -> None:
    real = Piece.split

    def split(self: Piece, at: int) -> Piece:
        tail = real(self, at)
        tail.start += tail.num_rows > 1
        return tail

    patch.setattr(Piece, "split", split)


@fault
def a_split_turns_the_lease_around(patch: Patch) -> None:
    real = Piece.split

    def split(self: Piece, at: int) -> Piece:
        tail = real(self, at)
        if self.lease is not None:
            self.lease.pieces.remove(tail)
            self.lease.pieces.insert(0, tail)
        return tail

    patch.setattr(Piece, "split", split)


@fault
def the_wrong_session_is_told(patch: Patch) -> None:
    real = Outcomes.deliver

    def deliver(self: Outcomes, session: ClientSession, outcomes: Any, finished: Any, is_promise: bool = False) -> None:
        sessions = {run.session: None for run in self._state.ledger.runs()}
        others = [s for s in sessions if s is not session and not s.is_closed]
        real(self, others[0] if others and session.last_seq % 3 == 2 else session, outcomes, finished, is_promise)

    patch.setattr(Outcomes, "deliver", deliver)


@fault
def cancelled_rows_stay_in_their_queue(patch: Patch) -> None:
    real = Ledger.end

    def end(self: Ledger, piece: Piece, start: int, stop: int, state: str) -> None:
        if state == "cancelled" and (start, stop) == (piece.start, piece.stop):
            piece.entry = None
        real(self, piece, start, stop, state)

    patch.setattr(Ledger, "end", end)


@fault
def heads_are_out_of_date(patch: Patch) -> None:
    real = PullPolicy._place

    def place(self: PullPolicy, lane: Lane) -> None:
        if lane.place is None or not lane.pieces:
            real(self, lane)

    patch.setattr(PullPolicy, "_place", place)


@fault
def a_trim_is_not_counted(patch: Patch) -> None:
    def trim(self: PullPolicy, piece: Piece, start: int, stop: int) -> None:
        piece.start, piece.stop = start, stop

    patch.setattr(PullPolicy, "trim", trim)


@fault
def a_lease_is_closed_twice(patch: Patch) -> None:
    real = Ledger.close

    def close(self: Ledger, lease: Lease) -> None:
        real(self, lease)
        if lease.num_rows > 2:
            real(self, lease)

    patch.setattr(Ledger, "close", close)


@fault
def a_lease_stays_with_the_lost_worker(patch: Patch) -> None:
    patch.setattr(Leases, "recover", lambda self, *args: None)


@fault
def checkpoints_are_lost_with_the_worker(patch: Patch) -> None:
    real = Ledger.requeue

    def requeue(self: Ledger, piece: Piece) -> None:
        self.save(piece, None)
        real(self, piece)

    patch.setattr(Ledger, "requeue", requeue)


@fault
def a_checkpoint_is_counted_once_more(patch: Patch) -> None:
    real = Ledger.save

    def save(self: Ledger, piece: Piece, saved: Saved | None) -> None:
        self.open_bytes += saved.block.nbytes if saved is not None and piece.saved is not None else 0
        real(self, piece, saved)

    patch.setattr(Ledger, "save", save)


@fault
def everything_is_redelivered(patch: Patch) -> None:
    def recover(self: Leases, lease: Lease, *_: Any, **__: Any) -> None:
        pieces = [piece for piece in lease.pieces if piece.state == LEASED]
        self.state.ledger.close(lease)
        self.dispatch.abandoned(lease)
        for piece in pieces:
            self.state.ledger.requeue(piece)

    patch.setattr(Leases, "recover", recover)


@fault
def an_absent_client_misses_its_results(patch: Patch) -> None:
    real = ClientSession.add_result

    def add_result(self: ClientSession, outcomes: Any, credit: Any) -> Any:
        made = real(self, outcomes, credit)
        if self.route is None:
            self.outbox.pop()
        return made

    patch.setattr(ClientSession, "add_result", add_result)


@fault
def an_acknowledgement_takes_one_too_many(patch: Patch) -> None:
    real = ClientSession.acknowledge
    patch.setattr(ClientSession, "acknowledge", lambda self, seq: real(self, seq + 1))


@fault
def a_late_follower_is_not_told(patch: Patch) -> None:
    patch.setattr(Outcomes, "catch_up", lambda self, follower, outcomes, now: None)


@fault
def followers_are_forgotten_when_their_twin_is_cancelled(patch: Patch) -> None:
    real = Settlement._pass_on

    def pass_on(self: Settlement, *args: Any, **final: Any) -> None:
        if self._outcome not in ("cancelled", "expired"):
            real(self, *args, **final)

    patch.setattr(Settlement, "_pass_on", pass_on)


@fault
def the_queue_has_no_bound(patch: Patch) -> None:
    patch.setattr(Admission, "check", lambda *args: None)


@fault
def outcomes_are_cut_from_the_front(patch: Patch) -> None:
    real = Settlement.outcome

    def outcome(self: Settlement, spans: Any) -> Outcome:
        shift = min(span[3] for span in spans)
        return real(self, [(i, start, stop, at - shift, q) for i, start, stop, at, q in spans])

    patch.setattr(Settlement, "outcome", outcome)


def check_seeds() -> None:
    for seed in range(6):
        check_machine(max_examples=400, seed=seed)


@pytest.mark.parametrize("name", FAULTS)
def test_the_machine_catches(name: str, monkeypatch: Patch) -> None:
    FAULTS[name](monkeypatch)
    with pytest.raises((AssertionError, LookupError, ValueError)):
        check_seeds()

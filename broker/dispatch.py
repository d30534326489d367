"""Batches to workers, and what came of them: the one place where the policy, the breakers and the worker's facts meet.

Knows who has room and what a batch's end teaches. Does not know messages, clients or why a worker is lost.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from penstock.broker.protocol import Code, Error
from penstock.broker.scheduling.accounts import Account
from penstock.broker.scheduling.batch import Offer
from penstock.broker.scheduling.events import Event, duration_text
from penstock.broker.scheduling.lanes import Kind
from penstock.broker.scheduling.remedies import Remedy, Watch
from penstock.broker.sessions import WorkerSession
from penstock.broker.state import BrokerState
from penstock.broker.tasks import Lease, Piece

MAX_ASSIGNS_PER_TURN = 256
CLOCK_S = 1e-4
"""Sooner than this is now: clocks and polls are no finer."""
EMERGENCY_S = 30.0
EMERGENCY_BATCHES = 3
"""So many batches in a row whose rows succeed alone but not together: then batching itself is what fails."""


class Dispatch:
    """See the module.

    Args:
        assign: gives a lease to its worker.
        end: ends pieces that cannot finish in time any more.
    """

    def __init__(self, state: BrokerState, assign: Callable[[Lease], None], end: Callable[[Piece, Error, float], None]) -> None:
        self._state = state
        self._assign = assign
        self._end = end
        self._watch = Watch()
        self._num_unbatchable: dict[str, int] = {}
        self._has_more = False
        self._spared: set[tuple[str, str]] = set()
        self._failed_last: dict[tuple[str, str], Account] = {}

    # --- forming batches -------------------------------------------------------------------------------------------

    def run(self, now: float) -> bool:
        """Give batches to workers with room, the least loaded first; True if there is more to do at once."""
        policy = self._state.policy
        policy.wake_at, self._has_more = None, False
        num_left = MAX_ASSIGNS_PER_TURN
        while num_left and policy.num_rows and self._assign_one(now):
            num_left -= 1
        return not num_left or self._has_more

    def _assign_one(self, now: float) -> bool:
        workers = self._state.serving()
        if len(workers) > 1:
            workers.sort(key=_num_leases)
        for worker in workers:
            kinds = self._kinds(worker, workers, now)
            if kinds and self._give(worker, kinds, workers, now):
                return True
        return False

    def _kinds(self, worker: WorkerSession, workers: list[WorkerSession], now: float) -> Collection[Kind]:
        """What a worker may be given now: not what it keeps failing, nor what it is spared while another has room for it."""
        kinds = worker.room()
        if not any(kind in kinds for kind in self._state.policy.kind_rows):
            return ()
        breakers = self._state.breakers
        if kinds and not breakers.is_all_closed:
            kinds = [k for k in kinds if breakers.may_run(worker.name, k[0], now)]
        if kinds and self._spared:
            idle = [other for other in workers if other is not worker and not other.leases]
            others = {k for other in idle for k in other.room() if breakers.may_run(other.name, k[0], now)}
            kinds = [k for k in kinds if (worker.name, k[0]) not in self._spared or k not in others]
        return kinds

    def _give(self, worker: WorkerSession, kinds: Collection[Kind], workers: list[WorkerSession], now: float) -> bool:
        """Form a batch for one worker; whether it got one. One that is busy gets it just in time to hide the way there."""
        state = self._state
        early_s = 0.001 * (worker.soonest_ms(now) - state.policy.config.ahead_ms) if worker.batches else 0.0
        if early_s > CLOCK_S:
            state.policy.wake_by(now + early_s)
            return False
        max_bytes = worker.credit_bytes - worker.assigned_bytes
        num_slow = sum(w.is_slow_now for w in workers if w is not worker) if len(workers) > 1 else 0
        offer = Offer(kinds, max_bytes, not worker.leases, worker.name, worker.batches > 0, len(workers), num_slow)
        batch = state.policy.take(offer, now)
        if state.policy.hopeless:
            self._give_up_hopeless(now)
            self._has_more = self._has_more or batch is None  # what stood behind them gets its turn at once
        if batch is None:
            return False
        for piece, _ in batch.picked:
            state.codel.dispatched(piece.run.priority, now - piece.run.arrived, now)
        state.breakers.started(worker.name, batch.queue.spec.name, now)
        self._assign(state.ledger.lease(batch, worker, now))
        return True

    def _give_up_hopeless(self, now: float) -> None:
        """End what cannot finish within its time limit any more: at once, and saying so."""
        pieces, self._state.policy.hopeless = self._state.policy.hopeless, []
        for piece in pieces:
            if piece.entry is None:
                continue
            left_ms, needs_ms = 1000.0 * (piece.run.deadline - now), piece.alone_ms / piece.num_rows
            self._state.counters["dropped_hopeless"] += piece.num_rows
            self._state.policy.expired(piece.run, piece.run.deadline)
            needs, left = duration_text(0.001 * needs_ms), duration_text(0.001 * left_ms)
            text = f"it cannot finish any more: it takes about {needs} and had {left} left; it did not run"
            self._end(piece, Error(Code.DEADLINE, text), now)

    # --- what came of them -----------------------------------------------------------------------------------------

    def completed(self, lease: Lease, timings: Mapping[str, Any], now: float) -> None:
        """Every row of a lease is answered."""
        batch, worker, state = lease.batch, lease.worker, self._state
        worker.turn_to_next(now)
        kernel = batch.queue.spec.name
        measured_ms = timings.get("h2d_ms", 0.0) + timings.get("compute_ms", 0.0) + timings.get("d2h_ms", 0.0)
        num_runs = int(timings.get("num_runs", 1))
        state.policy.completed(batch, worker.device, measured_ms, num_runs)
        state.metrics.batch_completed(kernel, timings, batch.num_rows, batch.limit, batch.predicted_ms, measured_ms)
        for account, num_rows, alone_ms, _ in batch.charges:
            spent_ms = measured_ms * batch.part(num_rows, alone_ms)
            state.metrics.device_time(account.name, spent_ms)
            if state.quotas.has_any:
                state.quotas.spend((account.principal, account.name), spent_ms, now)
        if "num_not_finite" in timings:
            state.counters["not_finite"] += int(timings["num_not_finite"])
        if "num_oom" in timings:
            num_rows = int(timings.get("oom_rows", batch.num_rows))
            self._tell(
                now, "out_of_memory", worker.name, state.policy.sizes.out_of_memory(worker.name, kernel, num_rows, batch.row_ms)
            )
        elif num_runs > 1 and batch.num_rows > 1:
            self._unbatchable(kernel, lease, now)
        elif batch.num_rows > 1:
            self._num_unbatchable.pop(kernel, None)
        has_failed = lease.num_failed >= lease.num_rows
        if lease.is_cancelled or (has_failed and self._is_one_clients_fault(lease)):
            state.breakers.abandoned(worker.name, kernel, lease.assigned_at)  # no verdict
        else:
            self._log(state.breakers.finished(worker.name, kernel, has_failed, now, lease.assigned_at))
        if lease.mode == "batch":
            predicted_ms = batch.predicted_ms if state.policy.predictor.is_known(kernel) else None
            self._watch.completed(
                kernel, worker.name, batch.num_rows, measured_ms, predicted_ms, lease.num_failed, now, batch.alone_ms
            )

    def _is_one_clients_fault(self, lease: Lease) -> bool:
        """A row that fails alone may be bad input. It speaks against the worker only after another client's has failed."""
        account = lease.batch.charges[0][0]
        key = (lease.worker.name, lease.queue.spec.name)
        last, self._failed_last[key] = self._failed_last.get(key, account), account
        return lease.num_rows == 1 and last is account

    def _unbatchable(self, kernel: str, lease: Lease, now: float) -> None:
        """A batch had to be taken apart. If its rows are all right one by one, the fault is in batching them."""
        if lease.num_failed:
            return
        self._num_unbatchable[kernel] = count = self._num_unbatchable.get(kernel, 0) + 1
        if count >= EMERGENCY_BATCHES:
            self._num_unbatchable.pop(kernel)
            self._state.policy.sizes.emergency(kernel, now + EMERGENCY_S)
            text = f"{count} batches failed whole and succeeded row by row: one task at a time for {EMERGENCY_S:.0f} s"
            self._tell(now, "emergency", kernel, text)

    def abandoned(self, lease: Lease) -> None:
        """A lease will not be answered."""
        self._state.policy.abandoned(lease.batch)
        self._state.breakers.abandoned(lease.worker.name, lease.queue.spec.name, lease.assigned_at)

    def arrived(self, worker: WorkerSession, now: float) -> None:
        """It is ready. One that comes after a fault gets small batches at first."""
        self._state.policy.predictor.add_worker(worker.name, worker.device)
        fault = worker.facts.get("fault")
        if fault:
            self._state.policy.sizes.begin_slowly(worker.name)
            self._tell(now, "fault", worker.name, f"back after a fault, with batches of one row at first: {fault}")

    def left(self, worker: WorkerSession) -> None:
        """Its session is over."""
        self._state.policy.predictor.forget_worker(worker.name)
        self._state.policy.sizes.forget_worker(worker.name)
        self._state.breakers.forget_worker(worker.name)
        self._watch.forget_worker(worker.name)
        self._spared = {pair for pair in self._spared if pair[0] != worker.name}
        self._failed_last = {pair: a for pair, a in self._failed_last.items() if pair[0] != worker.name}

    # --- from time to time -----------------------------------------------------------------------------------------

    def maintain(self, now: float) -> str | None:
        """Learn boundaries, watch memory, act on regressions; why the last configuration should be taken back, if it should."""
        state, policy = self._state, self._state.policy
        for kernel, change in policy.maintain(now):
            self._tell(now, "bins", kernel, change)
        high = policy.config.memory_high
        for worker in state.workers.values():
            fraction = worker.memory.get("used_fraction")
            if isinstance(fraction, float) and fraction > high:
                self._tell(now, "memory", worker.name, policy.sizes.memory_high(worker.name, fraction, now, high))
        if not policy.config.remediates:
            return None
        queued: dict[str, int] = {}
        for (kernel, _, _), num_rows in policy.kind_rows.items():
            queued[kernel] = queued.get(kernel, 0) + num_rows
        remedies = self._watch.decide(now, queued)
        for remedy in remedies:
            self._treat(remedy, now)
        return next((remedy.reason for remedy in remedies if remedy.kind == "roll_back"), None)

    def _treat(self, remedy: Remedy, now: float) -> None:
        """Do what the watch asks for, visibly."""
        sizes = self._state.policy.sizes
        self._tell(now, remedy.kind, remedy.worker or remedy.kernel, remedy.reason)
        if remedy.kind == "reduce_batch":
            for worker in self._state.serving():
                self._tell(now, "batch_size", worker.name, sizes.reduce(worker.name, remedy.kernel))
        elif remedy.kind == "rebalance":
            self._spared.add((remedy.worker, remedy.kernel))
        elif remedy.kind == "restore" and remedy.worker:
            self._spared.discard((remedy.worker, remedy.kernel))
        elif remedy.kind == "restore":
            sizes.restore(remedy.kernel)

    def reconfigured(self, now: float) -> None:
        """The configuration has changed: what happens next may be its fault."""
        self._watch.config_changed(now)

    def _tell(self, now: float, kind: str, subject: str, reason: str | None) -> None:
        if reason:
            self._log(Event(now, kind, subject, reason))

    def _log(self, event: Event | None) -> None:
        if event is not None:
            self._state.events.add(event)


def _num_leases(worker: WorkerSession) -> int:
    return len(worker.leases)

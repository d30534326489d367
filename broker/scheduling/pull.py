"""Which rows go next, and into which batch: decided when a worker asks, never before (late binding).

The order of decisions: the account with the least counter; its most urgent task fixes batch key and bin; the batch is filled
from the same key and bin in counter order, to its budget. Bins are multi-bin batching (arXiv 2412.04504) on predicted times;
they are ranges of cells, chosen at this moment.

Knows queues, accounts, predictions and batch sizes. Does not know leases, sessions or messages.
"""

from collections.abc import Iterator
from itertools import chain, islice

from penstock.broker.scheduling.accounts import Account
from penstock.broker.scheduling.batch import Batch, Filling, Offer, in_order
from penstock.broker.scheduling.bins import BinPlan, Histogram
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.lanes import BatchQueue, Lane
from penstock.broker.scheduling.prediction import Predictor
from penstock.broker.scheduling.queues import Queues
from penstock.broker.scheduling.sizes import BatchSizes
from penstock.broker.tasks import Piece, Run

MAX_LEADS = 8
"""Lanes that are tried for one pull before the worker stays idle."""
MAX_PUT_OFF = 64
SLOW_MS = 500.0
JOIN_MARGIN = 1.5
"""Leaving longer tasks out costs a batch more; with less of a margin the 95th percentile suffers."""
LEARN_EVERY_S = 2.0
SHORT_MS, NUM_WELL_KNOWN, SHORT_EVERY = 1.0, 200, 8


class PullPolicy(Queues):
    """Queues of pieces: `take` forms and charges a batch, `completed` teaches.

    Args:
        config: may be replaced at run time by `reconfigure`.
        predictor: shared with whoever shows or saves what it knows.
    """

    def __init__(self, config: SchedulingConfig | None = None, predictor: Predictor | None = None) -> None:
        super().__init__(config or SchedulingConfig(), predictor or Predictor())
        self.sizes = BatchSizes(self.config.first_batch_sizes)
        self.num_batches = 0
        self.hopeless: list[Piece] = []
        """Queued pieces that a pull found unable to finish in time: the caller ends them."""
        self.wake_at: float | None = None
        """When to ask again: a batch that was held for company must go, or a busy worker will soon be done."""

    # --- what goes -------------------------------------------------------------------------------------------------

    def take(self, offer: Offer, now: float) -> Batch | None:
        """The next batch for a worker, out of its queue and charged to its accounts.

        A piece of which only the first rows are picked stays queued with the rest. What is in `hopeless` afterwards cannot
        finish in time: the caller ends that, and may ask again.
        """
        only = self._only_lane(offer)
        for lane in islice(self._leads(offer), MAX_LEADS) if only is None else (only,):
            batch = self._form(lane, offer, now)
            if batch is not None:
                self._claim(batch, now)
                return batch
            if offer.is_busy or (lane.pieces[0][-1].is_isolated and not offer.is_idle):
                return None  # it has work; whoever is next in line stays next
        return None

    def _only_lane(self, offer: Offer) -> Lane | None:
        """The one lane with work, if there is just one: mostly so with one task under way."""
        if len(self.accounts.backlogged) == 1:
            heads = self.accounts.backlogged[0][-1].heads
            if len(heads) == 1:
                ((kind, lanes),) = heads.items()
                if len(lanes) == 1 and kind in offer.kinds:
                    lane: Lane = lanes[0][-1]
                    return lane
        return None

    def _leads(self, offer: Offer) -> Iterator[Lane]:
        """Lanes that may open a batch, in the order of decisions."""
        kinds, backlogged = offer.kinds, self.accounts.backlogged
        avoids_slow = offer.num_workers > 1 and offer.num_slow >= offer.num_workers - 1
        put_off = list[Lane]()
        for *_, account in backlogged:
            if len(put_off) >= MAX_PUT_OFF:
                break
            if account.num_batches % self.config.floor_every == self.config.floor_every - 1:
                lowest = account.lowest(kinds)
                if lowest is not None:
                    yield lowest
            for lane in islice(account.lanes(kinds), MAX_LEADS):
                if avoids_slow and _row_ms(lane) >= SLOW_MS:
                    put_off.append(lane)  # one worker is kept from slow work while there is other work
                    continue
                first = account.earliest(lane, kinds) if not avoids_slow else lane
                yield first
                if self.config.max_wait_ms:  # it may have been held: another lane may have a full batch
                    yield from (other for other in islice(account.lanes(kinds), MAX_LEADS) if other is not first)
                break
        yield from put_off

    def _form(self, lead: Lane, offer: Offer, now: float) -> Batch | None:
        """The batch that a lane opens, or None while it should wait for company."""
        queue = lead.queue
        row_ms = _row_ms(lead)
        limit = self.sizes.limit(offer.worker, queue.spec.name, row_ms, queue.max_batch_size, now)
        batch = Batch(queue, offer.worker, limit)
        batch.grid = self._grid
        known = self.config.drops_hopeless and self.predictor.is_known(queue.spec.name)
        slowness = self.predictor.slowness(queue.spec.name, offer.worker) if known else 1.0
        filling = Filling(batch, offer, now if known else None, slowness)
        self._fill(filling, lead, offer)
        self.hopeless += filling.hopeless
        if not batch.picked or (not batch.is_full and self._is_held(batch, offer, now)):
            return None
        batch.row_ms, batch.is_slow = row_ms, row_ms >= SLOW_MS
        batch.has_company = queue.num_rows >= limit
        if batch.num_rows == 1 and offer.num_workers == 1:
            batch.predicted_ms = row_ms
        else:
            batch.predicted_ms, _ = self.predictor.batch_ms(batch.load(), offer.worker)
        return batch

    def _fill(self, filling: Filling, lead: Lane, offer: Offer) -> None:
        """Rows of the lead's bin: its own account's first, then the others' in the order of their counters."""
        queue, batch = lead.queue, filling.batch
        if len(queue.lanes) == 1 and len(queue.lanes[lead.account]) == 1:
            batch.label = self._label(queue, lead.cell)
            filling.take(lead.account, lead.pieces)
            return
        low, high = self._bin(lead, batch.limit, offer.num_workers)
        batch.label = queue.plan.label(low, high)
        first = lead.pieces[0]  # whatever made its lane go first
        entries = in_order(queue.lanes[lead.account], low, high)
        if not filling.take(lead.account, chain((first,), (entry for entry in entries if entry is not first))):
            return
        for account in sorted(queue.lanes, key=_counter):
            if account is not lead.account and not filling.take(account, in_order(queue.lanes[account], low, high)):
                return

    def _bin(self, lead: Lane, limit: int, num_workers: int) -> tuple[int, int]:
        """The cells that may join a lead: fewer, wider bins while there is less than a batch per worker and bin.

        With less than that in all, nothing is gained by leaving shorter tasks out. A longer bin of m tasks of
        l ms joins n tasks of s ms only if that ends them all sooner on the whole: n l + m l < n s + m (s + l).
        """
        queue, plan = lead.queue, lead.queue.plan
        if not queue.is_max:
            return plan.range(lead.cell, plan.num_bins)
        if queue.num_rows > limit * num_workers:
            return plan.range(lead.cell, max(1, min(plan.num_bins, queue.num_rows // (limit * num_workers))))
        low, high = 0, lead.cell + 1
        here = sum(count for cell, count in queue.cells.items() if cell < high)
        longest_ms = self._grid.center_ms(lead.cell)
        for cell in sorted(cell for cell in queue.cells if cell >= high):
            ms, more = self._grid.center_ms(cell), queue.cells[cell]
            if ms * here >= JOIN_MARGIN * longest_ms * (here + more):
                break
            here, longest_ms, high = here + more, ms, cell + 1
        return low, high

    def _is_held(self, batch: Batch, offer: Offer, now: float) -> bool:
        """An incomplete batch may wait a little for company, while a worker is idle and nothing in it is a suspect."""
        until = batch.first + 0.001 * self.config.max_wait_ms
        if now >= until or batch.limit == 1 or batch.picked[0][0].is_isolated:
            return False
        self.wake_by(until)
        return True

    def wake_by(self, at: float) -> None:
        """Have `take` asked again at that time."""
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    def _claim(self, batch: Batch, now: float) -> None:
        """Take the picked rows out of their lanes, and charge for them."""
        self.num_batches += 1
        for account, num_rows, _, ms in batch.charges:
            self.accounts.charge(account, ms, num_rows, self.num_batches)
        taken: dict[Lane, list[Piece]] = {}
        for piece, num_rows in batch.picked:
            if piece.run.expected_s is not None:
                batch.queue.learn_lateness(now - piece.run.arrived, piece.run.expected_s)
            if num_rows < piece.stop - piece.start:
                self.trim(piece, piece.start + num_rows, piece.stop)
            elif piece.lane is not None:
                taken.setdefault(piece.lane, []).append(piece)
        for lane, pieces in taken.items():
            self._take_out(lane, pieces)

    # --- what came of it -------------------------------------------------------------------------------------------

    def completed(self, batch: Batch, device: str, measured_ms: float, num_runs: int = 1) -> None:
        """A batch took so long in `num_runs` calls: correct the charges, and learn from it if it went in one.

        Of short batches of a well-known queue one in eight is learned from: the broker's time is worth more than theirs.
        """
        queue = batch.queue
        for account, num_rows, alone_ms, charged in batch.charges:
            account.num_leased -= num_rows
            self.accounts.correct(account, measured_ms * batch.part(num_rows, alone_ms) - charged)
        if queue.mode == "stream" or num_runs != 1:
            return
        queue.num_measured += 1
        if measured_ms < SHORT_MS and queue.num_measured > NUM_WELL_KNOWN and queue.num_measured % SHORT_EVERY:
            return
        name = queue.spec.name
        self.predictor.observe(batch.load(), batch.worker, device, measured_ms)
        self._learn_share(queue, batch, measured_ms)
        queue.limit = batch.limit
        if queue.is_binned and batch.grid is self._grid:
            if queue.histogram is None:
                queue.histogram = Histogram(self._grid.num_cells)
            for cell, count in batch.cells:
                queue.histogram.add(cell, count)
            if batch.is_full:
                fixed_ms, row_ms = self.predictor.fixed_and_row_ms(name, batch.worker)
                self.sizes.completed(batch.worker, name, batch.row_ms, batch.num_rows, True, fixed_ms, row_ms)

    def expired(self, run: Run, now: float) -> None:
        """Its time is over, and it was expected to be done by then: whoever comes next is told of a longer wait."""
        if run.queue is not None and run.expected_s is not None:
            _, longest_ms = run.alone(0, run.num_rows)
            run.queue.learn_lateness(now - run.arrived, run.expected_s + 0.001 * longest_ms)

    def abandoned(self, batch: Batch) -> None:
        """A batch will not be answered: nobody pays for it."""
        for account, num_rows, _, charged in batch.charges:
            account.num_leased -= num_rows
            self.accounts.correct(account, -charged)

    def _learn_share(self, queue: BatchQueue, batch: Batch, measured_ms: float) -> None:
        """What part of its rows' times alone a full batch takes. One of the longest row would take as long if it were full.

        Times that were guessed when the rows came say nothing of it.
        """
        if not batch.is_known:
            return
        fullness = min(batch.num_rows / batch.limit, 1.0) if queue.is_max and not batch.has_company else 1.0
        before = queue.work_ms
        queue.learn_share(measured_ms * fullness, batch.alone_ms)
        self.work_ms += queue.work_ms - before
        if queue.num_rows:
            self.kind_ms[queue.kind] += queue.work_ms - before

    def maintain(self, now: float) -> list[tuple[str, str]]:
        """Learn the boundaries of at most one queue, the one that waits longest for it; (kernel, what changed)."""
        if self.config.boundaries_ms or self.config.max_bins == 1:
            return []
        due = [q for q in self._queues.values() if q.is_max and q.histogram is not None and now - q.learned_at >= LEARN_EVERY_S]
        queue = min(due, key=_learned_at, default=None)
        if queue is None or queue.histogram is None:
            return []
        queue.learned_at = now
        if queue.plan is self._first_plan:
            queue.plan = BinPlan(self._grid, self.config.max_bins)
        change = queue.plan.learn(queue.histogram, queue.limit)
        return [(queue.spec.name, change)] if change else []

    def reconfigure(self, config: SchedulingConfig) -> list[Piece]:
        """Schedule by other rules from now on; the pieces that must be cut and pushed again, taken out here."""
        before, self.config, self._budgets_s = self.config, config, config.class_budgets_s()
        if before.first_batch_sizes != config.first_batch_sizes:
            self.sizes = BatchSizes(config.first_batch_sizes)
        if (before.max_bins, before.boundaries_ms) == (config.max_bins, config.boundaries_ms):
            return []
        return self.rebuild(config)


def _row_ms(lane: Lane) -> float:
    """What a row of the first piece takes alone."""
    first: Piece = lane.pieces[0][-1]
    return first.alone_ms / (first.stop - first.start)


def _counter(account: Account) -> float:
    return account.counter


def _learned_at(queue: BatchQueue) -> float:
    return queue.learned_at

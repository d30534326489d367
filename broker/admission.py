"""Whether a submission is taken, and what becomes of it: limits, quotas, predicted work, idempotency keys, and its kernel.

Knows the rules at the door. Does not know routes, messages to send, or how tasks end.
"""

from collections.abc import Callable

from penstock.broker.columns import view
from penstock.broker.journal import Entry, digest_of
from penstock.broker.kept import Kept
from penstock.broker.protocol import Code, Error, Submit
from penstock.broker.scheduling.accounts import Account
from penstock.broker.scheduling.overload import Backlog, work_refusal
from penstock.broker.sessions import ClientSession, WorkerSession
from penstock.broker.spec import InputError
from penstock.broker.state import BrokerState
from penstock.broker.tasks import Run

MAX_UNACKED = 100_000
"""Messages of a session that wait for its acknowledgement."""
MIN_MEASURED = 3
GUESS_SLACK = 2.0
"""While a kernel is not well known, from so many batches on a wait of so many time limits is too long."""


class Refusal(Exception):
    """A submission is not taken; the error travels. `short_of` is one word for what there was too little of, for metrics."""

    def __init__(self, code: str, message: str, retry_after_ms: float | None = None, short_of: str = "") -> None:
        super().__init__(message)
        self.error = Error(code, message, retry_after_ms)
        self.short_of = short_of


class Admission:
    """See the module. `is_settled`: whether no kernel is still to be expected; then an unknown one is refused."""

    def __init__(self, state: BrokerState, is_settled: Callable[[float], bool]) -> None:
        self._state = state
        self._is_settled = is_settled
        self._next_seq = 0

    def credit(self, session: ClientSession) -> tuple[int, int]:
        """What the session may have submitted in all: rows, bytes."""
        config = self._state.config
        return session.returned_rows + config.window_rows, session.returned_bytes + config.window_bytes

    def check(
        self, session: ClientSession, m: Submit, num_rows: int, num_bytes: int, now: float, entry: Entry | None
    ) -> None:
        """Whether a submission is within every limit that concerns it: what is open already (`entry`) needs no room on disk.

        Raises:
            Refusal: it is not.
        """
        config = self._state.config
        if self._state.is_draining:
            raise Refusal(Code.UNAVAILABLE, "the broker is stopping")
        if entry is None and self.is_durable(m):
            self.check_journal(session.principal, num_rows, now)
        if not 1 <= num_rows <= config.max_rows_per_run:
            raise Refusal(Code.INVALID, f"a run has 1 to {config.max_rows_per_run} rows, not {num_rows}")
        if m.timeout_ms is not None and m.timeout_ms <= 0:
            raise Refusal(Code.DEADLINE, "the time limit was over before the task arrived")
        if num_bytes > min(config.window_bytes, config.max_queue_bytes):
            most = min(config.window_bytes, config.max_queue_bytes)
            raise Refusal(Code.INVALID, f"{num_bytes:,} payload bytes are too large: this broker takes at most {most:,}")
        self.check_session(session, num_rows, num_bytes, now)
        self.check_queue(session.account, num_rows, num_bytes, now)

    def check_session(self, session: ClientSession, num_rows: int, num_bytes: int, now: float) -> None:
        """Whether a session may have so much more open. Raises Refusal."""
        window_rows, window_bytes = self.credit(session)
        if session.used_rows + num_rows > window_rows or session.used_bytes + num_bytes > window_bytes:
            raise self._overloaded("the session's credit is used up", num_rows, now, "credit")
        self.check_outbox(session, num_rows, now)

    def check_outbox(self, session: ClientSession, num_rows: int, now: float) -> None:
        """Whether a session may be sent more results. Raises Refusal."""
        if session.num_unacked_bytes > self._state.config.max_result_bytes or len(session.outbox) > MAX_UNACKED:
            raise self._overloaded("the session's results wait for its acknowledgement", num_rows, now, "acks")

    def check_journal(self, principal: str, num_rows: int, now: float) -> None:
        """Whether a durable task of this principal may be taken. Raises Refusal."""
        why = self._state.journal.refusal(principal)
        if why is not None and not self._state.journal.is_durable:
            raise Refusal(Code.INVALID, why)
        if why is not None:
            raise self._overloaded(why, num_rows, now, "journal")

    def check_queue(self, account: Account, num_rows: int, num_bytes: int, now: float) -> None:
        """Whether so much more may be open. Raises Refusal."""
        config, ledger = self._state.config, self._state.ledger
        if ledger.num_open + num_rows > config.max_queue_rows:
            raise self._overloaded(f"the queue is full ({config.max_queue_rows} tasks)", num_rows, now, "queue")
        if ledger.open_bytes + num_bytes > config.max_queue_bytes:
            raise self._overloaded(f"the queue is full ({config.max_queue_bytes >> 20} MiB)", num_rows, now, "memory")
        if self._state.quotas.has_any:
            self._check_quota(account, num_rows, num_bytes, now)

    def is_durable(self, m: Submit) -> bool:
        """Whether a submission is to survive the broker: by its own wish, or by its kernel's configuration."""
        return m.is_durable or m.kernel in self._state.config.durable_kernels

    def key_of(self, m: Submit) -> bytes | None:
        """The idempotency key; a durable submission has one in any case."""
        return m.id if m.key is None and self.is_durable(m) else m.key

    def _check_quota(self, account: Account, num_rows: int, num_bytes: int, now: float) -> None:
        key, drain_s = (account.principal, account.name), account.num_open / max(self._state.finish_rate.at(now), 1e-3)
        over = self._state.quotas.check(key, num_rows, account.num_open, account.open_bytes, num_bytes, now, drain_s)
        if over is not None:
            raise _refusal(over.reason, over.retry_after_s, "quota")

    def _check_work(self, run: Run, now: float) -> None:
        """Whether the work that is queued ahead, as predicted, leaves a run its time; and whether its class is open."""
        state, policy, queue = self._state, self._state.policy, run.queue
        assert queue is not None
        workers = [w for w in state.serving() if queue.kind in w.kinds]
        if not policy.kind_rows.get(queue.kind) and any(not w.leases for w in workers):
            return  # nothing is ahead of it
        is_measured = queue.num_measured >= MIN_MEASURED
        slack = 1.0 if is_measured and policy.predictor.is_known(run.kernel) else GUESS_SLACK
        if not is_measured or not workers:
            return  # a guess refuses nobody
        ahead = self._ahead(run, workers, now)
        slowness = min(policy.predictor.slowness(run.kernel, w.name) for w in workers)
        total_ms, longest_ms = run.alone(0, run.num_rows)
        alone_ms, work_ms = slowness * run.spread * longest_ms, total_ms * queue.share
        left_ms = 1000.0 * (run.deadline - now)
        run.expected_s = ahead.wait_s(max(work_ms - alone_ms, 0.0))
        over = state.codel.refusal(run.priority, ahead.wait_s(), now) or work_refusal(
            ahead, work_ms, alone_ms, 0.001 * slack * left_ms / queue.lateness,
            policy.config.wait_budgets_s()[run.priority], policy.config.max_queue_device_s,
        )  # fmt: skip
        if over is not None and over.retry_after_s is None and left_ms < max(alone_ms, work_ms / ahead.num_workers):
            raise Refusal(Code.DEADLINE, over.reason, short_of="time")  # no wait will help
        if over is not None:
            raise _refusal(over.reason, over.retry_after_s, "time")

    def _ahead(self, run: Run, workers: list[WorkerSession], now: float) -> Backlog:
        """The work that stands before a run on the workers that can take it: not its client's of later classes."""
        policy, account = self._state.policy, run.account
        kinds = {kind for worker in workers for kind in worker.kinds}
        queued_ms = sum(ms for kind, ms in policy.kind_ms.items() if kind in kinds)
        per_alone = policy.work_ms / policy.alone_ms if policy.alone_ms else 0.0
        own_ms = per_alone * sum(account.class_ms[: run.priority + 1])
        if len(policy.accounts.backlogged) == (account.entry is not None):
            queued_ms = min(queued_ms, own_ms)  # nobody else waits
        leased_ms = sum(lease.left_ms(now) for worker in workers for lease in worker.leases.values())
        return Backlog(queued_ms, min(own_ms, queued_ms), policy.accounts.share(account), leased_ms, len(workers))

    def _overloaded(self, reason: str, num_rows: int, now: float, short_of: str) -> Refusal:
        """With the time in which as many rows ended lately."""
        per_s = self._state.finish_rate.at(now)
        retry_ms = 1000.0 * num_rows / per_s if per_s > 0 else 1000.0
        return Refusal(Code.OVERLOADED, reason, min(max(retry_ms, 20.0), 30_000.0), short_of)

    def remembered(self, session: ClientSession, m: Submit, now: float) -> Entry | None:
        """What the journal has under the idempotency key. Raises Refusal: something else, or no more."""
        key = self.key_of(m)
        entry = None if key is None else self._state.journal.find(session.principal, key, now)
        if entry is None:
            return None
        if not entry.is_same(m):
            raise Refusal(Code.CONFLICT, "this idempotency key was used with other content")
        if not entry.number and self.is_durable(m):
            if entry.run is not None:
                raise Refusal(Code.CONFLICT, "this idempotency key belongs to an open task that is not durable")
            return None  # no disk has what a durable one promises: it begins anew
        if entry.is_gone:
            raise Refusal(Code.RESULT_GONE, "this submission was done; its result is no longer kept")
        return entry

    def open(self, session: ClientSession, m: Submit, num_bytes: int, now: float, entry: Entry | None) -> Run:
        """Make the run, bound to its kernel unless that is still to come; it follows the open one of its entry."""
        kernel = self._state.kernels.known.get(m.kernel)
        if kernel is None and entry is None and self._is_settled(now):
            known = ", ".join(sorted(self._state.kernels.known)) or "none: no worker has come yet"
            raise Refusal(Code.UNKNOWN_KERNEL, f"no worker offers {m.kernel!r}; known kernels: {known}")
        self._next_seq += 1
        run = Run(session, m.id, m.kernel, m.block.num_rows, self._next_seq, now)
        self._describe(run, m, num_bytes)
        if m.timeout_ms is not None:
            run.deadline = now + m.timeout_ms / 1000.0
        if kernel is not None:
            try:
                self.bind(run)
                if entry is None:
                    self._check_work(run, now)
            except Refusal:
                run.release()  # run and pieces know each other, and nobody collects cycles here
                raise
        session.used_rows += run.num_rows
        session.used_bytes += num_bytes
        self._state.quotas.take((run.account.principal, run.account.name), run.num_rows, now)
        self._state.ledger.open(run)
        if entry is not None:
            run.follow(entry)
            self._state.journal.also_known_as(entry, run.id)
        elif run.key is not None:
            self._accept(run, now)
        return run

    def _accept(self, run: Run, now: float) -> None:
        journal, principal, key = self._state.journal, run.session.principal, run.key
        assert key is not None
        before = journal.find(principal, key, now)
        if before is not None:  # of one that was not durable, and is over
            journal.drop(before)
        journal.accept(principal, key, digest_of(run.request), run)

    def _describe(self, run: Run, m: Submit, num_bytes: int) -> None:
        run.priority, run.scalars, run.traceparent = m.priority, m.scalars, m.traceparent
        run.wants_partials, run.request, run.num_bytes = m.wants_partials, m, num_bytes
        run.is_durable, run.key = self.is_durable(m), self.key_of(m)

    def reopen(self, session: ClientSession, kept: Kept, arrived: float, deadline: float) -> Run:
        """A durable task that an earlier broker took, with the rows that have no outcome yet; its kernel is still to come."""
        m = kept.request
        self._next_seq += 1
        run = Run(session, m.id, m.kernel, m.block.num_rows, self._next_seq, arrived)
        self._describe(run, m, m.block.nbytes)
        run.is_durable, run.key, run.deadline = True, kept.key, deadline
        begun = kept.begun
        if kept.outcomes or begun is not None:
            run.keep_only(sorted((s, e) for o in kept.outcomes for _, s, e in o.spans), begun.deaths if begun else ())
        if begun is not None:
            run.started = begun.started
            for row, lines in begun.evidence.items():
                for piece in run.overlapping(row, row + 1):
                    piece.evidence = lines
        session.used_rows += run.num_open
        session.used_bytes += run.num_bytes
        self._state.ledger.open(run)
        for row, saved in begun.saved.items() if begun is not None else ():
            for piece in run.cut_out(row, row + 1):
                self._state.ledger.save(piece, saved)
        return run

    def bind(self, run: Run) -> None:
        """Give a run its batch key under the current version of its kernel.

        Raises:
            Refusal: the kernel does not take it.
        """
        spec = self._state.kernels.known[run.kernel]
        m: Submit = run.request
        if m.is_again and not spec.is_idempotent:
            raise Refusal(Code.UNAVAILABLE, f"{run.kernel!r} may have started under an earlier broker and is not idempotent")
        try:
            binding = spec.bind(m, run.session.principal)
        except InputError as e:
            raise Refusal(Code.INVALID, str(e)) from e
        run.block, run.cost_ms = binding.block, binding.cost_ms
        run.queue = self._state.policy.queue(binding.key, spec, binding.mode)
        self._state.policy.estimate(run)


def _refusal(reason: str, retry_after_s: float | None, short_of: str) -> Refusal:
    return Refusal(Code.OVERLOADED, reason, None if retry_after_s is None else 1000.0 * retry_after_s, short_of)


def is_same(first: Submit, again: Submit) -> bool:
    """Whether two submissions under one id are the same, byte for byte."""
    a, b = first.block, again.block
    return (
        (first.kernel, first.statics, first.scalars, a.columns, a.num_rows)
        == (again.kernel, again.statics, again.scalars, b.columns, b.num_rows)
        and list(a.lengths) == list(b.lengths)
        and all(view(x) == view(y) for x, y in zip(a.frames, b.frames, strict=True))
    )

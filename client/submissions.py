"""Every run of a session, from the moment it is taken until each of its rows has its outcome.

Knows where runs are and what the broker's words do to them: backlog -> flight -> closed, and back to the backlog when
the broker lost them or had no room. Does not know messages on their way out, connections or clocks. A row ends once:
whatever else comes for it is dropped.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from penstock.broker import protocol
from penstock.broker.protocol import Code, Error, Outcome
from penstock.broker.wire import MAX_ROWS
from penstock.client.backlog import Backlog
from penstock.client.config import ClientConfig
from penstock.client.credit import Credit
from penstock.client.deadlines import Deadlines
from penstock.client.draws import Draws
from penstock.client.flight import Flight, split_ids
from penstock.client.news import News
from penstock.client.retries import Retries
from penstock.client.run import PENDING, SENT, WAITING, Options, Part, Rest, Row, Run, deadline_of
from penstock.client.throttle import Throttle

MAX_IDLE_RUNS: Final = 4
"""With fewer runs than this under way the line counts as idle, and a task goes out at once."""


class Submissions:
    """See the module.

    Args:
        draw: n -> n random bytes.
        fault: is told what the broker sent that cannot be.
    """

    def __init__(self, config: ClientConfig, draw: Callable[[int], bytes], fault: Callable[[str], None]) -> None:
        self._grace_s = config.grace_s
        self._fault = fault
        draws = Draws(draw)
        self.draw_id = draws.id
        self.backlog = Backlog(config)
        self.flight = Flight()
        self.credit = Credit(config.max_rows_per_run, config.max_run_bytes)
        self._throttle = Throttle(config.has_throttle, draws.fraction)
        self._retries = Retries(config.max_retries, self._throttle, draws.fraction)
        self.deadlines = Deadlines()
        self.news = News()
        self.strays: set[bytes] = set()
        """Fetched runs that the broker has lost sight of: they have to be fetched again."""
        self.final_error: Error | None = None
        """Set once the session has ended: whatever is submitted ends with it."""

    @property
    def is_idle(self) -> bool:
        return not self.backlog.waiting and len(self.flight.runs) < MAX_IDLE_RUNS

    # --- what the user wants ---------------------------------------------------------------------------------------

    def submit(self, row: Row, options: Options, now: float) -> tuple[Run, int]:
        """Take one task: it goes out at once on an idle line, else it may wait `flush_s` for company."""
        deadline, backlog = deadline_of(options, now), self.backlog
        if backlog.pending:
            joined = backlog.join(row, options, deadline, now)
            if joined is not None:
                return joined
        run = Run(self.draw_id(), row.shape, options, deadline)
        run.add(row)
        if self._accept(run, now):
            is_alone = self.is_idle and not backlog.pending
            if is_alone or options.key is not None or backlog.is_full(1, row.shape):
                backlog.put(run)
            else:
                backlog.hold(run, now)
        return run, 0

    def send(self, run: Run, now: float) -> None:
        """Take a whole run."""
        if self._accept(run, now):
            self.backlog.put(run)

    def _accept(self, run: Run, now: float) -> bool:
        error = self.final_error
        if error is None and run.deadline <= now:
            error = Error(Code.DEADLINE, "the time limit is already over")
        self.backlog.count(run)
        if error is not None:
            self.end_rows(run, 0, run.num_rows, error)
            return False
        if run.deadline < math.inf:
            self.deadlines.add(run, run.deadline)
        return True

    def cancel(self, run: Run, start: int, stop: int) -> None:
        """End rows [start, stop) of an open run: at once while they are still here, else the broker must be asked."""
        run.cancels.append((start, stop))
        if run.state != SENT:
            self.end_rows(run, start, stop, Error(Code.CANCELLED, "cancelled before it was sent"))

    # --- on the way to the broker ----------------------------------------------------------------------------------

    def next_to_send(self, now: float) -> Run | None:
        """The run that leaves now, if the credit allows one; what is held back ends here."""
        backlog, credit, flight = self.backlog, self.credit, self.flight
        while (run := backlog.first()) is not None:
            # With nothing under way no more credit will come: then the broker shall say why it is too much.
            if not credit.covers(run.num_rows, run.nbytes) and flight:
                return None
            held_back = self._throttle.leaving(run, now)
            if held_back is not None:
                self.end_rows(run, 0, run.num_rows, held_back)
                continue
            backlog.pop()
            credit.spend(run.num_rows, run.nbytes)
            flight.runs[run.id] = run
            run.state = SENT
            self.news.num_events += 1  # there is room for who waits to submit
            return run
        return None

    def take_back(self, run: Run, error: Error) -> None:
        """What `next_to_send` gave cannot travel."""
        self.credit.take_back(run.num_rows, run.nbytes)
        self.end_rows(run, 0, run.num_rows, error)

    def welcome(self, m: protocol.Welcome, is_new_epoch: bool) -> list[Run]:
        """The broker says what it never had or has lost, which is submitted again; the open runs that it has come back."""
        unknown = split_ids(m.unknown)
        lost = [run for run in self.flight.runs.values() if run.id in unknown and run.can_be_sent]
        self.strays |= {run.id for run in self.flight.runs.values() if run.id in unknown and not run.can_be_sent}
        if m.is_resumed:
            for num_rows, nbytes in [*self.flight.take_unknown(unknown), *((run.num_rows, run.nbytes) for run in lost)]:
                self.credit.take_back(num_rows, nbytes)
            self.credit.grant(m.credit)
        else:
            self.flight.forget_ghosts()
            self.credit.restart(m.credit)
            self.backlog.limit(self.credit.window_rows, self.credit.window_bytes)
        for run in lost:
            run.is_again = run.is_again or is_new_epoch or not m.is_resumed
            self._come_back(run)
        self.news.num_events += 1
        return list(self.flight.runs.values())

    def _come_back(self, run: Run, rest_until: float | None = None) -> None:
        """The broker does not have it: it leaves again, perhaps after a rest, without the rows that nobody wants."""
        del self.flight.runs[run.id]
        self.backlog.count(run)
        if rest_until is None:
            self.backlog.put(run)
        else:
            self.backlog.rest(run, rest_until)
        for start, stop in run.cancels:
            self.end_rows(run, start, stop, Error(Code.CANCELLED, "cancelled"))

    # --- what the broker says --------------------------------------------------------------------------------------

    def fetched(self, id_: bytes | None, error: Error | None, body: Mapping[str, Any]) -> Run | None:
        """The answer to a fetch: the run whose outcomes will come, None if they will not."""
        if error is None and body["is_handed"]:
            run_id: bytes = body["id"]
            run = self.flight.runs.get(run_id)
            if (run is None and not self.flight.revive(run_id)) or run_id in self.strays:
                self.credit.spend(*body["uses"])
            self.strays.discard(run_id)
            if run is None:
                run = self.flight.runs[run_id] = Run.fetched(run_id, body["kernel"], body["rows"])
            return run
        stray = self.flight.runs.get(id_) if id_ is not None and id_ in self.strays else None
        if stray is not None:
            self.strays.discard(stray.id)
            error = error or Error(Code.UNAVAILABLE, f"client {body['client']!r} has this task now")
            self.end_rows(stray, 0, stray.num_rows, error)
        return None

    def take_results(self, m: protocol.Results) -> bool:
        """Whether all of it is of runs that are open here."""
        self.credit.grant(m.credit)
        is_known = True
        for outcome in m.outcomes:
            is_known = self._take_outcome(outcome) and is_known
        if self.backlog.pending and self.is_idle:
            self.backlog.flush()
        return is_known

    def _take_outcome(self, outcome: Outcome) -> bool:
        is_known = True
        base, times, block, runs = 0, outcome.queue_ms, outcome.block, self.flight.runs
        for i, (id_, start, stop) in enumerate(outcome.spans):
            run = runs.get(id_)
            if run is not None:
                fits = 0 <= start < stop <= run.num_rows and (block is None or base + stop - start <= block.num_rows)
                if not fits or (block is None and outcome.error is None):
                    self._fault(f"the broker sent an outcome for rows {start} to {stop} that does not fit")
                    return is_known
                part = Part(start, base, block, outcome.error, times[i] if i < len(times) else None, outcome)
                self._settle(run, start, stop, part)
            else:
                self.flight.answered(id_, stop - start)
                is_known = False
            base += stop - start
        return is_known

    def take_partials(self, m: protocol.Partial) -> None:
        for outcome in m.outcomes:
            for i, (id_, start, _) in enumerate(outcome.spans):
                run = self.flight.runs.get(id_)
                if run is not None and run.wants_partials and outcome.block is not None:
                    run.chunks.append(Part(start, i, outcome.block, outcome=outcome))
                    self.news.tell(run)

    def accepted(self, m: protocol.Accepted) -> None:
        run = self.flight.runs.get(m.id)
        if run is not None:
            run.accepted = True
            self.news.tell(run)

    def refused(self, m: protocol.Refused, now: float) -> None:
        run = self.flight.runs.get(m.id)
        sizes = [(run.num_rows, run.nbytes)] if run is not None else self.flight.take_unknown({m.id})
        for num_rows, nbytes in sizes:
            self.credit.take_back(num_rows, nbytes)
        if run is not None:
            self._refused(run, m.error, now)
        if self.backlog.pending and self.is_idle:
            self.backlog.flush()

    def _refused(self, run: Run, error: Error, now: float) -> None:
        if error.code == Code.UNSHARED and run.block is not None and run.block.has_shared:
            run.block = run.block.copied()
            self._come_back(run)
            return
        if error.code == Code.OVERLOADED and self.credit.can_cover(run.num_rows, run.nbytes):
            next_step = self._retries.refused(run, error, now)
            if isinstance(next_step, Rest):
                run.rest = next_step
                self._come_back(run, next_step.until)
                return
            error = next_step
        self.end_rows(run, 0, run.num_rows, error)

    # --- ends ------------------------------------------------------------------------------------------------------

    def end_rows(self, run: Run, start: int, stop: int, error: Error) -> None:
        """Rows that the broker has no say in any more."""
        self._settle(run, start, min(stop, run.num_rows), Part(start, error=error))

    def _settle(self, run: Run, start: int, stop: int, part: Part) -> None:
        if run.settle(start, stop, part):
            if run.num_open == 0:
                self._close(run)
            self.news.tell(run)

    def _close(self, run: Run) -> None:
        if run.state == SENT:
            del self.flight.runs[run.id]
        elif run.state in (PENDING, WAITING):
            self.backlog.remove(run)
        self.deadlines.remove(run)
        self.news.closed(run)
        run.close()

    def expire(self, now: float) -> None:
        """End what is over; what the broker has may wait a little longer for its word."""
        for run in self.deadlines.take_due(now):
            if run.state == SENT and now < run.deadline + self._grace_s:
                self.deadlines.add(run, run.deadline + self._grace_s)
                continue
            where = "it still waited in the client"
            if run.rest is not None:
                where = f"the broker had no room: {run.rest.error.message}"
            if run.state == SENT:
                self.flight.haunt(run)
                where = "the broker has not answered"
            self.end_rows(run, 0, run.num_rows, Error(Code.DEADLINE, f"the time limit is over; {where}"))

    def end(self, error: Error, final_error: Error) -> None:
        """Everything open ends with `error`, and whatever comes later with `final_error`."""
        self.final_error = final_error
        for run in [*self.flight.runs.values(), *self.backlog.runs()]:
            self.end_rows(run, 0, run.num_rows, error)
        self.backlog.clear()
        self.news.num_events += 1

    def check(self) -> None:
        for part in (self.backlog, self.flight, self.deadlines):
            part.check()
        for run in (*self.backlog.runs(), *self.flight.runs.values()):
            assert (run.entry is None) == (run.deadline == math.inf)


def says_whose(body: Mapping[str, Any]) -> bool:
    """Whether the reply to a `fetch` says all that `Submissions.fetched` needs."""
    id_, rows, uses = body.get("id"), body.get("rows"), body.get("uses")
    return (
        isinstance(id_, bytes) and len(id_) == protocol.ID_BYTES and type(rows) is int and 0 < rows <= MAX_ROWS
        and isinstance(uses, list) and len(uses) == 2 and all(type(n) is int and 0 <= n <= protocol.MAX_COUNT for n in uses)
        and type(body.get("is_handed")) is bool and isinstance(body.get("kernel"), str) and isinstance(body.get("client"), str)
    )  # fmt: skip

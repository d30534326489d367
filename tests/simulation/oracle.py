"""The observer outside: what was submitted, started, promised and told, and whether that is as the README says.

Sees messages at the broker's door, records as they become safe, rows as kernels begin them, and what users are told. Knows no
inner state of anybody. Whatever is not as promised is a `Violation` that names the invariant.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgpack

from penstock.broker import protocol as p
from penstock.broker.kept import DIED, KNOWN, OF_REQUEST, OUTCOME, TAKEN
from penstock.broker.protocol import Code
from penstock.broker.storage.records import Put
from penstock.broker.wire import decode
from simulation.tasks import ONCE, POISON, Task, kind_of, result_of, shown_row
from simulation.timeline import Timeline

Name = tuple[str, bytes]
"""(principal, idempotency key)."""
MAX_ATTEMPTS = 2
HOPELESS = "cannot finish"
TAKEN_OVER = "has taken this task over"
TOO_SHORT = "ahead of it"
_OWN = {Code.CANCELLED, Code.DEADLINE}
"""Ends that are a submission's own, and not of others with its key."""


class Violation(AssertionError):
    """A promise is broken."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


class Oracle:
    """See the module."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.wall_offset = self._min_offset = 1e9
        self._jumped = 0.0  # forward, at most, between any two times
        self.tasks: dict[Name, Task] = {}
        self._of_row: dict[bytes, Task] = {}
        self._names: dict[bytes, Name] = {}
        self._before: set[Name] = set()
        self._is_durable: set[Name] = set()
        self._refused: set[bytes] = set()
        self._deadlines: dict[bytes, float] = {}
        self._starts: defaultdict[bytes, int] = defaultdict(int)
        self._said: defaultdict[bytes, set[str]] = defaultdict(set)
        self._leases: dict[int, list[bytes]] = {}
        self._alone: defaultdict[bytes, set[int]] = defaultdict(set)
        self._assigned: set[bytes] = set()
        self._numbers: dict[int, Name] = {}
        self._safe: dict[Name, set[int]] = {}
        self.counts: defaultdict[str, int] = defaultdict(int)

    # --- what users and kernels do ---------------------------------------------------------------------------------

    def wanted(self, task: Task) -> None:
        """A user has thought of a task."""
        assert task.options.key is not None
        self.tasks[task.owner, task.options.key] = task
        for row in task.rows:
            self._of_row[row] = task
        self.counts["tasks"] += 1

    def started(self, rows: list[bytes]) -> None:
        """A kernel has begun with these rows."""
        for row in rows:
            task = self._of_row.get(row)
            if task is None:
                raise Violation("never submitted", f"a kernel was given {row!r}")
            self._starts[row] += 1
            if task.kernel == ONCE and self._starts[row] > 1 and not (task.is_spoiled or task.is_forgotten):
                text = f"{shown_row(row)} of a kernel that is not idempotent was started {self._starts[row]} times"
                raise Violation("run again", text)
        self.counts["started"] += len(rows)

    def answered(self, row: bytes, what: str) -> None:
        """A kernel's answer to a row: done or failed."""
        self._said[row].add(what)

    # --- the broker's door -----------------------------------------------------------------------------------------

    def received(self, message: Any, principal: str) -> None:
        """A message that the broker acts upon. The principal of a submission is that of its connection."""
        now = self._timeline.now
        if isinstance(message, p.Submit):
            name = (principal, message.key or message.id)
            is_new = message.id not in self._names or message.id in self._refused
            self._refused.discard(message.id)
            if is_new and name in self._before and name not in self._is_durable and name in self.tasks:
                self.tasks[name].is_forgotten = True
            self._names[message.id] = name
            if message.is_durable:
                self._is_durable.add(name)
            due = float("inf") if message.timeout_ms is None else now + message.timeout_ms / 1000.0
            for index in range(message.block.num_rows):
                row = bytes(message.block.row(0, index))
                self._deadlines[row] = max(self._deadlines.get(row, 0.0), due)
        elif isinstance(message, p.WorkerFinal):
            rows = self._leases.get(message.lease)
            if rows is not None and len(rows) == 1:
                self._alone[rows[0]].discard(message.lease)

    def voided(self, tokens: list[int]) -> None:
        """The broker that gave out these leases is gone; nobody died of them, and nobody knows what was not durable."""
        self._before.update(self._names.values())
        for token in tokens:
            for row in self._leases.get(token, ()):
                self._alone[row].discard(token)

    def clock_jumped(self, by: float) -> None:
        """Time limits of durable tasks go by the wall clock."""
        self.wall_offset += by
        self._jumped = max(self._jumped, self.wall_offset - self._min_offset)
        self._min_offset = min(self._min_offset, self.wall_offset)
        for name in self._is_durable:
            task = self.tasks[name]
            for row in task.rows:
                self._deadlines[row] = self._deadlines.get(row, 0.0) + max(-by, 0.0)

    def decided(self, message: Any) -> None:
        """What the core asks to be sent."""
        if isinstance(message, p.Results):
            self._note_own_ends(message)
        elif isinstance(message, p.Refused):
            self._refused.add(message.id)
        if not isinstance(message, p.Assign):
            return
        rows = [bytes(block.row(0, i)) for block in message.blocks for i in range(block.num_rows)]
        if message.lease in self._leases:
            raise Violation("lease used twice", f"{message.lease}")
        self._leases[message.lease] = rows
        for row in rows:
            task = self._of_row.get(row)
            if task is None or task.kernel != message.kernel:
                raise Violation("never submitted", f"assigned to {message.kernel}: {row!r}")
            if self._deadlines[row] + 1e-6 < self._timeline.now:
                raise Violation("leased late", f"{shown_row(row)} after its time limit")
        self._assigned.update(rows)
        if len(rows) == 1:
            self._alone[rows[0]].add(message.lease)

    def _note_own_ends(self, results: p.Results) -> None:
        """Who cancels, or runs out of time, gives up its own submission: one that came later with its key then starts anew."""
        for outcome in results.outcomes:
            if outcome.error is not None and outcome.error.code in _OWN:
                for task in (self.tasks[self._names[run_id]] for run_id, _, _ in outcome.spans if run_id in self._names):
                    task.is_spoiled = task.is_spoiled or task.is_twin

    def sent(self, message: Any, principal: str) -> None:
        """What leaves the broker for a client of this principal."""
        if isinstance(message, p.Accepted):
            name = self._own(message.id, principal)
            if message.is_durable and name not in self._safe:
                raise Violation("early promise", f"{self.tasks[name].name} was called accepted before it was safe")
        elif isinstance(message, p.Results):
            for outcome in message.outcomes:
                for run_id, start, stop in outcome.spans:
                    self._check_sent(self._own(run_id, principal), range(start, stop), outcome.error)

    def _own(self, run_id: bytes, principal: str) -> Name:
        name = self._names.get(run_id)
        if name is None:
            raise Violation("never submitted", f"{principal} is told of {run_id.hex()}")
        if name[0] != principal:
            raise Violation("wrong owner", f"{principal} is told of {self.tasks[name].name}")
        return name

    def _check_sent(self, name: Name, rows: range, error: p.Error | None) -> None:
        if error is not None and (TAKEN_OVER in error.message or (self.tasks[name].is_twin and error.code in _OWN)):
            return
        if name in self._is_durable and not self._safe.get(name, set()).issuperset(rows):
            raise Violation("early promise", f"the outcome of {self.tasks[name].name}{list(rows)} left before it was safe")

    # --- the journal -----------------------------------------------------------------------------------------------

    def put(self, put: Put) -> None:
        """A record is safe."""
        if put.kind == TAKEN:
            submit = decode(p.FROM_CLIENT, put.frames[1:])
            assert isinstance(submit, p.Submit)
            row = bytes(submit.block.row(0, 0))
            task = self._of_row[row]
            name = (task.owner, submit.key or submit.id)
            if self.tasks.get(name) is not task or name in self._safe:
                raise Violation("recorded twice", f"{task.name} was taken into the journal again, or under another key")
            self._numbers[put.task] = name
            self._safe[name] = set()
            return
        name = self._numbers.get(put.task)
        if name is None:
            raise Violation("lost", f"a record of task {put.task}, which is not in the journal")
        if put.kind == OUTCOME:
            results = decode(p.TO_CLIENT, put.frames[1:])
            for outcome in results.outcomes:
                for _, start, stop in outcome.spans:
                    if not self._safe[name].isdisjoint(range(start, stop)):
                        raise Violation("recorded twice", f"rows {start} to {stop} of {self.tasks[name].name}")
                    self._safe[name].update(range(start, stop))
        elif put.kind == DIED:
            start, _, count, *_ = msgpack.unpackb(bytes(put.frames[0]))
            row = self.tasks[name].rows[start]
            if count > (num_lost := len(self._alone[row])):
                raise Violation("blamed", f"{shown_row(row)}: {count} deaths, and {num_lost} leases alone were lost")
        elif put.kind == KNOWN and not self.tasks[name].is_over:
            raise Violation("acknowledged unseen", self.tasks[name].name)

    def erased(self, number: int, kinds: Sequence[int]) -> None:
        """Records of a task are gone: those of what was asked, when it is over and acknowledged, and no others."""
        if kinds and set(kinds) <= set(OF_REQUEST) and self.tasks[self._numbers[number]].is_over:
            return
        raise Violation("erased", f"{self.tasks[self._numbers[number]].name} within its window")

    # --- what users are told ---------------------------------------------------------------------------------------

    def told(self, task: Task, row: int, block: Any, base: int, error: p.Error | None, is_brokers: bool) -> None:
        """A user has the outcome of a row for the first time at a client; `is_brokers`: it is the broker's word."""
        now, data = self._timeline.now, task.rows[row]
        where = f"{shown_row(data)} of {task.kernel}"
        if error is None:
            value: bytes | str = bytes(block.row(0, base))
            if value != result_of(data):
                raise Violation("wrong answer", where)
            if "done" not in self._said[data]:
                raise Violation("wrong answer", f"{where}: no kernel gave it")
        else:
            value = error.code
            self._check_error(task, data, error, now, where)
        before = task.told.get(row)
        task.told.setdefault(row, value)
        is_own = task.is_twin and {before, value} & _OWN  # of one submission, not of its twin
        if row in task.recorded and is_brokers and task.options.is_durable and before != value and not is_own:
            raise Violation("two outcomes", f"{where}: {before!r}, then {value!r}")
        if is_brokers:
            task.recorded.add(row)
            task.told[row] = value
        self.counts["done" if error is None else error.code] += 1

    def _check_error(self, task: Task, row: bytes, error: p.Error, now: float, where: str) -> None:
        code, is_legal = error.code, False
        if code == Code.FAILED:
            is_legal = "failed" in self._said[row]
        elif code == Code.DEAD:
            is_legal = task.kernel != ONCE and len(self._alone[row]) >= MAX_ATTEMPTS
        elif code == Code.WORKER_LOST:
            is_legal = task.kernel == ONCE and row in self._assigned
        elif code == Code.CANCELLED:
            is_legal = task.is_cancelled or task.is_spoiled
        elif code == Code.DEADLINE:
            is_legal = self._is_due(task, now) or HOPELESS in error.message or TOO_SHORT in error.message
        elif code == Code.UNAVAILABLE:
            is_legal = task.kernel == ONCE or TAKEN_OVER in error.message
        elif code in (Code.OVERLOADED, Code.UNKNOWN_KERNEL):
            is_legal = not task.is_accepted or (task.is_twin and code == Code.OVERLOADED)
        elif code == Code.CONFLICT:
            is_legal = task.num_asked > 1 and task.options.is_durable
        if not is_legal:
            raise Violation("wrong error", f"{where}: {code}: {error.message}")

    def _is_due(self, task: Task, now: float) -> bool:
        timeout = task.options.timeout
        if timeout is None:
            return False
        is_due = now + 1e-6 >= task.submitted_at + timeout
        return is_due or (task.options.is_durable and now + self._jumped + 1e-6 >= task.submitted_at + timeout)

    def is_poison(self, row: bytes) -> bool:
        return kind_of(row) in POISON

    def lost(self, task: Task, what: str) -> Violation:
        return Violation("lost", f"{task.name}, which was accepted: {what}")

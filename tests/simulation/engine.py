"""A device that computes checksums: what `Work` needs of an engine, without torch.

Knows what rows do to a kernel, and how long it takes; a batch in which one raises is run again row by row, as the real runner
does. Does not know messages. Batches go one after another, or several in flight.
"""

from collections import deque
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from penstock.broker.columns import Block, pack
from penstock.broker.protocol import Answer, Assign, Code, Error
from simulation.oracle import Oracle
from simulation.tasks import BREAKS, HANGS, KILLS, ONCE, OUT, RAISES, SHARED, kind_of, result_of, spec
from simulation.timeline import Timeline


class Clock:
    """The times of one batch, as they travel."""

    def __init__(self, took_s: float, num_runs: int) -> None:
        self.load_ms = self.h2d_ms = self.d2h_ms = 0.0
        self.compute_ms = 1e3 * took_s
        self._num_runs = num_runs

    def timings(self) -> dict[str, float]:
        return {"compute_ms": self.compute_ms} | ({"num_runs": self._num_runs} if self._num_runs != 1 else {})


class Run:
    """A batch in a kernel: when it began, how long it takes, and how it ends."""

    def __init__(self, assign: Assign, began_at: float, took_s: float) -> None:
        self.assign = assign
        self.rows = rows_of(assign)
        self.began_at, self.took_s = began_at, took_s
        self.kinds = {kind_of(row) for row in self.rows}
        self.is_broken = BREAKS in self.kinds

    @property
    def kills(self) -> bool:
        return KILLS in self.kinds

    @property
    def hangs(self) -> bool:
        return HANGS in self.kinds

    @property
    def ends_at(self) -> float:
        return self.began_at + self.took_s


class Engine:
    """See the module.

    Args:
        num_slots: batches in flight; 0: one after another.
    """

    def __init__(self, timeline: Timeline, oracle: Oracle, num_slots: int, max_batch_size: int) -> None:
        self._timeline, self._oracle = timeline, oracle
        self.facts: Mapping[str, Any] = {"device": "simulated"}
        self.specs = [spec(name, max_batch_size) for name in (SHARED, ONCE)]
        plans = {name: SimpleNamespace(is_idempotent=name != ONCE) for name in (SHARED, ONCE)}
        self.runner = SimpleNamespace(resident={}, plans=plans)
        self.streams = NoStreams()
        self.pins = SimpleNamespace(unpin=lambda segments: None)
        self.flights = Flights(self, num_slots) if num_slots else None
        self.on_begin: Callable[[Run], None] = lambda run: None
        """Is told of a batch that has begun, and when it will be through."""
        self.current: Run | None = None
        self.slowness = 1.0
        self.breaks_next = False

    def begin(self, assign: Assign) -> Run:
        """A kernel starts with a batch."""
        random = self._timeline.random
        took_s = random.choice((0.0005, 0.003, 0.01, 0.04)) * random.uniform(0.5, 1.5) * self.slowness
        run = Run(assign, self._timeline.now, took_s)
        run.is_broken, self.breaks_next = run.is_broken or self.breaks_next, False
        self._oracle.started(run.rows)
        self._timeline.note("kernel", f"begins lease {assign.lease & 0xFFFFFFFF} of {len(run.rows)} rows")
        return run

    def run(self, assign: Assign, received_at: float) -> tuple[list[Answer], Clock, Any]:
        """What `Engine.run` gives, at the end of the batch that began before."""
        run, self.current = self.current, None
        assert run is not None
        assert run.assign is assign
        return self.end(run)

    def running(self) -> list[Run]:
        """The batches that the device is at."""
        if self.flights is not None:
            return list(self.flights._flying)
        return [] if self.current is None else [self.current]

    def end(self, run: Run) -> tuple[list[Answer], Clock, Any]:
        """The answers of a batch; and the fault after which the process must end, if there was one."""
        is_once, num_rows = run.assign.kernel == ONCE, len(run.rows)
        fault, answers = None, list[Answer]()
        if run.is_broken:
            fault = SimpleNamespace(error=Error(Code.FAILED, "the device is broken"))
            if is_once:
                answers = [Answer(0, num_rows, error=fault.error)]
        elif RAISES not in run.kinds:
            answers = [Answer(0, num_rows, _block(run.rows))]
        elif is_once:
            answers = [Answer(0, num_rows, error=Error(Code.FAILED, "it raised; not run again"))]
        else:
            answers = [_answer_alone(index, row) for index, row in enumerate(run.rows)]
        for answer in answers:
            for row in run.rows[answer.start : answer.stop]:
                self._oracle.answered(row, "done" if answer.error is None else "failed")
        return answers, Clock(run.took_s, 1 if len(answers) < 2 else 1 + 2 * num_rows), fault

    def memory(self) -> dict[str, float]:
        return {"used_fraction": 0.1}


def _answer_alone(index: int, row: bytes) -> Answer:
    if kind_of(row) == RAISES:
        return Answer(index, index + 1, error=Error(Code.FAILED, "it raised"))
    return Answer(index, index + 1, _block([row]))


def _block(rows: list[bytes]) -> Block:
    return pack([(OUT, None, [result_of(row) for row in rows])], len(rows))


def rows_of(assign: Assign) -> list[bytes]:
    return [bytes(block.row(0, row)) for block in assign.blocks for row in range(block.num_rows)]


class NoStreams:
    """A device on which nothing streams."""

    kernels: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return 0

    def cancel(self, lease: int) -> None:
        return

    def clear(self) -> None:
        return


class Flights:
    """Batches in flight, which land in order."""

    def __init__(self, engine: Engine, num_slots: int) -> None:
        self._engine = engine
        self._timeline = engine._timeline
        self._flying: deque[Run] = deque()
        self.pipeline = SimpleNamespace(num_slots=num_slots, num_stalls=0, has_room=True)

    def __len__(self) -> int:
        return len(self._flying)

    @property
    def has_room(self) -> bool:
        self.pipeline.has_room = len(self._flying) < self.pipeline.num_slots
        return self.pipeline.has_room

    @property
    def kernels(self) -> set[str]:
        return {run.assign.kernel for run in self._flying}

    def take(self, assign: Assign, received_at: float) -> None:
        run = self._engine.begin(assign)
        if self._flying:
            run.began_at = max(run.began_at, self._flying[-1].ends_at)
        self._flying.append(run)
        self._engine.on_begin(run)

    def is_done(self) -> bool:
        return bool(self._flying) and not self._flying[0].hangs and self._flying[0].ends_at <= self._timeline.now

    def landed(self) -> list[Any]:
        done = []
        while self.is_done():
            run = self._flying.popleft()
            answers, clock, fault = self._engine.end(run)
            done.append(
                SimpleNamespace(lease=run.assign.lease, answers=answers, clock=clock, fault=fault, release=lambda: None)
            )
            if fault is not None:
                break
        return done

    def forget(self) -> None:
        """Nobody waits for the answers; what is on the device runs on."""
        self._flying = deque(run for run in self._flying if run.hangs or run.kills)

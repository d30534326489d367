"""The command queue on a simulated device: order, slots, what it says of itself; and that the simulation finds mistakes."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from simulated_device import SimStream, SimTimeline

from penstock.worker.devices.timeline import HostTimeline
from penstock.worker.overlap import Overlap, Spans
from penstock.worker.pipeline import Pipeline

EMPTY = -1


class Slots:
    """Memory that jobs share, three cells for each slot; a cell that is not what it must be was read or written too soon."""

    def __init__(self, num_slots: int) -> None:
        self.free = list(range(num_slots))
        self.sent, self.computed, self.returned = ([EMPTY] * num_slots for _ in range(3))


class Numbered:
    """A job that takes its number there and back, times ten."""

    def __init__(self, slots: Slots, number: int) -> None:
        self.slots, self.number = slots, number
        self.slot = slots.free.pop()

    def copy_in(self) -> None:
        assert self.slots.sent[self.slot] == EMPTY, "a slot in flight was overwritten"
        self.slots.sent[self.slot] = self.number

    def compute(self) -> None:
        self.slots.computed[self.slot] = self.slots.sent[self.slot] * 10

    def copy_out(self) -> None:
        self.slots.returned[self.slot] = self.slots.computed[self.slot]

    def result(self) -> int:
        slots, i = self.slots, self.slot
        found = slots.returned[i]
        slots.sent[i] = slots.computed[i] = slots.returned[i] = EMPTY
        slots.free.append(i)
        return found


def drive(seed: int, num_slots: int, num_jobs: int = 12) -> list[int]:
    """The results of so many jobs, submitted whenever there is room."""
    timeline = SimTimeline(seed)
    pipeline: Pipeline[Numbered] = Pipeline(timeline, num_slots)
    slots, results = Slots(num_slots), list[int]()
    for number in range(num_jobs):
        while not pipeline.has_room or (pipeline.num_in_flight and pipeline.is_done()):
            results.append(pipeline.take()[0].result())
        assert pipeline.submit(Numbered(slots, number))
    while pipeline.num_in_flight:
        results.append(pipeline.take()[0].result())
    return results


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_results_come_in_order_and_are_those_of_their_jobs(num_slots: int) -> None:
    for seed in range(100):
        assert drive(seed, num_slots) == [number * 10 for number in range(12)]


def without_waits(which: str) -> Callable[[SimStream, object], None]:
    def wait(stream: SimStream, event: object) -> None:
        if stream.name != which:
            whole(stream, event)

    whole = SimStream.wait
    return wait


@pytest.mark.parametrize("which", ["compute", "d2h"])
def test_a_forgotten_wait_is_found(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimStream, "wait", without_waits(which))
    found = 0
    for seed in range(20):
        try:
            found += drive(seed, 3) != [number * 10 for number in range(12)]
        except AssertionError:
            found += 1
    assert found > 5


def test_a_slot_taken_too_soon_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline with one slot more than there is memory: the next job's copy in runs into the one before."""
    found = 0
    for seed in range(20):
        pipeline: Pipeline[Numbered] = Pipeline(SimTimeline(seed), 3)
        slots = Slots(2)
        try:
            for number in range(3):
                slots.free = slots.free or [0]
                pipeline.submit(Numbered(slots, number))
            found += [pipeline.take()[0].slots.returned[0] for _ in range(3)] != [0, 0, 20]
        except AssertionError as e:
            found += "overwritten" in str(e)
    assert found > 10


def test_a_full_queue_refuses_and_counts() -> None:
    pipeline: Pipeline[Numbered] = Pipeline(SimTimeline(), 2)
    slots = Slots(3)
    assert pipeline.submit(Numbered(slots, 0))
    assert pipeline.submit(Numbered(slots, 1))
    job = Numbered(slots, 2)
    assert not pipeline.submit(job)
    assert pipeline.num_stalls == 1
    assert pipeline.num_in_flight == pipeline.num_submitted == 2
    assert pipeline.take()[0].number == 0
    assert pipeline.submit(job)
    assert [pipeline.take()[0].number for _ in range(2)] == [1, 2]
    with pytest.raises(IndexError):
        pipeline.take()
    assert not pipeline.is_done()


def test_a_device_computes_while_it_copies() -> None:
    took = {"h2d": 2.0, "compute": 5.0, "d2h": 1.0}
    timeline = SimTimeline(duration_ms=lambda name: took[name])
    pipeline: Pipeline[Numbered] = Pipeline(timeline, 3)
    slots = Slots(3)
    for number in range(50):
        if not pipeline.has_room:
            _, times = pipeline.take()
            assert (times.h2d_ms, times.compute_ms, times.d2h_ms) == pytest.approx((2.0, 5.0, 1.0))
            slots.free.append(0)
            slots.sent[:] = [EMPTY] * 3
        slots.free = slots.free or [0]
        assert pipeline.submit(Numbered(slots, number))
    while pipeline.num_in_flight:
        pipeline.take()
    assert timeline.now_ms == pytest.approx(2.0 + 50 * 5.0 + 1.0)
    assert pipeline.efficiency == pytest.approx(250.0 / 253.0)
    # All copies are hidden but the first one in and the last one out.
    assert pipeline.overlap == pytest.approx(1.0 - 3.0 / (50 * 3.0), abs=0.03)
    numbers = pipeline.numbers()
    assert (numbers["queue_submitted"], numbers["queue_completed"], numbers["queue_in_flight"]) == (50, 50, 0)


def test_one_slot_overlaps_nothing() -> None:
    pipeline: Pipeline[Numbered] = Pipeline(SimTimeline(duration_ms=lambda name: 1.0), 1)
    slots = Slots(1)
    for number in range(10):
        pipeline.submit(Numbered(slots, number))
        assert pipeline.take()[0].result() == number * 10
    assert pipeline.overlap == 0.0
    assert pipeline.efficiency == pytest.approx(1 / 3)


def test_an_idle_device_is_not_an_inefficient_one() -> None:
    timeline = SimTimeline(duration_ms=lambda name: 1.0 if name == "compute" else 0.0)
    pipeline: Pipeline[Numbered] = Pipeline(timeline, 2)
    assert (pipeline.efficiency, pipeline.overlap) == (None, None)
    slots = Slots(2)
    for number in range(5):
        pipeline.submit(Numbered(slots, number))
        pipeline.take()[0].result()
        timeline.now_ms += 1000.0
    assert pipeline.efficiency == pytest.approx(1.0)


class Failing(Numbered):
    def compute(self) -> None:
        raise ValueError("no")


def test_a_step_that_raises_leaves_what_was_before() -> None:
    """On a host, as on cuda, the steps themselves are called at once."""
    pipeline: Pipeline[Numbered] = Pipeline(HostTimeline(), 2)
    slots = Slots(3)
    pipeline.submit(Numbered(slots, 1))
    for _ in range(5):
        slots.free = [2]
        slots.sent[2] = EMPTY
        with pytest.raises(ValueError, match="no"):
            pipeline.submit(Failing(slots, 2))
    assert (pipeline.num_in_flight, pipeline.num_submitted, pipeline.num_completed) == (1, 6, 5)
    assert pipeline.take()[0].result() == 10
    assert pipeline.submit(Numbered(slots, 3))


def test_a_broken_device_stays_broken() -> None:
    timeline = SimTimeline()
    pipeline: Pipeline[Numbered] = Pipeline(timeline, 3)
    slots = Slots(3)
    pipeline.submit(Numbered(slots, 0))
    pipeline.submit(Failing(slots, 1))
    pipeline.submit(Numbered(slots, 2))
    taken = list[int]()

    def take_all() -> None:
        while True:
            taken.append(pipeline.take()[0].number)

    for look in (take_all, pipeline.is_done):
        with pytest.raises(ValueError, match="no"):
            look()
    assert taken + [job.number for job in pipeline.abandon()] == [0, 1, 2]
    assert pipeline.num_in_flight == 0


def test_the_host_is_at_once() -> None:
    pipeline: Pipeline[Numbered] = Pipeline(HostTimeline(), 3)
    slots = Slots(3)
    for number in range(3):
        pipeline.submit(Numbered(slots, number))
        assert pipeline.is_done()
    assert [pipeline.take()[0].result() for _ in range(3)] == [0, 10, 20]


class Queue(RuleBasedStateMachine):
    """Any order of submitting, asking and taking, on a device of any speed."""

    def __init__(self) -> None:
        super().__init__()
        self.timeline = SimTimeline(7)
        self.pipeline: Pipeline[Numbered] = Pipeline(self.timeline, 3)
        self.slots = Slots(3)
        self.next = self.due = self.num_refused = 0

    @rule()
    def submit(self) -> None:
        has_room = self.pipeline.has_room
        if not has_room:
            self.slots.free.append(99)  # never reached
        job = Numbered(self.slots, self.next)
        assert self.pipeline.submit(job) == has_room
        self.next += has_room
        self.num_refused += not has_room

    @rule()
    def ask(self) -> None:
        assert not self.pipeline.is_done() or self.pipeline.num_in_flight

    @precondition(lambda self: self.pipeline.num_in_flight)
    @rule()
    def take(self) -> None:
        job, times = self.pipeline.take()
        assert (job.number, job.result()) == (self.due, self.due * 10)
        assert min(times.h2d_ms, times.compute_ms, times.d2h_ms) >= 0.0
        self.due += 1

    @rule(steps=st.integers(1, 9))
    def pass_time(self, steps: int) -> None:
        for _ in range(steps):
            self.timeline.step()

    @invariant()
    def counts(self) -> None:
        p = self.pipeline
        assert p.num_submitted - p.num_completed == p.num_in_flight <= p.num_slots
        assert (p.num_completed, p.num_stalls) == (self.due, self.num_refused)
        assert len(self.slots.free) == p.num_slots - p.num_in_flight
        assert p.overlap is None or 0.0 <= p.overlap <= 1.0 + 1e-9
        assert p.efficiency is None or 0.0 <= p.efficiency <= 1.0


TestQueue = Queue.TestCase


def brute_force(jobs: list[Spans], step: float = 0.25) -> tuple[float, float, float]:
    """The same sums by looking at every moment."""
    def covers(spans: list[tuple[float, float]], t: float) -> bool:
        return any(begin <= t < end for begin, end in spans)

    copies = [span for job in jobs for span in (job.h2d, job.d2h)]
    computes = [job.compute for job in jobs]
    moments = [i * step for i in range(int(max(end for _, end in copies) / step) + 1)]
    copying = [covers(copies, t) for t in moments]
    computing = [covers(computes, t) for t in moments]
    both = sum(a and b for a, b in zip(copying, computing, strict=True))
    return sum(copying) * step, sum(computing) * step, both * step


@given(
    durations=st.lists(st.tuples(*[st.integers(0, 12)] * 4), min_size=1, max_size=25),
    num_slots=st.integers(1, 4),
)
def test_overlap_is_exact_whatever_the_order_of_times(durations: list[tuple[int, ...]], num_slots: int) -> None:
    """Jobs as a pipeline of `num_slots` runs them, with pauses of the host, in quarters of a ms."""
    jobs = list[Spans]()
    for h2d, compute, d2h, pause in durations:
        before = jobs[-1] if jobs else Spans((0, 0), (0, 0), (0, 0))
        room = jobs[-num_slots].d2h[1] if len(jobs) >= num_slots else 0.0
        a = max(before.h2d[1], room + pause / 4)
        b = max(before.compute[1], a + h2d / 4)
        c = max(before.d2h[1], b + compute / 4)
        jobs.append(Spans((a, a + h2d / 4), (b, b + compute / 4), (c, c + d2h / 4)))
    assert all(one.d2h[1] <= other.d2h[1] for one, other in pairwise(jobs))
    overlap = Overlap(num_slots)
    for job in jobs:
        overlap.add(job)
    overlap.rest()
    assert (overlap.copy_ms, overlap.compute_ms, overlap.both_ms) == pytest.approx(brute_force(jobs))

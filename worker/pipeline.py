"""The command queue of a device: jobs are copied in, computed and copied out on three streams, several at a time.

    h2d      |in 1|in 2|    |in 3|
    compute       |   1   |   2   |   3   |
    d2h                   |out 1| |out 2| |out 3|

A job has a slot from its submission until its result has arrived; compute waits for the copy in, the copy out for
compute, and a slot's next job for the end of the copy out, so that nothing has to be locked or recorded elsewhere. A full
queue refuses. Knows order and times; does not know batches, memory or what a job computes. One thread uses it.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from penstock.worker.devices.timeline import Event, Stream, Timeline
from penstock.worker.overlap import Overlap, Spans


class Job(Protocol):
    """Three steps; each only enqueues, on the stream that is current when it is called, and each is called once.

    Everything that the steps touch lives until the job has come out of the pipeline.
    """

    def copy_in(self) -> None: ...

    def compute(self) -> None: ...

    def copy_out(self) -> None: ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, slots=True)
class Times:
    """What a job took on the device, waiting for others not included."""

    h2d_ms: float
    compute_ms: float
    d2h_ms: float


class _Marks:
    """The events of one job."""

    __slots__ = ("compute_begun", "compute_done", "d2h_begun", "d2h_done", "h2d_begun", "h2d_done")

    def __init__(self, timeline: Timeline) -> None:
        self.h2d_begun, self.h2d_done = timeline.event(), timeline.event()
        self.compute_begun, self.compute_done = timeline.event(), timeline.event()
        self.d2h_begun, self.d2h_done = timeline.event(), timeline.event()

    def spans(self) -> Spans:
        """In ms from the job's first moment."""
        zero = self.h2d_begun
        return Spans(
            (0.0, zero.ms_until(self.h2d_done)),
            (zero.ms_until(self.compute_begun), zero.ms_until(self.compute_done)),
            (zero.ms_until(self.d2h_begun), zero.ms_until(self.d2h_done)),
        )


class Pipeline(Generic[J]):
    """Jobs of one device, answered in the order in which they came.

    Args:
        num_slots: jobs in flight at most. Two hide the copies of jobs that compute longer than they copy; three also
            hide one direction behind the other.

    Attributes:
        num_submitted, num_completed: jobs that went in and came out; failed ones came out too.
        num_stalls: refusals, because all slots were in flight.
        compute, h2d: the streams, for work that must keep their order.
    """

    def __init__(self, timeline: Timeline, num_slots: int = 3) -> None:
        if num_slots < 1:
            raise ValueError(f"a pipeline needs a slot, not {num_slots}")
        self.num_slots = num_slots
        self.compute: Stream = timeline.compute_stream()
        self.h2d: Stream = timeline.stream()
        self.num_submitted = self.num_completed = self.num_stalls = 0
        self._d2h: Stream = timeline.stream()
        self._timeline = timeline
        # A job's events stay as they are until the job after it has come out: positions in time are measured from there.
        self._marks = deque(_Marks(timeline) for _ in range(num_slots + 1))
        self._in_flight: deque[tuple[J, _Marks]] = deque()
        self._overlap = Overlap(num_slots)
        self._last: tuple[Event, float] | None = None  # the first moment of the job that came out last, and when it was
        self._compute_ms = self._busy_s = 0.0
        self._busy_since = 0.0

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def jobs(self) -> list[J]:
        """Those in flight, the oldest first."""
        return [job for job, _ in self._in_flight]

    @property
    def has_room(self) -> bool:
        return len(self._in_flight) < self.num_slots

    def submit(self, job: J) -> bool:
        """Enqueue all steps of `job`; False, and counted as a stall, if no slot is free.

        Raises:
            whatever a step raises. Then the job is out, and nothing on the device touches its memory any more; jobs
            before it are done, and still to be taken.
        """
        if not self.has_room:
            self.num_stalls += 1
            return False
        marks = self._marks[0]
        if not self._in_flight:
            self._busy_since = self._timeline.now_s()
        self.num_submitted += 1
        try:
            self._enqueue(job, marks)
        except Exception:
            self.num_completed += 1
            self.finish()
            if not self._in_flight:
                self._rest()
            raise
        self._marks.rotate(-1)
        self._in_flight.append((job, marks))
        return True

    def _enqueue(self, job: Job, marks: _Marks) -> None:
        h2d, compute, d2h = self.h2d, self.compute, self._d2h
        h2d.record(marks.h2d_begun)
        h2d.run(job.copy_in)
        h2d.record(marks.h2d_done)
        compute.wait(marks.h2d_done)
        compute.record(marks.compute_begun)
        compute.run(job.compute)
        compute.record(marks.compute_done)
        d2h.wait(marks.compute_done)
        d2h.record(marks.d2h_begun)
        d2h.run(job.copy_out)
        d2h.record(marks.d2h_done)

    def is_done(self) -> bool:
        """Whether the oldest job has ended, so that `take` does not wait. Raises what the device has met."""
        return bool(self._in_flight) and self._in_flight[0][1].d2h_done.is_done()

    def take(self) -> tuple[J, Times]:
        """The oldest job, when it has ended, and its times. IndexError if there is none; raises what the device has met."""
        job, marks = self._in_flight[0]
        marks.d2h_done.wait()
        spans = marks.spans()
        self._in_flight.popleft()
        self.num_completed += 1
        times = Times(*(end - begin for begin, end in (spans.h2d, spans.compute, spans.d2h)))
        self._compute_ms += times.compute_ms
        first_ms = 0.0 if self._last is None else self._last[1] + self._last[0].ms_until(marks.h2d_begun)
        self._last = marks.h2d_begun, first_ms
        self._overlap.add(spans.moved(first_ms))
        if not self._in_flight:
            self._rest()
        return job, times

    def abandon(self) -> list[J]:
        """All jobs in flight, not waited for: the device is broken, or has been waited for (`finish`)."""
        jobs = self.jobs
        self._in_flight.clear()
        self.num_completed += len(jobs)
        if jobs:
            self._rest()
        return jobs

    def finish(self) -> None:
        """Wait until the device has done all that was enqueued. Raises what it has met."""
        for stream in (self.h2d, self.compute, self._d2h):
            stream.finish()

    def _rest(self) -> None:
        """Nothing is in flight."""
        self._busy_s += self._timeline.now_s() - self._busy_since
        self._overlap.rest()
        self._last = None  # a clock that counts from the device's start would lose its digits in days

    @property
    def efficiency(self) -> float | None:
        """The share of the time in which there was work that was spent in compute; None before the first job is out."""
        busy_s = self._busy_s + (self._timeline.now_s() - self._busy_since if self._in_flight else 0.0)
        return min(self._compute_ms / 1e3 / busy_s, 1.0) if busy_s > 0 and self._compute_ms > 0 else None

    @property
    def overlap(self) -> float | None:
        """The share of the shorter of copying and computing that the other hid; None before both have happened."""
        return self._overlap.ratio

    def numbers(self) -> dict[str, float]:
        """For heartbeats."""
        said: dict[str, float] = {
            "queue_submitted": self.num_submitted,
            "queue_completed": self.num_completed,
            "queue_in_flight": self.num_in_flight,
            "queue_stalls": self.num_stalls,
        }
        for name, ratio in (("queue_efficiency", self.efficiency), ("queue_overlap", self.overlap)):
            if ratio is not None:
                said[name] = ratio
        return said

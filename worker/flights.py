"""Batches in flight: the fast path of a device with streams. What goes wrong on it is solved as on any other device.

Knows which batches are under way, when another may begin, and what becomes of one that fails; does not know how a batch's
bytes move (`flight.py`), sockets or credit. One batch fails: what is in flight lands, then it is solved alone, run by run
(`Batch.solve`).
"""

import logging
from dataclasses import dataclass

import torch

from penstock.broker.columns import Block, view
from penstock.broker.protocol import Answer, Assign, Error
from penstock.worker.batch import Batch
from penstock.worker.clock import Clock
from penstock.worker.failures import Failure, describe
from penstock.worker.flight import Flight, Reused
from penstock.worker.outputs import to_block
from penstock.worker.pipeline import Pipeline, Times
from penstock.worker.pool import Buffer, Pool
from penstock.worker.runner import Runner

log = logging.getLogger("penstock.worker")


@dataclass(slots=True)
class Landed:
    """A batch that is through.

    Attributes:
        answers: all of its rows, once each; none if the device is broken: the broker finds out which rows are to blame.
        fault: after which this process must end.
        lent: where the answers lie; to be released when they have left.
    """

    lease: int
    answers: list[Answer]
    clock: Clock
    fault: Failure | None = None
    lent: Buffer | None = None

    def release(self) -> None:
        if self.lent is not None:
            self.lent.give_back()
            self.lent = None


class Flights:
    """The batches that a device works on at once.

    Args:
        runner: of the same device, and the way out when a batch fails.
        host: pinned buffers.
        device: buffers on the device, filled in the order of the pipeline's h2d stream.
    """

    def __init__(self, runner: Runner, pipeline: Pipeline[Flight], host: Pool, device: Pool) -> None:
        self.on = runner.device
        self.pipeline = pipeline
        self.host, self.device = host, device
        self._runner = runner
        self._landed: list[Landed] = []
        self._fault: Failure | None = None
        # Kernels that run with nothing else in flight: what must not run twice, what returns the same memory again, and
        # what is scanned, which looks at the outputs.
        self._alone = {name for name, plan in runner.plans.items() if not plan.is_idempotent} | set(runner.scans)

    def __len__(self) -> int:
        """Batches taken that have not come out."""
        return self.pipeline.num_in_flight + len(self._landed)

    @property
    def kernels(self) -> set[str]:
        """Those of the batches in flight, which may have to run again."""
        return {flight.batch.plan.name for flight in self.pipeline.jobs}

    @property
    def has_room(self) -> bool:
        """Whether another batch may begin: not before answers that are there have been taken."""
        return self.pipeline.has_room and not self._landed

    def take(self, assign: Assign, received_at: float) -> None:
        """Begin a batch; there must be room. It comes out of `landed`, whatever becomes of it.

        Args:
            received_at: `time.perf_counter()` when it came.
        """
        clock = Clock(received_at)
        clock.num_runs = 0
        num_rows = sum(block.num_rows for block in assign.blocks)
        with torch.inference_mode():
            prepared = self._runner.prepare(assign, clock)
            if isinstance(prepared, Error):
                self._landed.append(Landed(assign.lease, [Answer(0, num_rows, error=prepared)], clock))
                return
            plan, fixed = prepared
            batch = Batch(self._runner, plan, fixed, assign, num_rows, clock)
            is_flying, failure = (False, None) if plan.name in self._alone else self._launch(batch)
            if failure is not None and failure.is_device_fault:
                self._lose(failure, batch)
            elif not is_flying:
                self._drain()
                self._solve(batch, failure)

    def landed(self) -> list[Landed]:
        """What has come out since the last call; waits for nothing."""
        with torch.inference_mode():
            while self.pipeline.num_in_flight and self.is_done():
                self._land()
        out, self._landed = self._landed, []
        return out

    def finish(self) -> list[Landed]:
        """All that is left, when it is through."""
        with torch.inference_mode():
            self._drain()
        return self.landed()

    def is_done(self) -> bool:
        """Whether `landed` has something to do."""
        try:
            return bool(self._landed) or self.pipeline.is_done()
        except Exception:
            return True  # what is broken stays so: whoever takes the batch finds out what it is

    def forget(self) -> None:
        """Nobody waits for what is in flight: it does not come out."""
        for landed in self._landed:
            landed.release()
        self._landed.clear()
        for flight in self.pipeline.jobs:
            flight.is_forgotten = True

    def numbers(self) -> dict[str, float]:
        """For heartbeats."""
        return {**self.pipeline.numbers(), **self.host.numbers("host_pool"), **self.device.numbers("device_pool")}

    def _launch(self, batch: Batch) -> tuple[bool, Failure | None]:
        """Submit a batch. If it cannot be: False, and why, if the batch itself is the reason; nothing else of it is left."""
        flight: Flight | None = None
        failure: Failure | None = None
        name, is_first = batch.plan.name, not self.pipeline.num_in_flight
        if is_first:
            self._watch(batch)
        try:
            batched = batch.assemble(0, batch.num_rows)
            flight = Flight(batch, batched, self.pipeline, self.host, self.device)
            batch.clock.h2d_ms += batch.clock.lap()
            if not self.pipeline.submit(flight):
                raise RuntimeError("a batch was begun while no slot was free")
            return True, None
        except Reused:
            log.warning("kernel %r returns the same memory again: from now on it runs with nothing else in flight", name)
            self._alone.add(name)
        except Exception as e:
            failure = describe(name, e)
        if is_first:
            self._runner.watch.stop(False)
        if flight is not None and (failure is None or not failure.is_device_fault):
            flight.drop()
        return False, failure

    def _watch(self, batch: Batch) -> None:
        """The device turns to this batch: from now on it may take its time."""
        self._runner.watch.start(batch.plan.name, batch.assign.predicted_ms)

    def _drain(self) -> None:
        while self.pipeline.num_in_flight:
            self._land()

    def _land(self) -> None:
        """Take the oldest batch in flight, waiting for it."""
        batch = self.pipeline.jobs[0].batch
        try:
            flight, times = self.pipeline.take()
        except Exception as e:
            failure = describe(batch.plan.name, e)
        else:
            self._runner.watch.stop(True)
            if self.pipeline.num_in_flight:
                self._watch(self.pipeline.jobs[0].batch)
            self._arrive(flight, times)
            return
        self._crash(failure)

    def _arrive(self, flight: Flight, times: Times) -> None:
        batch = flight.batch
        if flight.is_forgotten or flight.is_spoiled:
            flight.drop()
            if not flight.is_forgotten:
                self._drain()
                self._solve(batch, None)
            return
        clock = batch.clock
        clock.h2d_ms += times.h2d_ms
        clock.compute_ms += times.compute_ms
        clock.lap()
        outcome = self._block(flight)
        clock.d2h_ms += times.d2h_ms + clock.lap()
        if isinstance(outcome, Failure):
            flight.drop()
            self._drain()
            self._solve(batch, outcome)
            return
        self._landed.append(Landed(batch.assign.lease, [Answer(0, batch.num_rows, outcome)], clock, None, flight.release()))

    def _block(self, flight: Flight) -> Block | Failure:
        name = flight.batch.plan.name
        try:
            return to_block(name, flight.outputs, flight.batch.num_rows)
        except Exception as e:
            return describe(name, e)

    def _solve(self, batch: Batch, failure: Failure | None) -> None:
        """Answer a batch from here on synchronously; nothing else is in flight.

        Args:
            failure: of its first run, if that says something about the batch: memory that other batches took does not.
        """
        if self._fault is not None:  # met while the others landed
            self._landed.append(Landed(batch.assign.lease, _untold(batch, self._fault), batch.clock, self._fault))
            return
        if failure is not None and failure.is_out_of_memory:
            self._runner.recover_memory()
            failure = None
        batch.clock.lap()
        answers = batch.solve(0, batch.num_rows) if failure is None else batch.judge(failure, 0, batch.num_rows)
        if self.on.type == "cpu":
            answers = [_owned(answer) for answer in answers]
        self._fault = batch.fault
        self._landed.append(Landed(batch.assign.lease, answers, batch.clock, batch.fault))

    def _crash(self, failure: Failure) -> None:
        """The device says that something in flight went wrong, and does not say what: each runs again by itself."""
        if not failure.is_device_fault:
            failure = self._finish() or failure
        if failure.is_device_fault:
            self._lose(failure)
            return
        for flight in self.pipeline.abandon():
            flight.drop()
            if not flight.is_forgotten:
                self._solve(flight.batch, None)

    def _finish(self) -> Failure | None:
        """Let the device end all that it was given, and say what it says then, if that is worse."""
        try:
            self.pipeline.finish()
        except Exception as e:
            failure = describe("", e)
            return failure if failure.is_device_fault else None
        return None

    def _lose(self, failure: Failure, *begun: Batch) -> None:
        """The device is broken, and nobody knows by which row of which batch."""
        self._fault = failure
        self._runner.watch.stop(False)
        for batch in [*(flight.batch for flight in self.pipeline.abandon()), *begun]:
            self._landed.append(Landed(batch.assign.lease, _untold(batch, failure), batch.clock, failure))


def _untold(batch: Batch, failure: Failure) -> list[Answer]:
    """Of a batch that broke the device, or was there: what may run again is not answered, so that the broker separates it."""
    return [] if batch.plan.is_idempotent else [Answer(0, batch.num_rows, error=failure.error)]


def _owned(answer: Answer) -> Answer:
    """Without the kernel's memory, as which the answers of a CPU leave: another batch may run before they do."""
    if answer.block is None:
        return answer
    block = answer.block
    frames = [bytes(view(frame)) for frame in block.frames]
    return Answer(answer.start, answer.stop, Block(block.num_rows, block.layout, block.lengths, frames))

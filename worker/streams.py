"""Streaming leases: open tasks of kernels that work in steps, all of a kernel's together.

Knows states, chunks and results; does not know sockets or credit. Each task ends with exactly one answer.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from penstock.broker.protocol import Answer, Assign, Checkpoint, Code, Error, WorkerPartial
from penstock.kernels import Step
from penstock.worker import devices
from penstock.worker.checkpoints import Saver, values_of
from penstock.worker.clock import Clock
from penstock.worker.failures import Failure, describe
from penstock.worker.inputs import Inputs, Plan
from penstock.worker.link import CheckpointLimits
from penstock.worker.outputs import to_row
from penstock.worker.precision import open_task, step
from penstock.worker.runner import Runner

log = logging.getLogger("penstock.worker")


@dataclass(slots=True)
class Stream:
    """One open task."""

    lease: int
    plan: Plan
    state: Any
    clock: Clock
    predicted_ms: float
    saver: Saver
    num_parts: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer of a streaming lease; `fault` as in `run_alone`, and then perhaps no answer."""

    lease: int
    answer: Answer | None
    clock: Clock
    fault: Failure | None = None


class Streams:
    """The open tasks of all streaming kernels of a runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._open: dict[str, dict[int, Stream]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    @property
    def kernels(self) -> set[str]:
        """The names of those with open tasks."""
        return {name for name, streams in self._open.items() if streams}

    def open(self, assign: Assign, received_at: float) -> Ended | None:
        """Begin a task of one row; an answer at once if that fails."""
        clock, watch = Clock(received_at), self._runner.watch
        with torch.inference_mode():
            prepared = self._runner.prepare(assign, clock)
            if isinstance(prepared, Error):
                return self._refused(assign, prepared, clock)
            if sum(block.num_rows for block in assign.blocks) != 1:
                return self._refused(assign, Error(Code.INVALID, "a streaming lease has one row"), clock)
            plan, fixed = prepared
            try:
                clock.lap()
                inputs = self._runner.to_device(plan.single(assign.blocks, assign.scalars))
                clock.h2d_ms += clock.lap()
                watch.start(f"{plan.name}.open", assign.predicted_ms)
                state, part = self._begin(plan, {**inputs, **fixed}, assign)
                watch.stop(True)
                clock.compute_ms += clock.lap()
            except Exception as e:
                watch.stop(False)
                failure = describe(plan.name, e)
                if failure.is_device_fault:
                    return Ended(assign.lease, _answer(plan, failure), clock, failure)
                return self._refused(assign, failure.error, clock)
        stream = Stream(assign.lease, plan, state, clock, assign.predicted_ms, Saver(), part)
        self._open.setdefault(plan.name, {})[assign.lease] = stream
        return None

    def _begin(self, plan: Plan, inputs: Inputs, assign: Assign) -> tuple[Any, int]:
        """A task's state and the number of its next part: where an earlier worker got, or anew if that cannot be used."""
        precision = self._runner.precisions.get(plan.name)
        state = open_task(plan.kernel, inputs, precision)
        if assign.checkpoint is None:
            return state, 0
        try:
            return plan.kernel.restore(state, values_of(assign.checkpoint, self._runner.device)), assign.part
        except Exception as e:
            if describe(plan.name, e).is_device_fault:
                raise
            log.warning("kernel %r cannot go on from its checkpoint, and begins anew: %s: %s", plan.name, type(e).__name__, e)
        return open_task(plan.kernel, inputs, precision), 0

    def _refused(self, assign: Assign, error: Error, clock: Clock) -> Ended:
        num_rows = max(sum(block.num_rows for block in assign.blocks), 1)
        return Ended(assign.lease, Answer(0, num_rows, error=error), clock)

    def cancel(self, lease: int) -> Ended | None:
        """Drop a task's state; None if it is not open."""
        for streams in self._open.values():
            if lease in streams:
                error = Error(Code.CANCELLED, "cancelled while streaming")
                return self._end(streams[lease], Answer(0, 1, error=error))
        return None

    def clear(self) -> None:
        """Forget all tasks: nobody waits for them."""
        self._open.clear()

    def step(self, limits: CheckpointLimits | None = None) -> Iterator[WorkerPartial | Checkpoint | Ended]:
        """One step of every kernel that has open tasks, and the checkpoints that are due; without limits there are none."""
        for streams in [s for s in self._open.values() if s]:
            active = list(streams.values())
            with torch.inference_mode():
                events: list[WorkerPartial | Checkpoint | Ended] = list(self._step(active))
                if limits is not None and active[0].plan.kernel.spec.checkpoints:
                    events += self._save(list(streams.values()), limits)
            yield from events

    def _save(self, active: list[Stream], limits: CheckpointLimits) -> Iterator[Checkpoint]:
        for stream in active:
            block = stream.saver.save(stream.plan.kernel, stream.state, limits)
            if block is not None:
                yield Checkpoint(lease=stream.lease, block=block, part=stream.num_parts)

    def _step(self, active: list[Stream]) -> Iterator[WorkerPartial | Ended]:
        steps = self._attempt(active)
        if not isinstance(steps, Failure):
            for stream, said in zip(active, steps, strict=True):
                yield from self._emit(stream, said)
            return
        if steps.is_out_of_memory:
            self._runner.recover_memory()
        elif steps.is_device_error:
            steps = self._runner.device_fault(steps) or steps
        if len(active) > 1 and not steps.is_device_fault:
            # Several tasks: each takes its step alone, so that only the guilty one fails.
            for stream in active:
                yield from self._step([stream])
            return
        for stream in active:
            yield self._fail(stream, steps)

    def _attempt(self, active: list[Stream]) -> list[Step] | Failure:
        plan, runner = active[0].plan, self._runner
        began = time.perf_counter()
        runner.num_runs += 1
        runner.watch.start(f"{plan.name}.step", max(stream.predicted_ms for stream in active))
        try:
            steps = step(plan.kernel, [stream.state for stream in active], runner.precisions.get(plan.name))
            devices.synchronize(runner.device)
        except Exception as e:
            runner.watch.stop(False)
            return describe(plan.name, e)
        runner.watch.stop(True)
        took = (time.perf_counter() - began) * 1e3
        for stream in active:
            stream.clock.compute_ms += took
        return steps

    def _emit(self, stream: Stream, said: Step) -> Iterator[WorkerPartial | Ended]:
        began = time.perf_counter()
        name = stream.plan.name
        try:
            chunk = to_row(name, said.chunk) if said.chunk else None
            result = None if said.result is None else to_row(name, said.result)
        except Exception as e:
            yield self._fail(stream, describe(name, e))
            return
        stream.clock.d2h_ms += (time.perf_counter() - began) * 1e3
        if chunk is not None:
            yield WorkerPartial(lease=stream.lease, part=stream.num_parts, block=chunk)
            stream.num_parts += 1
        if result is not None:
            yield self._end(stream, Answer(0, 1, result))

    def _fail(self, stream: Stream, failure: Failure) -> Ended:
        if failure.is_device_fault:
            return self._end(stream, _answer(stream.plan, failure), failure)
        return self._end(stream, Answer(0, 1, error=failure.error))

    def _end(self, stream: Stream, answer: Answer | None, fault: Failure | None = None) -> Ended:
        del self._open[stream.plan.name][stream.lease]
        return Ended(stream.lease, answer, stream.clock, fault)


def _answer(plan: Plan, fault: Failure) -> Answer | None:
    """Of a task that was there when the device broke: none, if it may run again elsewhere."""
    return None if plan.is_idempotent else Answer(0, 1, error=fault.error)

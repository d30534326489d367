"""One batch: assemble, call, take apart; and find the guilty row when it fails.

Knows rows, runs and what a failure says of them; does not know how kernels are loaded and unloaded, nor how memory comes back
(`runner.py`), leases' numbers or credit. A batch's rows are answered each exactly once, in ranges in order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from penstock.broker.columns import Block, gather
from penstock.broker.failpoints import ARMED, hit
from penstock.broker.protocol import Answer, Assign, Code, Error
from penstock.worker import devices, scan
from penstock.worker.clock import Clock
from penstock.worker.failures import Failure, describe
from penstock.worker.inputs import Inputs, Plan, take_rows
from penstock.worker.outputs import fetch, to_block
from penstock.worker.precision import run
from penstock.worker.runner import Runner

Outcome = tuple[Block, dict[int, str]]
"""Of a run that succeeded: its answer, and row -> output of what is not finite, where that is scanned for."""


def run_alone(runner: Runner, assign: Assign, received_at: float) -> tuple[list[Answer], Clock, Failure | None]:
    """With nothing else on the device: a batch's answers and times; and the failure after which this process must end, if
    there was one.

    Then rows may be left without an answer: on another process, or alone, they may succeed.

    Args:
        received_at: `time.perf_counter()` when the batch came.
    """
    clock = Clock(received_at)
    clock.num_runs = 0
    num_rows = sum(block.num_rows for block in assign.blocks)
    with torch.inference_mode():
        prepared = runner.prepare(assign, clock)
        if isinstance(prepared, Error):
            return [Answer(0, num_rows, error=prepared)], clock, None
        plan, fixed = prepared
        batch = Batch(runner, plan, fixed, assign, num_rows, clock)
        answers = batch.solve(0, num_rows)
    return answers, clock, batch.fault


class Batch:
    """One batch being solved: run as a whole, and in halves of halves where that fails."""

    __slots__ = ("assign", "clock", "fault", "fixed", "num_rows", "plan", "runner")

    def __init__(self, runner: Runner, plan: Plan, fixed: Inputs, assign: Assign, num_rows: int, clock: Clock) -> None:
        self.runner = runner
        self.plan = plan
        self.fixed = fixed
        self.assign = assign
        self.num_rows = num_rows
        self.clock = clock
        self.fault: Failure | None = None

    def solve(self, start: int, stop: int) -> list[Answer]:
        """Answers for rows [start, stop): at most 2 log2(n) more runs for one guilty row among n."""
        outcome = self._attempt(start, stop)
        if self._recovers(outcome) and self.plan.is_idempotent:
            outcome = self._attempt(start, stop)  # kernels' caches had taken the room
            self._recovers(outcome)
        return self.judge(outcome, start, stop)

    def judge(self, outcome: Outcome | Failure, start: int, stop: int) -> list[Answer]:
        """Answers for rows that ran with this outcome, by running parts of them where that may help."""
        if not isinstance(outcome, Failure):
            return self._answers(start, stop, outcome)
        if outcome.is_out_of_memory:
            self.clock.out_of_memory(stop - start)
        elif outcome.is_device_error:
            outcome = self.runner.device_fault(outcome) or outcome
        if outcome.is_device_fault:
            self.fault = outcome
            return [] if self.plan.is_idempotent else [Answer(start, stop, error=outcome.error)]
        if stop - start == 1 or not outcome.can_split:
            return [Answer(start, stop, error=outcome.error)]
        middle = (start + stop) // 2
        answers = self.solve(start, middle)
        return answers if self.fault else answers + self.solve(middle, stop)

    def _recovers(self, outcome: Outcome | Failure) -> bool:
        """After out of memory: free what can be freed; whether kernels had something to give."""
        return isinstance(outcome, Failure) and outcome.is_out_of_memory and self.runner.recover_memory() > 0

    def _answers(self, start: int, stop: int, outcome: Outcome) -> list[Answer]:
        """The block as a whole; where rows that are not finite are to fail, these as errors and the others between them."""
        block, bad = outcome
        self.clock.num_not_finite += len(bad)
        if not bad or self.runner.scans[self.plan.name] != "fail":
            return [Answer(start, stop, block)]
        answers, first = list[Answer](), 0
        for row in [*sorted(bad), stop - start]:
            if first < row:
                answers.append(Answer(start + first, start + row, gather([(block, first, row)])))
            if row in bad:
                text = f"kernel {self.plan.name!r}: its output {bad[row]!r} has values that are not finite (NaN or infinity)"
                answers.append(Answer(start + row, start + row + 1, error=Error(Code.FAILED, text)))
            first = row + 1
        return answers

    def _attempt(self, start: int, stop: int) -> Outcome | Failure:
        """One run. Everything that the run made, its exception included, is gone when this returns a Failure."""
        clock, runner, name = self.clock, self.runner, self.plan.name
        try:
            inputs = runner.to_device(self.assemble(start, stop))
            inputs.update(self.fixed)
        except Exception as e:
            clock.h2d_ms += clock.lap()
            return describe(name, e)
        clock.h2d_ms += clock.lap()
        clock.num_runs += 1
        runner.num_runs += 1
        runner.watch.start(name, self.assign.predicted_ms)
        if ARMED:
            hit("worker.kernel.before")
        try:
            outputs = run(self.plan.kernel, inputs, runner.precisions.get(name))
            sums = scan.sums(outputs) if name in runner.scans else None
            if not runner.is_cpu:
                devices.synchronize(runner.device)
            clock.compute_ms += clock.lap()
            outputs = outputs if runner.is_cpu else fetch(outputs)
            block = to_block(name, outputs, stop - start)
            bad = scan.not_finite(fetch(sums), outputs) if sums else {}
        except Exception as e:
            runner.watch.stop(False)
            clock.compute_ms += clock.lap()
            return self.blame(describe(name, e), stop - start)
        if ARMED:
            hit("worker.kernel.after")
        runner.watch.stop(True)
        clock.d2h_ms += clock.lap()
        return block, bad

    def assemble(self, start: int, stop: int) -> Inputs:
        """The batched inputs of rows [start, stop) on the CPU. Raises InvalidInput."""
        blocks: Sequence[Block] = self.assign.blocks
        scalars: Mapping[str, Any] = self.assign.scalars
        if stop - start < self.num_rows:
            blocks, scalars = take_rows(blocks, scalars, start, stop)
        self.clock.lap()
        batched = self.plan.batch(blocks, scalars)
        if self.plan.is_padded and stop - start == self.num_rows:
            self.clock.padding_ratio = self.plan.padding_ratio(batched)
        return batched

    def blame(self, failure: Failure, num_rows: int) -> Failure:
        """A kernel that is not idempotent may have had its effect on some rows: it must not run again."""
        if self.plan.is_idempotent or num_rows == 1:
            return failure
        error = failure.error
        message = f"{error.message} (in a batch of {num_rows}; not idempotent, so it was not run again)"
        blamed = Error(Code.FAILED, message, None, error.detail)
        return replace(failure, error=blamed, can_split=False)

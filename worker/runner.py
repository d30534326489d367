"""Runs one batch: load if needed, assemble, call, take apart; and find the guilty item when it fails.

Knows kernels, devices and failures; does not know sockets, leases' numbers or credit. A batch's rows are answered each
exactly once, in ranges in order.
"""

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from penstock.broker.columns import Block
from penstock.broker.protocol import Answer, Assign, Code, Error, Resident
from penstock.kernels import Context, InvalidInput, Kernel
from penstock.worker import devices
from penstock.worker.failures import Failure, describe, describe_load
from penstock.worker.inputs import Inputs, Plan, take_rows
from penstock.worker.outputs import fetch, to_block
from penstock.worker.precision import Precision, run

log = logging.getLogger("penstock.worker")
ABSENT, LOADING, READY, FAILED = "absent", "loading", "ready", "failed"


class Clock:
    """Milliseconds spent per phase of one lease, and what was out of the ordinary, as they travel in `final.timings`.

    Attributes:
        num_runs: calls of the kernel, those that failed included; of a stream, as if it were one.
        num_oom: how many of them ran out of memory; oom_rows: the fewest rows that did.
        padding_ratio: padded elements / real elements - 1 over the batch's ragged inputs.
    """

    __slots__ = (
        "compute_ms", "d2h_ms", "h2d_ms", "load_ms", "mark", "num_oom", "num_runs", "oom_rows", "padding_ratio", "wait_ms",
    )  # fmt: skip

    def __init__(self, received_at: float) -> None:
        self.mark = time.perf_counter()
        self.wait_ms = (self.mark - received_at) * 1e3
        self.load_ms = self.h2d_ms = self.compute_ms = self.d2h_ms = 0.0
        self.num_runs = 1
        self.num_oom = self.oom_rows = 0
        self.padding_ratio = 0.0

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        now = time.perf_counter()
        took, self.mark = (now - self.mark) * 1e3, now
        return took

    def out_of_memory(self, num_rows: int) -> None:
        """A run of so many rows did not fit."""
        self.num_oom += 1
        self.oom_rows = min(self.oom_rows or num_rows, num_rows)

    def timings(self) -> dict[str, float]:
        """The times, always; the facts only where they are not those of a batch that ran once, unpadded."""
        timings = {
            "batch_wait_ms": self.wait_ms, "load_ms": self.load_ms, "h2d_ms": self.h2d_ms,
            "compute_ms": self.compute_ms, "d2h_ms": self.d2h_ms,
        }  # fmt: skip
        if self.num_runs != 1:
            timings["num_runs"] = self.num_runs
        if self.num_oom:
            timings |= {"num_oom": self.num_oom, "oom_rows": self.oom_rows}
        if self.padding_ratio:
            timings["padding_ratio"] = self.padding_ratio
        return timings


class Runner:
    """The kernels of one device.

    Args:
        kernels: by name, not loaded.
        announce: told when a kernel with state is loading, ready or failed.
        precisions: of the kernels that do not run in their own.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        device: torch.device,
        state_dir: Path,
        announce: Callable[[Resident], None],
        precisions: Mapping[str, Precision] | None = None,
    ) -> None:
        self.device = device
        self.precisions = precisions or {}
        self.plans = {name: Plan(kernel, device) for name, kernel in kernels.items()}
        self.resident = {name: ABSENT for name, kernel in kernels.items() if kernel.spec.resident}
        self.num_runs = 0
        self.is_cpu = device.type == "cpu"
        self._state_dir = state_dir
        self._announce = announce

    def run(self, assign: Assign, received_at: float) -> tuple[list[Answer], Clock, Failure | None]:
        """A batch's answers and times; and the failure after which this process must end, if there was one.

        Args:
            received_at: `time.perf_counter()` when the batch came.
        """
        clock = Clock(received_at)
        clock.num_runs = 0
        num_rows = sum(block.num_rows for block in assign.blocks)
        with torch.inference_mode():
            prepared = self.prepare(assign, clock)
            if isinstance(prepared, Error):
                return [Answer(0, num_rows, error=prepared)], clock, None
            plan, fixed = prepared
            batch = Batch(self, plan, fixed, assign, num_rows, clock)
            answers = batch.solve(0, num_rows)
        return answers, clock, batch.fault

    def prepare(self, assign: Assign, clock: Clock) -> tuple[Plan, Inputs] | Error:
        """The plan of a lease's kernel, loaded, and what is equal for all of its rows: statics and context."""
        plan = self.plans.get(assign.kernel)
        if plan is None:
            return Error(Code.UNAVAILABLE, f"this worker has no kernel {assign.kernel!r}")
        if assign.digest and assign.digest != plan.digest:
            return Error(Code.UNAVAILABLE, f"this worker has another version of kernel {assign.kernel!r}")
        if assign.mode not in plan.kernel.spec.modes:
            return Error(Code.INVALID, f"kernel {assign.kernel!r} has no mode {assign.mode!r}")
        try:
            fixed: Inputs = dict(plan.statics(assign.statics))
        except InvalidInput as e:
            return Error(Code.INVALID, str(e))
        if not plan.kernel.is_loaded and (error := self._load(plan.kernel, clock)):
            return error
        fixed["context"] = Context(self.device, self._state_dir, assign.principal)
        return plan, fixed

    def _load(self, kernel: Kernel, clock: Clock) -> Error | None:
        name, before = kernel.spec.name, devices.used_bytes(self.device)
        self._tell(name, LOADING)
        clock.lap()
        error = None
        try:
            kernel.load(self.device)
        except Exception as e:
            error = describe_load(name, e)
            log.warning("%s", error.message)
        clock.load_ms += clock.lap()
        if error:
            devices.free_cache(self.device)
            self._tell(name, FAILED)
            return error
        num_bytes = max(devices.used_bytes(self.device) - before, 0)
        log.info("loaded %s in %.0f ms, %.0f MiB", name, clock.load_ms, num_bytes / 2**20)
        self._tell(name, READY, num_bytes, clock.load_ms)
        return None

    def _tell(self, name: str, state: str, num_bytes: int = 0, load_ms: float = 0.0) -> None:
        self.resident[name] = state
        self._announce(Resident(kernel=name, state=state, num_bytes=num_bytes, load_ms=load_ms))

    def to_device(self, inputs: Inputs) -> Inputs:
        """The tensors on the device; on the CPU, the same ones."""
        if self.is_cpu:
            return inputs
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def recover_memory(self) -> None:
        """Give back what a failed run has left. The caller holds neither its exception nor its tensors any more."""
        gc.collect()
        devices.free_cache(self.device)


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
        return self.judge(self._attempt(start, stop), start, stop)

    def judge(self, outcome: Block | Failure, start: int, stop: int) -> list[Answer]:
        """Answers for rows that ran with this outcome, by running parts of them where that may help."""
        if isinstance(outcome, Block):
            return [Answer(start, stop, outcome)]
        if outcome.is_out_of_memory:
            self.clock.out_of_memory(stop - start)
            self.runner.recover_memory()
        if outcome.is_device_fault:
            self.fault = outcome
        if self.fault or stop - start == 1 or not outcome.can_split:
            return [Answer(start, stop, error=(self.fault or outcome).error)]
        middle = (start + stop) // 2
        answers = self.solve(start, middle)
        if self.fault:
            return [*answers, Answer(middle, stop, error=self.fault.error)]
        return answers + self.solve(middle, stop)

    def _attempt(self, start: int, stop: int) -> Block | Failure:
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
        try:
            outputs = run(self.plan.kernel, inputs, runner.precisions.get(name))
            if not runner.is_cpu:
                devices.synchronize(runner.device)
            clock.compute_ms += clock.lap()
            block = to_block(name, outputs if runner.is_cpu else fetch(outputs), stop - start)
        except Exception as e:
            clock.compute_ms += clock.lap()
            return self.blame(describe(name, e), stop - start)
        clock.d2h_ms += clock.lap()
        return block

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
        return Failure(blamed, False, failure.is_out_of_memory, failure.is_device_fault)

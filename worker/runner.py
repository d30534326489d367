"""Runs one batch: load if needed, assemble, call, take apart; and find the guilty item when it fails.

Knows kernels, devices and failures; does not know sockets, leases' numbers or credit. A batch's rows are answered each
exactly once, in ranges in order.
"""

import gc
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from penstock.broker.columns import Block, gather
from penstock.broker.failpoints import ARMED, hit
from penstock.broker.protocol import Answer, Assign, Code, Error, Resident
from penstock.kernels import Context, InvalidInput, Kernel
from penstock.worker import devices, scan
from penstock.worker.config import DeviceFault
from penstock.worker.failures import Failure, describe, describe_load, device_fault, is_out_of_memory
from penstock.worker.inputs import Inputs, Plan, take_rows
from penstock.worker.outputs import fetch, to_block
from penstock.worker.precision import Precision, run
from penstock.worker.watch import Watch

log = logging.getLogger("penstock.worker")
ABSENT, LOADING, READY, FAILED = "absent", "loading", "ready", "failed"

Outcome = tuple[Block, dict[int, str]]
"""Of a run that succeeded: its answer, and row -> output of what is not finite, where that is scanned for."""


class Clock:
    """Milliseconds spent per phase of one lease, and what was out of the ordinary, as they travel in `final.timings`.

    Attributes:
        num_runs: calls of the kernel, those that failed included; of a stream, as if it were one.
        num_oom: how many of them ran out of memory; oom_rows: the fewest rows that did.
        num_not_finite: rows with outputs that are not finite, where outputs are scanned.
        padding_ratio: padded elements / real elements - 1 over the batch's ragged inputs.
    """

    __slots__ = (
        "compute_ms", "d2h_ms", "h2d_ms", "load_ms", "mark", "num_not_finite", "num_oom", "num_runs", "oom_rows",
        "padding_ratio", "wait_ms",
    )  # fmt: skip

    def __init__(self, received_at: float) -> None:
        self.mark = time.perf_counter()
        self.wait_ms = (self.mark - received_at) * 1e3
        self.load_ms = self.h2d_ms = self.compute_ms = self.d2h_ms = 0.0
        self.num_runs = 1
        self.num_oom = self.oom_rows = self.num_not_finite = 0
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
        if self.num_not_finite:
            timings["num_not_finite"] = self.num_not_finite
        if self.padding_ratio:
            timings["padding_ratio"] = self.padding_ratio
        return timings


class Runner:
    """The kernels of one device.

    Args:
        kernels: by name, not loaded.
        announce: told when a kernel with state is loading, ready, failed, or absent again.
        watch: is told what runs.
        scans: kernel -> "warn" or "fail" for rows with outputs that are not finite.
        precisions: of the kernels that do not run in their own.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        device: torch.device,
        state_dir: Path,
        announce: Callable[[Resident], None],
        watch: Watch | None = None,
        scans: Mapping[str, str] | None = None,
        precisions: Mapping[str, Precision] | None = None,
    ) -> None:
        self.device = device
        self.precisions = precisions or {}
        self.plans = {name: Plan(kernel, device) for name, kernel in kernels.items()}
        self.resident = {name: ABSENT for name, kernel in kernels.items() if kernel.spec.resident}
        self.num_runs = 0
        self.is_cpu = device.type == "cpu"
        self.watch = watch or Watch()
        self.scans = scans or {}
        self._state_dir = state_dir
        self._announce = announce
        self._used_at = dict.fromkeys(self.resident, 0.0)
        for name, kernel in kernels.items():
            for what in (name, *((f"{name}.open", f"{name}.step") if "stream" in kernel.spec.modes else ())):
                self.watch.add(what, kernel.spec.hang_limit_s)
        self.watch.keep()

    def run(self, assign: Assign, received_at: float) -> tuple[list[Answer], Clock, Failure | None]:
        """A batch's answers and times; and the failure after which this process must end, if there was one.

        Then rows may be left without an answer: on another process, or alone, they may succeed.

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
        if plan.name in self._used_at:
            self._used_at[plan.name] = time.monotonic()
        fixed["context"] = Context(self.device, self._state_dir, assign.principal)
        return plan, fixed

    def _load(self, kernel: Kernel, clock: Clock) -> Error | None:
        name, before = kernel.spec.name, devices.used_bytes(self.device)
        self._tell(name, LOADING)
        self.watch.load(name)
        clock.lap()
        failure = self._try_load(kernel)
        if failure is not None and failure.is_out_of_memory and self.recover_memory():
            failure = self._try_load(kernel)
        self.watch.turn()
        clock.load_ms += clock.lap()
        if failure is not None:
            log.warning("%s", failure.error.message)
            devices.free_cache(self.device)
            self._tell(name, FAILED)
            return failure.error
        num_bytes = max(devices.used_bytes(self.device) - before, 0)
        log.info("loaded %s in %.0f ms, %.0f MiB", name, clock.load_ms, num_bytes / 2**20)
        self._tell(name, READY, num_bytes, clock.load_ms)
        return None

    def _try_load(self, kernel: Kernel) -> Failure | None:
        """Raises DeviceFault."""
        try:
            kernel.load(self.device)
        except Exception as e:
            if (fault := device_fault(e)) is not None:
                raise DeviceFault(f"loading kernel {kernel.spec.name!r}: {fault}") from None
            return Failure(describe_load(kernel.spec.name, e), is_out_of_memory=is_out_of_memory(e))
        return None

    def _tell(self, name: str, state: str, num_bytes: int = 0, load_ms: float = 0.0) -> None:
        self.resident[name] = state
        self._announce(Resident(kernel=name, state=state, num_bytes=num_bytes, load_ms=load_ms))

    def to_device(self, inputs: Inputs) -> Inputs:
        """The tensors on the device; on the CPU, the same ones."""
        if self.is_cpu:
            return inputs
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def recover_memory(self) -> int:
        """Give back what a failed run has left, and what kernels keep without need; the bytes of the latter.

        The caller holds neither the run's exception nor its tensors any more.
        """
        num_bytes = sum(_trim(plan.kernel) for plan in self.plans.values())
        gc.collect()
        devices.free_cache(self.device)
        return num_bytes

    def unload_one(self, but: Collection[str]) -> str | None:
        """Unload the kernel that was not used for longest, except these; its name, None if there is none."""
        idle = [n for n in self._used_at if n not in but and self.plans[n].kernel.is_loaded and self.plans[n].kernel.can_unload]
        if not idle:
            return None
        name = min(idle, key=self._used_at.__getitem__)
        try:
            self.plans[name].kernel.unload()
        except Exception as e:
            log.warning("kernel %r could not be unloaded: %s: %s", name, type(e).__name__, e)
            return None
        self._tell(name, ABSENT)
        gc.collect()
        devices.free_cache(self.device)
        return name

    def device_fault(self, failure: Failure) -> Failure | None:
        """The device has refused something: whether it still computes decides if that was all."""
        try:
            devices.known_answer(self.device)
        except torch.OutOfMemoryError:
            return None
        except DeviceFault as e:
            return replace(failure, error=replace(failure.error, message=f"{failure.error.message}; {e}"), is_device_fault=True)
        return None


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


def _trim(kernel: Kernel) -> int:
    """The bytes that a kernel gives back of its caches; one that fails at it keeps them."""
    try:
        return kernel.trim()
    except Exception as e:
        log.warning("kernel %r could not give back its caches: %s: %s", kernel.spec.name, type(e).__name__, e)
        return 0

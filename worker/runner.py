"""The kernels of one device: loaded when they are wanted, unloaded when memory is, and what is equal for a whole batch.

Knows kernels, their state and the device's memory; does not know rows or how a batch is run (`batch.py`), leases' numbers or
credit.
"""

import gc
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from penstock.broker.protocol import Assign, Code, Error, Resident
from penstock.kernels import Context, InvalidInput, Kernel
from penstock.worker import devices
from penstock.worker.clock import Clock
from penstock.worker.config import DeviceFault
from penstock.worker.failures import Failure, describe_load, device_fault, is_out_of_memory
from penstock.worker.inputs import Inputs, Plan
from penstock.worker.precision import Precision
from penstock.worker.watch import Watch

log = logging.getLogger("penstock.worker")
ABSENT, LOADING, READY, FAILED = "absent", "loading", "ready", "failed"


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


def _trim(kernel: Kernel) -> int:
    """The bytes that a kernel gives back of its caches; one that fails at it keeps them."""
    try:
        return kernel.trim()
    except Exception as e:
        log.warning("kernel %r could not give back its caches: %s: %s", kernel.spec.name, type(e).__name__, e)
        return 0

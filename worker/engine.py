"""Everything of a worker that needs torch, built in one place: device, kernels, runner, streams.

Knows the order of building; imported after the hello, so that the broker sees the worker as starting while torch loads.
"""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from penstock.broker.protocol import Resident
from penstock.kernels import RegistryError, registry
from penstock.worker import canary, devices
from penstock.worker.config import DeviceFault, StartError, WorkerConfig, default_state_dir, parse_options, parse_scans
from penstock.worker.failures import device_fault
from penstock.worker.runner import Runner
from penstock.worker.streams import Streams
from penstock.worker.watch import Watch


class Engine:
    """The device with its kernels, warmed up.

    Raises:
        StartError: no such device or kernel, or a state directory that cannot be had.
        DeviceFault: the device does not compute.

    Attributes:
        specs: the kernels as `ready` offers them.
        facts: the device as `ready` describes it.
    """

    def __init__(self, config: WorkerConfig, announce: Callable[[Resident], None], watch: Watch) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = devices.choose(config.device)
        state_dir = config.state_dir or default_state_dir()
        try:
            kernels = registry.load(config.kernels, options=parse_options(config.options))
            state_dir.mkdir(parents=True, exist_ok=True)
        except (RegistryError, OSError) as e:
            raise StartError(str(e)) from e
        self.specs: list[Mapping[str, Any]] = [kernel.spec.to_wire() for kernel in kernels.values()]
        scans = self._scans(config, kernels)
        self.runner = Runner(kernels, self.device, state_dir, announce, watch, scans)
        self.streams = Streams(self.runner)
        self._warm_up()
        # What exists now stays for good: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()

    def _warm_up(self) -> None:
        try:
            self.facts = devices.facts(self.device)
            devices.warm_up(self.device)
        except RuntimeError as e:
            fault = device_fault(e)
            if fault is None:
                raise
            raise DeviceFault(fault) from e
        self.check_device()

    @staticmethod
    def _scans(config: WorkerConfig, kernels: Mapping[str, Any]) -> dict[str, str]:
        """Kernel -> "warn" or "fail", where its outputs are to be scanned."""
        others, by_kernel = parse_scans(config.scan_outputs)
        if unknown := sorted(set(by_kernel) - set(kernels)):
            raise StartError(f"scan_outputs names {unknown[0]!r}, which is no kernel; there are {', '.join(sorted(kernels))}")
        return {name: mode for name in kernels if (mode := by_kernel.get(name, others)) != "off"}

    def check_device(self) -> None:
        """Raises DeviceFault if the device gives no answer, or a wrong one."""
        canary.check(self.device)

    def memory(self) -> dict[str, float]:
        return devices.memory(self.device)

    @staticmethod
    def device_fault(e: Exception) -> str | None:
        """What an exception says of a broken device; None if it does not."""
        return device_fault(e)

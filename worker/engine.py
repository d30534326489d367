"""Everything of a worker that needs torch, built in one place: device, kernels, runner, streams.

Knows the order of building; imported after the hello, so that the broker sees the worker as starting while torch loads.
"""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from penstock.broker.protocol import Resident
from penstock.kernels import RegistryError, registry
from penstock.worker import devices
from penstock.worker.config import StartError, WorkerConfig, default_state_dir, parse_options
from penstock.worker.pinned import Pins
from penstock.worker.runner import Runner
from penstock.worker.streams import Streams


class Engine:
    """The device with its kernels, warmed up.

    Raises:
        StartError: no such device or kernel, or a state directory that cannot be had.

    Attributes:
        specs: the kernels as `ready` offers them.
        facts: the device as `ready` describes it.
        pins: clients' memory that the device may read by itself.
    """

    def __init__(self, config: WorkerConfig, announce: Callable[[Resident], None]) -> None:
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
        self.facts = devices.facts(self.device)
        self.runner = Runner(kernels, self.device, state_dir, announce)
        self.streams = Streams(self.runner)
        self.pins = Pins(self.device)
        devices.warm_up(self.device)
        # What exists now stays for good: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()

    def memory(self) -> dict[str, float]:
        return devices.memory(self.device)

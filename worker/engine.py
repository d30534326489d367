"""Everything of a worker that needs torch, built in one place: device, kernels, runner, streams, batches in flight.

Knows the order of building; imported after the hello, so that the broker sees the worker as starting while torch loads.
"""

import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from penstock.broker.protocol import Answer, Assign, Resident
from penstock.kernels import RegistryError, registry
from penstock.worker import devices
from penstock.worker.batch import run_alone
from penstock.worker.clock import Clock
from penstock.worker.config import (
    DeviceFault,
    StartError,
    WorkerConfig,
    default_state_dir,
    parse_options,
    parse_precision,
    parse_scans,
)
from penstock.worker.devices.timeline import Timeline, timeline
from penstock.worker.failures import Failure, device_fault
from penstock.worker.flight import Flight
from penstock.worker.flights import Flights
from penstock.worker.pinned import Pins
from penstock.worker.pipeline import Pipeline
from penstock.worker.pool import Pool, Scrub, pinned, plain
from penstock.worker.precision import precisions
from penstock.worker.runner import Runner
from penstock.worker.streams import Streams
from penstock.worker.watch import Watch

log = logging.getLogger("penstock.worker")


class Engine:
    """The device with its kernels, warmed up.

    Raises:
        StartError: no such device or kernel, or a state directory that cannot be had.
        DeviceFault: the device does not compute.

    Attributes:
        specs: the kernels as `ready` offers them.
        facts: the device as `ready` describes it.
        flights: batches in flight; None on a device without streams, which runs one batch after another.
        pins: clients' memory that the device may read by itself.
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
        # Before anything is put onto the device: whatever this thread does there from now on is on the compute stream.
        num_slots = (3 if self.device.type == "cuda" else 0) if config.slots is None else config.slots
        if num_slots and self.device.type == "mps":
            raise StartError("mps has no streams: it runs one batch after another (slots = 0)")
        streams = timeline(self.device) if num_slots else None
        precise = precisions(kernels, parse_precision(config.precision), self.device)
        self.specs: list[Mapping[str, Any]] = [kernel.spec.to_wire() for kernel in kernels.values()]
        scans = self._scans(config, kernels)
        self.runner = Runner(kernels, self.device, state_dir, announce, watch, scans, precise)
        self.streams = Streams(self.runner)
        self.flights = None if streams is None else take_off(self.runner, streams, num_slots, config.pool_bytes, config.scrub)
        self.pins = Pins(self.device)
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
        try:
            devices.known_answer(self.device)
        except torch.OutOfMemoryError as e:
            log.warning("%s has no room for the known-answer test: %s", self.device, e)

    def run(self, assign: Assign, received_at: float) -> tuple[list[Answer], Clock, Failure | None]:
        """As `run_alone`, of a batch on a device without streams."""
        return run_alone(self.runner, assign, received_at)

    def memory(self) -> dict[str, float]:
        """For heartbeats, whose thread asks: memory, health, and what goes through pools and queue."""
        said = {**devices.memory(self.device), **devices.health(self.device).numbers()}
        return said if self.flights is None else {**said, **self.flights.numbers()}

    @staticmethod
    def device_fault(e: Exception) -> str | None:
        """What an exception says of a broken device; None if it does not."""
        return device_fault(e)


def take_off(runner: Runner, streams: Timeline, num_slots: int, pool_bytes: int, scrub: str) -> Flights:
    """The pools and the queue of a device, warm: all memory that batches in flight will use is allocated here.

    Raises:
        StartError: there is not so much of it.
    """
    device = runner.device
    pipeline: Pipeline[Flight] = Pipeline(streams, num_slots)

    def on_device(num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def fill(memory: torch.Tensor, byte: int) -> None:
        def enqueue() -> None:
            memory.fill_(byte)

        pipeline.h2d.run(enqueue)

    try:
        host = Pool(pool_bytes, pinned if device.type == "cuda" else plain, Scrub(scrub))
        there = Pool(pool_bytes, on_device, Scrub(scrub), fill)
        pipeline.finish()
    except RuntimeError as e:
        raise StartError(f"{device} has no {pool_bytes} bytes for batches in flight, pinned and its own: {e}") from e
    return Flights(runner, pipeline, host, there)

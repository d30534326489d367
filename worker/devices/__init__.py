"""The device of this process: which there are, facts and memory for status, health, a known answer, streams and events."""

from penstock.worker.devices.canary import known_answer
from penstock.worker.devices.choosing import DeviceError, choose, facts, find, free_cache, synchronize, warm_up
from penstock.worker.devices.nvml import Health, health
from penstock.worker.devices.usage import memory, used_bytes

__all__ = [
    "DeviceError", "Health", "choose", "facts", "find", "free_cache", "health", "known_answer", "memory", "synchronize",
    "used_bytes", "warm_up",
]  # fmt: skip

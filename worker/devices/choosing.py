"""Which devices there are, which one this process takes, facts for status, waiting for it.

Knows torch's backends (cuda, mps, cpu); does not know kernels or batches.
"""

import platform
from typing import Any

import psutil
import torch

from penstock.worker.config import StartError


class DeviceError(StartError):
    """The device asked for does not exist here; the text says which do."""


def find() -> list[str]:
    """Every device worth a worker of its own: the accelerators, or the CPU where there is none."""
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else ["cpu"]


def choose(wanted: str) -> torch.device:
    """The device that `--device` means. Raises DeviceError."""
    found = find()
    if wanted == "auto":
        wanted = found[0]
    elif wanted == "cuda":
        wanted = "cuda:0"
    if wanted != "cpu" and wanted not in found:
        raise DeviceError(f"there is no device {wanted!r} here; there are {', '.join({*found, 'cpu'})}")
    device = torch.device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def facts(device: torch.device) -> dict[str, Any]:
    """What `ready.device` says: device, kind, name, total memory in bytes, torch's version, CPU threads."""
    about: dict[str, Any] = {"device": str(device), "kind": device.type, "torch": torch.__version__}
    about["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"name": properties.name, "index": device.index, "total_bytes": properties.total_memory}
        about["capability"] = f"{properties.major}.{properties.minor}"
    else:
        about |= {"name": _cpu_name(), "total_bytes": psutil.virtual_memory().total}
    return about


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; errors of kernels surface here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_cache(device: torch.device) -> None:
    """Give unused memory back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def warm_up(device: torch.device) -> None:
    """Make the context, the libraries' handles and torch's first-use caches, so that no task pays for them."""
    with torch.inference_mode():
        x = torch.frombuffer(bytearray(64 * 64 * 4), dtype=torch.float32).view(64, 64).to(device)
        y = torch.softmax(x @ x, -1)
        synchronize(device)
        y.cpu().reshape(-1).view(torch.uint8).numpy()

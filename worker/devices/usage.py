"""How much of the device's memory is used, and by whom, as plain numbers for heartbeats.

Knows torch's allocators and the machine's memory; does not know what the memory is used for.
"""

import psutil
import torch


def memory(device: torch.device) -> dict[str, float]:
    """For heartbeats: bytes resident in this process, those of the device, and `used_fraction` of the memory that kernels
    take theirs from, whoever uses it: the device's own, or else the machine's.

    `foreign_bytes` is what neither is free nor reserved by this process's tensors: other processes, and on cuda this
    one's context, some hundred MiB. A device whose context is broken has no numbers; the data loop meets that by itself.
    """
    used: dict[str, float] = {"rss_bytes": int(psutil.Process().memory_info().rss)}
    if device.type == "cuda":
        try:
            return used | _cuda(device)
        except RuntimeError:
            return used
    machine = psutil.virtual_memory()
    used["used_fraction"] = machine.percent / 100.0
    used |= {"total_bytes": machine.total, "free_bytes": machine.available}
    if device.type == "mps":
        used |= {
            "allocated_bytes": torch.mps.current_allocated_memory(),
            "reserved_bytes": torch.mps.driver_allocated_memory(),
        }
    used["foreign_bytes"] = foreign_bytes(
        machine.total, machine.available, used["rss_bytes"] + used.get("reserved_bytes", 0)
    )
    return used


def _cuda(device: torch.device) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    said = torch.cuda.memory_stats(device)
    reserved = said.get("reserved_bytes.all.current", 0)
    return {
        "allocated_bytes": said.get("allocated_bytes.all.current", 0),
        "reserved_bytes": reserved,
        "peak_bytes": said.get("allocated_bytes.all.peak", 0),
        "free_bytes": free,
        "total_bytes": total,
        "foreign_bytes": foreign_bytes(total, free, reserved),
        "used_fraction": 1.0 - free / total,
        "alloc_retries": said.get("num_alloc_retries", 0),
    }


def foreign_bytes(total: float, free: float, own: float) -> float:
    """Bytes in use by others; 0 where the three figures, taken one after another, do not add up."""
    return max(total - free - own, 0)


def used_bytes(device: torch.device) -> int:
    """Bytes that kernels hold: the device's, or the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return int(psutil.Process().memory_info().rss)

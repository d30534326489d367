"""What NVML says of a GPU: how busy, how hot, how throttled, how many memory errors.

Knows NVML; does not know torch's memory or what to do about a sick device. Optional: without the library, the driver or
the permission there is no figure, and no error.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import psutil
import torch

log = logging.getLogger("penstock.worker")
HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, HW_POWER_BRAKE = 0x08, 0x20, 0x40, 0x80
SLOWED = {
    HW_SLOWDOWN: "hardware slowdown",
    SW_THERMAL: "software thermal limit",
    HW_THERMAL: "hardware thermal limit",
    HW_POWER_BRAKE: "power brake",
}
"""Reasons to run slower that tell of trouble; idling and a power cap do not. Bits as in NVML's clocks event reasons."""


@dataclass(frozen=True, slots=True)
class Health:
    """A device's state now; None where nobody can say.

    Attributes:
        utilisation: share of the last moment in which the device was busy, 0 to 1.
        temperature_c: of the GPU's core.
        throttle_reasons: NVML's bit mask; 0 is full speed.
        ecc_errors: uncorrected memory errors since the driver was loaded.
    """

    utilisation: float | None = None
    temperature_c: int | None = None
    throttle_reasons: int | None = None
    ecc_errors: int | None = None

    @property
    def troubles(self) -> list[str]:
        """What is wrong, in words; empty if nothing is known to be."""
        found = [text for bit, text in SLOWED.items() if (self.throttle_reasons or 0) & bit]
        if self.ecc_errors:
            found.append(f"{self.ecc_errors} uncorrected memory errors")
        return found

    def numbers(self) -> dict[str, float]:
        """The known ones, for heartbeats."""
        known = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: value for name, value in known if value is not None}


def health(device: torch.device) -> Health:
    """The state of `device` now. On mps nothing is known; on a CPU the machine's utilisation since the last call."""
    if device.type == "cuda":
        return _read(device)
    return Health(utilisation=psutil.cpu_percent(None) / 100.0) if device.type == "cpu" else Health()


@cache
def _nvml() -> ModuleType | None:
    """NVML, started once; None if it cannot be used here."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError) as e:
        log.info("no NVML: %s", e)
        return None
    except pynvml.NVMLError as e:
        log.info("no NVML: %s", e)
        return None
    return pynvml  # type: ignore[no-any-return]


@cache
def _handle(device: torch.device) -> Any:
    """NVML's handle of torch's device: by its id, since CUDA_VISIBLE_DEVICES gives numbers of its own. None: not known."""
    nvml = _nvml()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if nvml is not None else None
    if nvml is None or uuid is None:
        return None
    return _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}".encode())


def _ask(nvml: ModuleType, function: Callable[..., Any], *arguments: Any) -> Any:
    """One figure; None if this device, driver or user has none."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _read(device: torch.device) -> Health:
    nvml, handle = _nvml(), _handle(device)
    if nvml is None or handle is None:
        return Health()
    rates = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    # Renamed in newer releases of the binding.
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    uncorrected, since_load = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return Health(
        utilisation=None if rates is None else rates.gpu / 100.0,
        temperature_c=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=_ask(nvml, reasons, handle),
        ecc_errors=_ask(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, since_load),
    )

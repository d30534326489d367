"""Devices: facts, memory, health with and without NVML, the known answer, what a wrong one looks like."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.worker import devices
from penstock.worker.devices import canary, nvml, usage
from penstock.worker.failures import DeviceFault

CPU = torch.device("cpu")


def test_auto_is_the_best_there_is() -> None:
    assert str(devices.choose("auto")) == devices.find()[0]
    assert devices.choose("cpu") == CPU
    with pytest.raises(devices.DeviceError, match="there is no device 'cuda:99'"):
        devices.choose("cuda:99")


def test_several_accelerators_are_a_worker_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices.find() == ["cuda:0", "cuda:1", "cuda:2"]


def test_facts_and_memory_of_a_cpu() -> None:
    about = devices.facts(CPU)
    assert about["kind"] == "cpu"
    assert about["total_bytes"] > 1 << 30
    used = devices.memory(CPU)
    assert 0.0 < used["used_fraction"] <= 1.0
    assert 0 < used["rss_bytes"] <= used["total_bytes"]
    assert used["foreign_bytes"] + used["rss_bytes"] + used["free_bytes"] == pytest.approx(used["total_bytes"], rel=0.05)
    assert abs(devices.used_bytes(CPU) - used["rss_bytes"]) < 1 << 26


@pytest.mark.parametrize(("total", "free", "own", "foreign"), [(80, 50, 20, 10), (80, 80, 0, 0), (80, 70, 20, 0)])
def test_foreign_memory(total: int, free: int, own: int, foreign: int) -> None:
    assert usage.foreign_bytes(total, free, own) == foreign


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"allocated_bytes.all.current": 5, "allocated_bytes.all.peak": 9, "reserved_bytes.all.current": 12}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: said)
    used = devices.memory(torch.device("cuda:0"))
    assert (used["allocated_bytes"], used["peak_bytes"], used["reserved_bytes"]) == (5, 9, 12)
    assert (used["free_bytes"], used["total_bytes"], used["foreign_bytes"], used["used_fraction"]) == (50, 100, 38, 0.5)


def test_a_broken_gpu_does_not_silence_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert devices.memory(torch.device("cuda:0")).keys() == {"rss_bytes"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    remembered = nvml._nvml, nvml._handle
    for function in remembered:
        function.cache_clear()
    yield torch.device("cuda:0")
    for function in remembered:
        function.cache_clear()


class Nvml:
    """As pynvml is used, on a machine with one GPU."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0

    def __init__(self, reasons: int = 0x4, ecc: int | None = 0) -> None:
        self.reasons, self.ecc = reasons, ecc

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        assert uuid == b"GPU-1234"
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=42, memory=7)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        if self.ecc is None:
            raise self.NVMLError("not supported")
        return self.ecc


def test_health_by_nvml(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_nvml", lambda: Nvml())
    found = devices.health(gpu)
    assert found == devices.Health(0.42, 61, 0x4, 0)
    assert found.numbers() == {"utilisation": 0.42, "temperature_c": 61, "throttle_reasons": 4, "ecc_errors": 0}
    assert found.troubles == [], "a power cap is none"


def test_troubles_are_said_in_words(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_nvml", lambda: Nvml(reasons=0x48, ecc=3))
    assert devices.health(gpu).troubles == ["hardware slowdown", "hardware thermal limit", "3 uncorrected memory errors"]


def test_what_a_gpu_does_not_tell_is_left_out(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_nvml", lambda: Nvml(ecc=None))
    assert "ecc_errors" not in devices.health(gpu).numbers()


def test_no_nvml_is_no_error(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_nvml", lambda: None)
    assert devices.health(gpu) == devices.Health()
    assert devices.health(torch.device("mps")).numbers() == {}
    assert 0.0 <= devices.health(CPU).numbers()["utilisation"] <= 1.0


def test_a_binding_without_a_driver_is_no_nvml(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert devices.health(gpu) == devices.Health()


def test_a_sound_device_knows_the_answer() -> None:
    devices.known_answer(CPU)


def spoilt(name: str) -> Any:
    """The operation `name`, with a wrong result: one element, one bit, or a little too much."""
    if name == "softmax":
        return lambda x, dim: x.softmax(dim) * 1.02
    whole = getattr(torch.Tensor, name)
    if name == "copy_":
        return lambda to, *a, **k: whole(to, *a, **k).__ixor__(1)
    if name == "sum":
        return lambda x: whole(x) + 1

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = whole(a, b)
        if a.is_floating_point():
            out[3, 5] += 1
        return out

    return matmul


@pytest.mark.parametrize(
    ("name", "what"),
    [("__matmul__", "a product of matrices"), ("sum", "a sum"), ("copy_", "a copy"), ("softmax", "softmax")],
)
def test_a_device_that_is_a_little_wrong_is_found(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch if name == "softmax" else torch.Tensor, name, spoilt(name))
    with pytest.raises(DeviceFault, match=f"computes wrongly: {what}"):
        devices.known_answer(CPU)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceFault),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (RuntimeError("no answer"), DeviceFault),
    ],
)
def test_what_the_canary_meets(raised: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(canary, "_reduction", meet)
    with pytest.raises(kind) as caught:
        devices.known_answer(CPU)
    assert type(caught.value) is kind

"""What counts as out of memory, as a broken device, as neither; and what is given back, scanned and believed."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_broker import assign, tensor_block

from penstock.broker.protocol import Answer, Code, Error, Resident
from penstock.kernels import InvalidInput, kernel, registry
from penstock.worker import devices, scan
from penstock.worker.batch import run_alone
from penstock.worker.config import DeviceFault, WorkerConfig, parse_scans
from penstock.worker.failures import describe
from penstock.worker.link import Credit
from penstock.worker.pressure import Pressure
from penstock.worker.runner import Runner

MEMORY, BROKEN, REFUSED, OTHER = "memory", "broken", "refused", "other"


def accelerator(text: str, code: int | None) -> torch.AcceleratorError:
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


def kind(e: Exception) -> str:
    failure = describe("k", e)
    assert failure.is_out_of_memory + failure.is_device_fault + failure.is_device_error <= 1
    if failure.is_out_of_memory:
        return MEMORY
    return BROKEN if failure.is_device_fault else REFUSED if failure.is_device_error else OTHER


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("CUDA error: an illegal memory access was encountered", BROKEN),
        ("CUDA error: device-side assert triggered", BROKEN),
        ("CUDA error: unspecified launch failure", BROKEN),
        ("CUDA error: uncorrectable ECC error encountered", BROKEN),
        ("CUDA error: uncorrectable NVLink error detected during the execution", BROKEN),
        ("CUDA error: misaligned address", BROKEN),
        ("CUDA error: unknown error", BROKEN),
        ("CUDA error: something that is not thought of yet", BROKEN),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`", BROKEN),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", BROKEN),
        ("Triton Error [CUDA]: an illegal memory access was encountered", BROKEN),
        ("HIP error: the operation cannot be performed in the present state", BROKEN),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", MEMORY),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", MEMORY),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", MEMORY),
        ("Unable to find a valid cuDNN algorithm to run convolution", MEMORY),
        ("CUDA error: out of memory", MEMORY),
        ("MPS backend out of memory (MPS allocated: 20 GB)", MEMORY),
        ("Triton Error [CUDA]: out of memory", MEMORY),
        ("CUDA error: invalid argument", REFUSED),
        ("CUDA error: no kernel image is available for execution on the device", REFUSED),
        ("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`", REFUSED),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", REFUSED),
        ("mat1 and mat2 shapes cannot be multiplied", OTHER),
    ],
)
def test_errors_by_their_text(text: str, wanted: str) -> None:
    assert kind(RuntimeError(text)) == wanted
    if wanted in (BROKEN, REFUSED):
        assert kind(accelerator(text, None)) == wanted, "a torch that gives no code"
    assert kind(ValueError(text)) == OTHER, "a kernel may quote what it likes"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (700, BROKEN), (710, BROKEN), (214, BROKEN), (719, BROKEN), (999, BROKEN), (4242, BROKEN),
        (2, MEMORY), (1, REFUSED), (701, REFUSED),
    ],
)  # fmt: skip
def test_a_code_goes_before_the_text(code: int, wanted: str) -> None:
    assert kind(accelerator("CUDA error: whatever", code)) == wanted
    assert kind(accelerator("CUDA error: invalid argument", code)) == wanted


def test_a_broken_device_is_seen_behind_what_a_kernel_makes_of_it() -> None:
    try:
        try:
            raise accelerator("CUDA error: device-side assert triggered", 710)
        except RuntimeError as e:
            raise InvalidInput("an index is out of range") from e
    except InvalidInput as e:
        failure = describe("k", e)
    assert failure.is_device_fault
    assert "device-side assert" in failure.error.message
    assert kind(torch.OutOfMemoryError("CUDA out of memory")) == MEMORY


# --- the canary ----------------------------------------------------------------------------------------------------


def test_a_refusal_is_believed_only_if_the_device_still_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    @kernel("accused", max_batch_size=8)
    def accused(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 and x[0, 0] == 0:
            return x
        raise RuntimeError("CUDA error: invalid argument")

    answers, fault = run(make_runner(accused), "accused", [0.0, 1.0])
    assert fault is None
    assert [a.error is None for a in answers] == [True, False]
    monkeypatch.setattr(devices, "known_answer", lambda device: fail_canary())
    answers, fault = run(make_runner(accused), "accused", [0.0, 1.0])
    assert answers == []
    assert fault is not None
    assert fault.is_device_fault
    assert "invalid argument; 2 + 2 gives 5" in fault.error.message


def fail_canary() -> None:
    raise DeviceFault("2 + 2 gives 5")


# --- memory --------------------------------------------------------------------------------------------------------


def make_runner(*targets: Any, announced: list[Resident] | None = None, scans: dict[str, str] | None = None) -> Runner:
    kernels = [registry.create(target) for target in targets]
    told = announced if announced is not None else []
    return Runner({k.spec.name: k for k in kernels}, torch.device("cpu"), Path("/tmp"), told.append, scans=scans)


def run(runner: Runner, name: str, firsts: list[float]) -> tuple[list[Answer], Any]:
    rows = np.array([[first, 0.5] for first in firsts], np.float32)
    answers, _, fault = run_alone(runner, assign(1, name, tensor_block(rows)), 0.0)
    return answers, fault


@kernel("hoarder", max_batch_size=8)
class Hoarder:
    """Has room for four rows, less what its cache holds; counts its calls."""

    cached = 3
    num_calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        type(self).num_calls += 1
        if len(x) + self.cached > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    def trim(self) -> int:
        held, type(self).cached = self.cached, 0
        return held << 20


def test_caches_go_before_a_batch_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hoarder, "cached", 3)
    monkeypatch.setattr(Hoarder, "num_calls", 0)
    runner = make_runner(Hoarder)
    rows = np.ones((4, 2), np.float32)
    answers, clock, _ = run_alone(runner, assign(1, "hoarder", tensor_block(rows)), 0.0)
    assert [(a.start, a.stop, a.error) for a in answers] == [(0, 4, None)]
    assert Hoarder.num_calls == 2
    assert "num_oom" not in clock.timings(), "the size was not at fault: the broker has nothing to learn"
    rows = np.ones((8, 2), np.float32)
    answers, clock, _ = run_alone(runner, assign(2, "hoarder", tensor_block(rows)), 0.0)
    assert [(a.start, a.stop, a.error) for a in answers] == [(0, 4, None), (4, 8, None)]
    assert Hoarder.num_calls == 5, "a cache that has nothing to give is no reason to try again"
    assert clock.timings()["oom_rows"] == 8


def test_one_row_that_does_not_fit_says_so_and_keeps_nothing() -> None:
    held: list[Any] = []

    @kernel("glutton", max_batch_size=8)
    def glutton(x: torch.Tensor) -> torch.Tensor:
        big = torch.ones(1000)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 900 GiB")

    runner = make_runner(glutton)
    gc.disable()
    try:
        (answer,), fault = run(runner, "glutton", [1.0])
    finally:
        gc.enable()
    assert fault is None
    assert isinstance(answer.error, Error)
    assert answer.error.code == Code.FAILED
    assert "kernel 'glutton' ran out of memory" in answer.error.message
    assert all(ref() is None for ref in held)


def test_a_cache_that_cannot_be_cleared_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    @kernel("clumsy", max_batch_size=8)
    class Clumsy:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def trim(self) -> int:
            raise ValueError("dropped it")

    assert make_runner(Clumsy).recover_memory() == 0
    assert "kernel 'clumsy' could not give back its caches: ValueError: dropped it" in caplog.text


def test_a_load_that_breaks_the_device_ends_the_process_and_one_that_has_no_room_asks_for_it() -> None:
    @kernel("loads")
    class Loads:
        raised: Any = None

        def load(self, device: torch.device) -> None:
            if self.raised is not None:
                raise type(self).raised

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def trim(self) -> int:
            return 1

    @kernel("caches")
    class Caches:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def trim(self) -> int:
            Loads.raised = None
            return 1

    runner = make_runner(Loads, Caches)
    Loads.raised = accelerator("CUDA error: unspecified launch failure", 719)
    with pytest.raises(DeviceFault, match=r"loading kernel 'loads': .*unspecified launch failure"):
        run(runner, "loads", [1.0])
    Loads.raised = torch.OutOfMemoryError("CUDA out of memory")
    (answer,), _ = run(runner, "loads", [1.0])
    assert answer.error is None


def make_resident(name: str) -> Any:
    @kernel(name)
    class Resides:
        def load(self, device: torch.device) -> None:
            pass

        def unload(self) -> None:
            pass

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    return Resides


def test_kernels_are_unloaded_the_least_recently_used_first_and_load_again() -> None:
    announced: list[Resident] = []
    runner = make_runner(*map(make_resident, "abc"), announced=announced)
    for name in "bcab":
        run(runner, name, [1.0])
    assert runner.unload_one(but={"c"}) == "a"
    assert runner.unload_one(but={"b"}) == "c"
    assert runner.unload_one(but={"b"}) is None
    assert runner.resident == {"a": "absent", "b": "ready", "c": "absent"}
    assert [(r.kernel, r.state) for r in announced[-2:]] == [("a", "absent"), ("c", "absent")]
    (answer,), _ = run(runner, "a", [1.0])
    assert answer.error is None
    assert runner.resident["a"] == "ready"


def test_pressure_begins_and_ends_at_different_shares() -> None:
    pressure = Pressure(0.95)
    seen = []
    for fraction in [0.5, 0.96, 0.94, 0.97, 0.91, 0.89, 0.94]:
        is_due = pressure.observe(fraction)
        seen.append((is_due, pressure.is_high))
        pressure.has_news = False
    assert seen == [(False, False), (True, True), (True, True), (False, True), (True, True), (True, False), (False, False)]


def test_pressure_that_lasts_is_acted_upon_ever_more_rarely() -> None:
    pressure, acted = Pressure(0.95), []
    for i in range(1, 40):
        if pressure.observe(0.99):
            acted.append(i)
            pressure.has_news = False
    assert acted == [1, 2, 4, 8, 16, 32]
    pressure = Pressure(0.95)
    assert pressure.observe(0.99)
    assert not pressure.observe(0.99), "a loop that is in a kernel is asked once"
    assert pressure.num_high == 1


def test_credit_after_a_fault_doubles_and_shrinks_under_pressure() -> None:
    credit, windows = Credit(1 << 20), []
    credit.begin_slowly()
    for _ in range(4):
        windows.append(credit.window)
        credit.measure(0.1)
    assert windows == [1, 2, 4, 4]
    credit.is_pressed = True
    assert credit.window == 1
    before = credit.total()
    credit.is_pressed = False
    assert credit.window == 4
    assert credit.total()[0] == before[0] + 3


# --- the scan ------------------------------------------------------------------------------------------------------


@kernel("spoils", max_batch_size=16)
def spoils(x: torch.Tensor) -> dict[str, Any]:
    """Rows that begin with 1, 2, 3 have NaN in one output, -infinity in a float16 one, infinity in a list's tensor."""
    first = x[:, :1]
    ragged = [torch.full((i % 3,), 1.0) for i in range(len(x))]
    return {
        "a": torch.where(first == 1, float("nan"), x),
        "b": torch.where(first == 2, -float("inf"), torch.full_like(x, 60_000.0)).half(),  # their sum is past float16
        "c": [torch.cat([row, torch.tensor([float("inf") if f == 3 else 0.0])]) for row, f in zip(ragged, first, strict=True)],
        "d": torch.full((len(x), 4), 3e38),  # finite, though their sum is not
        "e": torch.arange(len(x)),
        "f": ["text"] * len(x),
        "g": torch.empty(len(x), 0),
    }


def test_only_rows_that_are_not_finite_fail_each_by_its_output() -> None:
    firsts = [1.0, 0, 0, 2, 3, 0, 1]
    answers, fault = run(make_runner(spoils, scans={"spoils": "fail"}), "spoils", firsts)
    assert fault is None
    assert [(a.start, a.stop, a.error is None) for a in answers] == [
        (0, 1, False), (1, 3, True), (3, 4, False), (4, 5, False), (5, 6, True), (6, 7, False),
    ]  # fmt: skip
    assert [a.error.message.split("'")[3] for a in answers if a.error] == ["a", "b", "c", "a"]
    assert all(a.error.code == Code.FAILED for a in answers if a.error)
    good = answers[1].block
    assert good is not None
    assert good.num_rows == 2
    names = [column.name for column in good.columns]
    assert np.frombuffer(good.column(names.index("e"), 0, 2), np.int64).tolist() == [1, 2], "its own rows, not others'"


def test_a_warning_counts_and_no_scan_says_nothing() -> None:
    for scans, wanted in (({"spoils": "warn"}, 2), ({}, None)):
        runner = make_runner(spoils, scans=scans)
        rows = np.array([[1, 0.5], [0, 0.5], [2, 0.5]], np.float32)
        answers, clock, _ = run_alone(runner, assign(1, "spoils", tensor_block(rows)), 0.0)
        assert [(a.start, a.stop, a.error) for a in answers] == [(0, 3, None)]
        assert clock.timings().get("num_not_finite") == wanted


def test_all_finite_is_one_answer() -> None:
    (answer,), _ = run(make_runner(spoils, scans={"spoils": "fail"}), "spoils", [0.0, 0.0])
    assert answer.error is None
    assert scan.sums({"x": torch.arange(3), "t": ["a"]}) == {}


def test_scans_are_set_for_all_kernels_or_one() -> None:
    assert parse_scans(("warn", "embed=fail", "sleep=off")) == ("warn", {"embed": "fail", "sleep": "off"})
    assert parse_scans(()) == ("off", {})
    for wrong in ("loud", "embed=", "=fail", "embed=loud"):
        with pytest.raises(ValueError, match="scan_outputs"):
            WorkerConfig(scan_outputs=(wrong,))


@pytest.mark.parametrize(
    "wrong",
    [{"hang_limit_s": 0.0}, {"first_run_limit_s": 1e9}, {"max_failures": 0}, {"memory_high": 1.5}, {"drain_limit_s": -1.0}],
)
def test_settings_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WorkerConfig(**wrong)

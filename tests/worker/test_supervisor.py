"""The process above a worker, with real processes against a fake broker: restarts, hangs, signals, the end."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fault_kernels as faults
import numpy as np
import psutil
import pytest
from fake_broker import FakeBroker, assign, start_command, tensor_block

from penstock.broker import protocol
from penstock.broker.columns import Block
from penstock.worker.backoff import MAX_DEATHS, STABLE_S, Backoff

Start = Callable[..., subprocess.Popen[str]]
EXIT_S = 15.0
QUICK = ("--kernels", "fault_kernels", "--hang-limit-s", "1")


def pauses(backoff: Backoff, num: int, **kwargs: Any) -> list[float | None]:
    return [backoff.failed(**{"ran_s": 1.0, "was_in_kernel": False, "has_worked": False, **kwargs}) for _ in range(num)]


def test_pauses_double_to_a_minute_and_then_it_gives_up() -> None:
    assert pauses(Backoff(10, lambda: 0.0), 10) == [1, 2, 4, 8, 16, 32, 60, 60, 60, None]
    assert pauses(Backoff(4, lambda: 1.0), 4) == [0.5, 1, 2, None]
    assert pauses(Backoff(1), 1) == [None]
    drawn = pauses(Backoff(9), 6)
    assert all(pause is not None and 2**i / 2 <= pause <= 2**i for i, pause in enumerate(drawn))


def test_who_ran_for_a_while_or_finished_something_begins_anew() -> None:
    backoff = Backoff(4, lambda: 0.0)
    assert pauses(backoff, 3) == [1, 2, 4]
    assert pauses(backoff, 1, ran_s=STABLE_S) == [1]
    assert pauses(backoff, 2) == [2, 4]
    assert pauses(backoff, 5, has_worked=True) == [1] * 5


def test_deaths_in_kernels_cost_no_pause_while_suspects_are_separated() -> None:
    backoff = Backoff(3, lambda: 0.0)
    assert pauses(backoff, MAX_DEATHS, was_in_kernel=True) == [0.0] * MAX_DEATHS
    assert pauses(backoff, 3, was_in_kernel=True) == [1, 2, None], "a device on which nothing runs is not a task's fault"


@pytest.fixture
def broker(tmp_ipc: Path) -> Iterator[FakeBroker]:
    made = FakeBroker(tmp_ipc, heartbeat_ms=500.0)
    yield made
    made.close()


@pytest.fixture
def start(tmp_ipc: Path) -> Iterator[Start]:
    """Starts supervised workers, which are gone when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        started.append(start_command(f"ipc://{tmp_ipc}", tmp_ipc, *arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


class Supervised:
    """One broker and one supervised worker, which survives every test; leases are numbered through."""

    def __init__(self, folder: Path) -> None:
        self.broker = FakeBroker(folder, heartbeat_ms=1000.0)  # a busy machine is no reason to say hello again
        self.folder = folder
        self.process = start_command(self.broker.url, folder, *QUICK)
        self.ready = self.broker.expect(protocol.Ready)
        self.lease = 0

    def run(self, kernel: str = "fickle", first: float = faults.FINE, **fields: Any) -> int:
        """Send a row; the number of its lease."""
        self.lease += 1
        block = Block(1, (), (), ()) if "scalars" in fields else tensor_block(np.array([[first, 0.5]], np.float32))
        self.broker.send(assign(self.lease, kernel, block, **fields))
        return self.lease

    def answer(self, lease: int) -> protocol.Answer:
        (answer,), self.final = self.broker.answers(lease, 1)
        return answer

    def log(self) -> str:
        return (self.folder / "worker.log").read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.broker.close()


@pytest.fixture(scope="module")
def supervised(module_folder: Path) -> Iterator[Supervised]:
    made = Supervised(module_folder)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (faults.SEGFAULT, "killed by SIGSEGV in a run of kernel 'fickle'"),
        (faults.ASK_TO_END, "exit status 1"),
        (faults.END, "exit status 0"),
        (faults.EXIT, "exit status 86: the device is broken"),
        (faults.ILLEGAL, "exit status 86: the device is broken"),
        (faults.HANG, "a run of kernel 'fickle' has taken"),
        (faults.HANG_WITH_LOCK, "a run of kernel 'fickle' has taken"),
    ],
)
def test_a_worker_that_a_kernel_ends_is_started_again(supervised: Supervised, what: int, text: str) -> None:
    broker = supervised.broker
    if what != faults.HANG_WITH_LOCK:  # that one has a kernel without a first run: the page knows how long it takes
        assert supervised.answer(supervised.run()).error is None
    name, num_hellos = broker.hellos[-1].name, len(broker.hellos)
    began = time.monotonic()
    supervised.run(first=float(what))
    if what == faults.ILLEGAL:
        goodbye = broker.expect(protocol.Goodbye)
        assert goodbye.is_fault
        assert "illegal memory access" in goodbye.reason
    ready = broker.expect(protocol.Ready)
    assert time.monotonic() - began < 20.0, "no pause, and no patience as for a first run"
    assert [hello.name for hello in broker.hellos[num_hellos:]] == [name]
    assert broker.hellos[-1].pid != broker.hellos[num_hellos - 1].pid
    assert text in str(ready.device["fault"])
    assert tuple(ready.credit)[:1] == (1,), "slowly at first"
    assert not any(isinstance(m, protocol.WorkerFinal) for m in broker.inbox), "nothing was said of the guilty row"
    if what != faults.HANG:
        assert supervised.answer(supervised.run()).error is None
    assert text in supervised.log()
    broker.inbox.clear()


def test_what_may_take_long_is_not_ended(supervised: Supervised) -> None:
    """Longer than `--hang-limit-s`: as declared by the kernel, and as predicted by the broker."""
    supervised.answer(supervised.run("patient", scalars={"seconds": [0.0]}))
    supervised.answer(supervised.run("nap", scalars={"seconds": [0.0]}))
    pid = supervised.broker.hellos[-1].pid
    assert supervised.answer(supervised.run("patient", scalars={"seconds": [1.8]})).error is None
    assert supervised.answer(supervised.run("nap", scalars={"seconds": [1.8]}, predicted_ms=1800.0)).error is None
    assert supervised.broker.hellos[-1].pid == pid


def test_a_stopped_worker_is_not_ended(supervised: Supervised) -> None:
    supervised.answer(supervised.run("nap", scalars={"seconds": [0.0]}))
    pid = supervised.broker.hellos[-1].pid
    worker = psutil.Process(pid)
    lease = supervised.run("nap", scalars={"seconds": [0.4]})
    worker.suspend()
    time.sleep(2.5)  # the state under test: longer than the limit
    worker.resume()
    assert supervised.answer(lease).error is None
    assert supervised.broker.hellos[-1].pid == pid


def test_a_refused_call_of_the_device_is_a_failure_like_others(supervised: Supervised) -> None:
    pid = supervised.broker.hellos[-1].pid
    error = supervised.answer(supervised.run(first=float(faults.ACCUSED))).error
    assert error is not None
    assert "invalid argument" in error.message
    assert supervised.answer(supervised.run()).error is None
    assert supervised.broker.hellos[-1].pid == pid


def test_the_supervisor_is_small(supervised: Supervised) -> None:
    process = psutil.Process(supervised.process.pid)
    assert process.memory_info().rss < 30 << 20
    before, began = sum(process.cpu_times()[:2]), time.monotonic()
    while time.monotonic() - began < 1.0:
        supervised.broker.turn()
    assert sum(process.cpu_times()[:2]) - before <= 0.03  # the clock counts in 10 ms


def test_under_nohup_sighup_is_nothing_and_sigterm_drains_through_the_supervisor(broker: FakeBroker, start: Start) -> None:
    ours = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = start(*QUICK)
    signal.signal(signal.SIGHUP, ours)
    broker.expect(protocol.Ready)
    process.send_signal(signal.SIGHUP)
    for lease in (1, 2):
        broker.send(assign(lease, "nap", Block(1, (), (), ()), scalars={"seconds": [0.3]}))
        broker.answers(lease, 1)
    assert not any(isinstance(message, protocol.Drain) for message in broker.inbox)
    num_beats = len(broker.beats)
    broker.send(assign(3, "nap", Block(1, (), (), ()), scalars={"seconds": [0.4]}))
    broker.wait_until(lambda: len(broker.beats) > num_beats, "a heartbeat")
    process.terminate()
    broker.expect(protocol.Drain)
    broker.send(protocol.Drain())
    assert broker.expect(protocol.WorkerFinal).answers[0].error is None
    assert broker.expect(protocol.Goodbye).reason == "drained"
    assert process.wait(EXIT_S) == 0


def test_a_second_signal_ends_at_once_and_what_hangs_is_killed(broker: FakeBroker, start: Start, tmp_ipc: Path) -> None:
    process = start(*QUICK, "--first-run-limit-s", "60", "--drain-limit-s", "0.6")
    broker.expect(protocol.Ready)
    broker.send(assign(1, "busy", Block(1, (), (), ()), scalars={"seconds": [60.0]}))
    broker.wait_until(lambda: bool(broker.beats), "a heartbeat")
    process.terminate()
    assert process.wait(EXIT_S) == 128 + signal.SIGKILL
    assert "it does not end: killed" in (tmp_ipc / "worker.log").read_text()
    again = start(*QUICK)
    broker.expect(protocol.Ready)
    broker.send(assign(2, "busy", Block(1, (), (), ()), scalars={"seconds": [60.0]}))
    broker.wait_until(lambda: broker.beats[-1][1].session == broker.hellos[-1].secret, "a heartbeat of the second")
    again.send_signal(signal.SIGINT)
    broker.turn(100)
    again.send_signal(signal.SIGINT)
    assert again.wait(EXIT_S) == 128 + signal.SIGINT


def test_the_worker_ends_with_its_supervisor_whatever_it_does(broker: FakeBroker, start: Start, tmp_ipc: Path) -> None:
    process = start(*QUICK, "--first-run-limit-s", "60")
    broker.expect(protocol.Ready)
    worker = psutil.Process(broker.hellos[-1].pid)
    broker.send(assign(1, "fickle", tensor_block(np.array([[faults.HANG_WITH_LOCK, 0]], np.float32))))
    broker.wait_until((tmp_ipc / "hangs").exists, "the kernel to hang")
    process.kill()
    process.wait()
    wait_gone(worker)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [(["--device", "abacus"], 2, "device must be auto, cpu"), (["--kernels", "no_such_module"], 1, "no_such_module")],
)
def test_what_cannot_start_is_not_tried_again(
    start: Start, tmp_ipc: Path, arguments: list[str], status: int, message: str
) -> None:
    assert start(*arguments).wait(20.0) == status
    log = (tmp_ipc / "worker.log").read_text()
    (line,) = [line for line in log.splitlines() if line.startswith("penstock worker: ")]
    assert message in line
    assert "starts again" not in log


def test_a_device_that_does_not_compute_is_given_up(
    broker: FakeBroker, start: Start, tmp_ipc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last act, too, does not wait for threads that hang."""
    monkeypatch.setenv("BREAK_CANARY", "1")
    monkeypatch.setenv("HANG_IN_TEARDOWN", "1")
    process = start(*QUICK, "--max-failures", "2")
    goodbye = broker.expect(protocol.Goodbye)
    assert goodbye.is_fault
    assert "2 + 2 gives 5" in goodbye.reason
    broker.wait_until(lambda: len(broker.hellos) == 2, "a second try")
    assert process.wait(30.0) == 87
    log = (tmp_ipc / "worker.log").read_text()
    assert "worker cpu-0 gives up: 2 failures in a row, the last: exit status 86" in log
    assert not any(isinstance(m, protocol.Ready) for m in broker.inbox)


def test_a_start_that_hangs_is_ended(start: Start, tmp_ipc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANG_AT_IMPORT", "1")
    assert start(*QUICK, "--first-run-limit-s", "1", "--max-failures", "1").wait(20.0) == 87
    assert "the start has taken" in (tmp_ipc / "worker.log").read_text()


def test_memory_that_is_short_is_given_back(
    broker: FakeBroker, start: Start, tmp_ipc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a reading that the test writes: caches at once, then kernels that nobody waits for; little is taken ahead."""
    reading = tmp_ipc / "reading"
    reading.write_text("0.5")
    monkeypatch.setenv("FAKE_MEMORY", str(reading))
    start("--kernels", "fault_kernels")
    broker.expect(protocol.Ready)
    row = tensor_block(np.ones((1, 2), np.float32))
    broker.send(assign(1, "idle", row))
    broker.answers(1, 1)
    reading.write_text("0.97")
    broker.wait_until(lambda: "caches cleared, 1 MiB" in (tmp_ipc / "worker.log").read_text(), "the caches to go")
    broker.wait_until(lambda: any(isinstance(m, protocol.Resident) and m.state == "absent" for m in broker.inbox), "unloading")
    broker.wait_until(lambda: "memory: unloaded kernel 'idle'" in (tmp_ipc / "worker.log").read_text(), "a line about it")
    credits = []
    for lease in range(2, 6):
        broker.send(assign(lease, "scale", row))
        credits.append(broker.answers(lease, 1)[1].credit[0] - lease)
    assert credits[-1] == 1
    reading.write_text("0.92")
    num_beats = len(broker.beats)
    broker.wait_until(lambda: len(broker.beats) > num_beats + 1, "a reading between the two marks")
    assert "no longer short" not in (tmp_ipc / "worker.log").read_text()
    reading.write_text("0.5")
    broker.wait_until(lambda: "50 % in use, no longer short" in (tmp_ipc / "worker.log").read_text(), "the end of it")
    broker.send(assign(6, "idle", row))
    broker.answers(6, 1)


def wait_gone(process: psutil.Process) -> None:
    limit = time.monotonic() + EXIT_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit, "the worker outlives its supervisor"
        time.sleep(0.01)

"""A worker process against a fake broker over real ipc sockets: sessions, heartbeats, drain, and what goes wrong."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fake_broker import HERE, FakeBroker, assign, start_worker, tensor_block

from penstock.broker import protocol
from penstock.broker.columns import Block, pack
from penstock.broker.layout import Column
from penstock.broker.protocol import Code
from penstock.broker.wire import encode

Start = Callable[..., subprocess.Popen[str]]
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
EXIT_S = 10.0


@pytest.fixture
def broker(tmp_ipc: Path) -> Iterator[FakeBroker]:
    made = FakeBroker(tmp_ipc)
    yield made
    made.close()


@pytest.fixture
def start(tmp_ipc: Path) -> Iterator[Start]:
    """Starts workers, which are gone when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def begin(url: str = f"ipc://{tmp_ipc}", *arguments: str) -> subprocess.Popen[str]:
        started.append(start_worker(url, tmp_ipc, *arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


class Shared:
    """One broker and one worker for the tests that leave both as they were; leases are numbered through."""

    def __init__(self, folder: Path) -> None:
        self.broker = FakeBroker(folder)
        self.folder = folder
        self.process = start_worker(self.broker.url, folder)
        self.broker.expect(protocol.Ready)
        self.leases = itertools.count(1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.broker.close()


@pytest.fixture(scope="module")
def one_worker(module_folder: Path) -> Iterator[Shared]:
    made = Shared(module_folder)
    yield made
    made.close()


@pytest.fixture
def shared(one_worker: Shared) -> Shared:
    one_worker.broker.inbox.clear()
    one_worker.broker.beats.clear()
    one_worker.broker.hellos.clear()
    return one_worker


def seconds(*values: float) -> dict[str, Any]:
    return {"scalars": {"seconds": list(values)}}


def nothing(num_rows: int) -> Any:
    """A block of rows without columns: a task of row scalars only."""
    return Block(num_rows, (), (), ())


def log_of(tmp_ipc: Path) -> str:
    return (tmp_ipc / "worker.log").read_text()


def values(answer: protocol.Answer) -> np.ndarray:
    assert answer.block is not None, answer.error
    column = answer.block.columns[0]
    return np.frombuffer(answer.block.column(0, 0, answer.block.num_rows), column.dtype).reshape(-1, *column.shape)


def test_from_hello_to_goodbye(broker: FakeBroker, start: Start, tmp_ipc: Path) -> None:
    worker = start()
    broker.wait_until(lambda: bool(broker.hellos), "hello")
    said_hello_at = time.monotonic()
    hello = broker.hellos[0]
    assert (hello.name, hello.device, hello.pid) == ("cpu-0", "cpu", worker.pid)
    ready = broker.expect(protocol.Ready)
    assert time.monotonic() - said_hello_at > 0.1, "torch is loaded after the hello"
    specs = {spec["name"]: spec for spec in ready.specs}
    assert {"scale", "sleep", "softmax", "count"} <= set(specs)
    assert specs["count"]["modes"] == ["stream"]
    assert ready.resident["heavy"] == "absent"
    assert ready.device["kind"] == "cpu"
    assert ready.device["total_bytes"] > 0

    broker.send(assign(1, "scale", tensor_block(ROWS), statics={"factor": 3.0}, digest=specs["scale"]["digest"]))
    (answer,), final = broker.answers(1, 4)
    np.testing.assert_array_equal(values(answer), ROWS * 3)
    assert set(final.timings) == {"batch_wait_ms", "load_ms", "h2d_ms", "compute_ms", "d2h_ms"}
    assert final.credit[0] > ready.credit[0]

    broker.wait_until(lambda: bool(broker.beats and broker.beats[-1][1].progress), "a heartbeat with progress")
    assert broker.beats[-1][1].session == hello.secret
    memory = broker.beats[-1][1].memory
    assert memory["rss_bytes"] > 1 << 20
    assert 0.0 < memory["used_fraction"] < 1.0

    worker.terminate()
    broker.expect(protocol.Drain)
    broker.send(protocol.Drain())
    assert broker.expect(protocol.Goodbye).reason == "drained"
    assert worker.wait(EXIT_S) == 0
    log = log_of(tmp_ipc)
    assert "worker cpu-0 ready on cpu: " in log
    assert "worker cpu-0 ended: drained" in log


def test_streams_and_batches_interleave(shared: Shared) -> None:
    broker = shared.broker
    one, two, three = (next(shared.leases) for _ in range(3))
    first, second = (tensor_block(np.array([start]), "start") for start in (10, 50))
    broker.send(assign(one, "count", first, mode="stream", statics={"steps": 40, "pause": 0.02}))
    broker.send(assign(two, "count", second, mode="stream", statics={"steps": 10_000, "pause": 0.02}))
    broker.expect(protocol.WorkerPartial)
    broker.send(assign(three, "scale", tensor_block(ROWS)))
    final = broker.expect(protocol.WorkerFinal)
    assert final.lease == three, "a batch does not wait for a stream's end"
    broker.send(protocol.CancelLease(lease=two))
    cancelled = broker.expect(protocol.WorkerFinal)
    assert cancelled.lease == two
    assert cancelled.answers[0].error is not None
    assert cancelled.answers[0].error.code == Code.CANCELLED
    assert list(cancelled.credit) == [0, 0]
    (answer,), _ = broker.answers(one, 1)
    assert values(answer)[0].tolist() == list(range(10, 50))
    parts = [m.part for m in broker.inbox if isinstance(m, protocol.WorkerPartial) and m.lease == one]
    assert parts[-1] == 39


def test_a_waiting_batch_is_cancelled_before_it_begins(shared: Shared) -> None:
    broker = shared.broker
    one, two = next(shared.leases), next(shared.leases)
    broker.send(assign(one, "nap", nothing(1), **seconds(0.3)))
    broker.send(assign(two, "nap", nothing(2), **seconds(60.0, 60.0)))
    broker.send(protocol.CancelLease(lease=two))
    broker.send(protocol.CancelLease(lease=99_999))
    finals = {final.lease: final for final in (broker.expect(protocol.WorkerFinal) for _ in range(2))}
    assert finals[one].answers[0].error is None
    (answer,) = finals[two].answers
    assert answer.error is not None
    assert (answer.start, answer.stop, answer.error.code) == (0, 2, Code.CANCELLED)
    assert finals[two].timings == {"num_runs": 0}, "nothing is to be learned from it"
    assert finals[two].credit[0] > 0


@pytest.mark.parametrize("kernel", ["nap", "busy"])
def test_heartbeats_do_not_wait_for_a_kernel(shared: Shared, kernel: str) -> None:
    """`busy` never gives up the interpreter's lock by itself: the side thread gets it after a switch interval (5 ms)."""
    broker, lease = shared.broker, next(shared.leases)
    began = time.monotonic()
    broker.send(assign(lease, kernel, nothing(1), **seconds(2.0)))
    broker.answers(lease, 1)
    assert time.monotonic() - began > 1.9
    times = [at for at, _ in broker.beats if at > began]
    gaps = np.diff([began, *times])
    print(f"{kernel}: {len(times)} heartbeats in 2 s, longest gap {gaps.max() * 1e3:.0f} ms")
    assert len(times) >= 10
    assert gaps.max() < 0.5


def test_malformed_messages_are_ignored(shared: Shared) -> None:
    broker, lease = shared.broker, next(shared.leases)
    good = encode(assign(lease, "scale", tensor_block(ROWS)))
    headers: list[list[Any]] = [[b""], [b"PS\x01\x00"], [b"PS\x01\x00", b"\xc1"], [b"PS\x02\x00", b"\x80"]]
    bad = [*headers, [*good, b"more"], good[:2]]
    for frames in bad:
        broker.send_raw(frames)
    broker.send(assign(lease, "scale", tensor_block(ROWS)))
    broker.answers(lease, 4)
    assert log_of(shared.folder).count("ignored a malformed message") == len(bad)


def test_unattached_is_answered_with_hello(shared: Shared) -> None:
    shared.broker.sessions.clear()  # the next heartbeat is answered `unattached`
    shared.broker.expect(protocol.Ready)
    assert len(shared.broker.hellos) == 1


def test_a_silent_broker_is_greeted_again(shared: Shared) -> None:
    broker = shared.broker
    broker.is_deaf = True
    limit = time.monotonic() + 1.0
    while time.monotonic() < limit:
        broker.turn()
    broker.is_deaf = False
    broker.expect(protocol.Ready)
    assert len(broker.hellos) == 1


def thought(lease: int, **fields: Any) -> protocol.Assign:
    block = pack([(Column("prompt", "str", (), True), [3], [b"why"])], 1)
    return assign(lease, "think", block, mode="stream", statics={"num_tokens": 60, "pause": 0.01}, **fields)


def test_a_broker_that_takes_no_checkpoints_gets_none(shared: Shared) -> None:
    lease = next(shared.leases)
    shared.broker.send(thought(lease))
    assert shared.broker.expect(protocol.WorkerFinal).lease == lease
    assert not any(isinstance(m, protocol.Checkpoint) for m in shared.broker.inbox)
    shared.broker.inbox.clear()


def test_what_was_saved_is_where_another_lease_goes_on(broker: FakeBroker, start: Start) -> None:
    broker.limits = {"checkpoint_ms": 50.0, "max_checkpoint_bytes": 1 << 20}
    start()
    specs = {spec["name"]: spec for spec in broker.expect(protocol.Ready).specs}
    assert specs["think"]["checkpoints"] is True
    assert "checkpoints" not in specs["count"]
    broker.send(thought(1))
    broker.expect(protocol.Checkpoint)
    saved = broker.expect(protocol.Checkpoint)
    broker.send(protocol.CancelLease(lease=1))
    assert broker.expect(protocol.WorkerFinal).lease == 1
    broker.inbox.clear()
    broker.send(thought(2, checkpoint=saved.block, part=saved.part))
    block = broker.expect(protocol.WorkerFinal).answers[0].block
    parts = [m.part for m in broker.inbox if isinstance(m, protocol.WorkerPartial)]
    assert parts == list(range(saved.part, 60))
    assert block is not None
    broker.send(thought(3))
    whole = broker.expect(protocol.WorkerFinal).answers[0].block
    assert whole is not None
    assert [bytes(block.row(column, 0)) for column in range(2)] == [bytes(whole.row(column, 0)) for column in range(2)]


def test_sigterm_finishes_what_is_held(broker: FakeBroker, start: Start) -> None:
    worker = start()
    broker.expect(protocol.Ready)
    for lease in (1, 2):
        broker.send(assign(lease, "nap", nothing(1), **seconds(0.4)))
    broker.send(assign(3, "count", tensor_block(np.array([1]), "start"), mode="stream", statics={"steps": 5, "pause": 0.05}))
    broker.wait_until(lambda: any(beat.progress >= 1 for _, beat in broker.beats), "the first batch")
    worker.terminate()
    broker.expect(protocol.Drain)
    broker.send(protocol.Drain())
    finals = {broker.expect(protocol.WorkerFinal).lease for _ in range(3)}
    assert finals == {1, 2, 3}
    broker.expect(protocol.Goodbye)
    assert worker.wait(EXIT_S) == 0


def test_a_second_signal_ends_at_once(broker: FakeBroker, start: Start) -> None:
    worker = start()
    broker.expect(protocol.Ready)
    broker.send(assign(1, "busy", nothing(1), **seconds(60.0)))
    broker.wait_until(lambda: bool(broker.beats), "a heartbeat")
    worker.send_signal(signal.SIGINT)
    time.sleep(0.1)  # two signals at once would count as one
    worker.send_signal(signal.SIGINT)
    assert broker.expect(protocol.Goodbye).reason == "interrupted"
    assert worker.wait(EXIT_S) == 128 + signal.SIGINT
    assert not any(isinstance(m, protocol.WorkerFinal) for m in broker.inbox)


def test_what_is_cut_short_and_not_idempotent_does_not_go_back(broker: FakeBroker, start: Start, tmp_ipc: Path) -> None:
    """By its goodbye a worker says that nothing of what it holds has begun; the one that has is answered first."""
    worker = start()
    broker.expect(protocol.Ready)
    for lease in (1, 2):
        broker.send(assign(lease, "mark_once", nothing(1), **seconds(60.0)))
    broker.wait_until(lambda: (tmp_ipc / "begun").exists(), "the first batch")
    worker.send_signal(signal.SIGINT)
    time.sleep(0.1)  # two signals at once would count as one
    worker.send_signal(signal.SIGINT)
    final = broker.expect(protocol.WorkerFinal)
    assert final.lease == 1
    assert final.answers[0].error is not None
    assert final.answers[0].error.code == Code.WORKER_LOST
    assert broker.expect(protocol.Goodbye).reason == "interrupted"
    assert worker.wait(EXIT_S) == 128 + signal.SIGINT
    assert not any(isinstance(m, protocol.WorkerFinal) for m in broker.inbox), "the other one never began"


def test_the_brokers_drain_ends_a_worker(broker: FakeBroker, start: Start) -> None:
    worker = start()
    broker.expect(protocol.Ready)
    broker.send(assign(1, "nap", nothing(1), **seconds(0.2)))
    broker.send(protocol.Drain())
    broker.answers(1, 1)
    broker.expect(protocol.Goodbye)
    assert worker.wait(EXIT_S) == 0


def test_drain_without_an_answer_has_a_limit(broker: FakeBroker, start: Start) -> None:
    worker = start()
    broker.expect(protocol.Ready)
    worker.terminate()
    began = time.monotonic()
    broker.expect(protocol.Goodbye)
    assert 1.5 < time.monotonic() - began < 5.0
    assert worker.wait(EXIT_S) == 0


def test_a_broker_that_starts_again_gets_hello_and_ready(broker: FakeBroker, start: Start, tmp_ipc: Path) -> None:
    start()
    broker.expect(protocol.Ready)
    secret = broker.hellos[0].secret
    broker.send(assign(1, "mark", nothing(1), **seconds(0.5)))
    broker.wait_until((tmp_ipc / "begun").exists, "the batch to begin")
    broker.close()
    again = FakeBroker(tmp_ipc, epoch=2)
    try:
        assert list(again.expect(protocol.Ready).leases) == []
        assert again.hellos[0].secret == secret
        again.send(assign(3, "scale", tensor_block(ROWS)))
        assert again.expect(protocol.WorkerFinal).lease == 3, "answers to leases of another broker are forgotten"
        again.wait_until(lambda: bool(again.beats), "heartbeats to the new broker")
        log = log_of(tmp_ipc)
        assert log.count("trying again") >= 1  # twice if its heartbeats found no answer for a moment
        assert "the broker is back with a new session, epoch 2" in log
    finally:
        again.close()


def test_leases_are_kept_over_a_broken_connection(broker: FakeBroker, start: Start, tmp_ipc: Path) -> None:
    start()
    broker.expect(protocol.Ready)
    sessions = broker.sessions
    broker.send(assign(1, "count", tensor_block(np.array([1]), "start"), mode="stream", statics={"steps": 30, "pause": 0.02}))
    broker.expect(protocol.WorkerPartial)
    broker.send(assign(2, "mark", nothing(1), **seconds(0.5)))
    broker.wait_until((tmp_ipc / "begun").exists, "the batch to begin")
    broker.close()
    again = FakeBroker(tmp_ipc)
    again.sessions = sessions
    try:
        ready = again.expect(protocol.Ready)
        assert set(ready.leases) == {1, 2}
        finals = [again.expect(protocol.WorkerFinal) for _ in range(2)]
        assert {final.lease for final in finals} == {1, 2}
        assert all(final.answers[0].error is None for final in finals)
    finally:
        again.close()


def test_a_worker_may_start_before_its_broker(start: Start, tmp_ipc: Path) -> None:
    start()
    wait_for(lambda: (tmp_ipc / "worker.log").exists() and "ready on cpu" in log_of(tmp_ipc), "start")
    broker = FakeBroker(tmp_ipc)
    try:
        broker.expect(protocol.Ready)
    finally:
        broker.close()


def test_an_orphan_ends(broker: FakeBroker, tmp_ipc: Path) -> None:
    program = (
        "import os, sys; from fake_broker import start_worker; from pathlib import Path\n"
        "p = start_worker(sys.argv[1], Path(sys.argv[2]), '--parent', str(os.getpid()))\n"
        "print(p.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", program, broker.url, str(tmp_ipc)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    try:
        broker.expect(protocol.Ready)
        parent.kill()
        parent.wait()
        broker.expect(protocol.Drain)
        broker.send(protocol.Drain())
        broker.expect(protocol.Goodbye)
        wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the orphan's end")
    finally:
        parent.stdin.close()
        parent.stdout.close()
        if worker.is_running():
            worker.kill()


def test_an_idle_worker_rests(broker: FakeBroker, start: Start) -> None:
    worker = start()
    broker.heartbeat_ms = 1000.0
    broker.expect(protocol.Ready)
    broker.wait_until(lambda: bool(broker.beats), "a heartbeat")
    process = psutil.Process(worker.pid)
    before, began = sum(process.cpu_times()[:2]), time.monotonic()
    while time.monotonic() - began < 4.0:
        broker.turn()
    share = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)
    print(f"idle: {share:.2%} of a core")
    assert share < 0.01  # the clock of cpu_times counts in 10 ms: one tick is 0.25 %


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--device", "cuda:77"], 1, "there is no device 'cuda:77' here"),
        (["--device", "abacus"], 2, "device must be auto, cpu"),
        (["--kernels", "no_such_module"], 1, "no_such_module"),
        (["--option", "scale.factor=1"], 1, "takes no options"),
        (["--option", "nonsense"], 2, "kernel.key=value"),
        (["--broker", "carrier-pigeon"], 2, "is no address"),
    ],
)
def test_a_wrong_start_is_one_line(start: Start, tmp_ipc: Path, arguments: list[str], status: int, message: str) -> None:
    worker = start(f"ipc://{tmp_ipc}", *arguments)
    assert worker.wait(20.0) == status
    lines = [line for line in log_of(tmp_ipc).splitlines() if line.startswith("penstock worker: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in log_of(tmp_ipc)


def test_a_broker_that_refuses_ends_the_start(broker: FakeBroker, start: Start, tmp_ipc: Path) -> None:
    worker = start()
    broker.wait_until(lambda: bool(broker.hellos), "hello")
    broker.send(protocol.Fault(error=protocol.Error(Code.NOT_AUTHORISED, "not on my list")))
    assert worker.wait(20.0) == 77
    assert "the broker refused this worker: not on my list" in log_of(tmp_ipc)


def wait_for(is_true: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    limit = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < limit, what
        time.sleep(0.01)

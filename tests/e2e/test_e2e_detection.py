"""Failures are noticed within 10 s at default settings; and a broker that stood still takes nobody for dead.

The scenes are those of `scripts/bench detection`; the slow test plays all of them.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq
from ports import free_port
from running import Running, until
from zmq.utils.monitor import parse_monitor_message

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

import detection
from blackhole import TO_FAR, Cable, why_not
from detection import IDLE, KILL, LIMIT_S, LOCK, STOP, Stage, watch_client, watch_worker

from penstock.broker import detectors
from penstock.client import Client

TALLY = Path(__file__).with_name("tally_kernels.py")
LIVENESS_S = 5.0
NUM_TASKS = 200
needs_root = pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces: {why_not()}")


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable | None]:
    with ExitStack() as stack:
        yield None if why_not() else stack.enter_context(Cable())


@pytest.fixture(scope="module")
def stage(module_folder: Path, cable: Cable | None) -> Iterator[Stage]:
    """Workers a and b here and, with a cable, one at its far end, all over tcp with keys."""
    with Stage(module_folder / "p", cable) as stage:
        stage.broker()
        for name in ("a", "b"):
            stage.worker(name, stage.tcp)
        if cable is not None:
            stage.worker("far", stage.tcp, is_far=True)
        with Client(stage.url, connect_timeout=60.0) as ps:
            stage.ready(ps, "a", "b", *(["far"] if cable is not None else []))
        yield stage


@pytest.fixture
def ps(stage: Stage) -> Iterator[Client]:
    with Client(stage.url) as ps:
        yield ps


def test_a_stopped_worker(stage: Stage, ps: Client) -> None:
    row = watch_worker(stage, ps, "a", STOP, lambda pid: os.kill(pid, signal.SIGSTOP))
    assert LIVENESS_S - 1.0 < row["noticed_s"] <= row["resolved_s"] < LIMIT_S
    os.kill(int(detection._child_of(stage.processes["a"].pid)), signal.SIGCONT)


@needs_root
def test_a_worker_and_a_client_beyond_a_cable_that_swallows_everything(stage: Stage, ps: Client, cable: Cable) -> None:
    before = ps.status()["counters"].get("silent_clients", 0)
    stage.client("client", stage.tcp, "idle", is_far=True)
    row = watch_worker(stage, ps, "far", IDLE, lambda pid: cable.cut())
    assert row["noticed_s"] < LIMIT_S
    until(lambda: ps.status()["counters"].get("silent_clients", 0) == before + 1, "the client is away", LIMIT_S)
    cable.heal()
    until(lambda: ps.status()["num_clients_away"] == 0, "the client is back")
    detection.end_client(stage)


def test_a_worker_that_holds_the_interpreters_lock(stage: Stage, ps: Client) -> None:
    row = watch_worker(stage, ps, "b", LOCK, lambda pid: detection._give_order(stage.order("b"), "lock"))
    assert row["noticed_s"] <= row["resolved_s"] < LIMIT_S


def test_a_killed_worker_over_tcp(stage: Stage, ps: Client) -> None:
    """The process that takes its place says so, long before silence tells; and it has the same name."""
    row = watch_worker(stage, ps, "a", KILL, lambda pid: os.kill(pid, signal.SIGKILL))
    assert row["noticed_s"] < LIVENESS_S - 1.0
    stage.ready(ps, "a")


@needs_root
@pytest.mark.slow
def test_a_client_that_takes_no_results(stage: Stage, ps: Client, cable: Cable) -> None:
    row = watch_client(stage, ps, detection.FLOODED, "receiving", lambda pid: cable.cut(TO_FAR), is_far=True)
    assert row["noticed_s"] < LIMIT_S
    cable.heal()
    detection.end_client(stage)


@pytest.mark.slow
def test_every_mode() -> None:
    result = detection.measure()
    assert len(result["rows"]) >= (12 if why_not() else 20)
    assert not result["has_failed"], "\n".join(detection.lines(result))


# --- the transport by itself -----------------------------------------------------------------------------------------

DEAF = "import sys, time, zmq; s = zmq.Context().socket(zmq.PULL); s.rcvhwm = 1; s.bind(sys.argv[1]); time.sleep(600)"


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("is_flooded", [False, True])
def test_the_transport_closes_a_connection_that_leads_nowhere(cable: Cable, is_flooded: bool) -> None:
    """Heartbeats see an idle one; they wait behind what is unsent, so that TCP's limit has to see a full one."""
    endpoint = f"tcp://{cable.far}:{free_port()}"
    deaf = subprocess.Popen([*cable.inside, sys.executable, "-c", DEAF, endpoint])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PUSH)
    detectors.detect(socket)
    detectors.reconnect(socket)
    events = socket.get_monitor_socket(int(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED))
    try:
        socket.connect(endpoint)
        assert events.poll(20_000)
        assert parse_monitor_message(events.recv_multipart())["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if is_flooded:
            for _ in range(400):
                socket.send(bytes(1 << 20), zmq.NOBLOCK)
        cable.cut()
        began = time.monotonic()
        assert events.poll(20_000)
        assert parse_monitor_message(events.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED
        assert 2.0 < time.monotonic() - began < LIMIT_S
    finally:
        cable.heal()
        deaf.kill()
        deaf.wait()
        socket.disable_monitor()
        context.destroy(0)


# --- nobody dies of the broker's own pause ---------------------------------------------------------------------------


@pytest.mark.parametrize("pause_s", [8.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_the_broker_stands_still(folder: Path, pause_s: float) -> None:
    """Longer than any limit: no worker and no session is lost, and no task runs twice."""
    tally = folder / "tally"
    tally.touch()
    run = Running(folder, {"E2E_TALLY": str(tally)})
    tcp = f"tcp://127.0.0.1:{free_port()}"
    kernels = ("--kernels", str(TALLY))
    try:
        broker = run.start_broker("--listen", tcp)
        run.start_worker("local", *kernels)
        command = [sys.executable, "-P", "-m", "penstock.worker", "--broker", tcp, "--device", "cpu", "--name", "tcp", *kernels]
        run.start("tcp", command)
        pids = {w["name"]: w["pid"] for w in run.wait_ready("local", "tcp")["workers"]}
        with run.client(timeout=None) as one, Client(tcp, timeout=None) as two:
            tasks = [ps.submit("tally", number=float(n), seconds=0.1) for n, ps in enumerate([one, two] * (NUM_TASKS // 2))]
            until(lambda: sum(task.done() for task in tasks) > NUM_TASKS // 10, "some are done")
            broker.send_signal(signal.SIGSTOP)
            assert not all(task.done() for task in tasks)
            time.sleep(pause_s)
            broker.send_signal(signal.SIGCONT)
            assert sorted(int(task.result(60.0)) for task in tasks) == list(range(NUM_TASKS))
            body = one.status()
            assert two.status()["pid"] == body["pid"]
    finally:
        run.stop()
    again = {n: count for n, count in Counter(map(int, tally.read_text().split())).items() if count != 1}
    assert again == {}, body["counters"]
    assert {w["name"]: w["pid"] for w in body["workers"]} == pids
    for name in ("workers_lost", "lost_clients"):
        assert body["counters"].get(name, 0) == 0, body["counters"]

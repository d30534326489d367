"""Every failpoint of broker, worker and client, each with SIGKILL: the process dies right there, and nothing is lost by it.

Real processes, sockets and files. All sites are armed in all processes; one fires when its file is put into a folder. All
clients keep account (scripts/faults/accounting.py): that of the test, which lives and submits again what a broker has lost; one
that is killed whenever the broker dies, and then only fetches what was accepted; and those that die at a site of their own.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import waves
from accounting import Account, Log, settle
from running import Running, is_gone, until

from penstock.broker.failpoints import SITES
from penstock.client import Client, InvalidInput, PenstockError, UnknownTask

KERNELS = (Path(waves.__file__).with_name("fault_kernels.py"), Path(__file__).with_name("e2e_kernels.py"))
NUM_TASKS = 12
LIMIT_S = 40.0
LATE = {"broker.sent": 0.04, "worker.sent": 0.04, "client.sent": 0.04, "broker.committing": 0.3}
"""There a process dies so many seconds later: what it has sent has left, and so would have what must wait for the commit."""
ARMED = ";".join(f"{site}=kill:{LATE.get(site.rpartition('.')[0], 0)}" for site in SITES)
OFTEN = (
    "broker.decided.submit", "broker.committing.taken", "broker.committed.taken", "broker.sent.assign",
    "broker.committed.outcome", "broker.payload.written", "broker.restore.record", "worker.received.assign",
    "worker.sending.final", "client.sent.submit", "client.received.results", "client.taken.results",
)  # fmt: skip
"""The sites that every run of the tests tries; the others are for `-m chaos`."""


def sites_of(party: str) -> list[Any]:
    of_party = [site for site in SITES if site.startswith(f"{party}.")]
    return [site if site in OFTEN else pytest.param(site, marks=pytest.mark.chaos) for site in of_party]


class World:
    """A broker, two workers, a client that is not killed, and one that is. What is under way is done by another thread."""

    def __init__(self, folder: Path) -> None:
        self.switches, self.accounts, self.ghost = folder / "switches", folder / "accounts", folder / "ghost"
        self.switches.mkdir()
        self.accounts.mkdir()
        env = {
            "PENSTOCK_FAILPOINTS": ARMED, "PENSTOCK_FAILPOINTS_FOLDER": str(self.switches), "E2E_GHOST": str(self.ghost),
            "PENSTOCK_BROKER_SESSION_TTL_S": "3", "PENSTOCK_BROKER_HEARTBEAT_MS": "250",
            "PYTHONPATH": str(KERNELS[0].parent), "PENSTOCK_BROKER_MIN_FREE_BYTES": "1",
        }  # fmt: skip
        self.run = Running(folder, env)
        self.log = Log(self.accounts / "driver", "driver")
        self.client = Client(self.run.url, name="driver", connect_timeout=60.0, timeout=60.0)
        self.num_waves = 0
        self.work: Future[object] | None = None
        self._thread = ThreadPoolExecutor(1)
        self.start_broker()
        for name in ("w0", "w1"):
            self.start_worker(name)
        self.run.wait_ready("w0", "w1")
        self.client.call("owned", data=b"")
        self.doomed = self.start_doomed()
        until(lambda: "connected" in self.run.log("doomed"), "the other client has met the broker")

    def close(self) -> None:
        self.client.close()
        self.kill_doomed()
        self.run.stop()
        self._thread.shutdown()

    # --- who dies ------------------------------------------------------------------------------------------------

    def start_broker(self) -> None:
        self.broker = self.run.start_broker("--drain-s", "10")

    def start_worker(self, name: str) -> None:
        self.run.start_worker(name, *(word for path in KERNELS for word in ("--kernels", str(path))))

    def client_command(self, name: str) -> list[str]:
        return [sys.executable, "-P", waves.__file__, self.run.url, str(self.accounts / name), name, str(NUM_TASKS)]

    def start_doomed(self) -> subprocess.Popen[bytes]:
        with (self.run.folder / "doomed.log").open("wb") as log:
            return subprocess.Popen(self.client_command("doomed"), env=self.run.env, stdin=subprocess.PIPE, stdout=log)

    def kill_doomed(self) -> None:
        assert self.doomed.stdin is not None
        self.doomed.kill()
        self.doomed.wait(10)
        self.doomed.stdin.close()

    def replace_doomed(self) -> None:
        self.kill_doomed()
        self.doomed = self.start_doomed()

    def tell_doomed(self) -> None:
        assert self.doomed.stdin is not None
        self.doomed.stdin.write(f"{self.num_waves}\n".encode())
        self.doomed.stdin.flush()

    def restart(self) -> None:
        self.run.kill("broker")
        self.start_broker()

    def workers(self) -> set[psutil.Process]:
        """The processes under the supervisors, as they are now."""
        return {child for name in ("w0", "w1") for child in psutil.Process(self.run.processes[name].pid).children()}

    def arm(self, site: str) -> None:
        (self.switches / site).touch()

    def has_fired(self, site: str) -> bool:
        return (self.switches / f"{site}.fired").exists()

    # --- what is done meanwhile ----------------------------------------------------------------------------------

    def begin(self, work: Callable[[], object]) -> None:
        self.work = self._thread.submit(work)

    def begin_wave(self) -> None:
        self.num_waves += 1
        keys = waves.keys(self.log, NUM_TASKS, self.num_waves)
        self.tell_doomed()
        self.begin(lambda: waves.play(self.client, self.log, keys, LIMIT_S))

    def settle(self) -> None:
        """What is under way comes to its end, and so does one wave more if that was none."""
        if self.work is None:
            self.begin_wave()
        assert self.work is not None
        work, self.work = self.work, None
        try:
            work.result(LIMIT_S)
        except TimeoutError as e:
            raise AssertionError(f"not settled: {self.log.unsettled()}\n{self.client.jobs()}\n{self.story()}") from e
        if self.num_waves:
            self.tell_doomed()  # perhaps once more
            settled = f"settled {self.num_waves}\n"
            until(lambda: settled in self.run.log("doomed"), f"the other client's wave {self.num_waves} is settled", LIMIT_S)

    def story(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{name}:\n{self.run.log(name)[-1500:]}" for name in (*self.run.processes, "doomed"))

    def drop(self, key: str) -> None:
        try:
            self.client.drop(key=key, timeout=LIMIT_S)
        except UnknownTask:  # its answer was lost with the broker: this is the second time
            assert self.client.jobs() is not None

    def account(self) -> Account:
        held = [job["key"] for job in self.client.jobs() if job["kernel"] == waves.KERNEL and job["key"]]
        return settle(self.accounts.iterdir(), held)


@pytest.fixture(scope="module")
def worlds(module_folder: Path) -> Iterator[list[World]]:
    made = list[World]()
    yield made
    for world in made:
        world.close()


@pytest.fixture
def world(worlds: list[World], module_folder: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """The one of the test before, unless that has failed."""
    if not worlds:
        folder = module_folder / f"{request.session.testsfailed}"
        folder.mkdir()
        worlds.append(World(folder))
    num_failed = request.session.testsfailed
    yield worlds[0]
    if request.session.testsfailed > num_failed:
        worlds.pop().close()


def check(world: World) -> None:
    account = world.account()
    assert account.is_clean, account.text()
    assert not account.failed, account.text()
    assert not account.refused, account.text()
    assert not account.indeterminate, account.text()


# --- the broker ------------------------------------------------------------------------------------------------------


def on_start(world: World, site: str) -> None:
    """Something that happens when a broker takes over: peers come back, the journal is read."""
    world.begin_wave()
    world.arm(site)
    world.restart()


def on_drop(world: World, site: str) -> None:
    world.client.options(durable=True, idempotency_key=site).call("echo_bytes", data=b"")
    world.arm(site)
    world.begin(lambda: world.drop(site))


def on_unlink(world: World, site: str) -> None:
    """All that is in an old payload file is dropped."""
    durable = world.client.options(durable=True)
    for key in ("old", "new"):
        world.restart()
        durable.options(idempotency_key=key).call("echo_bytes", data=bytes(waves.LARGE_BYTES))
    world.arm(site)
    world.begin(lambda: world.drop("old"))


def on_death(world: World, site: str) -> None:
    """A task brings down its worker."""
    world.ghost.touch()
    world.arm(site)
    world.begin(lambda: world.client.options(durable=True).call("haunted", x=np.zeros(3, np.float32)))
    until(lambda: world.has_fired(site), f"{site} was reached")
    world.ghost.unlink()


def on_once(world: World, site: str) -> None:
    """A task that must not run twice is given to a worker."""

    def call() -> None:
        task = world.client.options(durable=True, idempotency_key=site).submit("owned_once", data=b"")
        is_accepted = False
        with contextlib.suppress(PenstockError):
            task.accepted(LIMIT_S)
            is_accepted = True
        error = task.exception(LIMIT_S)
        # Unavailable: it was in no journal yet, and another broker than this one might have begun with it.
        assert error is None or error.code == "worker_lost" or (error.code == "unavailable" and not is_accepted)

    world.arm(site)
    world.begin(call)


def on_backup(world: World, site: str) -> None:
    world.arm(site)
    folder = world.run.folder / site

    def back_up() -> None:
        try:
            world.client.backup(folder, timeout=LIMIT_S)
        except InvalidInput:  # the question was repeated, and what the broker had begun lies there
            world.client.backup(f"{folder}-again", timeout=LIMIT_S)

    world.begin(back_up)


def on_stop(world: World, site: str) -> None:
    world.arm(site)
    world.broker.terminate()


def on_wave(world: World, site: str) -> None:
    world.arm(site)
    world.begin_wave()


def on_new_file(world: World, site: str) -> None:
    """A broker begins a payload file with its first large frame."""
    world.restart()
    on_wave(world, site)


def on_acceptance(world: World, site: str) -> None:
    """Nothing runs meanwhile: what is accepted too early has no outcome before the broker dies, and is lost."""
    workers = world.workers()
    for worker in workers:
        worker.suspend()
    on_wave(world, site)
    until(lambda: world.broker.poll() is not None, f"the broker died at {site}", LIMIT_S)
    for worker in workers:
        worker.resume()


TRIGGERS = {
    "broker.committing.taken": on_acceptance, "broker.committed.taken": on_acceptance,
    "broker.received.attach": on_start, "broker.received.workerhello": on_start, "broker.received.ready": on_start,
    "broker.restore": on_start, "broker.received.control": on_drop, "broker.decided.control": on_drop,
    "broker.committing.erase": on_drop, "broker.committed.erase": on_drop, "broker.payload.unlinked": on_unlink,
    "broker.payload.begun": on_new_file,
    "broker.committing.started": on_once, "broker.committed.started": on_once,
    "broker.committing.died": on_death, "broker.committed.died": on_death, "broker.backup": on_backup,
    "broker.stop": on_stop,
}  # fmt: skip
"""What makes a broker get to a site, where a wave of tasks does not."""


@pytest.mark.parametrize("site", sites_of("broker"))
def test_the_broker_dies_at(world: World, site: str) -> None:
    TRIGGERS.get(site, TRIGGERS.get(site.rpartition(".")[0], on_wave))(world, site)
    until(lambda: world.broker.poll() is not None, f"the broker died at {site}", LIMIT_S)
    assert (world.broker.returncode, world.has_fired(site)) == (-signal.SIGKILL, True), world.run.log("broker")[-2000:]
    world.start_broker()
    world.replace_doomed()
    world.settle()
    check(world)


@pytest.mark.chaos
@pytest.mark.parametrize("site", ["broker.committing.erase", "broker.committed.erase"])
def test_a_requeue_is_done_wholly_or_not_at_all(world: World, site: str) -> None:
    durable = world.client.options(durable=True, idempotency_key=f"poor-{site}")
    world.ghost.touch()
    dead = durable.submit("haunted", x=np.zeros(3, np.float32)).exception(LIMIT_S)
    assert dead is not None
    assert dead.code == "dead"
    world.ghost.unlink()
    (world.switches / f"{site}.fired").unlink(missing_ok=True)
    world.arm(site)

    def requeue() -> None:
        with contextlib.suppress(InvalidInput):  # asked again, it has begun again already, and is done: nothing has failed
            world.client.requeue(key=f"poor-{site}", timeout=LIMIT_S)

    world.begin(requeue)
    until(lambda: world.broker.poll() is not None, f"the broker died at {site}", LIMIT_S)
    world.start_broker()
    world.replace_doomed()
    world.settle()
    np.testing.assert_array_equal(world.client.fetch(key=f"poor-{site}").result(LIMIT_S), np.ones(3, np.float32))


# --- a worker --------------------------------------------------------------------------------------------------------


def on_drain(world: World, site: str) -> None:
    world.begin_wave()
    world.arm(site)
    supervisor = world.run.processes["w0"]
    supervisor.terminate()
    assert supervisor.wait(LIMIT_S) == 128 + signal.SIGKILL
    world.start_worker("w0")


WORKER_TRIGGERS = {
    "worker.sending.hello": on_start, "worker.received.welcome": on_start, "worker.sending.ready": on_start,
    "worker.sent.ready": on_start, "worker.stop.begun": on_drain,
}  # fmt: skip


@pytest.mark.parametrize("site", sites_of("worker"))
def test_a_worker_dies_at(world: World, site: str) -> None:
    world.run.wait_ready("w0", "w1")
    before = world.workers()
    WORKER_TRIGGERS.get(site, on_wave)(world, site)
    until(lambda: world.has_fired(site), f"{site} was reached")
    until(lambda: any(is_gone(process.pid) for process in before), f"the worker died at {site}")
    world.settle()
    check(world)


# --- a client --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", sites_of("client"))
def test_a_client_dies_at(world: World, site: str) -> None:
    command = world.client_command(site)
    world.arm(site)
    lives = [subprocess.run(command, env=world.run.env, input=b"0\n", timeout=LIMIT_S, check=False) for _ in range(2)]
    statuses = [life.returncode for life in lives]
    assert (statuses, world.has_fired(site)) == ([-signal.SIGKILL, 0], True)
    check(world)

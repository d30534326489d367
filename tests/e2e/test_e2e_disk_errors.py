"""A disk that fails or is full: the broker acknowledges nothing more and ends with status 4; its next start goes on.

By failpoints, by strace where it is installed, and on a small tmpfs where the tests run as root.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import waves
from accounting import Log, settle
from running import Running, until

KERNELS = str(Path(waves.__file__).with_name("fault_kernels.py"))
LIMIT_S = 40.0
NUM_TASKS = 12
ERRORS = {
    "broker.committing.taken": "EIO", "broker.committing.acked": "EIO", "broker.committing.outcome": "ENOSPC",
    "broker.payload.begun": "ENOSPC", "broker.payload.written": "EIO",
}  # fmt: skip


class Disk:
    """A broker and a worker, and a client that keeps account of what comes of the disk's errors."""

    def __init__(self, folder: Path, state: Path | None = None) -> None:
        self.switches = folder / "switches"
        self.switches.mkdir()
        self.armed = {
            "PENSTOCK_FAILPOINTS": ";".join(f"{site}=error:{name}" for site, name in ERRORS.items()),
            "PENSTOCK_FAILPOINTS_FOLDER": str(self.switches),
        }  # fmt: skip
        extra = {"PENSTOCK_BROKER_MIN_FREE_BYTES": "1", "PENSTOCK_BROKER_HEARTBEAT_MS": "250"}
        self.run = Running(folder, extra | ({} if state is None else {"PENSTOCK_BROKER_STATE_DIR": str(state)}))
        self.run.start_worker("w", "--kernels", KERNELS)
        self.log = Log(folder / "driver.account", "driver")
        self.client = self.run.client(name="driver", timeout=None)
        self.num_waves = 0

    def start_broker(self, *before: str) -> None:
        command = [*before, sys.executable, "-P", "-m", "penstock.broker", "--url", self.run.url]
        self.broker = self.run.start("broker", command, self.armed)

    def check_ended(self, why: str) -> None:
        """With status 4, and one line that says why."""
        until(lambda: self.broker.poll() is not None, "the broker has ended", LIMIT_S)
        last = self.run.log("broker").splitlines()[-1]
        assert (self.broker.returncode, "Traceback" in self.run.log("broker")) == (4, False), self.run.log("broker")
        assert last.startswith("penstock broker: the journal ")
        assert why in last

    def play(self) -> None:
        self.num_waves += 1
        waves.play(self.client, self.log, waves.keys(self.log, NUM_TASKS, self.num_waves), LIMIT_S)

    def check_account(self) -> None:
        account = settle([self.run.folder / "driver.account"])
        assert account.is_clean, account.text()
        assert (account.failed, account.indeterminate, account.refused) == ({}, [], []), account.text()
        assert account.num_done >= self.num_waves * NUM_TASKS

    def close(self) -> None:
        self.client.close()
        self.run.stop()


@contextlib.contextmanager
def disk(folder: Path, state: Path | None = None) -> Iterator[Disk]:
    made = Disk(folder, state)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def broken(module_folder: Path) -> Iterator[Disk]:
    with disk(module_folder) as made:
        made.start_broker()
        made.run.wait_ready("w")
        yield made


@pytest.mark.parametrize("site", ERRORS)
def test_an_error_of_the_journal_ends_the_broker_and_nothing_is_lost(broken: Disk, site: str) -> None:
    broken.run.kill("broker")
    broken.start_broker()  # which has not begun a payload file yet
    (broken.switches / site).touch()
    with ThreadPoolExecutor(1) as thread:
        playing = thread.submit(broken.play)
        broken.check_ended({"EIO": "Input/output error", "ENOSPC": "No space left on device"}[ERRORS[site]])
        broken.start_broker()
        playing.result(LIMIT_S)
    broken.check_account()


@pytest.mark.chaos  # tracing makes the broker ten times slower
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: apt-get install strace")
@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_a_sync_that_fails_in_the_kernel(folder: Path, call: str) -> None:
    """SQLite syncs its log by fdatasync, payload files are synced by fsync."""
    with disk(folder) as made:
        made.start_broker()
        made.play()
        made.run.kill("broker")
        trace = ("-f", "-qq", "-o", str(folder / "strace.txt"), "-e", f"trace={call}")
        made.start_broker("strace", *trace, "-e", f"inject={call}:error=EIO:when=2+")
        with ThreadPoolExecutor(1) as thread:
            playing = thread.submit(lambda: [made.play() for _ in range(3)])
            made.check_ended("")
            assert "(INJECTED)" in (folder / "strace.txt").read_text()
            made.start_broker()
            playing.result(LIMIT_S)
        made.check_account()


@contextlib.contextmanager
def tmpfs(folder: Path, num_mib: int) -> Iterator[None]:
    mount(folder, f"size={num_mib}m")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "penstock", str(folder)], capture_output=True, timeout=20, check=False
    )
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_and_more_room(folder: Path) -> None:
    state = folder / "small"
    state.mkdir()
    with tmpfs(state, 2), disk(folder, state) as made:
        made.start_broker()
        with ThreadPoolExecutor(1) as thread:
            playing = thread.submit(lambda: [made.play() for _ in range(12)])
            made.check_ended("")
            mount(state, "remount,size=64m")
            made.start_broker()
            playing.result(LIMIT_S)
        made.check_account()

"""What users do with durable tasks, with real processes: after their client was killed, after they died, from a backup."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import KERNELS, Running, running, until

from penstock.broker.files import broker_folder
from penstock.client import ResultGone, Unavailable, UnknownTask

X = np.arange(6, dtype=np.float32)
SUBMIT = """
import sys
import numpy as np
from penstock.client import Client
ps = Client(sys.argv[1], name="doomed").options(durable=True, timeout=None)
for i in range(int(sys.argv[3])):
    ps.options(idempotency_key=f"job-{i}").submit(sys.argv[2], x=np.full(3, i, np.float32)).accepted()
print("accepted", flush=True)
sys.stdin.read()
"""


def submit_and_die(run: Running, kernel: str, num_tasks: int) -> None:
    """A client of its own process that is killed once its tasks are accepted."""
    doomed = subprocess.Popen(
        [sys.executable, "-P", "-c", SUBMIT, run.url, kernel, str(num_tasks)],
        env=run.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert doomed.stdout is not None
    assert doomed.stdin is not None
    with doomed.stdout, doomed.stdin:
        assert doomed.stdout.readline() == b"accepted\n"
        doomed.kill()
        doomed.wait(10)


def told(run: Running, *arguments: str) -> Any:
    done = run.cli(*arguments, "--json", "--url", run.url)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_tasks_of_a_client_that_was_killed(tmp_ipc: Path) -> None:
    with running(tmp_ipc, "w") as run, run.client(name="heir") as ps:
        ps.call("scale", x=X)
        submit_and_die(run, "scale", 4)
        until(lambda: all(job["state"] == "done" for job in ps.jobs()), "all are done")
        listed = {job["key"] for job in told(run, "jobs")}
        assert {"job-3"} <= listed <= {f"job-{i}" for i in range(4)}, "all but what it had acknowledged"
        assert told(run, "jobs", "show", "job-2")["client"] == "doomed"
        np.testing.assert_array_equal(ps.fetch(key="job-1").result(), np.full(3, 2.0, np.float32))
        saved = run.cli("jobs", "fetch", "job-3", "--out", "result.npz", "--url", run.url)
        assert saved.returncode == 0, saved.stderr
        with np.load(run.folder / "result.npz") as content:
            np.testing.assert_array_equal(content["out"], np.full(3, 6.0, np.float32))
        until(lambda: "job-3" not in {job["key"] for job in ps.jobs()}, "what a client fetched and acknowledged is not kept")
        assert run.cli("jobs", "drop", "job-0", "--url", run.url).returncode == 0
        missing = run.cli("jobs", "fetch", "job-0", "--url", run.url)
        assert (missing.returncode, "no durable task of yours is called 'job-0'" in missing.stderr) == (1, True)
        with pytest.raises(UnknownTask):
            ps.fetch(key="job-0")


def test_open_tasks_are_taken_cancelled_and_go_on_through_a_crash(tmp_ipc: Path) -> None:
    with running(tmp_ipc, "w") as run, run.client(name="heir") as ps:
        ps.call("scale", x=X)
        run.kill("w")
        submit_and_die(run, "scale", 3)
        tasks = [ps.fetch(key=f"job-{i}", take=True) for i in range(2)]
        assert run.cli("jobs", "cancel", "job-1", "--url", run.url).returncode == 0
        assert run.cli("jobs", "cancel", "job-2", "--url", run.url).returncode == 0
        waiting = run.cli("jobs", "fetch", "job-0", "--take", "--timeout", "0.1", "--url", run.url)
        assert (waiting.returncode, "it goes on" in waiting.stderr) == (1, True)
        assert isinstance(tasks[0].exception(10), Unavailable), "another client has taken it"
        again = ps.fetch(key="job-0", take=True)
        run.kill("broker")
        run.start_broker()
        run.start_worker("w", "--kernels", str(KERNELS))
        np.testing.assert_array_equal(again.result(60), np.zeros(3, np.float32))
        assert tasks[1].cancel()
        assert {job["key"]: job["state"] for job in ps.jobs()}["job-2"] == "cancelled"


def test_a_dead_task_is_run_again_once_it_can(tmp_ipc: Path) -> None:
    ghost = tmp_ipc / "ghost"
    with running(tmp_ipc, "w0", extra={"E2E_GHOST": str(ghost)}) as run, run.client() as ps:
        ps.call("haunted", x=X)
        ghost.touch()
        task = ps.options(durable=True, idempotency_key="poor").submit("haunted", x=X)
        dead = task.exception(60)
        assert dead is not None
        assert dead.code == "dead"
        lines = dead.detail.splitlines()
        assert len(lines) == 2, "its supervisor has started the worker again"
        assert all("worker w0" in line for line in lines)
        assert [job["key"] for job in told(run, "jobs", "--dead")] == ["poor"]
        assert "worker w0" in run.cli("jobs", "show", "poor", "--url", run.url).stdout
        ghost.unlink()
        new = run.cli("jobs", "requeue", "poor", "--url", run.url)
        assert new.returncode == 0, new.stderr
        assert told(run, "jobs", "--dead") == []
        np.testing.assert_array_equal(ps.fetch(id=new.stdout.strip()).result(60), X + 1)
        np.testing.assert_array_equal(ps.options(durable=True, idempotency_key="poor").call("haunted", x=X), X + 1)


def test_a_backup_made_while_running_is_restored(tmp_ipc: Path) -> None:
    large = np.arange(50_000, dtype=np.float32)  # its payload lies in a file of its own
    with running(tmp_ipc, "w") as run, run.client() as ps:
        durable = ps.options(durable=True, timeout=None)
        durable.call("scale", x=X)
        run.kill("w")
        kept = [durable.options(idempotency_key=f"k{i}").submit("scale", x=large + i) for i in range(5)]
        for task in kept:
            task.accepted()
        streaming = [durable.submit("scale", x=X + i) for i in range(500)]
        made = run.cli("backup", "copy", "--url", run.url)
        assert made.returncode == 0, made.stderr
        for task in streaming:
            task.accepted()
        durable.options(idempotency_key="late").submit("scale", x=X).accepted()
        again = run.cli("backup", "copy", "--url", run.url)
        assert (again.returncode, "exists" in again.stderr) == (1, True)
        run.kill("broker")
        modes = {path.stat().st_mode & 0o777 for path in (run.folder / "copy").rglob("*") if path.is_file()}
        assert modes == {0o600}
        state = tmp_ipc / "fresh"
        journal = broker_folder(state, run.url) / "journal"
        shutil.copytree(run.folder / "copy", journal)
        run.env["PENSTOCK_BROKER_STATE_DIR"] = str(state)
    with running(tmp_ipc, extra={"PENSTOCK_BROKER_STATE_DIR": str(state)}) as run, run.client() as ps:
        run.start_worker("w", "--kernels", str(KERNELS))
        for i in range(5):
            np.testing.assert_array_equal(ps.fetch(key=f"k{i}").result(60), 2 * (large + i))
        with pytest.raises((UnknownTask, ResultGone)):
            ps.fetch(key="late")

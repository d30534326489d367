"""Durable tasks with real processes and a real disk: brokers, workers and clients that are killed at any moment."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import Running, running, until

X = np.arange(6, dtype=np.float32)
NUM_TASKS = 200
SUBMIT = """
import sys
import numpy as np
from penstock.client import Client
ps = Client(sys.argv[1], name="doomed").options(durable=True)
tasks = [ps.options(idempotency_key=f"job-{i}").submit("scale", x=np.full(3, i, np.float32)) for i in range(int(sys.argv[2]))]
for task in tasks:
    task.accepted()
print("accepted", flush=True)
sys.stdin.read()
"""


def restart_broker(run: Running) -> None:
    run.kill("broker")
    run.start_broker()


def test_tasks_survive_the_broker(tmp_ipc: Path) -> None:
    with running(tmp_ipc, "w") as run, run.client() as ps:
        durable = ps.options(durable=True)
        durable.call("scale", x=X)  # the client knows the kernel from now on
        run.kill("w")
        tasks = [durable.submit("scale", x=X + i) for i in range(NUM_TASKS)]
        for task in tasks:
            task.accepted()
        restart_broker(run)
        run.start_worker("w", "--kernels", str(Path(__file__).with_name("e2e_kernels.py")))
        for i, task in enumerate(tasks):
            np.testing.assert_array_equal(task.result(), 2 * (X + i))
        assert ps.status()["tasks"]["open"] == 0


def test_broker_and_worker_killed_again_and_again(tmp_ipc: Path) -> None:
    with running(tmp_ipc, "w") as run, run.client() as ps:
        durable = ps.options(durable=True)
        tasks = [durable.submit("scale", x=X + i) for i in range(NUM_TASKS)]
        for task in tasks[:100]:
            task.accepted()
        for life in range(3):
            restart_broker(run)
            run.kill("w")
            run.start_worker("w", "--kernels", str(Path(__file__).with_name("e2e_kernels.py")))
            tasks += [durable.submit("scale", x=X + NUM_TASKS + 10 * life + i) for i in range(10)]
        for i, task in enumerate(tasks):
            np.testing.assert_array_equal(task.result(), 2 * (X + i))


@pytest.mark.parametrize("is_broker_killed", [False, True])
def test_a_client_that_is_killed_can_fetch_by_key(tmp_ipc: Path, is_broker_killed: bool) -> None:
    with running(tmp_ipc, "w", extra={"PENSTOCK_BROKER_SESSION_TTL_S": "2"}) as run:
        doomed = subprocess.Popen(
            [sys.executable, "-P", "-c", SUBMIT, run.url, "20"], env=run.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert doomed.stdout is not None
        assert doomed.stdin is not None
        assert doomed.stdout.readline() == b"accepted\n"
        doomed.kill()
        doomed.wait(10)
        doomed.stdout.close()
        doomed.stdin.close()
        if is_broker_killed:
            restart_broker(run)
        with run.client(name="heir") as ps:
            durable = ps.options(durable=True)
            for i in range(20):
                key = f"job-{i}"
                found = durable.options(idempotency_key=key).call("scale", x=np.full(3, i, np.float32))
                np.testing.assert_array_equal(found, np.full(3, 2 * i, np.float32))
            until(lambda: ps.status()["tasks"]["open"] == 0, "all is done")


def test_a_damaged_journal_is_refused_in_one_line(tmp_ipc: Path) -> None:
    with running(tmp_ipc, "w") as run, run.client() as ps:
        ps.options(durable=True).submit("scale", x=X).accepted()
        run.kill("broker")
        (journal,) = tmp_ipc.rglob("journal.sqlite-wal")
        data = bytearray(journal.with_name("journal.sqlite").read_bytes())
        data[100] ^= 0xFF
        journal.unlink()
        journal.with_name("journal.sqlite").write_bytes(data)
        process = run.start_broker()
        assert process.wait(20) == 4
        assert "damaged" in run.log("broker").splitlines()[-1]
        del run.processes["broker"]

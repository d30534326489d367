"""Keys as people use them: the command line makes them, workers and clients show them over tcp, and who may not is told why."""

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port
from running import CLI, KERNELS, LIMIT_S, Running, until

from penstock.broker.keys import KeyFolder, read_key
from penstock.client import AsyncClient, Client, NotAuthorised, PenstockError, Unavailable

CONNECT_S = 2.0


class Site(Running):
    """A broker at an ipc address and, for whoever has a key, at 0.0.0.0."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.far = f"tcp://127.0.0.1:{self.port}"

    def key(self, name: str, role: str) -> Path:
        done = self.cli("keys", "new", name, "--role", role, "--url", self.url)
        assert done.returncode == 0, done.stderr
        path = self.folder / f"{name}.key"
        assert read_key(path).secret not in done.stdout + done.stderr
        return path

    def open(self) -> None:
        self.start_broker("--listen", f"tcp://0.0.0.0:{self.port}")

    def wait_open(self) -> None:
        """Until it answers at its ipc address, and so at both."""
        with self.client() as client:
            client.status()

    def far_worker(self, name: str, key: Path, **extra: str) -> subprocess.Popen[bytes]:
        arguments = ("--broker", self.far, "--key", str(key), "--kernels", str(KERNELS))
        return self.start_worker(name, *arguments, extra=extra)

    def far_client(self, key: Path | None, **options: Any) -> Client:
        return Client(self.far, key=key, **{"connect_timeout": CONNECT_S, "timeout": LIMIT_S, **options})


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    made = Site(folder)
    yield made
    made.stop()


def double(client: Client) -> None:
    x = np.arange(5.0, dtype=np.float32)
    assert np.allclose(client.call("softmax", x=x).sum(), 1.0)


def test_a_worker_and_clients_join_with_keys(site: Site) -> None:
    worker_key, alice = site.key("gpu-2", "worker"), site.key("alice", "client")
    site.open()
    site.far_worker("far", worker_key)
    site.wait_ready("far")
    with site.far_client(alice) as client, site.client() as local:
        double(client)
        double(local)
        # Heartbeats travel on a socket of their own, with the key: without them it would be lost by now.
        time.sleep(0.2)
        assert local.status()["counters"].get("workers_lost", 0) == 0
        assert {a["client"] for a in local.status()["accounts"]}
        with pytest.raises(NotAuthorised, match="may not control"):
            client.drain("far")
        local.drain("far")
        until(lambda: site.processes["far"].poll() == 0, "the worker drains")

    async def call_async() -> None:
        async with AsyncClient(site.far, connect_timeout=CONNECT_S, key=alice) as ps:
            assert (await ps.status())["num_clients"] >= 1

    asyncio.run(call_async())


def failure(site: Site, key: Path | None, is_async: bool = False) -> PenstockError:
    """How a client ends that cannot get in; it must not take longer than the time to connect."""

    async def ask_async() -> None:
        async with AsyncClient(site.far, connect_timeout=CONNECT_S, key=key) as ps:
            await ps.status()

    def ask() -> None:
        with site.far_client(key) as client:
            client.status()

    began = time.monotonic()
    with pytest.raises(PenstockError) as caught:
        asyncio.run(ask_async()) if is_async else ask()
    assert time.monotonic() - began < CONNECT_S + 1.0
    return caught.value


@pytest.mark.parametrize("is_async", [False, True])
def test_a_client_is_told_why_it_does_not_get_in(site: Site, is_async: bool) -> None:
    worker_key = site.key("gpu-2", "worker")
    elsewhere = KeyFolder(site.folder / "elsewhere")
    elsewhere.new("alice", "client", site.folder / "foreign.key")
    site.open()
    site.wait_open()
    for key, kind, words in (
        (worker_key, NotAuthorised, "another role than worker"), (None, Unavailable, "PENSTOCK_KEY"),
        (site.folder / "foreign.key", Unavailable, "another key"),
    ):  # fmt: skip
        error = failure(site, key, is_async)
        assert isinstance(error, kind)
        assert words in str(error)


def test_a_worker_is_told_why_it_does_not_get_in(site: Site) -> None:
    alice = site.key("alice", "client")
    site.open()
    site.wait_open()
    assert site.far_worker("refused", alice).wait(LIMIT_S) == 77
    assert "the broker refuses the key 'alice' here" in site.log("refused")
    site.start_worker("without", "--broker", site.far)
    until(lambda: "it wants a key" in site.log("without"), "the worker says what is wrong")


def test_revoking_ends_clients_and_workers_at_once(site: Site) -> None:
    worker_key, alice = site.key("gpu-2", "worker"), site.key("alice", "client")
    site.open()
    worker = site.far_worker("far", worker_key)
    site.wait_ready("far")
    with site.far_client(alice) as client:
        task = client.submit("sleep", seconds=8.0)
        task.accepted()
        done = site.cli("keys", "revoke", "alice")
        assert (done.returncode, "the running broker knows" in done.stdout) == (0, True), done.stderr
        with pytest.raises(NotAuthorised):
            task.result(5.0)
        with pytest.raises(NotAuthorised):
            client.status()
    assert isinstance(failure(site, alice), NotAuthorised)
    assert site.cli("keys", "revoke", "gpu-2").returncode == 0
    assert worker.wait(LIMIT_S) == 77
    log = site.log("far")  # it was told, or was busy then and tried to come back
    assert "not allowed any more" in log or "refuses the key" in log
    listed = site.cli("keys", "list")
    assert "alice" not in listed.stdout
    assert "gpu-2" not in listed.stdout
    assert site.cli("keys", "revoke", "alice").returncode == 2


def test_a_broker_with_the_same_keys_comes_back(site: Site) -> None:
    worker_key, alice = site.key("gpu-2", "worker"), site.key("alice", "client")
    site.open()
    site.far_worker("far", worker_key)
    site.wait_ready("far")
    with site.far_client(alice) as client:
        double(client)
        site.kill("broker")
        site.open()
        site.wait_ready("far")
        double(client)


def test_the_environment_and_the_file_name_the_key(site: Site) -> None:
    alice = site.key("alice", "client")
    site.open()
    site.wait_open()
    done = subprocess.run(
        [*CLI, "status", "--json", "--url", site.far], env=site.env | {"PENSTOCK_KEY": str(alice)}, capture_output=True,
        text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr  # a broker, but no worker
    (site.folder / "penstock.toml").write_text(f'[client]\nkey = "{alice}"\n')
    done = site.cli("status", "--json", "--url", site.far)
    assert done.returncode == 4, done.stderr
    os.chmod(alice, 0o644)
    done = site.cli("status", "--json", "--url", site.far)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "chmod 600" in done.stderr

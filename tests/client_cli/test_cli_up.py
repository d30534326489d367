"""What `penstock up` decides; processes are in tests/e2e."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.broker.address import Address, AddressError
from penstock.broker.settings import SettingsError
from penstock.client.cli import up
from penstock.client.cli.children import Child
from penstock.client.cli.up import Up, UpConfig, broker_command, find_address, worker_command

ADDRESS = Address("ipc:///tmp/x")


def test_pauses_double_and_end_at_a_minute() -> None:
    child = Child("w", [])
    pauses = [child.plan_restart(now=float(i)) for i in range(9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert child.restart_at == 68.0
    child.started_at = 1000.0
    assert child.plan_restart(now=1070.0) == 1  # it ran for a minute


HANG_UP = "import os, signal; os.kill(os.getppid(), signal.SIGHUP); raise SystemExit(3)"


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["terminal", "nohup"])
def test_a_terminal_that_closes_stops_it_unless_that_is_to_be_ignored(before: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "broker_command", lambda config: [sys.executable, "-c", HANG_UP])
    monkeypatch.setattr(up, "worker_command", lambda *args: [sys.executable, "-c", "import time; time.sleep(60)"])
    said = list[str]()
    ours = signal.signal(signal.SIGHUP, before)
    try:
        assert Up(UpConfig(ADDRESS, devices=("cpu",)), said.append).run() == (0 if before is signal.SIG_DFL else 3)
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, ours)
    assert any("stopping" in line for line in said) == (before is signal.SIG_DFL)


def test_where_the_broker_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"XDG_RUNTIME_DIR": "/run/me"}
    assert find_address(None, None, env).url == "ipc:///run/me/penstock"
    (tmp_path / "penstock.toml").write_text('[broker]\nurl = "ipc:///from/file"\n')
    assert find_address(None, None, env).url == "ipc:///from/file"
    env["PENSTOCK_BROKER_URL"] = "ipc:///from/broker"
    assert find_address(None, None, env).url == "ipc:///from/broker"
    env["PENSTOCK_URL"] = "ipc:///from/env"
    assert find_address(None, None, env).url == "ipc:///from/env"
    assert find_address("tcp://127.0.0.1:7700", None, env).url == "tcp://127.0.0.1:7700"
    with pytest.raises(AddressError):
        find_address("nonsense", None, env)


@pytest.mark.parametrize("content", ["[broker", "broker = 3"])
def test_a_broken_file_is_one_line(content: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(content)
    for path in (file, tmp_path / "missing.toml"):
        with pytest.raises(SettingsError, match=path.name):
            find_address(None, path, {})


def test_what_workers_are_told() -> None:
    config = UpConfig(ADDRESS, kernels=("a", "b.py"), options=("embed.model=/m",), file=Path("p.toml"))
    command = worker_command(config, "worker-2", "cuda:1", 4)
    assert command[:5] == [sys.executable, "-P", "-m", "penstock.worker", "--broker"]
    words = " ".join(command[5:])
    assert words.startswith("ipc:///tmp/x --name worker-2 --parent ")
    assert words.endswith("--device cuda:1 --threads 4 --kernels a --kernels b.py --option embed.model=/m --config p.toml")
    plain = worker_command(UpConfig(ADDRESS), "worker-1", None, None)
    assert "--device" not in plain
    assert "--threads" not in plain


def test_what_the_broker_is_told() -> None:
    plain = broker_command(UpConfig(ADDRESS))
    assert plain == [sys.executable, "-P", "-m", "penstock.broker", "--url", "ipc:///tmp/x"]
    full = broker_command(UpConfig(ADDRESS, file=Path("p.toml"), metrics="127.0.0.1:9464"))
    assert full == [*plain, "--config", "p.toml", "--metrics", "127.0.0.1:9464"]


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [up._threads_each(n) for n in (0, 1, 2, 3, 16)] == [None, None, 4, 2, 1]

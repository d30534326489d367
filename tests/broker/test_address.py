"""Addresses: one URL for both sockets, and the file that tells it to others."""

import json
import stat
from pathlib import Path

import pytest

from penstock.broker.address import (
    Address,
    AddressError,
    connection_file,
    remove_connection,
    runtime_dir,
    write_connection,
)


@pytest.mark.parametrize(
    ("url", "front", "back", "is_local"),
    [
        ("ipc:///run/p", "ipc:///run/p/clients.sock", "ipc:///run/p/workers.sock", True),
        ("tcp://127.0.0.1:7700", "tcp://127.0.0.1:7700", "tcp://127.0.0.1:7701", True),
        ("tcp://localhost:1", "tcp://localhost:1", "tcp://localhost:2", True),
        ("tcp://[::1]:7700", "tcp://[::1]:7700", "tcp://[::1]:7701", True),
        ("tcp://192.168.0.7:65534", "tcp://192.168.0.7:65534", "tcp://192.168.0.7:65535", False),
        ("tcp://gpu-box.example:80", "tcp://gpu-box.example:80", "tcp://gpu-box.example:81", False),
        ("tcp://0.0.0.0:80", "tcp://0.0.0.0:80", "tcp://0.0.0.0:81", False),
    ],
)
def test_endpoints(url: str, front: str, back: str, is_local: bool) -> None:
    address = Address(url)
    assert (address.front, address.back, address.is_local) == (front, back, is_local)


@pytest.mark.parametrize(
    "url",
    [
        "", "here", "ipc://relative/path", "ipc://", f"ipc:///{'x' * 100}", "tcp://127.0.0.1", "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65535", "tcp://127.0.0.1:99999", "tcp://:7700", "tcp://*:7700", "http://localhost:80",
        "tcp://127.0.0.1:7700/path", "tcp://user@host:80", "tcp://host:80\n", "inproc://x",
    ],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(AddressError) as caught:
        Address(url)
    assert "ipc:///" in str(caught.value)


def test_a_long_ipc_path_is_refused_before_the_kernel_cuts_it() -> None:
    longest = "/" + "x" * 86
    assert len(Address(f"ipc://{longest}").front) - len("ipc://") <= 107
    with pytest.raises(AddressError):
        Address(f"ipc://{longest}xxx")


def test_find_prefers_argument_then_environment_then_file_then_default(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert Address.find(None, env).url == f"ipc://{tmp_path}/penstock"
    path = connection_file(env)
    path.parent.mkdir()
    write_connection(path, Address("tcp://127.0.0.1:5000"), 17)
    assert Address.find(None, env).url == "tcp://127.0.0.1:5000"
    env["PENSTOCK_URL"] = "tcp://127.0.0.1:6000"
    assert Address.find(None, env).url == "tcp://127.0.0.1:6000"
    assert Address.find("tcp://127.0.0.1:7000", env).url == "tcp://127.0.0.1:7000"


def test_without_a_runtime_folder_the_default_is_per_user() -> None:
    assert runtime_dir({}).name.startswith("penstock-")
    assert runtime_dir({}) != runtime_dir({"XDG_RUNTIME_DIR": "/run/user/1"})


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"url": 5}', "not json", '{"url": "nonsense"}'])
def test_a_connection_file_that_is_none(tmp_path: Path, text: str) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    path = connection_file(env)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(AddressError):
        Address.find(None, env)


def test_the_connection_file_is_private_and_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "connection.json"
    path.write_text("old")
    path.chmod(0o644)
    write_connection(path, Address("ipc:///run/p"), 17)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == {"url": "ipc:///run/p", "pid": 17}
    assert list(tmp_path.iterdir()) == [path], "nothing temporary is left"


def test_only_its_writer_takes_the_connection_file_away(tmp_path: Path) -> None:
    path = tmp_path / "connection.json"
    write_connection(path, Address("ipc:///run/p"), 17)
    remove_connection(path, 18)
    assert path.exists()
    remove_connection(path, 17)
    assert not path.exists()
    remove_connection(path, 17)
    path.write_text("[]")
    remove_connection(path, 17)
    assert path.exists()

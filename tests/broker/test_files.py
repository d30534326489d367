"""What outlives a broker: written whole or not at all, taken up again, and forgotten without harm."""

import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.broker import files
from penstock.broker.address import Address
from penstock.broker.configuration import Settings, load_settings
from penstock.broker.files import MAX_FILE_BYTES, SAVE_EVERY_S, Keeper, broker_folder, default_state_dir, write_whole
from penstock.broker.scheduling.prediction import Predictor
from penstock.broker.server import Server


class Memory:
    """A learner with one number."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def dump(self) -> dict[str, Any]:
        return {"version": 1, "value": self.value}

    def restore(self, saved: Mapping[str, Any]) -> None:
        if saved["version"] != 1:
            raise ValueError(f"version {saved['version']} is not 1")
        self.value = saved["value"] + 0


def kept(path: Path, value: Any = 0) -> tuple[Memory, Keeper]:
    memory = Memory(value)
    return memory, Keeper(path, memory, now=100.0)


def test_a_file_is_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_whole(path, b"first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["b.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_on_the_way_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "b.json"
    write_whole(path, b"first")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)  # type: ignore[call-overload]
        with pytest.raises(OSError, match="No space"):
            write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    write_whole(path, b"third")
    assert path.read_bytes() == b"third"


def test_each_broker_has_its_folder() -> None:
    urls = ["ipc:///run/user/1000/penstock", "ipc:///run/user/1000-penstock", "tcp://127.0.0.1:7700", "ipc:///" + "x" * 80]
    folders = [broker_folder(Path("/state"), url) for url in urls]
    assert len(set(folders)) == len(urls)
    assert folders[0].name.startswith("ipc-run-user-1000-penstock-")
    assert all(len(folder.name) < 64 and folder.parent == Path("/state/brokers") for folder in folders)
    assert default_state_dir({"XDG_STATE_HOME": "/there"}) == Path("/there/penstock")
    assert default_state_dir({}).parts[-3:] == (".local", "state", "penstock")


def test_what_was_learned_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    memory, keeper = kept(path)
    assert not keeper.restore()
    memory.value = 41
    keeper.close()
    memory, keeper = kept(path)
    assert keeper.restore()
    assert memory.value == 41


def test_it_is_saved_now_and_then_and_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, writes = tmp_path / "m.json", list[bytes]()
    monkeypatch.setattr(files, "write_whole", lambda _, data: writes.append(data))
    memory, keeper = kept(path, 1)

    def turn(now: float) -> int:
        keeper.turn(now)
        if keeper._writer is not None:
            keeper._writer.join()
        return len(writes)

    memory.value = 2
    assert turn(100.0 + SAVE_EVERY_S - 0.01) == 0
    assert turn(100.0 + SAVE_EVERY_S) == 1
    memory.value = 3
    assert turn(100.0 + 2 * SAVE_EVERY_S - 0.01) == 1, "not before its time"
    assert turn(100.0 + 2 * SAVE_EVERY_S) == 2
    assert turn(100.0 + 9 * SAVE_EVERY_S) == 2, "nothing has changed"
    keeper.close()
    assert len(writes) == 2
    memory.value = 4
    keeper.close()
    assert json.loads(writes[-1])["value"] == 4


def test_who_has_learned_nothing_leaves_no_file(tmp_path: Path) -> None:
    memory, keeper = kept(tmp_path / "m.json", 5)
    keeper.restore()
    keeper.close()
    assert not os.listdir(tmp_path)
    memory.value = 6
    keeper.close()
    _, again = kept(tmp_path / "m.json")
    again.restore()
    (tmp_path / "m.json").unlink()
    again.close()
    assert not os.listdir(tmp_path), "what was read and has not changed is not written"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"version": 2, "value": 1}', b'{"version": 1}', b"[" * 100_000,
     b'{"version": 1, "value": "x"}', b" " * (MAX_FILE_BYTES + 1)],
)  # fmt: skip
def test_a_broken_file_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    memory, keeper = kept(path)
    with caplog.at_level(logging.WARNING):
        assert not keeper.restore()
    assert [r.message.startswith(f"{path} is moved aside") for r in caplog.records] == [True]
    assert (tmp_path / "m.json.broken").read_bytes() == content
    assert not path.exists()
    memory.value = 7
    keeper.close()
    assert json.loads(path.read_bytes())["value"] == 7


def test_a_folder_that_cannot_be_had_is_a_warning_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    memory, keeper = kept(tmp_path / "file" / "m.json")
    memory.value = 1
    with caplog.at_level(logging.WARNING):
        assert not keeper.restore()
        keeper.close()
        keeper.close()
    assert [r.levelname for r in caplog.records].count("WARNING") == 2  # reading, writing
    assert "is not saved" in caplog.messages[-1]


@pytest.mark.parametrize("value", [float("nan"), b"bytes", {1, 2}])
def test_what_is_no_json_is_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Any) -> None:
    memory, keeper = kept(tmp_path / "m.json")
    memory.value = value
    with caplog.at_level(logging.WARNING):
        keeper.close()
    assert "is not saved" in caplog.messages[-1]
    assert not (tmp_path / "m.json").exists()


# --- in the server -------------------------------------------------------------------------------------------------


def settings(folder: Path, **broker: Any) -> Settings:
    (folder / "none.toml").write_text("")
    return load_settings(folder / "none.toml", {"state_dir": folder / "state", **broker}, env={})


def test_a_server_keeps_what_is_learned_under_its_address(tmp_ipc: Path) -> None:
    address = Address(f"ipc://{tmp_ipc}/b")
    for expected in (0, 5):
        memory = Memory()
        server = Server(settings(tmp_ipc), address, lambda: settings(tmp_ipc))
        server.open()
        server.keep("memory", memory)
        assert memory.value == expected
        memory.value = 5
        server.close()
    assert json.loads((broker_folder(tmp_ipc / "state", address.url) / "memory.json").read_bytes())["value"] == 5


def test_neither_pages_nor_files_wake_an_idle_server(tmp_ipc: Path) -> None:
    given = settings(tmp_ipc, metrics="127.0.0.1:0")
    server = Server(given, Address(f"ipc://{tmp_ipc}/b"), lambda: given)
    server.open()
    try:
        assert server._wait_ms() is None
    finally:
        server.close()


def test_the_predictor_is_kept(tmp_ipc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumps, restored = iter([{"learned": 0}, {"learned": 1}, {"learned": 1}, {"learned": 1}, {"learned": 1}]), list[Any]()
    monkeypatch.setattr(Predictor, "dump", lambda self: next(dumps))
    monkeypatch.setattr(Predictor, "restore", lambda self, saved: restored.append(saved))
    for expected in ([], [{"learned": 1}]):
        server = Server(settings(tmp_ipc), Address(f"ipc://{tmp_ipc}/b"), lambda: settings(tmp_ipc))
        server.open()
        server.close()
        assert restored == expected

"""Settings that change while the broker runs: all of them or none, the last good ones kept, and a way back."""

import contextlib
import dataclasses
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from broker_process import BrokerProcess, broker, wait_for

from penstock.broker.config import NEEDS_RESTART
from penstock.broker.configuration import Configuration, Settings, load_settings
from penstock.broker.scheduling.quotas import ClientRules
from penstock.broker.settings import SettingsError

GOOD = """
[broker]
max_clients = 20
[scheduling]
max_bins = 4
boundaries_ms = [10, 20.5]
[clients."agent-*"]
weight = 3
rate_per_s = 100
[worker]
device = "cpu"
"""


class World:
    """A file, and a configuration that was read from it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "penstock.toml"
        self.write("")
        self.configuration = Configuration(self.load(), self.load, now=10.0)

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def load(self) -> Settings:
        return load_settings(self.file, {"max_workers": 3}, env={})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_all_parts_come_from_their_sections_and_sources(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(GOOD)
    env = {"PENSTOCK_SCHEDULING_MAX_WAIT_MS": "5", "PENSTOCK_BROKER_MAX_CLIENTS": "30"}
    made = load_settings(tmp_path / "p.toml", {"drain_s": 1.5, "url": None}, env)
    assert (made.broker.max_clients, made.broker.drain_s, made.broker.url) == (30, 1.5, "")
    assert (made.scheduling.max_bins, made.scheduling.boundaries_ms, made.scheduling.max_wait_ms) == (4, (10.0, 20.5), 5.0)
    assert made.clients == {"agent-*": ClientRules(weight=3, rate_per_s=100)}


def test_a_reload_brings_what_has_changed(world: World) -> None:
    before = world.configuration.current
    world.write(GOOD)
    changes = world.configuration.reload(20.0)
    assert "broker.max_clients: 10000 -> 20" in changes
    assert "scheduling.max_bins: 8 -> 4" in changes
    assert "clients.agent-*.weight: None -> 3" in changes
    assert len(changes) == 3 + len(dataclasses.fields(ClientRules)) - 5  # the five that stay None have not changed
    now = world.configuration
    assert (now.current, now.previous, now.loaded_at, now.error) == (world.load(), before, 20.0, "")
    assert now.current.broker.max_workers == 3, "the command line still counts"


def test_a_reload_of_the_same_leaves_the_way_back(world: World) -> None:
    before = world.configuration.current
    world.write(GOOD)
    world.configuration.reload(20.0)
    assert world.configuration.reload(30.0) == []
    assert (world.configuration.previous, world.configuration.loaded_at) == (before, 20.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[broker]\nmax_clients = 0\n", "broker: max_clients must be above 0"), ("[broker", "penstock.toml: "),
        ("[broker]\nmax_clients = 5\n[scheduling]\nmax_bins = 100\n", "scheduling: max_bins is at most 64"),
        ("[broker]\nmax_clients = 5\n[clients.x]\nweight = -1\n", "weight must be a number above 0"),
        ("[broker]\nmax_clients = 5\n[clients]\nx = 1\n", "must be a table"), ("[brokers]\n", "unknown section"),
        ("[clients.x]\nwaight = 1\n", "unknown setting waight"),
        ("[scheduling]\nbins = 1\n", "unknown setting scheduling.bins"),
        ("[broker]\nurl = 'ipc:///else'\n", "broker.url cannot change while the broker runs: it needs a restart"),
        ("[broker]\nmetrics = '127.0.0.1:1'\nmax_clients = 5\n", "broker.metrics cannot change"),
        ("[broker]\nheartbeat_ms = 10.0\nstate_dir = '/x'\n", "broker.state_dir and broker.heartbeat_ms cannot"),
    ],
)  # fmt: skip
def test_the_last_good_ones_stay_and_the_reason_is_told(world: World, text: str, message: str) -> None:
    world.write(GOOD)
    world.configuration.reload(20.0)
    good, before = world.configuration.current, world.configuration.previous
    world.write(text)
    with pytest.raises(SettingsError, match=message) as caught:
        world.configuration.reload(30.0)
    assert "\n" not in str(caught.value)
    now = world.configuration
    assert (now.current, now.previous, now.loaded_at, now.error) == (good, before, 20.0, str(caught.value))
    world.write(GOOD)
    world.configuration.reload(40.0)
    assert now.error == ""


def test_a_file_that_is_gone(world: World) -> None:
    good = world.configuration.current
    world.file.unlink()
    with pytest.raises(SettingsError, match=r"penstock\.toml"):
        world.configuration.reload(20.0)
    assert world.configuration.current is good


def test_back_and_forth(world: World) -> None:
    first = world.configuration.current
    assert world.configuration.roll_back("nothing to return to", 15.0) == []
    world.write(GOOD)
    world.configuration.reload(20.0)
    assert world.configuration.report(25.0) == {"age_s": 5.0, "error": "", "can_roll_back": True}
    assert "scheduling.max_bins: 4 -> 8" in world.configuration.roll_back("latency is up by 30 %", 26.0)
    assert world.configuration.current == first
    assert world.configuration.report(27.0) == {
        "age_s": 1.0, "error": "rolled back: latency is up by 30 %", "can_roll_back": False
    }  # fmt: skip
    assert world.configuration.roll_back("again", 28.0) == []
    assert world.configuration.current == first
    assert "scheduling.max_bins: 8 -> 4" in world.configuration.reload(29.0), "who asks for it again gets it"


@pytest.mark.parametrize("name", NEEDS_RESTART)
def test_what_needs_a_restart_is_refused_by_name(world: World, name: str) -> None:
    other = {
        "url": "ipc:///else", "listen": "tcp://127.0.0.1:7777", "curve": "off", "group_access": True,
        "metrics": "127.0.0.1:0", "state_dir": Path("/else"), "max_message_bytes": 5, "heartbeat_ms": 1.0,
        "dedup_window_s": 1.0, "dedup_bytes": 1, "journal": "memory", "result_ttl_s": 1.0, "max_kept_bytes": 1,
        "min_free_bytes": 1, "checkpoint_s": 1.0, "max_checkpoint_bytes": 1,
    }  # fmt: skip
    current = world.configuration.current
    wanted = dataclasses.replace(current, broker=dataclasses.replace(current.broker, **{name: other[name]}))
    configuration = Configuration(current, lambda: wanted, 0.0)
    with pytest.raises(SettingsError, match=rf"broker\.{name} .* needs a restart"):
        configuration.reload(1.0)


# --- the process ---------------------------------------------------------------------------------------------------


def told(b: BrokerProcess, text: str) -> str:
    """The next line of the broker's output with this text."""
    assert b.process.stdout is not None
    for line in b.process.stdout:
        if text in line:
            return line
    raise AssertionError(f"the broker ended and never said {text!r}")


def test_a_hangup_signal_brings_new_limits_and_keeps_good_ones(tmp_ipc: Path) -> None:
    file = tmp_ipc / "penstock.toml"
    with broker(tmp_ipc, None, "--drain-s", "0") as b:
        client = b.client()
        client.submit([b"abc"] * 3, wants_accepted=True)
        client.receive("accepted")
        told(b, "listens at")
        for limit, line, answer in (
            ("3", "settings reloaded: broker.max_queue_rows: 100000 -> 3", "refused"),
            ("'many'", "settings stay as they are: broker.max_queue_rows from the file must be int, not 'many'", "refused"),
            ("5", "settings reloaded: broker.max_queue_rows: 3 -> 5", "accepted"),
        ):
            file.write_text(f"[broker]\nmax_queue_rows = {limit}\n")
            b.process.send_signal(signal.SIGHUP)
            assert line in told(b, "settings")
            client.submit([b"abc"], wants_accepted=True)
            assert client.receive()[0]["type"] == answer
        assert b.stop()[0] == 0


def test_who_asks_for_a_reload_is_told_what_came_of_it(tmp_ipc: Path) -> None:
    file = tmp_ipc / "penstock.toml"
    with broker(tmp_ipc) as b:
        client = b.client()
        for text, reason in (
            ("[broker]\nmax_clients = 0\n", "max_clients must be above 0"), ("[broker]\nmax_clients = 20\n", None),
            ("[scheduling]\nmax_bins = 2\n[clients.x]\nweight = 2\n", None), ("[broker]\nurl = 'ipc:///else'\n", None),
            ("[broker]\nmetrics = '127.0.0.1:0'\n", "broker.metrics cannot change"),
        ):  # fmt: skip
            file.write_text(text)
            client.send("control", request=7, op="reload")
            fields, _ = client.receive("reply")
            assert fields["request"] == 7
            error = fields.get("error")
            assert error is None if reason is None else reason in error[1]


def test_when_its_terminal_goes_a_broker_ends(tmp_ipc: Path) -> None:
    """As anything does that was started in it; without a terminal the same signal means to read the settings again."""
    master, slave = pty.openpty()
    program = [sys.executable, "-m", "penstock.broker", "--url", f"ipc://{tmp_ipc}/b"]
    leader = (
        "import fcntl, subprocess, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "child = subprocess.Popen(sys.argv[1:]); print(child.pid, flush=True); child.wait()"
    )
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_ipc)}
    log, published = tmp_ipc / "log", tmp_ipc / "penstock" / "connection.json"
    with log.open("w") as f:
        shell = subprocess.Popen(
            [sys.executable, "-c", leader, *program], env=env, cwd=tmp_ipc, start_new_session=True,
            stdin=slave, stdout=subprocess.PIPE, stderr=f, text=True,
        )  # fmt: skip
    assert shell.stdout is not None
    process = psutil.Process(int(shell.stdout.readline()))
    try:
        wait_for(lambda: "listens at" in log.read_text())
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "settings reloaded" in log.read_text())
        assert published.exists()
        os.close(slave)
        os.close(master)
        wait_for(lambda: not published.exists())
        assert "stopping" in log.read_text()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        shell.kill()
        shell.communicate()

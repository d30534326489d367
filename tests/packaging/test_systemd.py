"""The systemd units: what the tools of systemd say of them, that they fit the programs, and how they are installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from source_tree import ROOT

from penstock.broker.config import BrokerConfig
from penstock.broker.server import CLOSE_S
from penstock.broker.settings import load
from penstock.worker.config import DEVICE_FAULT_STATUS, WorkerConfig
from penstock.worker.supervisor import END_S

SYSTEMD = ROOT / "scripts" / "systemd"
BROKER, WORKER, TARGET = "penstock-broker.service", "penstock-worker@.service", "penstock.target"
UNITS = {BROKER: 1.5, WORKER: 2.0}
"""The most exposed that each may be, as `systemd-analyze security` counts."""
BIN = Path(sys.executable).parent

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: apt-get install systemd)"
)


def entries(name: str) -> dict[str, list[str]]:
    """A unit's settings; each may stand there several times."""
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def seconds(text: str) -> float:
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    return float(number) * units[text[len(number) :]]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# --- what systemd says ---------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as they are installed, for this environment."""
    for name in (*UNITS, TARGET):
        (tmp_path / name).write_text((SYSTEMD / name).read_text().replace("@BIN@", str(BIN)))
    return tmp_path


@needs_systemd
def test_the_units_are_clean(installed: Path) -> None:
    done = run("systemd-analyze", "verify", *(installed / name for name in (*UNITS, TARGET)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_the_check_of_the_units_can_fail(installed: Path) -> None:
    unit = installed / BROKER
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=mostly"))
    assert "mostly" in run("systemd-analyze", "verify", unit).stderr


@needs_systemd
@pytest.mark.parametrize(("name", "limit"), UNITS.items())
def test_little_is_exposed(installed: Path, name: str, limit: float) -> None:
    command = ("systemd-analyze", "security", "--offline=true", "--no-pager")
    done = run(*command, f"--threshold={limit * 10:.0f}", installed / name)
    assert done.returncode == 0, done.stdout
    assert run(*command, "--threshold=5", installed / name).returncode != 0, "nothing is that hidden"


# --- how they fit the programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
def test_the_commands_exist(name: str) -> None:
    unit = entries(name)
    commands = [*unit["ExecStart"], *unit.get("ExecReload", [])]
    assert commands
    for command in commands:
        program, subcommand, *arguments = command.split()
        assert program == "@BIN@/penstock"
        done = run(BIN / "penstock", subcommand, "--help")
        assert done.returncode == 0, done.stderr
        assert [option for option in arguments if option.startswith("--") and option not in done.stdout] == []


@pytest.mark.parametrize("name", UNITS)
def test_it_is_started_again_after_a_broken_device_and_not_after_wrong_settings(name: str) -> None:
    unit = entries(name)
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartForceExitStatus"] == [str(DEVICE_FAULT_STATUS)]
    assert unit["RestartPreventExitStatus"] == ["2"]
    assert seconds(unit["StartLimitIntervalSec"][0]) > int(unit["StartLimitBurst"][0]) * seconds(unit["RestartSec"][0])


def test_who_drains_has_the_time_for_it() -> None:
    assert seconds(entries(BROKER)["TimeoutStopSec"][0]) > BrokerConfig().drain_s + CLOSE_S
    assert seconds(entries(WORKER)["TimeoutStopSec"][0]) > WorkerConfig().drain_limit_s + END_S
    assert entries(WORKER)["KillMode"] == entries(BROKER)["KillMode"] == ["mixed"], "a worker told twice ends at once"


@pytest.mark.parametrize(("name", "section", "cls"), [(BROKER, "broker", BrokerConfig), (WORKER, "worker", WorkerConfig)])
def test_the_environment_holds_settings_that_exist(name: str, section: str, cls: type) -> None:
    env = dict(pair.split("=", 1) for line in entries(name)["Environment"] for pair in line.split())
    assert (env["XDG_RUNTIME_DIR"], env["XDG_STATE_HOME"]) == ("%t", "%S")
    ours = [variable for variable in env if variable.startswith("PENSTOCK_")]
    config = load(cls, section, env=env, content={})
    changed = [f"PENSTOCK_{section}_{name}".upper() for name in cls.__slots__ if getattr(config, name) != getattr(cls(), name)]
    assert changed == ours


def test_the_broker_sees_who_its_clients_are() -> None:
    for name in UNITS:  # with users of its own, every client would be nobody, and memory could not be shared
        assert "PrivateUsers" not in entries(name)
        assert "DynamicUser" not in entries(name)
        assert entries(name)["User"] == entries(name)["Group"] == ["penstock"]


def test_libzmq_may_set_the_policy_of_its_threads() -> None:
    *_, denied, allowed = entries(BROKER)["SystemCallFilter"]
    assert denied == "~@privileged @resources"
    assert allowed == "sched_setscheduler", "it aborts without"


# --- install-service -----------------------------------------------------------------------------------------------


def load_script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("install_service", ROOT / "scripts" / "install_service.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root folder with an installation in /opt/penstock."""
    program = tmp_path / "opt/penstock/bin/penstock"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def install(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(ROOT / "scripts" / "install-service", "--root", image, "--venv", "/opt/penstock", *arguments)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_apply_it_says_what_it_would_do_and_does_nothing(image: Path) -> None:
    before = files(image)
    done = install(image, "--device", "cuda:0", "--device", "cuda:1")
    assert (done.returncode, done.stderr) == (0, "")
    for name in (*UNITS, TARGET):
        assert f"would write  /etc/systemd/system/{name} (new)" in done.stdout
    assert "would write  /etc/penstock/penstock.toml (new)" in done.stdout
    assert f"enable --now {TARGET} {BROKER} penstock-worker@cuda:0.service penstock-worker@cuda:1.service" in done.stdout
    assert "Nothing has been changed" in done.stdout
    assert files(image) == before


def test_installed_changed_and_taken_away(image: Path) -> None:
    before = set(files(image))
    done = install(image, "--apply")
    assert (done.returncode, done.stderr) == (0, "")
    written = files(image)
    assert set(written) - before == {
        *(f"etc/systemd/system/{name}" for name in (*UNITS, TARGET)),
        "etc/sysusers.d/penstock.conf", "etc/tmpfiles.d/penstock.conf", "etc/penstock/penstock.toml",
    }  # fmt: skip
    assert "ExecStart=/opt/penstock/bin/penstock broker\n" in written[f"etc/systemd/system/{BROKER}"]
    assert not [path for path, text in written.items() if "@BIN@" in text]
    assert all((image / path).stat().st_mode & 0o777 == 0o644 for path in set(written) - before)

    (image / "etc/penstock/penstock.toml").write_text("[broker]\ndrain_s = 5\n")
    (image / f"etc/systemd/system/{BROKER}").write_text("old")
    again = install(image, "--apply")
    assert f"write        /etc/systemd/system/{BROKER} (changed)" in again.stdout
    assert f"unchanged    /etc/systemd/system/{WORKER}" in again.stdout
    assert files(image) == written | {"etc/penstock/penstock.toml": "[broker]\ndrain_s = 5\n"}

    assert "would remove" in install(image, "--uninstall").stdout
    assert "etc/tmpfiles.d/penstock.conf" in files(image)
    gone = install(image, "--uninstall", "--apply")
    assert gone.returncode == 0
    assert set(files(image)) == before | {"etc/penstock/penstock.toml"}


def test_the_settings_that_are_installed_can_be_used(tmp_path: Path) -> None:
    text = (SYSTEMD / "penstock.toml").read_text()
    file = tmp_path / "penstock.toml"
    for content in (text, text.replace("# ", "")[text.index("[") - 6 :]):
        file.write_text(content)
        load(BrokerConfig, "broker", file=file, env={})
        load(WorkerConfig, "worker", file=file, env={})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--apply"], "run it as root"),
        (["--venv", "/nowhere"], "/nowhere/bin/penstock is not there"),
        (["--venv", str(BIN.parent), "--device", "gpu0"], "a device is cpu or cuda:<index>, not 'gpu0'"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert load_script().main(arguments) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert len(error.splitlines()) == 1


def test_what_the_services_could_not_see_is_not_installed(image: Path) -> None:
    hidden = image / "home/ann/venv/bin"
    hidden.parent.parent.mkdir(parents=True)
    shutil.copytree(image / "opt/penstock/bin", hidden)
    before = files(image)
    done = run(ROOT / "scripts" / "install-service", "--root", image, "--venv", "/home/ann/venv")
    assert done.returncode == 0
    assert "BUT: the services cannot see /home/ann/venv" in done.stdout
    refused = run(ROOT / "scripts" / "install-service", "--root", image, "--venv", "/home/ann/venv", "--apply")
    assert refused.returncode == 1
    assert "the services cannot see /home/ann/venv" in refused.stderr
    assert files(image) == before

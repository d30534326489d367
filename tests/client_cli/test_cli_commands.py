"""Commands without a broker: help, usage errors, exit statuses; every error is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.client.cli import main

COMMANDS = [
    "up", "broker", "worker", "call", "bench", "status", "tasks", "task", "jobs", "backup", "drain", "reload", "doctor",
    "simulate",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _nobody_there(tmp_ipc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_ipc))
    monkeypatch.setenv("PENSTOCK_CLIENT_CONNECT_TIMEOUT", "0.1")
    monkeypatch.chdir(tmp_ipc)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert [name for name in COMMANDS if f"\n  {name} " not in out] == []
        assert "penstock call softmax x=[1,2,3]" in out


@pytest.mark.parametrize(
    "command",
    [
        "up", "call", "bench", "status", "tasks", "task", "drain", "reload", "doctor", "backup", "jobs", "jobs show",
        "jobs fetch", "jobs cancel", "jobs requeue", "jobs drop",
    ],
)  # fmt: skip
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: penstock {command} ")
    assert max(map(len, out.splitlines())) <= 110


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["cal"], 2, "cal"),
        (["call"], 2, "KERNEL"),
        (["call", "softmax", "--nonsense"], 2, "penstock call --help"),
        (["call", "softmax", "x"], 2, "name=value"),
        (["call", "softmax", "--timeout", "soon"], 2, "--timeout"),
        (["up", "--workers", "0"], 2, "--workers"),
        (["up", "--url", "http://here"], 2, "http://here"),
        (["up", "--config", "nowhere.toml"], 2, "nowhere.toml"),
        (["status", "--url", "ipc://relative"], 2, "ipc://relative"),
        (["status"], 5, "penstock up"),
        (["status", "--json"], 5, "penstock up"),
        (["drain", "w"], 5, "penstock up"),
        (["reload"], 5, "penstock up"),
        (["tasks"], 5, "penstock up"),
        (["task"], 2, "ID"),
        (["task", "3fa9"], 5, "penstock up"),
        (["jobs"], 5, "penstock up"),
        (["jobs", "--dead", "--json"], 5, "penstock up"),
        (["jobs", "show"], 2, "penstock jobs show --help"),
        (["jobs", "undo", "k"], 2, "undo"),
        (["jobs", "fetch", "k"], 5, "penstock up"),
        (["jobs", "--url", "ipc://relative", "drop", "k"], 2, "ipc://relative"),
        (["backup", "somewhere"], 5, "penstock up"),
        (["call", "softmax", "x=[1]"], 5, "penstock up"),
        (["bench"], 5, "penstock up"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("looking", "jobs"):
        monkeypatch.setattr(f"penstock.client.cli.{module}.QUICK_CONNECT_S", 0.1)
    assert main(arguments) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("penstock: ")
    assert told.err.count("\n") == 1
    assert says in told.err


def test_without_torch_the_worker_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("up", "worker"):
        assert main([command]) == 1
        assert "pip install 'penstock[worker]'" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "module"), [("broker", "penstock.broker"), ("worker", "penstock.worker")])
def test_other_programs_get_their_own_arguments(command: str, module: str) -> None:
    run = [sys.executable, "-P", "-m", "penstock.client.cli", command]
    done = subprocess.run([*run, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: penstock {command}")
    done = subprocess.run([*run, "--nonsense"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2


def test_the_simulator_is_another_process_with_all_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: became.append([program, *arguments]))
    main(["simulate", "--service", "uniform:1:20", "--json", "--help"])
    python = sys.executable
    module = ["-P", "-m", "penstock.broker.simulator"]
    assert became == [[python, python, *module, "--service", "uniform:1:20", "--json", "--help"]]


def test_a_reader_that_leaves_is_no_error() -> None:
    program = [sys.executable, "-P", "-m", "penstock.client.cli", "--help"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()

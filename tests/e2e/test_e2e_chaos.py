"""`scripts/chaos` itself: a short run with a fixed seed, a long one, and that it leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from running import until

CHAOS = Path(__file__).parents[2] / "scripts" / "faults" / "chaos.py"
ACCOUNT = ("lost", "unexpected", "wrong owner", "duplicates")


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(CHAOS), *arguments]


def env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def run(limit_s: float, *arguments: str) -> tuple[dict[str, int], str]:
    """A run to its end: the numbers of its account, and all that it said."""
    done = subprocess.run(command(*arguments), env=env(), capture_output=True, text=True, timeout=limit_s, check=False)
    said = done.stdout + done.stderr
    numbers = {name.strip(): int(number) for name, number in re.findall(r"^([a-z ()]+?) +(\d+)$", done.stdout, re.M)}
    assert done.returncode == 0, said
    assert {name: numbers[name] for name in ACCOUNT} == dict.fromkeys(ACCOUNT, 0)
    return numbers, said


def left_behind(folder: str) -> list[str]:
    """Processes that were started for this folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(folder in word for word in process.info["cmdline"] or ()):
            found.append(" ".join(process.info["cmdline"]))
    return found


def test_a_short_run() -> None:
    kinds = "kill,stop,restart,poison"
    numbers, said = run(110, "--minutes", "0.25", "--seed", "4", "--gap-s", "1.5", "2.5", "--faults", kinds)
    assert numbers["done"] > 100, said
    assert numbers["dead (poison)"] > 0, said
    assert int(re.findall(r"(\d+) faults", said)[-1]) >= 3, said


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_long_run_with_all_faults() -> None:
    numbers, said = run(880, "--minutes", "10")
    assert numbers["done"] > 10_000, said
    assert numbers["dead (poison)"] > 0, said


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Tests that run in the background ignore SIGINT, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_nothing_is_left_when_it_is_ended(number: int) -> None:
    """SIGKILL leaves the folder, and what needs root is left out here: nobody could take that away."""
    faults = "kill,stop,partition,disk" if number == signal.SIGINT else "kill,stop"
    started = command("--minutes", "5", "--seed", "1", "--faults", faults)
    with subprocess.Popen(started, env=env(), stdout=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            assert process.stdout is not None
            folder = ""
            for line in process.stdout:
                folder = folder or "".join(re.findall(r"logged in (\S+)", line))
                if "s left" in line:
                    break
            assert left_behind(folder)
            process.send_signal(number)
            process.wait(30)
            until(lambda: not left_behind(folder), "all processes are gone", 10)
            assert not Path(folder, "state").is_mount()
            assert f"chaos{process.pid}" not in _networks()
        finally:
            process.kill()
    subprocess.run(["rm", "-r", folder], check=True)


def _networks() -> str:
    path = Path("/var/run/netns")
    return " ".join(p.name for p in path.iterdir()) if path.is_dir() else ""

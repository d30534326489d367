"""`scripts/fuzz` finds nothing in a moment, plays saved inputs again, and says when one of them breaks a rule."""

import os
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzzing" / "main.py"


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # its folder has its modules
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)


@pytest.mark.parametrize("target", ["codec", "client"])
def test_a_moment_of_it(target: str) -> None:
    done = fuzz("--target", target, "--seconds", "1.5", "--seed", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split(" inputs")[0].split()[-1]) > 20


def test_a_violation_is_an_exit_status(tmp_path: Path) -> None:
    saved = tmp_path / "input"
    saved.write_bytes(msgpack.packb(["from client", [b"PS", b"x"]]))
    assert fuzz("--target", "codec", "--replay", str(saved)).returncode == 0
    saved.write_bytes(msgpack.packb(["from client", [b"PS\x01\x02", 5]]))  # no bytes at all: the codec may rely on those
    done = fuzz("--target", "codec", "--replay", str(saved))
    assert done.returncode == 1
    assert "TypeError" in done.stdout + done.stderr

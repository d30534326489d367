"""Failpoints: how they are armed, that a typo is an error, and that every site stands in the code."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from penstock.broker import failpoints, kept, protocol
from penstock.broker.failpoints import FALLIBLE, SITES, BadFailpoint, parse

HIT = re.compile(r'hit(_message|_records)?\("([a-z.]+)"')
MESSAGES = {name.lower() for name in vars(protocol)}


def stages_in(root: Path) -> Counter[str]:
    """What the sources call, by name: sites, and stages that the type of a message or record completes."""
    found = Counter[str]()
    for package in ("broker", "client", "worker"):
        for path in (root / package).rglob("*.py"):
            for line in path.read_text(encoding="utf-8").splitlines():
                found.update(name for _, name in HIT.findall(line))
                assert not HIT.search(line) or any(name.startswith(f"{package}.") for _, name in HIT.findall(line)), path
    return found


def test_every_site_stands_in_the_code_and_nothing_else(repository_root: Path) -> None:
    stages = stages_in(repository_root)
    for site in SITES:
        assert stages[site] == 1 or stages[site.rpartition(".")[0]] == 1, site
    assert all(stage in SITES or any(site.startswith(f"{stage}.") for site in SITES) for stage in stages), stages


def test_sites_that_messages_complete_are_messages() -> None:
    of_messages = ("broker.received.", "broker.decided.", "broker.sending.", "broker.sent.", "client.")
    for site in SITES:
        assert not site.startswith(of_messages) or site.rpartition(".")[2] in MESSAGES, site


def test_the_names_of_records_are_those_of_the_journal() -> None:
    assert failpoints._KINDS == {
        0: "erase", kept.TAKEN: "taken", kept.STARTED: "started", kept.DIED: "died", kept.OUTCOME: "outcome",
        kept.ACKED: "acked", kept.KNOWN: "acked",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("broker.committing.takn=kill", "no site"),
        ("broker.committing.taken", "what to do"),
        ("broker.committing.taken=die", "what to do"),
        ("broker.committing.taken=error", "what to do"),
        ("broker.committing.taken=pause", "what to do"),
        ("broker.committing.taken=error:ENOSUCH", "ENOSUCH"),
        ("broker.committing.taken=kill@x", "invalid literal"),
        ("broker.committing.taken=kill@0", "counted from 1"),
        ("broker.committing.taken=kill;broker.committing.taken=pause:1", "armed already"),
        ("broker.committing.taken=pause:x", "could not convert"),
        ("worker.received.assign=error:EIO", "nothing can fail there"),
    ],
)
def test_what_cannot_be_understood_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadFailpoint, match=why):
        parse(text)


@pytest.mark.parametrize("module", ["penstock.broker", "penstock.worker", "penstock.client.cli"])
def test_a_program_with_a_typo_does_not_start(module: str) -> None:
    env = os.environ | {"PENSTOCK_FAILPOINTS": "broker.nowhere=kill"}
    done = subprocess.run([sys.executable, "-m", module, "--help"], env=env, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"there is no site 'broker.nowhere'" in done.stderr.splitlines()[-1]


def test_the_nth_time_counts_and_only_that() -> None:
    point = parse("broker.committing.taken=error:ENOSPC@3")["broker.committing.taken"]
    point.hit()
    point.hit()
    with pytest.raises(OSError, match="No space left") as caught:
        point.hit()
    assert caught.value.errno == errno.ENOSPC
    point.hit()


def test_a_switch_fires_once_in_one_process(tmp_path: Path) -> None:
    armed = [parse("broker.payload.written=error:EIO", tmp_path)["broker.payload.written"] for _ in range(2)]
    for point in armed:
        point.hit()
    (tmp_path / "broker.payload.written").touch()
    with pytest.raises(OSError, match="Input/output"):
        armed[0].hit()
    armed[1].hit()
    assert [path.name for path in tmp_path.iterdir()] == ["broker.payload.written.fired"]


def test_kill_is_a_kill() -> None:
    program = "from penstock.broker.failpoints import hit; hit('client.sent.submit'); print('alive')"
    env = os.environ | {"PENSTOCK_FAILPOINTS": "client.sent.submit = kill:0.01"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def test_nothing_is_armed_here_and_errors_are_for_what_can_fail() -> None:
    assert not failpoints.ARMED
    failpoints.hit("broker.committing.taken")
    assert set(FALLIBLE) < set(SITES)

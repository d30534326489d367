"""What `scripts/chaos` says at the end: recovery times, tasks that ended as they must not, and when it is not content."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from accounting import Account
from chaos import Ending, Tail, _tell, _wrong_ends, recoveries
from nemesis import Done, Fault
from stage import Surprise

ROLES = {"alice": "client", "bob": "client", "w0": "worker", "w1": "worker", "s1": "supervisor", "broker": "broker"}


def times(folder: Path, name: str, *lines: tuple[float, float, str]) -> None:
    (folder / f"{name}.times").write_text("".join(f"{end} {begun} {worker}\n" for end, begun, worker in lines))


def test_recovery_is_when_tasks_of_who_was_hit_end_again(tmp_path: Path) -> None:
    times(tmp_path, "alice", (11.0, 9.0, "w0"), (12.0, 10.5, "w1"), (16.0, 10.6, "w0-2"), (31.0, 30.5, "w0"))
    times(tmp_path, "bob", (14.0, 10.2, "w1"), (22.0, 21.0, "w1"))
    done = [
        Done(Fault(0, "kill", "w0"), 10.0, 10.0),  # the end at 11 was under way before
        Done(Fault(0, "stop", "bob", 3.0), 10.1, 13.0),
        Done(Fault(0, "kill", "s1"), 20.0, 20.0),  # the worker below it
        Done(Fault(0, "kill", "broker"), 30.0, 30.0),
        Done(Fault(0, "kill", "w0"), 40.0, 40.0),  # nothing came after it
    ]
    assert recoveries(done, ROLES, tmp_path) == {
        "kill worker": [6.0, None], "stop client": [1.0], "kill supervisor": [2.0], "kill broker": [1.0],
    }  # fmt: skip


def test_who_is_hit_again_before_has_not_recovered(tmp_path: Path) -> None:
    times(tmp_path, "alice", (16.0, 15.0, "w0"))
    done = [Done(Fault(0, "kill", "w0"), 10.0, 10.0), Done(Fault(0, "kill", "broker"), 12.0, 12.0)]
    assert recoveries(done, ROLES, tmp_path) == {"kill worker": [None], "kill broker": [4.0]}


def test_wrong_ends(tmp_path: Path) -> None:
    lines = [
        {"is": "failed", "key": "poison-d-1", "code": "dead"}, {"is": "failed", "key": "cancel-m-2", "code": "cancelled"},
        {"is": "failed", "key": "small-d-3", "code": "dead"},
        {"is": "failed", "key": "poison-d-4", "code": "dead_without_evidence"},
        {"is": "done", "key": "poison-d-5"}, {"is": "done", "key": "small-d-6"}, {"is": "ended"},
    ]  # fmt: skip
    path = tmp_path / "c.log"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"is": "fai')
    assert sorted(_wrong_ends([path])) == ["poison: dead_without_evidence", "poison: done", "small: dead"]


GOOD = {"late": [], "num_open": 0, "wrong_ends": Counter()}


@pytest.mark.parametrize(
    ("account", "changed", "surprises", "is_good"),
    [
        ({}, {}, [], True),
        ({"lost": ["a/1"]}, {}, [], False),
        ({"unexpected": ["a/1"]}, {}, [], False),
        ({"wrong_owner": ["a/1"]}, {}, [], False),
        ({"duplicates": ["a/1"]}, {}, [], False),
        ({}, {"late": ["alice"]}, [], False),
        ({}, {"num_open": 1}, [], False),
        ({}, {"wrong_ends": Counter(["small: dead"])}, [], False),
        ({}, {}, [Surprise("broker", 1, "a trace")], False),
    ],
)
def test_it_is_content_only_if_nothing_is_wrong(
    tmp_path: Path, account: dict[str, list[str]], changed: dict[str, object], surprises: list[Surprise], is_good: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ending = Ending(Account(**account), **{**GOOD, **changed})  # type: ignore[arg-type]
    stage = SimpleNamespace(folder=tmp_path, roles={}, surprises=surprises)
    assert _tell(ending, SimpleNamespace(done=[]), stage) == is_good  # type: ignore[arg-type]
    said = capsys.readouterr().out
    for name in ("lost", "unexpected", "wrong owner", "duplicates"):
        assert f"{name:20s} {len(account.get(name.replace(' ', '_'), [])):8d}" in said


def test_a_tail_counts_what_is_new(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "f")
    assert tail.num_lines() == 0
    (tmp_path / "f").write_text("a\nb\nc")
    assert tail.num_lines() == 2
    with (tmp_path / "f").open("a") as f:
        f.write("\nd\n")
    assert tail.num_lines() == 4

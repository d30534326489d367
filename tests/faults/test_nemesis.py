"""The nemesis: what it will do follows from the seed, what it does is ended, and who is to be spared is."""

from collections import Counter

import pytest
from nemesis import BROKER, KINDS, SECONDS, Fault, Nemesis, schedule

ROLES = {"broker": "broker", "s0": "supervisor", "w0": "worker", "alice": "client", "bob": "client"}
CUT_OFF = ("w0", "alice")


def drawn(seed: int, seconds: float = 600.0, kinds: tuple[str, ...] = KINDS, **more: object) -> list[Fault]:
    return schedule(seed, seconds, kinds, ROLES, CUT_OFF, **more)  # type: ignore[arg-type]


def test_the_same_seed_is_the_same_schedule() -> None:
    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    short, long = drawn(7, 100.0), drawn(7)
    assert short
    assert long[: len(short)] == short


def test_every_kind_hits_everybody_it_can() -> None:
    hit = {(fault.kind, fault.target) for fault in drawn(1)}
    everybody = {(kind, name) for kind in ("kill", "stop") for name in ROLES}
    assert hit == everybody | {("restart", "broker"), ("restart", "s0"), ("disk", "broker"), ("blackout", "broker")} | {
        ("partition", name) for name in CUT_OFF
    }


def test_only_the_kinds_that_were_asked_for() -> None:
    assert {fault.kind for fault in drawn(1, kinds=("stop",))} == {"stop"}
    assert drawn(1, kinds=()) == []
    assert drawn(1, kinds=("poison",)) == []  # the clients' business


def test_nobody_is_hit_while_a_fault_of_its_lasts() -> None:
    until = Counter[str]()
    for fault in drawn(3, 6000.0):
        low, high = SECONDS.get(fault.kind, (0.0, 0.0))
        assert low <= fault.seconds <= high
        assert fault.at_s >= until[fault.target] - 0.01
        until[fault.target] = fault.at_s + fault.seconds  # type: ignore[assignment]


def test_who_is_spared_is_hit_before_only() -> None:
    faults = drawn(5, 6000.0, spared=((BROKER, "s0"), 300.0))
    at = [fault.at_s for fault in faults if fault.target in (BROKER, "s0")]
    assert at
    assert max(at) < 300.0
    assert {fault.target for fault in faults if fault.at_s > 300.0} == {"w0", "alice", "bob"}


class Recorder:
    """Whom the nemesis acts upon, with some who are not there."""

    def __init__(self, *absent: str) -> None:
        self.absent = absent
        self.told: list[str] = []

    def begin(self, fault: Fault) -> bool:
        self.told.append(f"begin {fault.target}")
        return fault.target not in self.absent

    def end(self, fault: Fault) -> None:
        self.told.append(f"end {fault.target}")


@pytest.fixture
def faults() -> list[Fault]:
    return [Fault(1.0, "stop", "a", 5.0), Fault(2.0, "kill", "b"), Fault(3.0, "stop", "c", 1.0), Fault(9.0, "stop", "d", 60.0)]


def test_faults_begin_and_end_when_they_are_due(faults: list[Fault]) -> None:
    target = Recorder("c")
    nemesis = Nemesis(faults, target, 100.0)
    for now in range(100, 111):
        nemesis.turn(float(now))
    assert target.told == ["begin a", "begin b", "end b", "begin c", "end a", "begin d"]
    assert nemesis.num_missed == 1
    assert [(one.fault.target, one.began) for one in nemesis.done] == [("a", 101.0), ("b", 102.0), ("d", 109.0)]
    nemesis.heal(110.0)
    assert target.told[-1] == "end d"
    assert nemesis.done[-1].ended == 110.0


def test_after_healing_nothing_comes(faults: list[Fault]) -> None:
    target = Recorder()
    nemesis = Nemesis(faults, target, 0.0)
    nemesis.turn(1.0)
    nemesis.heal(1.5)
    nemesis.turn(100.0)
    assert target.told == ["begin a", "end a"]

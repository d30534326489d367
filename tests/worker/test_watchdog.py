"""How long a run may take, what the shared page says of it, and when a worker counts as hung. Times are made up."""

import math
import os
import random
import subprocess
import sys
import time

import pytest

from penstock.worker.watch import ENDING, IDLE, LOADING, RUNNING, SIZE, STARTING, TURNING, Activity, Pace, Page, Watch
from penstock.worker.watchdog import Watchdog, what

S = 1_000_000_000


def settled(took_s: float, declared_s: float = 0.0) -> Pace:
    """A pace after a first run and one more."""
    pace = Pace(b"k", declared_s, 0)
    pace.measure(took_s)
    pace.measure(took_s)
    return pace


def test_the_limit_is_the_largest_of_what_speaks_for_patience() -> None:
    assert settled(0.001).limit_s(10.0, 600.0, 0.0) == 10.0
    assert settled(4.0).limit_s(10.0, 600.0, 0.0) == pytest.approx(20.0)
    assert settled(0.001).limit_s(10.0, 600.0, predicted_s=30.0) == 150.0
    assert settled(0.001, declared_s=77.0).limit_s(10.0, 600.0, 0.0) == 77.0
    assert settled(0.001).limit_s(10.0, 600.0, predicted_s=1e12) < 1e6, "a number from elsewhere is bounded"


def test_a_first_run_may_compile_unless_it_is_known_how_long_that_takes() -> None:
    pace = Pace(b"k", 0.0, 0)
    assert pace.limit_s(10.0, 600.0, 0.0) == 600.0
    pace.first_s = 7.0
    assert pace.limit_s(10.0, 600.0, 0.0) == 35.0
    pace.measure(1.0)
    assert pace.limit_s(10.0, 600.0, 0.0) == 10.0


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_the_percentile_is_tracked(sigma: float) -> None:
    draw = random.Random(5)
    pace, found = settled(1.0), []
    for i in range(40_000):
        pace.measure(draw.lognormvariate(0.0, sigma))
        if i > 10_000:
            found.append(math.log(pace.p99_s))
    wanted = 2.326 * sigma  # of the logarithm
    assert sum(found) / len(found) == pytest.approx(wanted, abs=0.2 + 0.15 * wanted)


def test_the_percentile_follows_a_change() -> None:
    pace = settled(0.01)
    for _ in range(40):
        pace.measure(5.0)
    assert pace.p99_s > 4.0


def test_the_page_says_what_happens() -> None:
    page = Page()
    page.begin(30.0)
    assert (page.read().state, page.read().limit_ns) == (STARTING, 30 * S)
    watch = Watch(page.memory, floor_s=2.0, first_s=60.0)
    watch.add("scale")
    watch.add("é" * 40)  # its 80 bytes are cut
    watch.keep()
    watch.is_ready = True
    watch.rest()
    assert page.read().state == IDLE
    for is_done in (True, False):
        before = time.monotonic_ns()
        watch.start("scale")
        running = page.read()
        assert (running.state, running.name, running.is_ready) == (RUNNING, "scale", True)
        assert before <= running.began_ns <= time.monotonic_ns()
        assert running.limit_ns == (60 * S if is_done else 2 * S)
        watch.stop(is_done)
    assert (page.read().state, page.read().limit_ns, page.read().num_done) == (TURNING, 12 * S, 1)
    watch.start("é" * 40, predicted_ms=1e6)
    assert page.read().name.startswith("é" * 32)
    assert page.read().limit_ns == 5000 * S
    watch.load("scale")
    assert (page.read().state, page.read().limit_ns) == (LOADING, 60 * S)
    watch.end()
    assert page.read().state == ENDING


def test_the_next_worker_knows_what_kernels_took_but_not_of_others() -> None:
    page = Page()
    page.begin(30.0)
    first = Watch(page.memory, floor_s=1.0, first_s=60.0)
    for name in ("a", "b"):
        first.add(name)
    first.keep()
    first.start("b")
    first.stop(True)
    page.begin(30.0)
    second = Watch(page.memory, floor_s=1.0, first_s=60.0)
    for name in ("b", "c"):
        second.add(name)
    second.keep()
    limits = {}
    for name in ("b", "c"):
        second.start(name)
        limits[name] = page.read().limit_ns
        second.stop(False)
    assert limits == {"b": 1 * S, "c": 60 * S}


def test_a_page_full_of_rubbish_is_no_reason_to_fail() -> None:
    page = Page()
    page.memory[:] = b"\xff" * SIZE
    watch = Watch(page.memory)
    watch.add("a")
    watch.keep()
    watch.start("a")
    assert page.read().limit_ns == 600 * S


def test_another_process_reads_the_page() -> None:
    page = Page()
    program = (
        "import sys; from penstock.worker.watch import Page, Watch\n"
        "w = Watch(Page(int(sys.argv[1])).memory); w.add('there'); w.keep(); w.start('there')"
    )
    subprocess.run([sys.executable, "-P", "-c", program, str(page.fd)], pass_fds=(page.fd,), check=True)
    assert (page.read().state, page.read().name) == (RUNNING, "there")
    os.close(page.fd)


class Look:
    """A watchdog whose clock and worker the test drives."""

    def __init__(self) -> None:
        self.now = 1000 * S
        self.is_stopped = False
        self.dog = Watchdog(lambda: self.is_stopped, lambda: self.now)

    def after(self, seconds: float, activity: Activity) -> str | None:
        self.now += round(seconds * S)
        return self.dog.look(activity, 0.25)

    def until(self, seconds: float, activity: Activity) -> str | None:
        """Looks every quarter of a second, so long or until something is found."""
        for _ in range(round(seconds * 4)):
            if found := self.after(0.25, activity):
                return found
        return None


def running(began_s: float = 1000.0, limit_s: float = 10.0, state: int = RUNNING, num_done: int = 0) -> Activity:
    return Activity(state, round(began_s * S), round(limit_s * S), num_done, True, "spin")


@pytest.mark.parametrize("state", [STARTING, TURNING, LOADING, RUNNING, ENDING])
def test_past_its_limit_it_hangs(state: int) -> None:
    look = Look()
    assert look.until(10.0, running(state=state)) is None
    found = look.until(1.0, running(state=state))
    assert found is not None
    assert what(running(state=state)) in found
    assert "its limit is 10.0 s" in found


def test_who_waits_for_work_never_hangs() -> None:
    assert Look().until(1000.0, running(state=IDLE, limit_s=0.0)) is None


def test_what_changes_does_not_hang() -> None:
    look = Look()
    for i in range(400):  # each is past its limit, but never seen twice
        assert look.after(0.25, running(limit_s=0.1, num_done=i)) is None


def test_a_supervisor_that_stood_still_grants_the_whole_time_again() -> None:
    look = Look()
    look.until(5.0, running())
    assert look.after(500.0, running()) is None
    assert look.until(9.5, running()) is None
    assert look.until(1.0, running()) is not None


def test_a_worker_that_is_stopped_does_not_hang() -> None:
    look = Look()
    look.is_stopped = True
    assert look.until(100.0, running()) is None
    look.is_stopped = False
    assert look.until(9.0, running()) is None
    assert look.until(2.0, running()) is not None

"""What a broker is to a service manager: the words it sends, the lines it logs, its test of itself, its group's access."""

import logging
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from broker_process import broker

from penstock.broker import logs, selftest
from penstock.broker.notify import Notifier
from penstock.broker.protocol import Code, Error, Fault, Heartbeat
from penstock.broker.wire import Message, encode


@pytest.fixture(params=["path", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_ipc: Path) -> Iterator[tuple[str, socket.socket]]:
    address = f"{tmp_ipc}/notify" if request.param == "path" else f"@penstock-{os.urandom(6).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(address if address[0] == "/" else "\0" + address[1:])
        made.settimeout(5.0)
        yield address, made


def heard(ear: socket.socket) -> list[str]:
    return ear.recv(4096).decode().split("\n")


def test_the_words(ear: tuple[str, socket.socket]) -> None:
    address, end = ear
    env = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier(env)
    assert env == {"HOME": "/"}, "no child speaks in our name"
    assert notifier.interval_s == 1.5
    assert notifier.next_deadline() is None, "nobody is alive before it is ready"
    notifier.starting("reading", 60.0)
    assert heard(end) == ["EXTEND_TIMEOUT_USEC=60000000", "STATUS=reading"]
    assert notifier.next_deadline() is None, "nor then"
    notifier.ready("two\nlines")
    assert heard(end) == ["READY=1", "STATUS=two lines"]
    now = time.monotonic()
    assert notifier.is_due(now)
    notifier.alive(now, "two\nlines")
    assert heard(end) == ["WATCHDOG=1"], "what is known already is not said again"
    assert not notifier.is_due(now + 1.4)
    assert notifier.is_due(now + 1.5)
    assert notifier.next_deadline() == now + 1.5
    notifier.alive(now + 1.5, "other")
    assert heard(end) == ["WATCHDOG=1", "STATUS=other"]
    notifier.reloading()
    reloading, usec = heard(end)
    assert reloading == "RELOADING=1"
    assert abs(int(usec.removeprefix("MONOTONIC_USEC=")) - time.monotonic_ns() // 1000) < 60e6
    notifier.stopping("the end", 2.5)
    assert heard(end) == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=2500000", "STATUS=the end"]


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"WATCHDOG_USEC": "1000000"},
        {"NOTIFY_SOCKET": "/nowhere/notify"},
        {"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
    ],
)
def test_who_is_not_watched_gives_no_signs_of_life(env: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(dict(env))
    notifier.ready("fine")
    assert notifier.next_deadline() is None
    assert not notifier.is_due(time.monotonic() + 1e6)
    assert ("does not hear READY=1" in caplog.text) == ("NOTIFY_SOCKET" in env), "a lost word is logged"


# --- lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "prefix"), [(10, "<7>"), (20, "<6>"), (30, "<4>"), (40, "<3>"), (50, "<3>"), (25, "<6>")])
def test_every_line_has_its_priority(level: int, prefix: str) -> None:
    record = logging.LogRecord("penstock", level, __file__, 1, "%s\n\nmore", ("first",), None)
    assert logs.JournalFormatter("%(message)s").format(record) == f"{prefix}first\n{prefix}\n{prefix}more"


def test_a_traceback_is_one_priority_throughout() -> None:
    try:
        raise ValueError("of two\nlines")
    except ValueError:
        record = logging.LogRecord("penstock", logging.ERROR, __file__, 1, "", (), sys.exc_info())
    lines = logs.JournalFormatter("%(message)s").format(record).split("\n")
    assert len(lines) > 4
    assert {line[:3] for line in lines} == {"<3>"}


PROGRAM = """
import logging, os
from penstock.broker import logs
logs.configure('info', 'T %(message)s')
logging.info('hello')
os.abort()
"""


@pytest.mark.parametrize(("is_journal", "wanted"), [(True, "<6>hello"), (False, "T hello")])
def test_the_journal_is_recognised_by_what_stderr_is(tmp_path: Path, is_journal: bool, wanted: str) -> None:
    with (tmp_path / "log").open("wb") as log:
        found = os.fstat(log.fileno())
        stream = f"{found.st_dev}:{found.st_ino if is_journal else 0}"
        env = {**os.environ, "JOURNAL_STREAM": stream}
        done = subprocess.run([sys.executable, "-c", PROGRAM], stderr=log, env=env, check=False)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == wanted
    assert done.returncode < 0
    assert any("Fatal Python error" in line for line in lines), "a crash says where it happened"


# --- the test of itself --------------------------------------------------------------------------------------------


class Answering:
    """Two ROUTERs that answer a stranger with the given message, or not at all; a context manager."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", front: Message | None, back: Message | None) -> None:
        self.sides = []
        for name, answer in (("front", front), ("back", back)):
            s = context.socket(zmq.ROUTER)
            s.bind(f"inproc://{name}")
            self.sides.append((s, answer))

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *error: object) -> None:
        for s, _ in self.sides:
            s.close(linger=0)

    def turn(self) -> None:
        for s, answer in self.sides:
            if s.poll(1):
                route, *_ = s.recv_multipart()
                if answer is not None:
                    s.send_multipart([route, *encode(answer)])


STRANGER = Fault(error=Error(Code.UNATTACHED, "say hello"))


@pytest.fixture
def context() -> "Iterator[zmq.Context[zmq.Socket[bytes]]]":
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


def turns(answering: Answering) -> Callable[[], bool]:
    end = time.monotonic() + 0.5

    def turn() -> bool:
        answering.turn()
        return time.monotonic() < end

    return turn


def test_a_broker_that_answers_passes(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    with Answering(context, STRANGER, STRANGER) as answering:
        selftest.check(context, "inproc://front", "inproc://back", turns(answering))


@pytest.mark.parametrize(
    ("front", "back", "text"),
    [
        (None, STRANGER, "inproc://front is bound, but a message sent there is not answered"),
        (STRANGER, None, "inproc://back is bound, but a message sent there is not answered"),
        (Heartbeat(), STRANGER, "inproc://front answers a stranger with Heartbeat"),
        (STRANGER, Fault(error=Error(Code.OVERLOADED, "no")), "inproc://back answers a stranger with Fault"),
    ],
)
def test_a_broker_that_does_not_fails(
    context: "zmq.Context[zmq.Socket[bytes]]", front: Message | None, back: Message | None, text: str
) -> None:
    with Answering(context, front, back) as answering, pytest.raises(selftest.SelfTestFailed, match=text):
        selftest.check(context, "inproc://front", "inproc://back", turns(answering))


def test_a_broker_that_fails_its_test_ends(tmp_ipc: Path) -> None:
    program = (
        "import sys; from penstock.broker import __main__ as m, doors, server; server.SELF_TEST_S = 0.3\n"
        "doors.Doors._receive = lambda self, door: door.socket.recv_multipart() and None\n"
        f"sys.exit(m.main(['--url', 'ipc://{tmp_ipc}/b']))"
    )
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_ipc)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("is bound, but a message sent there is not answered")
    assert not (tmp_ipc / "penstock" / "connection.json").exists()


# --- who may connect -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "mode"), [(None, 0o700), ("yes", 0o660)])
def test_the_group_may_connect_if_it_was_said(
    tmp_ipc: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, mode: int
) -> None:
    if given is not None:
        monkeypatch.setenv("PENSTOCK_BROKER_GROUP_ACCESS", given)
    with broker(tmp_ipc) as b:
        b.client()
        modes = {stat.S_IMODE((tmp_ipc / "b" / f"{side}.sock").stat().st_mode) for side in ("clients", "workers")}
    assert modes == {mode}

"""Who notices what, and when: a worker, a client and a broker fail in every way there is, and those who watch them are timed.

Everything runs at default settings and over tcp with keys, but for one worker on ipc. `noticed`: from the failure until who
watches has acted upon it; `resolved`: until the tasks that were open are done elsewhere. A broker has a standby for that.
"""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from blackhole import TO_FAR, TO_NEAR, Cable, why_not
from stack import free_port

from penstock.broker.keys import ROLES, KeyFolder
from penstock.client import Client, PenstockError

HERE: Final = Path(__file__).parent
LIMIT_S: Final = 10.0
HANG_LIMIT_S: Final = 10.0
PATIENCE_S: Final = 60.0
MEGABYTE: Final = np.zeros(1 << 18, np.float32)
KILL, STOP, LOCK, HANG = "kill -9", "SIGSTOP", "Python hung, holding the lock", "kernel hung"
IDLE, FLOODED = "blackholed, idle", "blackholed, flooded one way"
Row = dict[str, Any]


def until(is_true: Callable[[], Any], what: str, began: float, limit_s: float = PATIENCE_S) -> float:
    """Seconds from `began` until something is true."""
    while not is_true():
        if time.monotonic() > began + limit_s:
            raise TimeoutError(f"not within {limit_s:.0f} s: {what}")
        time.sleep(0.01)
    return time.monotonic() - began


class Stage:
    """A broker at an ipc and a tcp address, and processes here or at the far end of a cable; a context manager."""

    def __init__(self, folder: Path, cable: Cable | None) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._cable = cable
        self.url = f"ipc://{folder}/b"
        host = cable.near if cable is not None else "127.0.0.1"
        self.tcp = f"tcp://{host}:{free_port(host)}"
        self.standby = f"ipc://{folder}/s"
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")},
            "XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder / "state"), "PENSTOCK_WORKER_THREADS": "1",
        }  # fmt: skip
        self._keys = {role: folder / f"{role}.key" for role in ROLES}
        for role, path in self._keys.items():
            KeyFolder(folder / "state" / "penstock").new(f"bench-{role}", role, path)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self.processes.values():
            process.wait(PATIENCE_S)

    def _start(self, name: str, command: Sequence[str], is_far: bool = False) -> None:
        inside = self._cable.inside if self._cable is not None and is_far else []
        env = {**self._env, "PENSTOCK_BENCH_ORDER": str(self.order(name))}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*inside, sys.executable, "-P", *command], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def broker(self) -> None:
        self._start("broker", ["-m", "penstock.broker", "--url", self.url, "--listen", self.tcp])

    def spare(self) -> None:
        self._start("standby", ["-m", "penstock.broker", "--url", self.standby])

    def worker(self, name: str, url: str, is_far: bool = False) -> None:
        arguments = ["--broker", url, "--device", "cpu", "--name", name, "--kernels", str(HERE / "detection_kernels.py")]
        self._start(name, ["-m", "penstock.worker", *arguments, "--key", str(self._keys["worker"])], is_far)

    def client(self, name: str, url: str, what: str, is_far: bool = False) -> None:
        """A process that does `what`, see `_PARTS`, once it is connected."""
        path = f"import sys; sys.path.append({str(HERE)!r}); import detection; detection.play({what!r}, {url!r}, sys.argv[1])"
        self._start(name, ["-c", path, str(self._keys["client"])], is_far)
        self.await_log(name, "connected")

    def order(self, name: str) -> Path:
        return self.folder / f"{name}.order"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def await_log(self, name: str, text: str, num: int = 1, began: float | None = None) -> float:
        """Seconds until a process has logged a text so many times."""
        what = f"{text!r} in the log of {name}"
        return until(lambda: self.log(name).count(text) >= num, what, time.monotonic() if began is None else began)

    def ready(self, ps: Client, *names: str) -> dict[str, int]:
        """Until these workers are ready; their process ids by name."""
        found: dict[str, int] = {}

        def look() -> bool:
            with contextlib.suppress(PenstockError, TimeoutError):
                found.update({w["name"]: w["pid"] for w in ps.status()["workers"] if w["state"] in ("ready", "busy")})
            return found.keys() >= set(names)

        until(look, f"workers {names} ready", time.monotonic(), 2 * PATIENCE_S)
        return found


# --- the parts that clients play, in processes of their own ----------------------------------------------------------


def play(what: str, url: str, key: str) -> None:
    """Never ends by itself. Says `connected`, and `done` for every task."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGUSR1, lambda number, frame: ctypes.PyDLL(None).sleep(3600))
    with Client(url, key=key, connect_timeout=PATIENCE_S, timeout=None) as ps:
        ps.call("stumble", seconds=0.0)
        print("connected", flush=True)
        for task in _PARTS[what](ps):
            task.add_done_callback(lambda _: print("done", flush=True))


def _idle(ps: Client) -> Iterator[Any]:
    while True:
        signal.pause()
    yield


def _light(ps: Client) -> Iterator[Any]:
    while True:
        ps.call("stumble", seconds=0.0)
        print("done", flush=True)
        time.sleep(0.2)
    yield


def _sending(ps: Client) -> Iterator[Any]:
    while True:
        yield ps.submit("take", x=MEGABYTE)


def _receiving(ps: Client) -> Iterator[Any]:
    open_ones = list[Any]()
    while True:
        open_ones = [task for task in open_ones if not task.done()]
        if len(open_ones) < 200:
            open_ones.append(ps.submit("give", size=float(MEGABYTE.size)))
            yield open_ones[-1]
        else:
            time.sleep(0.01)


_PARTS: Final = {"idle": _idle, "light": _light, "sending": _sending, "receiving": _receiving}


# --- a worker, watched by the broker ---------------------------------------------------------------------------------


def watch_worker(stage: Stage, ps: Client, name: str, mode: str, fail: Callable[[int], None], kernel: str = "stumble") -> Row:
    """Some work on all workers, then a failure of one: until the broker gives it up, and until all is done."""
    pid = stage.ready(ps, name)[name]
    if mode == IDLE:
        tasks = []
    elif mode == FLOODED:
        tasks = [ps.submit("take", x=MEGABYTE) for _ in range(64)]
    else:
        tasks = [ps.submit("stumble", seconds=0.1) for _ in range(30)]
        until(lambda: any(task.done() for task in tasks), "work goes on", time.monotonic())
    fail(pid)
    if mode in (LOCK, HANG):
        until(lambda: not stage.order(name).exists(), "the order was followed", time.monotonic())
    began = time.monotonic()
    num_killed = stage.log(name).count(": killed")
    if mode == HANG:  # its own supervisor's business
        noticed = stage.await_log(name, ": killed", num_killed + 1, began)
    else:
        noticed = until(lambda: pid not in [w["pid"] for w in ps.status()["workers"]], f"{name} was given up", began)
    resolved = until(lambda: all(task.done() for task in tasks), "the work is done", began) if tasks else None
    assert not any(task.exception(0) for task in tasks)
    return {"watched": "worker by broker", "mode": mode, "noticed_s": noticed, "resolved_s": resolved}


def of_workers(stage: Stage, ps: Client) -> Iterator[Row]:
    """Failures of processes, one after another."""
    yield watch_worker(stage, ps, "local", f"{KILL}, on ipc", lambda pid: os.kill(pid, signal.SIGKILL))
    stage.ready(ps, "local")
    yield watch_worker(stage, ps, "a", STOP, lambda pid: os.kill(pid, signal.SIGSTOP))
    os.kill(int(_child_of(stage.processes["a"].pid)), signal.SIGCONT)
    stage.ready(ps, "a")
    for mode, word in ((LOCK, "lock"), (HANG, "sleep")):
        yield watch_worker(stage, ps, "b", mode, lambda pid, word=word: _give_order(stage.order("b"), word))  # type: ignore[misc]
        stage.ready(ps, "a", "b")
    yield watch_worker(stage, ps, "c", KILL, lambda pid: os.kill(pid, signal.SIGKILL))


def _give_order(path: Path, word: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(word)
    part.rename(path)


def _child_of(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]


# --- a client, watched by the broker ---------------------------------------------------------------------------------


def watch_client(stage: Stage, ps: Client, mode: str, what: str, fail: Callable[[int], None], is_far: bool = False) -> Row:
    """A client fails: until the broker sends it nothing more. Its session waits a minute for it to come back."""
    stage.client("client", stage.tcp, what, is_far)
    process = stage.processes["client"]
    if what != "idle":
        stage.await_log("client", "done", 20)
    before = ps.status()
    fail(process.pid)
    began = time.monotonic()
    gone = before["num_clients"] - before["num_clients_away"]
    noticed = until(lambda: (s := ps.status())["num_clients"] - s["num_clients_away"] < gone, f"client: {mode}", began)
    return {"watched": "client by broker", "mode": mode, "noticed_s": noticed, "resolved_s": None}


def end_client(stage: Stage) -> None:
    process = stage.processes.pop("client")
    process.kill()
    process.wait(PATIENCE_S)
    (stage.folder / "client.log").unlink()


def of_clients(stage: Stage, ps: Client) -> Iterator[Row]:
    for mode, number in ((KILL, signal.SIGKILL), (STOP, signal.SIGSTOP), (LOCK, signal.SIGUSR1)):
        yield watch_client(stage, ps, mode, "idle", lambda pid, number=number: os.kill(pid, number))  # type: ignore[misc]
        end_client(stage)


# --- the cable -------------------------------------------------------------------------------------------------------


def of_the_far_host(stage: Stage, ps: Client, cable: Cable) -> Iterator[Row]:
    """Idle: nothing goes through the cable any more. Flooded: nothing in the direction in which most goes."""
    for mode, cut, part in ((IDLE, (), "idle"), (FLOODED, (TO_FAR,), "receiving")):
        yield watch_worker(stage, ps, "far", mode, lambda _, cut=cut: cable.cut(*cut))  # type: ignore[misc]
        cable.heal()
        stage.ready(ps, "far")
        yield watch_client(stage, ps, mode, part, lambda _, cut=cut: cable.cut(*cut), is_far=True)  # type: ignore[misc]
        end_client(stage)
        cable.heal()
        stage.ready(ps, "far")


# --- the broker, watched by both -------------------------------------------------------------------------------------


def watch_broker(folder: Path, cable: Cable | None, mode: str, part: str, fail: Callable[[int], None]) -> Iterator[Row]:
    """A broker fails that has a standby: until each side says so, and until its client's tasks are done there."""
    with Stage(folder, cable) as stage:
        stage.broker()
        stage.spare()
        both, is_far = f"{stage.tcp},{stage.standby}", cable is not None
        stage.worker("w", both, is_far)
        with Client(stage.url, connect_timeout=PATIENCE_S) as ps:
            stage.ready(ps, "w")
        stage.client("client", both, part, is_far)
        stage.await_log("client", "done", 5)
        fail(stage.processes["broker"].pid)
        began = time.monotonic()
        seen: dict[str, float] = {}
        until(lambda: _see(stage, seen, began), "worker and client have noticed", began)
        stage.await_log("w", "is back", began=began)
        num_done = stage.log("client").count("done")
        resolved = stage.await_log("client", "done", num_done + 1, began)
        if cable is not None:
            cable.heal()
    yield {"watched": "broker by worker", "mode": mode, "noticed_s": seen["w"], "resolved_s": resolved}
    yield {"watched": "broker by client", "mode": mode, "noticed_s": seen["client"], "resolved_s": resolved}


def _see(stage: Stage, seen: dict[str, float], began: float) -> bool:
    """Note who has said that the broker is gone; whether both have."""
    for name, text in (("w", "is away"), ("client", "has been silent")):
        if name not in seen and text in stage.log(name):
            seen[name] = time.monotonic() - began
    return len(seen) == 2


def of_brokers(folder: Path, cable: Cable | None) -> Iterator[Row]:
    yield from watch_broker(folder / "k", None, KILL, "light", lambda pid: os.kill(pid, signal.SIGKILL))
    yield from watch_broker(folder / "s", None, STOP, "light", lambda pid: os.kill(pid, signal.SIGSTOP))
    if cable is not None:
        yield from watch_broker(folder / "i", cable, IDLE, "light", lambda _: cable.cut())
        yield from watch_broker(folder / "f", cable, FLOODED, "sending", lambda _: cable.cut(TO_NEAR))


# --- the bench -------------------------------------------------------------------------------------------------------


def measure() -> Row:
    """All modes, once each."""
    missing = why_not()
    rows = list[Row]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-", dir="/tmp")))
        cable = stack.enter_context(Cable()) if not missing else None
        with Stage(folder / "p", cable) as stage, Client(stage.url, connect_timeout=PATIENCE_S) as ps:
            stage.broker()
            stage.worker("local", stage.url)
            for name in ("a", "b", "c"):
                stage.worker(name, stage.tcp)
            stage.ready(ps, "local", "a", "b", "c")
            for _ in range(30):
                ps.call("stumble", seconds=0.01)
            parts = [of_workers(stage, ps), of_clients(stage, ps)]
            if cable is not None:
                stage.worker("far", stage.tcp, is_far=True)
                parts.append(of_the_far_host(stage, ps, cable))
            for part in parts:
                for row in part:
                    rows.append(row)
                    print(line(row), flush=True)
        for row in of_brokers(folder, cable):
            rows.append(row)
            print(line(row), flush=True)
    late = [row for row in rows if row["noticed_s"] > limit_of(row)]
    return {"rows": rows, "not_measured": missing, "has_failed": bool(late)}


def limit_of(row: Row) -> float:
    return HANG_LIMIT_S + 1.0 if row["mode"] == HANG else LIMIT_S


def line(row: Row) -> str:
    """One measurement for people."""
    then = "" if row["resolved_s"] is None else f"   done elsewhere after {row['resolved_s']:5.1f} s"
    note = "" if row["noticed_s"] <= limit_of(row) else "   NOT within its limit"
    return f"{row['watched']:18s} {row['mode']:32s} noticed after {row['noticed_s']:5.1f} s{then}{note}"


def lines(result: Row) -> list[str]:
    """The table for people."""
    made = [line(row) for row in result["rows"]]
    if result["not_measured"]:
        made.append(f"blackholed: not measured ({result['not_measured']})")
    return made

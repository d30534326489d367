"""Everything that runs in `scripts/chaos`: a broker, supervised workers and clients, started, hit, started again, ended.

Knows processes, files and networks; does not know which fault comes when (`nemesis.py`), nor what clients do (`load.py`).
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from load import END
from nemesis import BROKER, Fault
from network import Network, can_have_networks
from ports import free_port

from penstock.broker.keys import KeyFolder

HERE = Path(__file__).parent
STOP_S = 15.0
RESTART_S = {"broker": 0.3, "supervisor": 0.3, "client": 1.0}
JOURNAL_FAILED = 4
"""The broker's exit status when its disk is full."""
DISK_BYTES = 512 << 20
LOW_BYTES, MIN_FREE_BYTES = 8 << 20, 32 << 20
SETTINGS = f"""[broker]
journal = "disk"
session_ttl_s = 10
dedup_window_s = 120
dedup_bytes = {256 << 20}
min_free_bytes = {MIN_FREE_BYTES}
drain_s = 2
max_attempts = 4
shared_min_bytes = {256 << 10}
"""
"""Short times, so that what they guard happens; but an outcome that a client has received and not logged must still be there
when it comes back. A task may bring down four workers, as the nemesis may hit one twice."""
CLIENTS = (
    ("durable", "durable"), ("mapper", "map"), ("slow", "slow"), ("probe", "probe"), ("large", "large"),
    ("alice", "mortal"), ("bob", "canceller"), ("eve", "stranger"),
)  # fmt: skip
"""Names and kinds. Those with keys come over tcp, each a principal of its own; the others are this user, over ipc."""
WITH_KEYS = ("alice", "bob", "eve")
WORKERS = ("w0", "w1")
WORKER_OF = {"s0": "w0", "s1": "w1"}
"""Supervisor -> the worker below it."""
FAR = ("w1", "s1", "alice")
"""Those over tcp with networks of their own, where this user may make some."""


@dataclass
class Actor:
    """A process that is started again whenever it ends. `is_doomed`: its end was asked for."""

    name: str
    role: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    is_doomed: bool = False
    is_over: bool = False
    restart_at: float = 0.0


@dataclass
class Surprise:
    """An end that nobody has asked for."""

    name: str
    status: int
    last_words: str


@dataclass
class Stage:
    """See the module.

    Args:
        folder: new, with a short path; kinds: of faults, for what they need; poison_s: a poison task so often; 0: none.
        rate: how many times as much as usual the clients submit.
    """

    folder: Path
    kinds: Collection[str]
    seed: int = 0
    poison_s: float = 0.0
    rate: float = 1.0
    actors: dict[str, Actor] = field(default_factory=dict)
    surprises: list[Surprise] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.url = f"ipc://{self.folder}/penstock"
        self.state = self.folder / "state"
        self._networks: dict[str, Network] = {}
        self._has_disk = False
        self._stopped: dict[str, int] = {}
        self._is_full_until = 0.0
        self._leash = _end_with_parent()

    # --- beginning -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the disk, the networks and the keys, and start everything."""
        (self.folder / "penstock.toml").write_text(SETTINGS)
        self.state.mkdir()
        if "disk" in self.kinds:
            self._mount()
        host = self._make_networks() if "partition" in self.kinds else "127.0.0.1"
        far = f"tcp://{host}:{free_port(host)}"
        keys = {name: self.folder / f"{name}.key" for name in (*WITH_KEYS, "w1")}
        for name, path in keys.items():
            KeyFolder(self.state / "penstock").new(name, "worker" if name in WORKERS else "client", path)
        self._cast(far, keys)
        for actor in self.actors.values():
            self._start(actor)

    def _cast(self, far: str, keys: Mapping[str, Path]) -> None:
        """Who there is: those with keys come over tcp, to the address `far`."""
        python = [sys.executable, "-P"]
        self._add(BROKER, "broker", [*python, "-m", "penstock.broker", "--url", self.url, "--listen", far])
        kernels = [str(HERE / name) for name in ("fault_kernels.py", "chaos_kernels.py")]
        worker = [*python, "-m", "penstock.worker", "--device", "cpu", "--kernels", kernels[0], "--kernels", kernels[1]]
        for above, name in WORKER_OF.items():
            where = ["--broker", far, "--key", str(keys[name])] if name in keys else ["--broker", self.url]
            self._add(above, "supervisor", [*worker, "--name", name, *where])
        for name, kind in CLIENTS:
            where = ["--url", far, "--key", str(keys[name])] if name in keys else ["--url", self.url]
            more = ["--folder", str(self.folder), "--seed", str(self.seed), "--rate", str(self.rate)]
            if kind == "durable":
                more += ["--poison-s", str(self.poison_s)]
            self._add(name, "client", [sys.executable, str(HERE / "load.py"), kind, "--name", name, *where, *more])

    @property
    def roles(self) -> dict[str, str]:
        """What can be hit: name -> role. A worker `w0` is the process below the supervisor `s0`."""
        return {name: actor.role for name, actor in self.actors.items()} | dict.fromkeys(WORKERS, "worker")

    @property
    def cut_off(self) -> list[str]:
        return [name for name in FAR if name in self._networks and not name.startswith("s")]

    def _add(self, name: str, role: str, command: list[str]) -> None:
        network = self._networks.get(name)
        self.actors[name] = Actor(name, role, [*(network.command if network else []), *command])

    def _make_networks(self) -> str:
        """One for the worker and one for a client; the broker's address in the first comes back."""
        number = os.getpid()
        subnets = [f"10.{64 + number % 64}.{2 * (number // 64 % 128) + i}" for i in range(2)]
        host = f"{subnets[0]}.1"
        worker, client = (Network(f"chaos{number}{i}", subnet, host) for i, subnet in enumerate(subnets))
        self._networks = {"w1": worker, "s1": worker, "alice": client}
        for network in (worker, client):
            network.create()
        return host

    def _mount(self) -> None:
        if not mount(self.state):
            raise OSError(f"no disk could be mounted at {self.state}")
        self._has_disk = True

    def _start(self, actor: Actor) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        env |= {"XDG_RUNTIME_DIR": str(self.folder), "XDG_STATE_HOME": str(self.state), "PENSTOCK_WORKER_THREADS": "1"}
        env |= {"PYTHONSAFEPATH": "", "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{actor.name}.out").open("ab") as out:
            actor.process = subprocess.Popen(
                actor.command, env=env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0,
                preexec_fn=self._leash,
            )  # fmt: skip
        actor.is_doomed = False

    # --- meanwhile -----------------------------------------------------------------------------------------------------

    def tend(self, now: float) -> None:
        """Start again what has ended."""
        for actor in self.actors.values():
            if actor.process is None:
                if not actor.is_over and now >= actor.restart_at:
                    self._start(actor)
            elif (status := actor.process.poll()) is not None:
                self._ended(actor, status, now)

    def _ended(self, actor: Actor, status: int, now: float) -> None:
        actor.process, actor.restart_at = None, now + RESTART_S[actor.role]
        if actor.role == "client" and status == 0:
            actor.is_over = True
        elif actor.role == "broker" and status == JOURNAL_FAILED and now < self._is_full_until:
            actor.restart_at = now + 1.0
        elif status != -signal.SIGKILL and not (actor.is_doomed and status in (0, -signal.SIGTERM)):  # it may just have started
            words = (self.folder / f"{actor.name}.out").read_text(errors="replace").splitlines()[-12:]
            self.surprises.append(Surprise(actor.name, status, "\n".join(words)))

    def pid(self, name: str) -> int | None:
        """The process of an actor, or of a worker, if it runs."""
        if name in WORKERS:
            above = self.pid(f"s{name[1:]}")
            with suppress(psutil.Error):
                for child in psutil.Process(above).children() if above else []:
                    if "--unsupervised" in child.cmdline():
                        return int(child.pid)
            return None
        process = self.actors[name].process
        return process.pid if process is not None and process.poll() is None else None

    # --- faults --------------------------------------------------------------------------------------------------------

    def begin(self, fault: Fault) -> bool:
        """Do it; False if its target is not there."""
        if fault.kind == "partition":
            self._networks[fault.target].cut(fault.how)
            return True
        if fault.kind == "disk":
            self._fill(DISK_BYTES if fault.how == "full" else self._free_bytes() - LOW_BYTES)
            self._is_full_until = float("inf")
            return True
        if fault.kind == "blackout":
            for name in self.actors:
                self._signal(name, signal.SIGKILL)
            return True
        pid = self.pid(fault.target)
        if pid is None:
            return False
        if fault.kind == "stop":
            self._stopped[fault.target] = os.pidfd_open(pid)
        self._signal(fault.target, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "restart": signal.SIGTERM}[fault.kind])
        return True

    def _signal(self, name: str, number: int) -> None:
        pid = self.pid(name)
        if number == signal.SIGTERM:
            self.actors[name].is_doomed = True
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, fault: Fault) -> None:
        """What lasted is over."""
        if fault.kind == "stop":
            pidfd = self._stopped.pop(fault.target)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)
        elif fault.kind == "partition":
            self._networks[fault.target].heal()
        elif fault.kind == "disk":
            (self.state / "filler").unlink(missing_ok=True)
            self._is_full_until = time.monotonic() + 3.0

    def _free_bytes(self) -> int:
        found = os.statvfs(self.state)
        return found.f_bavail * found.f_frsize

    def _fill(self, num_bytes: int) -> None:
        with suppress(OSError), (self.state / "filler").open("wb", buffering=0) as f:
            for _ in range(max(0, num_bytes) // (1 << 20)):
                f.write(bytes(1 << 20))

    # --- the end -------------------------------------------------------------------------------------------------------

    def finish(self, limit_s: float, say: Callable[[str], None]) -> list[str]:
        """Let the clients see the end of everything; who has not after `limit_s` comes back."""
        (self.folder / END).touch()
        until = time.monotonic() + limit_s
        while time.monotonic() < until and any(not actor.is_over for actor in self._clients()):
            self.tend(time.monotonic())
            time.sleep(0.05)
        late = [actor.name for actor in self._clients() if not actor.is_over]
        if late:
            say(f"not at their end after {limit_s:.0f} s: {', '.join(late)}")
        return late

    def _clients(self) -> list[Actor]:
        return [actor for actor in self.actors.values() if actor.role == "client"]

    def close(self) -> None:
        """End everything, however it stands. May be called at any moment, and twice."""
        below = []
        for actor in self.actors.values():
            if actor.process is not None:
                with suppress(psutil.Error):
                    below += psutil.Process(actor.process.pid).children(recursive=True)
                actor.process.kill()
        for actor in self.actors.values():
            if actor.process is not None:
                actor.process.wait(STOP_S)
                actor.process = None
        for process in psutil.wait_procs(below, STOP_S)[1]:
            process.kill()
        for pidfd in self._stopped.values():
            os.close(pidfd)
        self._stopped.clear()
        for network in set(self._networks.values()):
            network.remove()
        self._networks.clear()
        if self._has_disk:
            self._has_disk = False
            subprocess.run(["umount", "--lazy", str(self.state)], check=False)


def missing_rights(kinds: Collection[str]) -> dict[str, str]:
    """The kinds of faults that cannot be done here, and why."""
    why = {}
    if "partition" in kinds and not can_have_networks():
        why["partition"] = "needs root that may make network namespaces, on Linux with iproute2"
    if "disk" in kinds and not can_have_disks():
        why["disk"] = "needs root that may mount a tmpfs, on Linux"
    return why


def can_have_disks() -> bool:
    """Found out by mounting one."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory(prefix="ps-chaos-") as folder:
        is_mounted = mount(Path(folder))
        if is_mounted:
            subprocess.run(["umount", folder], check=True)
    return is_mounted


def mount(folder: Path) -> bool:
    """A disk in memory, which can be filled."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def new_folder() -> Path:
    """With a short path: those of ipc sockets may have about 100 bytes."""
    return Path(tempfile.mkdtemp(prefix="ps-chaos-", dir="/tmp"))


def _end_with_parent() -> Callable[[], None] | None:
    """For children: SIGKILL when this process is gone, however. Runs between fork and exec. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, int(signal.SIGKILL), 0, 0, 0) and None

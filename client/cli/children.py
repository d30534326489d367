"""A process that is started again when it fails: its command, its lines, its pauses.

Knows processes; does not know what they are for.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

FIRST_RESTART_S: Final = 1.0
LAST_RESTART_S: Final = 60.0
STABLE_S: Final = 60.0
"""Who ran for this long starts with the shortest pause again."""
_PR_SET_PDEATHSIG: Final = 1


def _bind_prctl() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl


def _end_with_parent() -> Callable[[], None] | None:
    """For a child without `--parent`: the kernel sends it SIGTERM when this process is gone. Linux only.

    It runs between fork and exec; all that it needs is looked up before.
    """
    prctl, parent = _bind_prctl(), os.getpid()
    if prctl is None:
        return None

    def leash() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it went before the call above
            os._exit(1)

    return leash


class Child:
    """One process that is started again when it fails.

    Args:
        name: prefix of its log lines.
        is_leashed: it does not watch its parent by itself.
    """

    def __init__(self, name: str, command: Sequence[str], is_leashed: bool = False) -> None:
        self.name = name
        self._command = list(command)
        self._is_leashed = is_leashed
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.restart_at: float | None = None
        self._num_failures = 0
        self._rest = b""

    def start(self, now: float) -> None:
        self.restart_at, self.started_at = None, now
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_end_with_parent() if self._is_leashed else None,
        )

    @property
    def is_running(self) -> bool:
        return self.process is not None

    @property
    def pipe(self) -> Any:
        assert self.process is not None
        return self.process.stdout

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def lines(self, is_end: bool) -> list[str]:
        """What it wrote since the last call, in whole lines; at its end also an unfinished one."""
        data = self._rest + _read_some(self.pipe.fileno())
        while is_end and (more := _read_some(self.pipe.fileno())):
            data += more
        *whole, self._rest = data.split(b"\n")
        if is_end and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode(errors="replace") for line in whole]

    def plan_restart(self, now: float) -> float:
        """It has failed: the pause until it starts again, in seconds."""
        if now - self.started_at >= STABLE_S:
            self._num_failures = 0
        pause = min(FIRST_RESTART_S * 2.0 ** min(self._num_failures, 10), LAST_RESTART_S)
        self._num_failures += 1
        self.restart_at = now + pause
        return pause


def _read_some(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return b""


def describe(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"

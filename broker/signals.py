"""Signals as facts: how often the process was asked to stop, and whether to read the settings again.

SIGTERM and SIGINT ask to stop. SIGHUP asks to read the settings again, unless the terminal in which the process was started
has gone: that ends it, like anything else that was started there.
"""

import os
import signal
import socket
from typing import Any


class Signals:
    """One per process. `fd` becomes readable with every signal, from `install` on."""

    def __init__(self) -> None:
        self.num_stops = 0
        self.fd = -1
        self._ends: tuple[socket.socket, ...] = ()
        self._wants_reload = False
        self._can_hang_up = False

    def install(self) -> None:
        """Take the signals, for the rest of the process; call in the main thread."""
        self._ends = reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self.fd = reader.fileno()
        signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        is_ignored = signal.signal(signal.SIGHUP, self._on_hangup) is signal.SIG_IGN  # under nohup
        self._can_hang_up = not is_ignored and _has_terminal()

    def drain(self) -> None:
        """Make `fd` unreadable until the next signal."""
        os.read(self.fd, 4096)

    def take_reload(self) -> bool:
        """Whether to read the settings again; True once for any number of signals."""
        wanted, self._wants_reload = self._wants_reload, False
        return wanted

    def _on_stop(self, number: int, frame: Any) -> None:
        self.num_stops += 1

    def _on_hangup(self, number: int, frame: Any) -> None:
        if self._can_hang_up and not _has_terminal():
            self.num_stops += 1
        else:
            self._wants_reload = True


def _has_terminal() -> bool:
    """Whether this process belongs to a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True

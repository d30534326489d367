"""What a service manager is told: ready, alive, reloading, stopping, and a line for people. The protocol is sd_notify(3).

Knows datagrams, and when the next sign of life is due. Does not know what is alive: who calls `alive` has just made progress.
"""

import logging
import os
import socket
import time
from collections.abc import MutableMapping

log = logging.getLogger(__name__)
MAX_SEND_S = 0.2


class Notifier:
    """This process's. Where no service manager asked for it, every call does nothing.

    Args:
        env: NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are taken out of it, so that no child speaks in our name.
    Attributes:
        interval_s: a sign of life is due so often, twice within what the service manager allows; None: nobody waits for any.
    """

    def __init__(self, env: MutableMapping[str, str] = os.environ) -> None:
        address, usec, pid = (env.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
        self._address = "\0" + address[1:] if address.startswith("@") else address
        is_watched = bool(address) and usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        self.interval_s = int(usec) / 2e6 if is_watched else None
        self._due_at: float | None = None
        self._status = ""

    def starting(self, status: str, limit_s: float) -> None:
        """It makes progress, and will say more within `limit_s`: it is not to be given up before."""
        self._send([f"EXTEND_TIMEOUT_USEC={round(limit_s * 1e6)}"], status)

    def ready(self, status: str) -> None:
        """It serves; also after `reloading`. Signs of life are due from now on."""
        if self.interval_s is not None:
            self._due_at = time.monotonic()
        self._send(["READY=1"], status)

    def reloading(self) -> None:
        """The settings are being read again; `ready` ends it."""
        self._send(["RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"], self._status)

    def stopping(self, status: str, limit_s: float) -> None:
        """It ends by itself within `limit_s`: it is not to be killed before."""
        self._send(["STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(limit_s * 1e6)}"], status)

    def is_due(self, now: float) -> bool:
        """Whether it is time for `alive`; times are those of `time.monotonic`."""
        return self._due_at is not None and now >= self._due_at

    def next_deadline(self) -> float | None:
        """When it will be; None: never."""
        return self._due_at

    def alive(self, now: float, status: str) -> None:
        """What this process is for has made progress."""
        assert self.interval_s is not None
        self._due_at = now + self.interval_s
        self._send(["WATCHDOG=1"], status)

    def _send(self, lines: list[str], status: str) -> None:
        """One datagram; the status only if it is news."""
        if not self._address:
            return
        if status != self._status:
            self._status = status
            lines.append("STATUS=" + " ".join(status.split()))
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
                s.settimeout(MAX_SEND_S)
                s.sendto("\n".join(lines).encode(), self._address)
        except OSError as e:
            log.warning("the service manager does not hear %s: %s", lines[0], e)

"""A service manager's ear: the socket that NOTIFY_SOCKET names, what came there, from whom and when. Knows no unit files."""

import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 60.0
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Notice:
    """One datagram."""

    at: float
    pid: int
    fields: dict[str, str]


class NotifySocket:
    """Bound as long as it lives. `seen` has everything that was taken from it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.seen: list[Notice] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def close(self) -> None:
        self._socket.close()

    def env(self, watchdog_s: float | None = None) -> dict[str, str]:
        """What a service manager would set for a service that is watched."""
        watchdog = {} if watchdog_s is None else {"WATCHDOG_USEC": str(round(watchdog_s * 1e6))}
        return {"NOTIFY_SOCKET": self.address, **watchdog}

    def take(self, limit_s: float) -> Notice | None:
        """The next one, or None if none comes in time."""
        self._socket.settimeout(max(limit_s, 1e-3))
        try:
            data, extra, _, _ = self._socket.recvmsg(4096, 256)
        except TimeoutError:
            return None
        pid, _, _ = next(
            _CREDENTIALS.unpack(value) for level, kind, value in extra if (level, kind) == (1, socket.SCM_CREDENTIALS)
        )
        fields = dict(line.split("=", 1) for line in data.decode().splitlines())
        self.seen.append(Notice(time.monotonic(), pid, fields))
        return self.seen[-1]

    @property
    def status(self) -> str:
        """The line that a service manager would show now."""
        return next((notice.fields["STATUS"] for notice in reversed(self.seen) if "STATUS" in notice.fields), "")

    def wait(self, name: str, limit_s: float = LIMIT_S) -> Notice:
        """The next one with this field."""
        end = time.monotonic() + limit_s
        while (notice := self.take(end - time.monotonic())) is not None:
            if name in notice.fields:
                return notice
        raise AssertionError(f"no {name} within {limit_s:.0f} s; the last ones: {self.seen[-5:]}")

    def drain(self) -> list[Notice]:
        """What has come up to now."""
        start = len(self.seen)
        while self.take(0.0) is not None:
            pass
        return self.seen[start:]

    def is_quiet(self, seconds: float) -> bool:
        """Whether nothing comes for so long, apart from what is there already."""
        self.drain()
        return self.take(seconds) is None


def socket_in(folder: Path) -> NotifySocket:
    return NotifySocket(str(folder / "notify"))

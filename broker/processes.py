"""The ends of peers' processes on this machine, as descriptors that become ready. Knows processes, and no peer."""

import logging
import os
from collections.abc import Iterator

from penstock.broker.responder import Poller

log = logging.getLogger("penstock.broker")
_READABLE = 1


class Processes:
    """Watches processes where the system can tell of their end; elsewhere a worker's silence tells."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._pids: dict[int, int] = {}  # descriptor -> process
        self._watched: set[int] = set()
        self._ended: list[int] = []

    def watch(self, pid: int) -> None:
        """Learn at once when it ends; 0 is none."""
        if pid == 0 or pid in self._watched or not hasattr(os, "pidfd_open"):
            return
        try:
            fd = os.pidfd_open(pid)
        except OSError as e:
            log.warning("cannot watch process %d: %s", pid, e)
            return
        self._pids[fd] = pid
        self._watched.add(pid)
        self._poller.register(fd, _READABLE)

    def owns(self, fd: int) -> bool:
        return fd in self._pids

    def handle(self, fd: int) -> None:
        """A descriptor of ours is ready."""
        self._poller.unregister(fd)
        self._ended.append(fd)

    def ended(self) -> Iterator[int]:
        """The processes that have ended since the last time, in this order."""
        ended, self._ended = self._ended, []
        for fd in ended:
            pid = self._pids.pop(fd)
            self._watched.discard(pid)
            os.close(fd)
            log.info("process %d has ended", pid)
            yield pid

    def close(self) -> None:
        for fd in self._pids:
            os.close(fd)
        self._pids.clear()
        self._watched.clear()
        self._ended.clear()

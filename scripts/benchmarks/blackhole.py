"""A network of two hosts on this machine, whose cable can be made to swallow what is sent, one way or both: nobody is told.

The far host is a network namespace, the cable a pair of virtual interfaces. A direction is cut by giving its sender a wrong
hardware address for the other end: packets leave and nobody takes them. Needs root and `ip`.
"""

import itertools
import os
import shutil
import subprocess
from types import TracebackType
from typing import Final

NOBODY: Final = "02:00:00:00:00:99"
TO_FAR, TO_NEAR = "to far", "to near"


def why_not() -> str:
    """What is missing to make such a network; empty if nothing is."""
    if os.geteuid() != 0:
        return "not root"
    if shutil.which("ip") is None:
        return "no `ip` here"
    tried = subprocess.run(["ip", "netns", "add", f"ps-try-{os.getpid()}"], capture_output=True)
    if tried.returncode:
        return "no network namespaces here"
    _ip("netns", "del", f"ps-try-{os.getpid()}")
    return ""


class Cable:
    """A context manager. `near` and `far` are the addresses of its ends; `inside` goes before a command for the far host.

    A process may have four at once.
    """

    _numbers = itertools.cycle(range(4))

    def __init__(self) -> None:
        number, mine = os.getpid() % 16_000, next(self._numbers)
        net, first = f"10.{192 + number // 4096}.{number // 16 % 256}", number % 16 * 16 + 4 * mine
        self.near, self.far = f"{net}.{first + 1}", f"{net}.{first + 2}"
        name = f"{os.getpid()}{'abcd'[mine]}"
        self._name, self._here, self._there = f"ps-{name}", f"psn{name}", f"psf{name}"
        self.inside = ["ip", "netns", "exec", self._name]

    def __enter__(self) -> "Cable":
        _ip("netns", "add", self._name)
        try:
            _ip("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self._name)
            _ip("addr", "add", f"{self.near}/30", "dev", self._here)
            _ip("-n", self._name, "addr", "add", f"{self.far}/30", "dev", self._there)
            _ip("link", "set", self._here, "up")
            for device in (self._there, "lo"):
                _ip("-n", self._name, "link", "set", device, "up")
            self._macs = {TO_FAR: _mac("-n", self._name, device=self._there), TO_NEAR: _mac(device=self._here)}
        except BaseException:
            _ip("netns", "del", self._name)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _ip("netns", "del", self._name)

    def cut(self, *directions: str) -> None:
        """From now on nothing arrives in these directions; in both, if none is named."""
        for direction in directions or (TO_FAR, TO_NEAR):
            self._aim(direction, NOBODY)

    def heal(self) -> None:
        """Everything arrives again."""
        for direction, mac in self._macs.items():
            self._aim(direction, mac)

    def _aim(self, direction: str, mac: str) -> None:
        where = ((), self.far, self._here) if direction == TO_FAR else (("-n", self._name), self.near, self._there)
        namespace, address, device = where
        _ip(*namespace, "neigh", "replace", address, "lladdr", mac, "nud", "permanent", "dev", device)


def _mac(*namespace: str, device: str) -> str:
    words = _ip(*namespace, "-o", "link", "show", device).split()
    return words[words.index("link/ether") + 1]


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout

"""A network of its own for one process: a namespace with one link to this machine, which can be cut. Root on Linux only.

Knows `ip` of iproute2; does not know what runs there.
"""

import os
import shutil
import subprocess
import sys

CUTS = ("blackhole", "link")
"""Ways to cut: packets to the broker vanish while the link stays up, or the link goes down."""


def can_have_networks() -> bool:
    """Whether one can be made here: found out by making it, since not every root may."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    network = Network(f"probe{os.getpid()}", "10.127.255", "10.127.255.1")
    try:
        network.create()
    except OSError:
        return False
    finally:
        network.remove()
    return True


class Network:
    """One namespace.

    Args:
        name: new on this machine; subnet: the first three numbers of its addresses, like "10.1.2".
        broker: the address there that is cut off, one of this machine's.
    """

    def __init__(self, name: str, subnet: str, broker: str) -> None:
        self.name = name
        self.host = f"{subnet}.1"
        self._broker = broker
        self.command = ["ip", "netns", "exec", name]
        self._subnet = subnet
        self._link = f"v{name[-12:]}"
        self._cut = ""

    def create(self) -> None:
        name, link = self.name, self._link
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("addr", "add", f"{self.host}/24", "dev", link)
        _ip("link", "set", link, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{self._subnet}.2/24", "dev", "eth0")
        self._up()

    def _up(self) -> None:
        _ip("-n", self.name, "link", "set", "eth0", "up")
        _ip("-n", self.name, "route", "replace", "default", "via", self.host)

    def cut(self, how: str) -> None:
        self._cut = how
        if how == "blackhole":
            _ip("-n", self.name, "route", "add", "blackhole", f"{self._broker}/32")
        else:
            _ip("-n", self.name, "link", "set", "eth0", "down")

    def heal(self) -> None:
        how, self._cut = self._cut, ""
        if how == "blackhole":
            _ip("-n", self.name, "route", "del", "blackhole", f"{self._broker}/32")
        elif how:
            self._up()

    def remove(self) -> None:
        """The link goes with the namespace."""
        subprocess.run(["ip", "link", "del", self._link], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["ip", "netns", "del", self.name], stderr=subprocess.DEVNULL, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

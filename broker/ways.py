"""How a peer reaches its broker: one address or several, each with the key to show there, and which of them is in use.

Several are ways to one broker (ipc, then tcp; two addresses of its machine), or lead to brokers that stand in for each other.
A peer uses one of them at a time. Knows addresses and keys; does not know sockets or times.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.broker.address import Address, AddressError
from penstock.broker.keys import KeyProblem, OwnKey, find_key


@dataclass(frozen=True, slots=True)
class Way:
    """An address, and the key to show there if it wants one."""

    address: Address
    key: OwnKey | None = None


class Ways:
    """The ways to a broker, the preferred one first. `now` is the one in use."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = tuple(ways)
        self._at = 0
        self._refused = set[int]()

    def __len__(self) -> int:
        return len(self._ways)

    def __str__(self) -> str:
        return ", ".join(way.address.url for way in self._ways)

    @property
    def now(self) -> Way:
        return self._ways[self._at]

    def begin(self) -> None:
        """Something that stood has broken: the preferred way first."""
        self._at = 0

    def move_on(self) -> None:
        """Nobody answers here: the next one."""
        self._at = (self._at + 1) % len(self._ways)

    def refuse(self) -> bool:
        """The broker here does not want this key; whether that leaves no way."""
        self._refused.add(self._at)
        return len(self._refused) == len(self._ways)

    def about(self, why: str) -> str:
        """What is wrong here, in words that tell which way is meant."""
        return why if len(self._ways) == 1 else f"{self.now.address.url}: {why}"


def find_addresses(
    given: str | Sequence[str] | None, setting: Sequence[str] = (), env: Mapping[str, str] = os.environ
) -> tuple[Address, ...]:
    """The addresses of the argument, a list or text with commas, else of PENSTOCK_URL, else of a setting, else what
    `Address.find` finds.

    Raises:
        AddressError: one of them is none.
    """
    source = given or env.get("PENSTOCK_URL") or setting
    if not source:
        return (Address.find(None, env),)
    urls = _parts(source)
    if not urls:
        raise AddressError(f"{source!r} names no address: use ipc:///folder or tcp://host:port, several with commas")
    return tuple(map(Address, urls))


def find_ways(
    given: str | Sequence[str] | None,
    keys: Sequence[Path] = (),
    setting: Sequence[str] = (),
    env: Mapping[str, str] = os.environ,
) -> Ways:
    """The addresses, as `find_addresses` does, and the key for each: `keys`, else those that PENSTOCK_KEY names.

    One key serves at all addresses; where brokers have keys of their own, there is a file for each address, in their order.

    Raises:
        AddressError, KeyProblem: one cannot be used, or their numbers do not fit.
    """
    addresses = find_addresses(given, setting, env)
    paths = list(keys) or [Path(part) for part in _parts(env.get("PENSTOCK_KEY"))]
    if len(paths) not in (0, 1, len(addresses)):
        raise KeyProblem(f"{len(paths)} keys for {len(addresses)} addresses: give one for all, or one for each in their order")
    if len(paths) == 1:
        paths *= len(addresses)
    files = dict(enumerate(paths))
    return Ways([Way(address, find_key(files.get(i), address, env)) for i, address in enumerate(addresses)])


def _parts(given: str | Sequence[str] | None) -> list[str]:
    parts = given.split(",") if isinstance(given, str) else given or ()
    return [part.strip() for part in parts if part.strip()]

"""Several addresses of a broker: where they come from, their keys, and the order in which they are tried."""

from pathlib import Path

import pytest

from penstock.broker.address import Address, AddressError
from penstock.broker.keys import KeyFolder, KeyProblem
from penstock.broker.ways import Way, Ways, find_addresses, find_ways

A, B, C = "ipc:///tmp/a", "tcp://127.0.0.1:7001", "tcp://127.0.0.1:7002"


def urls(ways: Ways, num: int) -> list[str]:
    """The next so many that are tried."""
    found = []
    for _ in range(num):
        found.append(ways.now.address.url)
        ways.move_on()
    return found


def test_where_addresses_come_from(tmp_path: Path) -> None:
    """Argument > PENSTOCK_URL > setting > the connection file or the default."""
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    both = {**env, "PENSTOCK_URL": f"{B}, {C}"}
    assert [a.url for a in find_addresses(f"{A},{B}", [C], both)] == [A, B]
    assert [a.url for a in find_addresses([B, A], (), both)] == [B, A]
    assert [a.url for a in find_addresses(None, [A], both)] == [B, C]
    assert [a.url for a in find_addresses(None, [A, C], env)] == [A, C]
    assert [a.url for a in find_addresses(None, (), env)] == [f"ipc://{tmp_path}/penstock"]


@pytest.mark.parametrize("wrong", [",", [""], f"{A},nowhere", [A, "tcp://x"], f"{B};{C}"])
def test_what_is_no_address(wrong: str | list[str], tmp_path: Path) -> None:
    with pytest.raises(AddressError, match=r"ipc:///folder"):
        find_addresses(wrong, (), {"XDG_RUNTIME_DIR": str(tmp_path)})


def test_the_order() -> None:
    ways = Ways([Way(Address(url)) for url in (A, B, C)])
    assert str(ways) == f"{A}, {B}, {C}"
    assert urls(ways, 5) == [A, B, C, A, B]
    ways.begin()
    assert urls(ways, 1) == [A]
    assert ways.about("no") == f"{B}: no"
    assert Ways([Way(Address(A))]).about("no") == "no"


def test_refused_everywhere() -> None:
    ways = Ways([Way(Address(url)) for url in (A, B)])
    assert not ways.refuse()
    assert not ways.refuse(), "the same one again"
    ways.move_on()
    assert ways.refuse()


def test_keys(tmp_path: Path) -> None:
    """One for all, or one for each; none where none is needed."""
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    files = [tmp_path / "x.key", tmp_path / "y.key"]
    for path in files:
        KeyFolder(tmp_path / path.stem).new("alice", "client", path)
    one = find_ways([A, B, C], files[:1], (), env)
    ways = [one.now.key]
    for _ in range(2):
        one.move_on()
        ways.append(one.now.key)
    assert ways[0] is None and ways[1] is not None and ways[1] == ways[2]
    each = find_ways([B, C], (), (), {**env, "PENSTOCK_KEY": ",".join(map(str, files))})
    first = each.now.key
    each.move_on()
    assert first is not None and each.now.key is not None and first.server != each.now.key.server
    with pytest.raises(KeyProblem, match="2 keys for 3 addresses"):
        find_ways([A, B, C], files, (), env)

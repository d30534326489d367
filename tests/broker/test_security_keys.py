"""Key files and the gate, without a broker around them."""

import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from penstock.broker.address import Address, connection_file, write_connection
from penstock.broker.gate import DOMAINS, Gate, GateError
from penstock.broker.keys import ROLES, AllowedKey, KeyFolder, KeyProblem, draw, find_key, read_key, write_key
from penstock.broker.state import BACK, FRONT

TCP = Address("tcp://10.1.2.3:7777")


@pytest.fixture
def keys(tmp_path: Path) -> KeyFolder:
    return KeyFolder(tmp_path / "state")


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    made = zmq.Context()
    yield made
    made.destroy(0)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_new_key_is_allowed_and_only_its_owner_can_read_it(keys: KeyFolder, tmp_path: Path) -> None:
    path = tmp_path / "alice.key"
    allowed = keys.new("alice", "client", path)
    own = read_key(path)
    assert (own.name, own.role, own.public, own.server) == ("alice", "client", allowed.public, keys.broker_key().public)
    assert keys.allowed() == [allowed]
    assert allowed.principal == "client:alice"
    files = [path, *(p for p in keys.path.rglob("*") if p.is_file())]
    assert len(files) == 3
    assert {mode_of(p) for p in files} == {0o600}
    assert {mode_of(p) for p in keys.path.rglob("*") if p.is_dir()} == {0o700}
    assert own.secret not in "".join(p.read_text() for p in files[1:] if p.name != "broker.key")


def test_no_secret_is_shown(keys: KeyFolder, tmp_path: Path) -> None:
    keys.new("alice", "client", tmp_path / "alice.key")
    own = read_key(tmp_path / "alice.key")
    assert own.secret not in repr(own) + str(own)
    (tmp_path / "alice.key").write_text(f'secret = "{own.secret}" "')
    with pytest.raises(KeyProblem) as problem:
        read_key(tmp_path / "alice.key")
    assert own.secret not in str(problem.value) + repr(problem.value.__cause__)


def test_nothing_is_overwritten(keys: KeyFolder, tmp_path: Path) -> None:
    path = tmp_path / "alice.key"
    keys.new("alice", "client", path)
    before = path.read_text()
    with pytest.raises(KeyProblem, match="called alice"):
        keys.new("alice", "admin", tmp_path / "other.key")
    with pytest.raises(KeyProblem, match="there already"):
        keys.new("bob", "client", path)
    assert path.read_text() == before
    assert [key.name for key in keys.allowed()] == ["alice"]
    assert not (tmp_path / "other.key").exists()


@pytest.mark.parametrize("name", ["", "../alice", "a/b", ".hidden", "a" * 33, "a b", "a\n", 'a"', "client:a"])
def test_names_that_are_none(keys: KeyFolder, tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyProblem, match="name is 1 to 32"):
        keys.new(name, "client", tmp_path / "key")
    with pytest.raises(KeyProblem, match="no key is called"):
        keys.revoke(name)
    assert not (tmp_path / "key").exists()


def test_roles_that_are_none(keys: KeyFolder, tmp_path: Path) -> None:
    with pytest.raises(KeyProblem, match="a role is client, worker, admin"):
        keys.new("alice", "root", tmp_path / "key")


def test_what_others_can_read_is_no_secret(keys: KeyFolder, tmp_path: Path) -> None:
    path = tmp_path / "alice.key"
    keys.new("alice", "client", path)
    path.chmod(0o640)
    with pytest.raises(KeyProblem, match="chmod 600"):
        read_key(path)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_can_write_allows_nobody(keys: KeyFolder, tmp_path: Path, what: str) -> None:
    keys.new("alice", "client", tmp_path / "alice.key")
    folder = keys.path / "allowed"
    (folder if what == "folder" else folder / "alice.toml").chmod(0o777)
    with pytest.raises(KeyProblem, match="chmod"):
        keys.allowed()


@pytest.mark.parametrize(
    "text", ["", "role = 'client'", "x = 1", "role = 'root'\npublic = 'x'", "role = 'client'\npublic = 5", "\x00", "é" * 5000]
)
def test_a_list_with_a_broken_file_is_refused_by_its_name(keys: KeyFolder, text: str) -> None:
    folder = keys.path / "allowed"
    folder.mkdir(parents=True)
    (folder / "alice.toml").write_text(text)
    (folder / "alice.toml").chmod(0o600)
    with pytest.raises(KeyProblem, match=r"alice\.toml"):
        keys.allowed()


def test_a_public_key_that_is_not_the_secret_ones_is_refused(tmp_path: Path) -> None:
    own, other = draw("a", "client"), draw("b", "client")
    path = tmp_path / "a.key"
    write_key(path, own)
    path.write_text(path.read_text().replace(own.public, other.public))
    with pytest.raises(KeyProblem, match="does not belong"):
        read_key(path)


def test_where_a_key_is_found(keys: KeyFolder, tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    keys.new("alice", "client", tmp_path / "alice.key")
    keys.new("bob", "client", tmp_path / "bob.key")
    with_key = env | {"PENSTOCK_KEY": str(tmp_path / "alice.key")}
    assert find_key(None, TCP, env) is None
    assert find_key(None, TCP, with_key).name == "alice"  # type: ignore[union-attr]
    assert find_key(tmp_path / "bob.key", TCP, with_key).name == "bob"  # type: ignore[union-attr]
    assert find_key(None, Address("ipc:///tmp/x"), with_key) is None
    with pytest.raises(KeyProblem, match="cannot be read"):
        find_key(tmp_path / "none.key", TCP, env)


def test_the_connection_file_names_the_brokers_key(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path), "PENSTOCK_KEY": str(tmp_path / "a.key")}
    write_key(tmp_path / "a.key", draw("a", "client"))
    with pytest.raises(KeyProblem, match="does not name the broker's public key"):
        find_key(None, TCP, env)
    server = draw("broker", "broker").public
    connection_file(env).parent.mkdir()
    write_connection(connection_file(env), TCP, 1, server)
    assert mode_of(connection_file(env)) == 0o600
    assert find_key(None, TCP, env).server == server  # type: ignore[union-attr]
    with pytest.raises(KeyProblem):
        find_key(None, Address("tcp://10.1.2.4:7777"), env)  # another broker's


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(context: "zmq.Context[zmq.Socket[bytes]]", keys: KeyFolder, tmp_path: Path) -> Iterator[Gate]:
    for role in ROLES:
        keys.new(f"my-{role}", role, tmp_path / f"{role}.key")
    made = Gate(context, keys, Counter())
    yield made
    made.close()


def ask(gate: Gate, public: str, domain: bytes = b"penstock.front", mechanism: bytes = b"CURVE") -> bytes:
    reply = gate.answer([b"1.0", b"7", domain, b"10.0.0.9", b"", mechanism, z85.decode(public)])
    assert reply[:2] == [b"1.0", b"7"]
    assert len(reply) == 6
    assert (reply[4] == b"") == (reply[2] != b"200")
    return reply[2]


@pytest.mark.parametrize(("side", "roles"), [(FRONT, {"client", "admin"}), (BACK, {"worker"}), ("else", set())])
def test_which_roles_enter_where(gate: Gate, tmp_path: Path, side: str, roles: set[str]) -> None:
    publics = {role: read_key(tmp_path / f"{role}.key").public for role in ROLES}
    assert {role for role, public in publics.items() if ask(gate, public, f"penstock.{side}".encode()) == b"200"} == roles
    assert ask(gate, draw("x", "client").public, f"penstock.{side}".encode()) == b"400"
    assert all(ask(gate, public, f"penstock.{side}".encode(), b"PLAIN") == b"400" for public in publics.values())


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([b"CURVE", b"1.0", *DOMAINS])), max_size=9))
def test_whatever_is_asked_there_is_an_answer_and_it_is_no(frames: list[bytes]) -> None:
    gate = Gate.__new__(Gate)
    gate.__dict__.update(_counters=Counter(), _num_refused={}, _allowed={}, _test_keys={})
    reply = gate.answer(frames)
    assert len(reply) == 6
    assert reply[2] in (b"400", b"500")
    assert reply[4] == b""


def test_refusals_are_counted_by_address_up_to_a_bound(gate: Gate) -> None:
    public = z85.decode(draw("x", "client").public)
    for number in range(1000):
        gate.answer([b"1.0", b"7", b"penstock.front", b"10.0.%d.%d" % divmod(number, 250), b"", b"CURVE", public])
    for _ in range(3):
        gate.answer([b"1.0", b"7", b"penstock.front", b"10.9.9.9", b"", b"CURVE", public])
    assert gate._counters["handshakes_refused"] == 1003
    assert len(gate._num_refused) == 256
    assert gate.report()["refused_by_address"]["10.9.9.9"] == 3


def test_a_reload_tells_who_is_gone_and_a_broken_one_changes_nothing(gate: Gate, keys: KeyFolder, tmp_path: Path) -> None:
    public = read_key(tmp_path / "client.key").public
    assert gate.principal(public, FRONT) == "client:my-client"
    (keys.path / "allowed" / "new.toml").write_text("role = 5")
    keys.revoke("my-client")
    with pytest.raises(KeyProblem):
        gate.reload()
    assert gate.principal(public, FRONT) == "client:my-client"
    (keys.path / "allowed" / "new.toml").unlink()
    assert gate.reload() == {"client:my-client"}
    assert gate.principal(public, FRONT) == ""
    assert ask(gate, public) == b"400"
    keys.new("my-client", "client", tmp_path / "again.key")  # the same name is another key
    assert gate.reload() == frozenset()
    assert gate.principal(public, FRONT) == ""


@pytest.fixture
def router(context: "zmq.Context[zmq.Socket[bytes]]") -> Iterator["zmq.Socket[bytes]"]:
    with context.socket(zmq.ROUTER) as made:
        yield made


def bind(router: "zmq.Socket[bytes]") -> str:
    return f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"


@pytest.mark.parametrize("side", [FRONT, BACK])
def test_the_self_test_passes_where_the_gate_guards(gate: Gate, router: "zmq.Socket[bytes]", side: str) -> None:
    gate.guard(router, side)
    gate.check(side, bind(router))
    assert not gate._counters  # it does not count as a stranger


def test_the_self_test_finds_a_gate_that_lets_in_everybody(
    gate: Gate, router: "zmq.Socket[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.guard(router, FRONT)
    monkeypatch.setattr(Gate, "_find", lambda *_: AllowedKey("x", "client", gate.public_key))
    with pytest.raises(GateError, match="lets in a throw-away key"):
        gate.check(FRONT, bind(router))


def test_the_self_test_finds_the_domain_of_the_other_side(gate: Gate, router: "zmq.Socket[bytes]") -> None:
    gate.guard(router, BACK)
    with pytest.raises(GateError):
        gate.check(FRONT, bind(router))


def test_the_self_test_finds_a_socket_without_any_mechanism(gate: Gate, router: "zmq.Socket[bytes]") -> None:
    with pytest.raises(GateError):
        gate.check(FRONT, bind(router))


def test_the_self_test_finds_a_gate_that_refuses_everybody(
    gate: Gate, router: "zmq.Socket[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.guard(router, FRONT)
    monkeypatch.setattr(Gate, "_find", lambda *_: None)
    with pytest.raises(GateError, match="refuses an allowed key"):
        gate.check(FRONT, bind(router))


def test_a_key_of_another_role_since_is_out_of_its_old_side(gate: Gate, keys: KeyFolder, tmp_path: Path) -> None:
    public = read_key(tmp_path / "client.key").public
    listed = keys.path / "allowed" / "my-client.toml"
    listed.write_text(listed.read_text().replace('"client"', '"worker"'))
    assert gate.reload() == {"client:my-client"}
    assert gate.principal(public, FRONT) == ""  # its connection to that side may stand still
    assert gate.principal(public, BACK) == "worker:my-client"

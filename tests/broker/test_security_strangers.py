"""A broker on tcp and everybody who should not get in, or not further than in: refused, counted, and nobody else disturbed."""

import contextlib
import os
import pickle
import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
import raw_zmtp
import zmq
from broker_process import BrokerProcess, broker, wait_for
from plain_peer import VERSION, PlainPeer
from ports import free_port

from penstock.broker.keys import KeyFolder, draw, read_key

ROLES = {"alice": "client", "bob": "client", "boss": "admin", "box": "worker"}
MB = 1 << 20
Key = tuple[bytes, bytes, bytes]


class Guarded:
    """A broker on tcp with keys for everybody in `ROLES`."""

    def __init__(self, process: BrokerProcess, folder: Path, keys: KeyFolder) -> None:
        self.process = process
        self.folder = folder
        self.keys = keys
        self.server = keys.broker_key().public.encode()
        self.memory = psutil.Process(process.process.pid).memory_info
        self.admin = self.peer("boss")
        self.admin.hello()

    def key(self, name: str) -> Key:
        own = read_key(self.folder / f"{name}.key")
        return own.public.encode(), own.secret.encode(), own.server.encode()

    def stranger(self) -> Key:
        own = draw("stranger", "client")
        return own.public.encode(), own.secret.encode(), self.server

    def peer(self, name: str, side: str = "front") -> PlainPeer:
        return self.process.peer(side, None if self.process.url.startswith("ipc:") else self.key(name))

    def client(self, name: str) -> PlainPeer:
        peer = self.peer(name)
        peer.hello()
        return peer

    def worker(self) -> PlainPeer:
        peer = self.peer("box", "back")
        peer.become_worker("box")
        return peer

    def status(self) -> dict[str, Any]:
        self.admin.send("status", request=1)
        body: dict[str, Any] = self.admin.receive("reply")[0]["body"]
        return body

    def count(self, name: str) -> int:
        return int(self.status()["counters"].get(name, 0))

    def control(self, peer: PlainPeer, op: str, **fields: Any) -> Any:
        peer.send("control", request=2, op=op, **fields)
        return peer.receive("reply")[0].get("error")

    def check_serves(self) -> None:
        client, worker = self.client("alice"), self.worker()
        run = client.submit([b"abc"])
        worker.work()
        assert client.result() == [(run, 0, b"cba")]
        worker.send("goodbye")
        client.send("goodbye")


@contextmanager
def guarded(folder: Path, *args: str, url: str | None = None) -> Iterator[Guarded]:
    keys = KeyFolder(folder / "state")
    for name, role in ROLES.items():
        keys.new(name, role, folder / f"{name}.key")
    with broker(folder, url or f"tcp://127.0.0.1:{free_port()}", "--state-dir", str(folder / "state"), *args) as process:
        yield Guarded(process, folder, keys)


@contextmanager
def unguarded(folder: Path, *args: str) -> Iterator[BrokerProcess]:
    with broker(folder, f"tcp://127.0.0.1:{free_port()}", "--state-dir", str(folder / "state"), *args) as process:
        yield process


def is_ignored(peer: PlainPeer, seconds: float = 0.4) -> bool:
    """Whether a hello brings nothing at all."""
    peer.socket.setsockopt(zmq.SNDTIMEO, 0)
    try:
        peer.send("hello", name="x", secret=bytes(16))
    except zmq.Again:  # libzmq has given up
        return True
    return peer.is_quiet(seconds)


# --- at the door -----------------------------------------------------------------------------------------------------


def test_who_has_no_key_or_another_roles_stays_outside(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        public, secret, server = b.key("alice")
        other = draw("x", "client")
        outside = [
            b.process.peer("front"), b.process.peer("back"),  # the mechanism NULL
            b.process.peer("front", b.stranger()), b.process.peer("back", b.stranger()),
            b.process.peer("front", (public, secret, other.public.encode())),  # it wants another broker
            b.process.peer("front", (server, secret, server)),  # the broker's own public key
            b.process.peer("front", (public, other.secret.encode(), server)),  # Alice's public key without her secret
            b.peer("box", "front"), b.peer("alice", "back"), b.peer("boss", "back"),
        ]  # fmt: skip
        assert all(is_ignored(peer, 0.1) for peer in outside)
        assert all(peer.is_quiet(0.05) for peer in outside)
        assert b.count("handshakes_refused") >= 5
        assert b.count("handshakes_failed") >= 9
        assert b.status()["security"]["refused_by_address"]["127.0.0.1"] >= 5
        assert b.status()["num_clients"] == 1
        b.check_serves()


@pytest.mark.parametrize("url", ["tcp://0.0.0.0:{port}", "tcp://[::]:{port}"])
def test_beyond_loopback_only_with_keys(tmp_ipc: Path, url: str) -> None:
    url = url.format(port=free_port())
    refused = BrokerProcess(tmp_ipc, url, "--state-dir", str(tmp_ipc / "none"))
    code, output = refused.finish()
    refused.close()
    assert (code, len(output.splitlines())) == (2, 1)
    assert "penstock keys new" in output
    if "[" in url and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    with guarded(tmp_ipc, url=url) as b:
        b.check_serves()
        assert is_ignored(b.process.peer())


@pytest.mark.parametrize(("curve", "url", "words"), [
    ("off", "tcp://0.0.0.0:7700", "take away curve"), ("on", "tcp://127.0.0.1:7700", "no key is allowed"),
    ("maybe", "tcp://127.0.0.1:7700", "curve must be auto, on, off"),
])  # fmt: skip
def test_settings_that_do_not_go_together(tmp_ipc: Path, curve: str, url: str, words: str) -> None:
    (tmp_ipc / "penstock.toml").write_text(f'[broker]\ncurve = "{curve}"\n')
    b = BrokerProcess(tmp_ipc, url, "--state-dir", str(tmp_ipc / "none"))
    code, output = b.finish()
    b.close()
    assert (code, len(output.splitlines())) == (2, 1)
    assert words in output


def test_loopback_without_keys_is_a_setting(tmp_ipc: Path) -> None:
    (tmp_ipc / "penstock.toml").write_text('[broker]\ncurve = "off"\n')
    KeyFolder(tmp_ipc / "state").new("alice", "client", tmp_ipc / "alice.key")
    with unguarded(tmp_ipc) as b:
        client = b.client()
        client.send("control", request=2, op="reload")
        assert client.receive("reply")[0]["error"][0] == "not_authorised"  # nobody there is known


def test_a_broken_key_file_keeps_the_broker_from_starting(tmp_ipc: Path) -> None:
    KeyFolder(tmp_ipc / "state").new("alice", "client", tmp_ipc / "alice.key")
    (tmp_ipc / "state" / "keys" / "broker.key").chmod(0o644)
    b = BrokerProcess(tmp_ipc, f"tcp://127.0.0.1:{free_port()}", "--state-dir", str(tmp_ipc / "state"))
    code, output = b.finish()
    b.close()
    assert (code, len(output.splitlines())) == (2, 1)
    assert "broker.key" in output


def test_ipc_for_the_user_and_tcp_for_keys_at_once(tmp_ipc: Path) -> None:
    port = free_port()
    with guarded(tmp_ipc, "--listen", f"tcp://127.0.0.1:{port}", url=f"ipc://{tmp_ipc}/b") as b:
        far = PlainPeer(f"tcp://127.0.0.1:{port}", b.key("alice"))
        b.process.peers.append(far)
        far.hello()
        worker = PlainPeer(f"tcp://127.0.0.1:{port + 1}", b.key("box"))
        b.process.peers.append(worker)
        worker.become_worker("far")
        for client in (b.admin, far):
            run = client.submit([b"abc"])
            worker.work()
            assert client.result() == [(run, 0, b"cba")]
        assert b.control(b.admin, "reload") is None  # its own user
        assert b.control(far, "reload")[0] == "not_authorised"
        assert "server_key" not in b.process.connection_file.read_text()


# --- inside ----------------------------------------------------------------------------------------------------------


def test_another_ones_task_is_neither_seen_nor_touched(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        alice, bob, secret = b.peer("alice"), b.client("bob"), os.urandom(16)
        epoch = alice.hello(secret)["epoch"]
        run = alice.submit([b"abc"], wants_accepted=True)
        alice.receive("accepted")
        bob.send("status", request=1, id=run)
        assert bob.receive("reply")[0]["body"]["state"] == "unknown"
        bob.send("status", request=1, what="tasks")
        assert bob.receive("reply")[0]["body"]["num_open"] == 0
        bob.send("cancel", id=run, start=0, stop=1)
        bob.send("ack", seq=1 << 30)
        thief = b.peer("bob")
        thief.send("attach", run, name="plain", secret=secret, epoch=epoch, received=0, open=len(run))
        welcome, frames = thief.receive("welcome")
        assert (welcome.get("is_resumed", False), frames) == (False, [run])
        b.worker().work()
        assert alice.result() == [(run, 0, b"cba")]
        assert thief.is_quiet(0.2) and bob.is_quiet(0.1)


def test_control_is_for_admins(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        b.worker()
        alice = b.client("alice")
        assert b.control(alice, "drain", target="box")[0] == "not_authorised"
        assert b.control(alice, "reload")[0] == "not_authorised"
        assert b.count("refused_not_authorised") == 2
        assert b.control(b.admin, "drain", target="box") is None
        assert b.control(b.admin, "reload") is None


def test_a_revoked_key_is_out_at_once(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        alice, again, bob = b.client("alice"), b.client("alice"), b.client("bob")
        alice.submit([b"abc"], wants_accepted=True)
        alice.receive("accepted")
        b.keys.revoke("alice")
        assert b.control(b.admin, "reload") is None
        assert [p.receive("error")[0]["error"][0] for p in (alice, again)] == ["not_authorised"] * 2
        wait_for(lambda: b.status()["tasks"]["open"] == 0)
        assert b.count("expelled") == 2
        again.submit([b"abc"])
        assert again.receive("error")[0]["error"][0] == "not_authorised"
        assert b.count("refused_revoked") >= 1
        wait_for(lambda: b.count("connections_cut") >= 1)
        assert is_ignored(b.peer("alice"))
        bob.send("status", request=1)
        bob.receive("reply")
        b.keys.new("carol", "client", tmp_ipc / "carol.key")
        assert is_ignored(b.peer("carol"))
        b.process.process.send_signal(1)  # SIGHUP does the same
        wait_for(lambda: b.status()["security"]["keys"] == len(ROLES))
        b.client("carol")


def test_a_revoked_workers_tasks_go_to_another(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        b.keys.new("box2", "worker", tmp_ipc / "box2.key")
        assert b.control(b.admin, "reload") is None
        worker, client = b.worker(), b.client("bob")
        run = client.submit([b"abc"])
        worker.receive("assign")
        b.keys.revoke("box")
        assert b.control(b.admin, "reload") is None
        assert worker.receive("error")[0]["error"][0] == "not_authorised"
        other = b.peer("box2", "back")
        other.become_worker("box2")
        other.work()
        assert client.result() == [(run, 0, b"cba")]


def test_a_broken_list_changes_nothing_and_broken_settings_do_not_keep_a_revoked_key(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        alice = b.client("alice")
        bad = b.keys.path / "allowed" / "bad.toml"
        bad.write_text("role = 5")
        b.keys.revoke("alice")
        error = b.control(b.admin, "reload")
        assert error[0] == "invalid_input" and "bad.toml" in error[1]
        alice.send("status", request=1)
        alice.receive("reply")
        bad.unlink()
        (tmp_ipc / "penstock.toml").write_text("[broker]\nmax_clients = 0\n")
        assert "max_clients" in b.control(b.admin, "reload")[1]
        assert alice.receive("error")[0]["error"][0] == "not_authorised"


def test_a_quota_for_a_principal_holds_under_any_name(tmp_ipc: Path) -> None:
    (tmp_ipc / "penstock.toml").write_text('[clients."client:alice"]\nmax_open = 2\n[clients."client:bob"]\nmax_open = 99\n')
    with guarded(tmp_ipc) as b:
        refused = []
        for name in ("one", "two", "client:bob"):
            peer = b.peer("alice")
            peer.send("hello", name=name, secret=os.urandom(16))
            peer.receive("welcome")
            peer.submit([b"abc"], wants_accepted=True)
            refused.append(peer.receive()[0]["type"])
        assert refused == ["accepted", "accepted", "refused"]
        assert {a["client"] for a in b.status()["accounts"]} >= {"client:alice"}


# --- what they send --------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def bombs(trap: Path) -> list[list[bytes]]:
    head, pickled = msgpack.packb("type") + msgpack.packb("hello"), pickle.dumps(Trap(trap))
    return [
        [VERSION, b"\x81\xa1a" + b"\x91" * 65_000],  # 65,000 deep
        [VERSION, b"\x82" + head + b"\xa1a" + b"\x9f" * 4000],
        [VERSION, b"\x82" + head + b"\xa4name" + (b"\xdd" + b"\xff" * 4) * 100],  # arrays of 4 billion
        [VERSION, b"\x82" + head + b"\xa4name" + b"\xdf" + b"\xff" * 4],
        [VERSION, b"\xdf" + b"\xff" * 4],
        [VERSION, b"\x82" + head + b"\xa4name\xdc\x1f\xff" + b"\x80" * 8191],
        [VERSION, b"\x82" + head + head],  # a key twice
        [VERSION, b"\x82" + head + b"\xa4name\xc7\x05\x01hello"],  # an extension type
        [VERSION, b"\x80" * 65_537],
        [VERSION, msgpack.packb({"type": "status", "request": 1}), *[b""] * 8300],
        [VERSION, b"\x82" + head + b"\xa4name" + b"\xdc\x20\x00" * 21_000],  # a thousand arrays of 8,192, one in the other
        [pickled], [pickled, pickled], [VERSION, pickled],
        [VERSION, msgpack.packb({"type": "submit", "id": bytes(16), "kernel": "echo"}), pickled],
    ]  # fmt: skip


def test_bombs_and_pickles_are_counted_and_cost_nothing(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        b.check_serves()
        bob, before = b.peer("bob"), b.memory().rss
        for frames in bombs(tmp_ipc / "trap") * 3:
            bob.send_frames(*frames)
            fields, _ = bob.receive(timeout_s=10.0)
            assert (fields["type"], fields["error"][0]) == ("error", "protocol")
        assert b.count("malformed") == 3 * len(bombs(tmp_ipc))
        assert not (tmp_ipc / "trap").exists(), "something was unpickled"
        assert b.memory().rss - before < 40 * MB
        b.check_serves()


def test_a_frame_past_the_limit_ends_its_connection(tmp_ipc: Path) -> None:
    (tmp_ipc / "penstock.toml").write_text("[broker]\nmax_message_bytes = 65536\n")
    with guarded(tmp_ipc) as b:
        bob, before = b.client("bob"), b.memory().rss
        events = bob.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        bob.send_frames(VERSION, bytes(64 * MB))
        assert events.poll(10_000)
        bob.socket.disable_monitor()
        events.close()
        assert b.memory().rss - before < 20 * MB
        b.check_serves()


def test_a_message_without_end_is_cut_off(tmp_ipc: Path) -> None:
    """ZeroMQ has no limit of its own here; libzmq as a peer never sends a part, so this one is made by hand."""
    (tmp_ipc / "penstock.toml").write_text("[broker]\nmax_message_bytes = 1048576\nwindow_bytes = 1048576\n")
    with unguarded(tmp_ipc) as b:
        honest, worker, memory = b.client(), b.worker(), psutil.Process(b.process.pid).memory_info
        before, sent, data = memory().rss, 0, raw_zmtp.frame(bytes(65536), more=True)
        with raw_zmtp.join(b.endpoint("front")) as s:
            try:
                while sent < 200 * MB:
                    s.sendall(data)
                    sent += len(data)
                    time.sleep(0.005)  # 13 MB/s: half a second of it is more than the limit
            except OSError:
                pass
        assert sent < 100 * MB
        assert memory().rss - before < sent + 20 * MB
        honest.send("status", request=1)
        assert honest.receive("reply")[0]["body"]["counters"]["connections_cut"] == 1
        run = honest.submit([b"abc"])
        worker.work()
        assert honest.result() == [(run, 0, b"cba")]


def test_a_handshake_without_end_is_cut_off(tmp_ipc: Path) -> None:
    """Before anybody has shown a key ZeroMQ takes frames as large as any message."""
    with guarded(tmp_ipc) as b:
        before, sent = b.memory().rss, 0
        with raw_zmtp.connect(b.process.endpoint("front")) as s:
            s.sendall(raw_zmtp.greeting(b"CURVE") + b"\x06" + (200 * MB).to_bytes(8, "big") + b"\x05HELLO")
            try:
                while sent < 200 * MB:
                    s.sendall(bytes(65536))
                    sent += 65536
                    time.sleep(0.003)
            except OSError:
                pass
        assert sent < 40 * MB
        assert b.memory().rss - before < 60 * MB
        assert b.count("connections_cut") + b.count("handshakes_failed") >= 1
        b.check_serves()


def test_slow_large_messages_of_an_honest_peer_are_not_cut(tmp_ipc: Path) -> None:
    (tmp_ipc / "penstock.toml").write_text("[broker]\nmax_message_bytes = 1048576\nwindow_bytes = 1048576\n")
    with unguarded(tmp_ipc) as b, raw_zmtp.join(b.endpoint("front")) as s:
        part, body = raw_zmtp.frame(bytes(4096), more=True), msgpack.packb({"type": "nothing"})
        for _ in range(4):  # 4 messages of 1 MB, each slower than the broker looks
            for _ in range(15):
                s.sendall(part * 17)
                time.sleep(0.04)
            s.sendall(raw_zmtp.frame(VERSION, more=True) + raw_zmtp.frame(body))
        client = b.client()

        def count(name: str) -> int:
            client.send("status", request=1)
            return int(client.receive("reply")[0]["body"]["counters"].get(name, 0))

        wait_for(lambda: count("malformed") == 4)
        assert count("connections_cut") == 0


def test_whom_the_kernel_does_not_vouch_for_is_nobody(tmp_ipc: Path) -> None:
    """ZeroMQ tells nothing of a peer that speaks an older ZMTP, not even on ipc."""
    with broker(tmp_ipc) as b:
        for side in ("front", "back"):
            for fields in (
                {"type": "hello", "name": "old", "secret": bytes(16), "pid": 1, "device": "cpu"}, {"type": "share"},
                {"type": "heartbeat", "session": bytes(16)}, {"type": "attach", "name": "old", "secret": bytes(16), "epoch": 1},
            ):  # fmt: skip
                with raw_zmtp.old_join(b.endpoint(side)) as s:
                    s.sendall(raw_zmtp.frame(VERSION, more=True) + raw_zmtp.frame(msgpack.packb(fields)))
                    s.recv(100)
                    time.sleep(0.05)
        client, worker = b.client(), b.worker()

        def status() -> dict[str, Any]:
            client.send("status", request=1)
            body: dict[str, Any] = client.receive("reply")[0]["body"]
            return body

        wait_for(lambda: status()["counters"].get("unidentified", 0) >= 5)
        assert status()["num_clients"] == 1
        assert [w["name"] for w in status()["workers"]] == ["plain"]
        run = client.submit([b"abc"])
        worker.work()
        assert client.result() == [(run, 0, b"cba")]


def test_an_older_zmtp_is_nobody_on_tcp_either(tmp_ipc: Path) -> None:
    hello = raw_zmtp.frame(VERSION, more=True) + raw_zmtp.frame(
        msgpack.packb({"type": "hello", "name": "old", "secret": bytes(16)})
    )
    with unguarded(tmp_ipc) as b, raw_zmtp.old_join(b.endpoint("front")) as s:
        s.sendall(hello)
        client, worker = b.client(), b.worker()
        run = client.submit([b"abc"])
        worker.work()
        assert client.result() == [(run, 0, b"cba")]
        client.send("status", request=1)
        report = client.receive("reply")[0]["body"]
        assert (report["num_clients"], report["counters"]["unidentified"]) == (1, 1)
    with guarded(tmp_ipc) as b, raw_zmtp.old_join(b.process.endpoint("front")) as s:
        with contextlib.suppress(OSError):
            s.sendall(hello)
        assert raw_zmtp.is_closed(s)
        b.check_serves()
        assert b.status()["num_clients"] <= 2


def test_who_never_finishes_a_handshake_is_dropped(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        silent = [raw_zmtp.connect(b.process.endpoint("front")) for _ in range(20)]
        half = [raw_zmtp.connect(b.process.endpoint("front")) for _ in range(20)]
        for s in half:
            s.sendall(raw_zmtp.greeting(b"CURVE")[:20])
        b.check_serves()
        assert all(raw_zmtp.is_closed(s, 15.0) for s in (*silent, *half))
        for s in (*silent, *half):
            s.close()


def fuzz(draw: random.Random, endpoint: str) -> None:
    """One connection with something that is no handshake, or one that goes wrong somewhere."""
    starts = [b"", raw_zmtp.SIGNATURE, raw_zmtp.greeting(), raw_zmtp.greeting(b"CURVE"), raw_zmtp.greeting(b"PLAIN"),
              raw_zmtp.greeting(b"CURVE") + raw_zmtp.command(b"HELLO", draw.randbytes(194)),
              raw_zmtp.greeting(b"CURVE") + raw_zmtp.command(b"INITIATE", draw.randbytes(draw.randrange(400))),
              raw_zmtp.greeting() + raw_zmtp.command(b"READY", raw_zmtp.prop(b"User-Id", b"admin:boss"))]  # fmt: skip
    with raw_zmtp.connect(endpoint) as s:
        try:
            s.sendall(draw.choice(starts) + draw.randbytes(draw.randrange(300)))
            if draw.random() < 0.2:
                s.settimeout(0.01)
                s.recv(100)
        except OSError:
            return


def churn(b: Guarded, num_connections: int, seed: int) -> tuple[int, int]:
    """Strangers of all kinds one after another; how much memory and how many descriptors the broker has more at the end."""
    process, draw_ = psutil.Process(b.process.process.pid), random.Random(seed)
    b.check_serves()

    def knock() -> None:
        for _ in range(num_connections // 10):
            for _ in range(8):
                fuzz(draw_, b.process.endpoint(draw_.choice(("front", "back"))))
            for key in (None, b.stranger()):
                peer = PlainPeer(b.process.endpoint("front"), key)
                peer.close()

    knock()
    wait_for(lambda: process.num_fds() < 60)
    before, fds = process.memory_info().rss, process.num_fds()
    knock()
    wait_for(lambda: process.num_fds() <= fds + 3)
    b.check_serves()
    return process.memory_info().rss - before, process.num_fds() - fds


def test_strangers_come_and_go(tmp_ipc: Path) -> None:
    with guarded(tmp_ipc) as b:
        more_bytes, more_fds = churn(b, 200, seed=1)
        assert more_bytes < 12 * MB
        assert more_fds <= 10
        assert b.count("connections_accepted") >= 300
        assert b.count("handshakes_failed") >= 20


def test_an_honest_client_is_not_disturbed(tmp_ipc: Path) -> None:
    """At some 200 strangers a second none of its tasks fails, and half of them are as quick as ever."""
    with guarded(tmp_ipc) as b:
        client, worker, ends_at = b.client("alice"), b.worker(), time.monotonic() + 3.0
        endpoints, draw_, num_attacks = [b.process.endpoint(side) for side in ("front", "back")], random.Random(5), []

        def attack() -> None:
            while time.monotonic() < ends_at:
                fuzz(draw_, draw_.choice(endpoints))
                num_attacks.append(1)
                time.sleep(0.004)

        attacker = threading.Thread(target=attack)
        attacker.start()
        times = []
        while time.monotonic() < ends_at:
            began = time.monotonic()
            run = client.submit([b"abc"])
            worker.work()
            assert client.result() == [(run, 0, b"cba")]
            times.append(time.monotonic() - began)
        attacker.join()
        assert len(num_attacks) > 150
        assert statistics.median(times) < 0.05
        assert max(times) < 2.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_connections", [10_000, 100_000])
def test_very_many_strangers_come_and_go(tmp_ipc: Path, num_connections: int) -> None:
    with guarded(tmp_ipc) as b:
        more_bytes, more_fds = churn(b, num_connections // 2, seed=2)
        assert more_bytes < 24 * MB
        assert more_fds <= 10

"""The broker as a process, over real sockets, spoken to by a peer that knows PROTOCOL.md and nothing of our code."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import plain_peer
import psutil
import pytest
from broker_process import BrokerProcess, broker, wait_for
from plain_peer import PlainPeer
from ports import free_port


def status(client: PlainPeer) -> dict[str, object]:
    client.send("status", request=1)
    body: dict[str, object] = client.receive("reply")[0]["body"]
    return body


def test_a_plain_reader_submits_a_task_and_reads_its_result(tmp_ipc: Path) -> None:
    source = Path(plain_peer.__file__).read_text()
    assert "import penstock" not in source
    assert "from penstock" not in source
    with broker(tmp_ipc) as b:
        client, worker = b.client(), b.worker()
        run = client.submit([b"hello", b"world"])
        assert worker.work() == 2
        assert client.result() == [(run, 0, b"olleh"), (run, 1, b"dlrow")]
        assert status(client)["is_ready"]


def test_rows_batch_over_clients_and_errors_reach_their_own(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as b:
        clients, worker = [b.client() for _ in range(3)], b.worker()
        first = clients[0].submit([b"first"])
        header, _ = worker.receive("assign")  # it is busy now
        runs = [client.submit([b"%05d" % number]) for number, client in enumerate(clients)]
        wait_for(lambda: status(clients[0])["tasks"]["queued"] == 3)  # type: ignore[index]
        error = ["kernel_failed", "it broke", None, ""]
        worker.send("final", lease=header["lease"], answers=[[0, 1, None, error]], credit=[2, 1 << 40])
        assert worker.work() == 3
        assert clients[0].result() == [(first, 0, error)]
        for number, (client, run) in enumerate(zip(clients, runs, strict=True)):
            assert client.result() == [(run, 0, (b"%05d" % number)[::-1])]


def test_a_second_broker_at_the_address_is_refused(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as first:
        second = BrokerProcess(tmp_ipc, first.url)
        try:
            code, output = second.finish()
        finally:
            second.close()
        assert code == 3
        assert len(output.splitlines()) == 1
        assert "already running" in output
        assert first.client()
        assert json.loads(first.connection_file.read_text())["pid"] == first.process.pid


def test_after_a_kill_the_address_is_free_again(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as first:
        first.process.kill()
        first.finish()
    with broker(tmp_ipc) as second:
        wait_for(lambda: json.loads(second.connection_file.read_text())["pid"] == second.process.pid)
        assert second.client()


GARBAGE = [
    [b""], [b"x"], [b"PS\x01\x00"], [b"PS\x01\x00", b""], [b"PS\x01\x00", b"\xc1"], [b"PS\x01\x00", b"\x81\xa4type\xa3fly"],
    [b"GET / HTTP/1.1\r\n\r\n"], [b"PS\x01\x00", b"\x91" * 70_000], [b"PS\x01\x00", b"\x80", *[b"x"] * 9000],
    [b"\0" * 1_000_000, b""],
]  # fmt: skip


@pytest.mark.parametrize("side", ["front", "back"])
def test_malformed_bytes_are_counted_answered_and_the_loop_goes_on(tmp_ipc: Path, side: str) -> None:
    with broker(tmp_ipc) as b:
        client, worker, stranger = b.client(), b.worker(), b.peer(side)
        for frames in GARBAGE:
            stranger.send_frames(*frames)
            fields, _ = stranger.receive()
            assert (fields["type"], fields["error"][0]) == ("error", "protocol")
        stranger.send_frames(b"PS\x02\x03", b"\x80")
        assert "2.3 met 1." in stranger.receive()[0]["error"][1]
        stranger.send("submit" if side == "front" else "final", id=b"short")
        assert stranger.receive()[0]["error"][0] == "protocol"
        stranger.send("heartbeat", session=b"s" * 16)
        assert stranger.receive()[0]["error"][0] == "unattached"
        assert status(client)["counters"]["malformed"] == len(GARBAGE) + 2  # type: ignore[index]
        run = client.submit([b"abc"])
        worker.work()
        assert client.result() == [(run, 0, b"cba")]


def test_what_a_client_says_is_not_taken_for_a_worker(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as b:
        client = b.client()
        client.send("ready", specs=[], credit=[5, 5])
        assert client.receive("error")[0]["error"][0] == "protocol"


def test_tcp_on_loopback(tmp_ipc: Path) -> None:
    with broker(tmp_ipc, f"tcp://127.0.0.1:{free_port()}") as b:
        client, worker = b.client(), b.worker()
        run = client.submit([b"abc"])
        worker.work()
        assert client.result() == [(run, 0, b"cba")]
        other = BrokerProcess(tmp_ipc, b.url)
        code, output = other.finish()
        other.close()
        assert (code, len(output.splitlines())) == (3, 1)


def test_tcp_on_ipv6_loopback(tmp_ipc: Path) -> None:
    with broker(tmp_ipc, f"tcp://[::1]:{free_port()}") as b:
        if b.process.poll() is not None:
            code, output = b.finish()
            assert (code, len(output.splitlines())) == (2, 1), output
            return
        assert b.client()


@pytest.mark.parametrize(
    "url", ["tcp://0.0.0.0:7700", "tcp://*:7700", "tcp://192.168.1.1:7700", "tcp://127.0.0.1:99999", "ipc://here"]
)
def test_addresses_that_are_refused(tmp_ipc: Path, url: str) -> None:
    b = BrokerProcess(tmp_ipc, url)
    try:
        code, output = b.finish()
    finally:
        b.close()
    assert (code, len(output.splitlines())) == (2, 1), output
    assert output.startswith("penstock broker: ")


def test_a_wrong_setting_is_one_line(tmp_ipc: Path) -> None:
    (tmp_ipc / "penstock.toml").write_text("[broker]\nmax_queue_rows = 'many'\n")
    b = BrokerProcess(tmp_ipc)
    code, output = b.finish()
    b.close()
    assert code == 2
    assert "broker.max_queue_rows from the file must be int, not 'many'" in output


def test_sigterm_lets_the_accepted_task_finish(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as b:
        client, worker = b.client(), b.worker()
        run = client.submit([b"abc"], wants_accepted=True)
        client.receive("accepted")
        b.process.terminate()
        wait_for(lambda: bool(status(client)["is_draining"]))
        refused = client.submit([b"xyz"])
        fields, _ = client.receive("refused")
        assert (fields["id"], fields["error"][0]) == (refused, "unavailable")
        worker.work()
        assert client.result() == [(run, 0, b"cba")]
        client.receive("goodbye")
        worker.receive("goodbye")
        code, _ = b.finish()
        assert code == 0
        assert not b.connection_file.exists()


def test_sigterm_when_idle_is_quick(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as b:
        b.client()
        code, _ = b.stop()
        assert code == 0


def test_a_second_signal_does_not_wait_for_what_is_open(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as b:
        client = b.client()
        client.submit([b"abc"], wants_accepted=True)
        client.receive("accepted")
        b.process.terminate()
        wait_for(lambda: bool(status(client)["is_draining"]))
        code, _ = b.stop()
        assert code == 0


def test_a_killed_worker_process_is_noticed_at_once_and_its_task_redelivered(tmp_ipc: Path) -> None:
    with broker(tmp_ipc, None) as b:
        client = b.client()
        program = [sys.executable, plain_peer.__file__, b.endpoint("back")]
        doomed = subprocess.Popen(program, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        assert doomed.stdout is not None
        try:
            assert doomed.stdout.readline() == "ready\n"
            run = client.submit([b"abc"])
            assert doomed.stdout.readline() == "assigned\n"
        finally:
            doomed.kill()
            doomed.communicate()
        killed_at = time.monotonic()
        wait_for(lambda: not status(client)["workers"])
        assert time.monotonic() - killed_at < 4.0, "liveness would take 5 s"
        worker = b.worker("next")
        worker.work()
        assert client.result() == [(run, 0, b"cba")]


def test_sockets_and_connection_file_are_private(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as b:
        b.client()
        assert stat.S_IMODE((tmp_ipc / "b").stat().st_mode) == 0o700
        for name in ("clients.sock", "workers.sock"):
            assert not stat.S_IMODE((tmp_ipc / "b" / name).stat().st_mode) & 0o077
        assert stat.S_IMODE(b.connection_file.stat().st_mode) == 0o600
        assert stat.S_IMODE(b.connection_file.parent.stat().st_mode) == 0o700
        assert json.loads(b.connection_file.read_text()) == {"url": b.url, "pid": b.process.pid}
        assert b.stop()[0] == 0
        assert not b.connection_file.exists()


def test_a_client_that_reconnects_gets_what_it_missed(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as b:
        secret = os.urandom(16)
        first, watcher, worker = b.peer(), b.client(), b.worker()
        epoch = first.hello(secret)["epoch"]
        run = first.submit([b"abc"])
        wait_for(lambda: status(watcher)["tasks"]["leased"] == 1)  # type: ignore[index]
        first.socket.close()
        worker.work()
        wait_for(lambda: status(watcher)["tasks"].get("done") == 1)  # type: ignore[attr-defined]
        second = b.peer()
        second.send("attach", run, name="plain", secret=secret, epoch=epoch, open=16)
        fields, _ = second.receive("welcome")
        assert fields["is_resumed"]
        assert second.result() == [(run, 0, b"cba")]


def test_a_frame_past_the_limit_costs_its_sender_the_connection_only(tmp_ipc: Path) -> None:
    (tmp_ipc / "penstock.toml").write_text("[broker]\nmax_message_bytes = 100000\n")
    with broker(tmp_ipc) as b:
        client, worker, rude = b.client(), b.worker(), b.client()
        rude.submit([b"x" * 1_000_000])
        run = client.submit([b"abc"])
        worker.work()
        assert client.result() == [(run, 0, b"cba")]
        assert status(client)["tasks"]["open"] == 0  # type: ignore[index]


def test_no_message_of_a_burst_is_left_lying(tmp_ipc: Path) -> None:
    """The sockets' descriptors are edge triggered: what is not drained must not wait for the next message."""
    with broker(tmp_ipc) as b:
        peers, worker = [b.client() for _ in range(4)], b.worker()
        for peer in peers:
            for _ in range(1500):
                peer.send("heartbeat")
        for peer in peers:
            for _ in range(1500):
                peer.receive("heartbeat")
        for _ in range(50):
            runs = [peer.submit([b"%04d" % n for n in range(8)]) for peer in peers]
            answered = 0
            while answered < 8 * len(peers):
                answered += worker.work()
            for peer, run in zip(peers, runs, strict=True):
                got = list[object]()
                while len(got) < 8:
                    got += peer.result()
                assert got == [(run, n, (b"%04d" % n)[::-1]) for n in range(8)]


def test_the_loop_answers_while_ten_thousand_tasks_expire(tmp_ipc: Path) -> None:
    with broker(tmp_ipc, None, "--window-rows", "20000") as b:
        client, other = b.client(), b.client()
        for _ in range(10_000):
            client.submit([b"x"], timeout_ms=1500.0)
        slowest_s, num_ended = 0.0, 0
        while num_ended < 10_000:
            asked = time.monotonic()
            other.send("heartbeat")
            other.receive("heartbeat")
            slowest_s = max(slowest_s, time.monotonic() - asked)
            while not client.is_quiet(0):
                num_ended += len(client.result())
        assert slowest_s < 1.0
        assert status(other)["tasks"]["open"] == 0  # type: ignore[index]


def test_an_idle_broker_uses_next_to_nothing(tmp_ipc: Path) -> None:
    with broker(tmp_ipc) as b:
        client, _ = b.client(), b.worker()
        run = client.submit([b"abc"], timeout_ms=50.0)
        assert client.result()[0][0] == run
        process = psutil.Process(b.process.pid)
        before, started = process.cpu_times(), time.monotonic()
        assert client.is_quiet(3.0)
        after = process.cpu_times()
        used = (after.user + after.system) - (before.user + before.system)
        assert used / (time.monotonic() - started) < 0.05

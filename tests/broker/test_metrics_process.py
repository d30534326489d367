"""The broker's pages over a real socket, as Prometheus and a health check ask for them."""

import http.client
import json
import re
import socket
from pathlib import Path

import pytest
from broker_process import BrokerProcess, broker, wait_for
from prometheus_client.parser import text_string_to_metric_families

METRICS = ("--metrics", "127.0.0.1:0")


def port_of(b: BrokerProcess) -> int:
    """The port that the broker chose, as it says itself."""
    assert b.process.stdout is not None
    for line in b.process.stdout:
        if found := re.search(r"metrics at http://127\.0\.0\.1:(\d+)/metrics", line):
            return int(found[1])
    raise AssertionError("no metrics")


def get(port: int, path: str, method: str = "GET") -> tuple[int, str, str]:
    """Status, content type, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()
    finally:
        connection.close()


def scrape(port: int) -> dict[str, float]:
    """Every sample: name{label values} -> value."""
    _, _, text = get(port, "/metrics")
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {f"{s.name}{sorted(s.labels.values())}".replace("'", ""): s.value for s in samples}


def test_what_it_counts_and_whether_it_is_well(tmp_ipc: Path) -> None:
    with broker(tmp_ipc, None, *METRICS) as b:
        port = port_of(b)
        assert get(port, "/healthz") == (503, "text/plain; charset=utf-8", "no worker is ready: none has come\n")
        client, worker = b.client(), b.worker("w1")
        wait_for(lambda: get(port, "/healthz")[0] == 200)
        run = client.submit([b"abc", b"xyz"])
        wait_for(lambda: "penstock_worker_state[busy, cpu, w1]" in scrape(port))
        found = scrape(port)
        assert found["penstock_tasks_open[]"] == 2.0
        assert found["penstock_clients[]"] == 1.0
        assert found["penstock_uptime_seconds[]"] > 0.0
        worker.work()
        assert client.result()[0][0] == run
        wait_for(lambda: scrape(port)["penstock_tasks_open[]"] == 0.0)
        found = scrape(port)
        assert found["penstock_requests_total[done, echo, plain]"] == 2.0
        assert found["penstock_batch_size_sum[echo]"] == found["penstock_e2e_seconds_count[echo]"] == 2.0
        assert get(port, "/metrics")[1] == "text/plain; version=0.0.4; charset=utf-8"
        status, kind, text = get(port, "/status")
        assert (status, kind) == (200, "application/json")
        report = json.loads(text)
        assert report["workers"][0]["name"] == "w1"
        assert report["kernels"]["echo"]["digest"] == b"12345678".hex()
        assert [get(port, "/")[0], get(port, "/metrics", "POST")[0]] == [404, 405]
        assert get(port, "/healthz", "HEAD") == (200, "text/plain; charset=utf-8", "")


def test_a_worker_that_is_lost_is_seen(tmp_ipc: Path) -> None:
    with broker(tmp_ipc, None, *METRICS) as b:
        port, worker = port_of(b), b.worker("w1")
        wait_for(lambda: get(port, "/healthz")[0] == 200)
        worker.send("goodbye")
        wait_for(lambda: get(port, "/healthz")[0] == 503)
        assert not any("worker_state" in name for name in scrape(port))


def test_slow_and_rude_peers_do_not_keep_tasks_waiting(tmp_ipc: Path) -> None:
    with broker(tmp_ipc, None, *METRICS) as b:
        port, client, worker = port_of(b), b.client(), b.worker()
        peers = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        try:
            for n, peer in enumerate(peers):
                peer.sendall((b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n", b"\0" * 9000)[n % 3])
            run = client.submit([b"abc"])
            worker.work()
            assert client.result(5.0) == [(run, 0, b"cba")]
        finally:
            for peer in peers:
                peer.close()
        wait_for(lambda: get(port, "/healthz")[0] == 200)


@pytest.mark.parametrize("metrics", ["0.0.0.0:9464", "192.168.1.1:9464", "9464", "[::]:1", "127.0.0.1:99999"])
def test_other_addresses_are_refused(tmp_ipc: Path, metrics: str) -> None:
    b = BrokerProcess(tmp_ipc, None, "--metrics", metrics)
    try:
        code, output = b.finish()
    finally:
        b.close()
    assert (code, len(output.splitlines())) == (2, 1), output
    assert output.startswith("penstock broker: broker: metrics ")


def test_a_port_in_use_is_one_line(tmp_ipc: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        b = BrokerProcess(tmp_ipc, None, "--metrics", f"127.0.0.1:{port}")
        try:
            code, output = b.finish()
        finally:
            b.close()
    assert (code, output) == (2, f"penstock broker: metrics: cannot listen at 127.0.0.1:{port}: Address already in use\n")

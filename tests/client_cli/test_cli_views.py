"""How status and findings look, and what `doctor` makes of what it sees."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from penstock.broker.address import Address
from penstock.client.cli import doctor
from penstock.client.cli.doctor import NOTE, OK, WRONG, Finding
from penstock.client.cli.figures import duration, milliseconds, share, size
from penstock.client.cli.status import exit_status, render

WORKER = {
    "name": "w1", "pid": 42, "device": "cuda:0", "state": "ready", "leases": 2, "done": 12_345, "failed": 1,
    "memory": {"rss_bytes": 5 << 20, "allocated_bytes": 3 << 30},
    "resident": {"embed": "ready", "generate": "loading", "rerank": "absent"},
    "kernels": ["embed"],
}  # fmt: skip
BODY: dict[str, Any] = {
    "pid": 7, "epoch": 1, "uptime_s": 3700.0, "is_ready": True, "is_settled": True, "is_draining": False,
    "num_clients": 3, "tasks": {"open": 5, "open_bytes": 2048, "queued": 3, "leased": 2, "done": 9, "strange": 1},
    "tasks_per_s": 12.3, "queues": [{"kernel": "embed", "mode": "batch", "queued": 3, "batch_keys": 1}],
    "workers": [WORKER], "kernels": {}, "counters": {"malformed": 2, "nothing": 0},
}  # fmt: skip


def text_of(body: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed below
    console.print(render(body, "ipc:///x"))
    console.file.close()
    return console.export_text()


def test_status_shows_what_there_is() -> None:
    text = text_of(BODY)
    for part in ("broker 7", "ready", "1 h 1 min", "w1", "42", "cuda:0", "12,345", "3.0 GiB", "embed, generate (loading)",
                 "3 queued, 2 leased, 9 done, 1 strange", "2.0 KiB", "malformed 2"):  # fmt: skip
        assert part in text
    assert "nothing" not in text
    assert "rerank" not in text
    assert exit_status(BODY) == 0


def test_a_broker_without_workers_is_not_fine() -> None:
    body = {**BODY, "is_ready": False, "workers": [], "queues": []}
    text = text_of(body)
    assert "NOT READY" in text
    assert "penstock worker" in text
    assert exit_status(body) == 4
    assert exit_status({}) == 4


def test_an_older_broker_may_say_less() -> None:
    worker = {key: WORKER[key] for key in ("name", "pid", "device", "leases", "done", "failed")}
    assert "w1" in text_of({"workers": [worker]})


@pytest.mark.parametrize(
    ("num_bytes", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (5 << 50, "5120 TiB")]
)
def test_sizes(num_bytes: int, shown: str) -> None:
    assert size(num_bytes) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.9, "0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0.0 ms"), (9.94, "9.9 ms"), (120.4, "120 ms"), (1500.0, "1.5 s"), (61_000.0, "1 min 1 s")],
)
def test_times(value: float | None, shown: str) -> None:
    assert milliseconds(value) == shown


def test_shares() -> None:
    assert [share(value) for value in (None, 0.0, 0.951, 1.0)] == ["-", "0 %", "95 %", "100 %"]


# --- doctor --------------------------------------------------------------------------------------------------------


def levels(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.topic: finding.level for finding in findings}


def lists_devices(monkeypatch: pytest.MonkeyPatch, status: int, out: str, err: str = "") -> Finding:
    done = subprocess.CompletedProcess([], status, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    return next(f for f in doctor.check_devices() if f.topic == "devices")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    assert lists_devices(monkeypatch, 0, json.dumps(["cuda:0", "cuda:1"])).level == OK
    broken = lists_devices(monkeypatch, 1, "", "Traceback\nImportError: libcudart.so")
    assert (broken.level, "libcudart.so" in broken.text) == (WRONG, True)
    assert lists_devices(monkeypatch, 0, "surprise").level == WRONG
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/nvidia0"])
    assert "CUDA" in lists_devices(monkeypatch, 0, json.dumps(["cpu"])).advice


def test_a_hanging_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **options: Any) -> None:
        raise subprocess.TimeoutExpired("python", options["timeout"])

    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    monkeypatch.setattr(subprocess, "run", hang)
    assert levels(doctor.check_devices())["devices"] == WRONG


def test_without_torch_only_workers_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in doctor.WORKER else "1.0")
    found = list(doctor.check_packages())
    assert [f.level for f in found if f.topic == "packages"] == [OK, NOTE]
    assert levels(doctor.check_devices()) == {"cpu": OK}
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert WRONG in [f.level for f in doctor.check_packages()]


def test_the_ipc_folder(tmp_ipc: Path) -> None:
    address = Address(f"ipc://{tmp_ipc}")
    assert levels(doctor.check_address(address, None, {}))["ipc folder"] == OK
    tmp_ipc.chmod(0o777)
    assert levels(doctor.check_address(address, None, {}))["ipc folder"] == WRONG
    tmp_ipc.chmod(0o700)
    missing = Address(f"ipc://{tmp_ipc}/new")
    assert levels(doctor.check_address(missing, missing.url, {}))["ipc folder"] == OK
    assert "ipc folder" not in levels(doctor.check_address(Address("tcp://127.0.0.1:7700"), None, {}))


def test_the_broker(tmp_ipc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_ipc))
    address = Address.default()
    assert levels(doctor.check_broker(address, None)) == {"broker": NOTE}
    assert levels(doctor.check_broker(address, BODY)) == {"broker": OK, "worker": OK}
    assert levels(doctor.check_broker(address, {**BODY, "workers": [], "is_ready": False}))["worker"] == WRONG
    away = {**BODY, "workers": [{**WORKER, "state": "away"}]}
    assert levels(doctor.check_broker(address, away))["worker"] == WRONG
    (tmp_ipc / "penstock").mkdir()
    (tmp_ipc / "penstock" / "connection.json").write_text('{"url": "ipc:///gone", "pid": 1}')
    assert levels(doctor.check_broker(address, None)) == {"broker": WRONG}


def test_what_is_wrong_has_advice(tmp_ipc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_ipc))
    monkeypatch.setattr(doctor, "check_devices", lambda: iter(()))
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 4096))
    found = list(doctor.examine("nonsense", lambda address: None))
    assert [f.topic for f in found if f.level == WRONG] == ["limits", "address"]
    assert all(f.advice for f in found if f.level != OK)

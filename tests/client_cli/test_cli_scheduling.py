"""How the broker's scheduling and open tasks look, and the commands that ask for them."""

import json
import os
from typing import Any

import pytest
from rich.console import Console, RenderableType

from penstock.client.cli import looking, main, tasks
from penstock.client.cli.scheduling import MAX_EVENTS, MAX_LIMITS
from penstock.client.cli.status import render
from penstock.client.errors import InvalidInput

BINS = [
    {
        "kernel": "embed", "mode": "batch", "batch_keys": 2, "queued": 1234, "num_bins": 3, "edges_ms": [100.0, 500.0],
        "occupancy": [{"bin": "fast", "queued": 1200}, {"bin": "medium", "queued": 30}, {"bin": "slow", "queued": 4}],
        "mape": 0.082, "coverage": 0.951, "samples": 4000,
    },
    {
        "kernel": "generate", "mode": "stream", "batch_keys": 1, "queued": 4, "num_bins": 1, "edges_ms": [],
        "occupancy": [{"bin": "all", "queued": 4}], "mape": 0.0, "coverage": 0.0, "samples": 0,
    },
    {
        "kernel": "matmul", "mode": "batch", "batch_keys": 31, "queued": 812, "num_bins": 3, "edges_ms": [8.72, 155.0],
        "occupancy": [{"bin": b, "queued": n} for b, n in (("<8.72 ms", 12), ("8.7-155 ms", 800), (">=155 ms", 0))],
        "mape": 0.21, "coverage": 0.93, "samples": 811,
    },
]  # fmt: skip
BODY: dict[str, Any] = {
    "pid": 7, "is_ready": True,
    "queues": [
        {"kernel": "matmul", "mode": "batch", "queued": 9812, "batch_keys": 77},
        {"kernel": "count", "mode": "stream", "queued": 3, "batch_keys": 1},
    ],
    "bins": BINS,
    "accounts": [
        {"client": "notebook.py", "queued": 1200, "leased": 64, "weight": 1.0, "share": 0.62, "device_s": 812.3},
        {"client": "agent-7", "queued": 34, "leased": 2, "weight": 3.0, "share": 0.38, "device_s": 12.0},
        {"client": "a-status", "queued": 0, "leased": 0, "weight": 1.0, "share": 0.0, "device_s": 0.0},
    ],
    "admission": {"queued_s": 42.5, "closed_classes": [8, 9]},
    "breakers": [
        {"worker": "w2", "kernel": "generate", "state": "half_open", "retry_in_s": 3.2},
        {"worker": "w1", "kernel": "generate", "state": "closed", "retry_in_s": None},
    ],
    "limits": [{"worker": "w1", "kernel": "embed", "class": c, "limit": n} for c, n in (("fast", 64), ("slow", 16))],
    "events": [
        {"age_s": 65.0, "kind": "breaker_opened", "subject": "generate on w2", "reason": "6 of 10 batches failed [red]"},
        {"age_s": 70.0, "kind": "bins_moved", "subject": "matmul", "reason": "12 % more throughput predicted"},
    ],
    "config": {"path": "/etc/penstock.toml", "loaded_age_s": 300.0, "error": "scheduling.max_bins must be above 0"},
}  # fmt: skip
ID = "3fa9c1d2" + "0" * 24
TASKS: list[dict[str, Any]] = [
    {
        "id": ID, "client": "notebook.py", "kernel": "embed", "rows": 64, "leased": 64, "queued": 0, "done": 0,
        "state": "running", "position": 0, "eta_ms": 120.0, "priority": 5, "complexity": 3.2, "why": "it runs on w1",
    },
    {
        "id": "3fb9c1d2" + "0" * 24, "client": "a-client-with-a-long-name", "kernel": "generate-long", "rows": 1, "leased": 0,
        "queued": 1, "done": 0, "state": "queued", "position": 1812, "ahead": 12, "eta_ms": 4200.0, "alone_ms": 640.0,
        "priority": 8, "complexity": 9.74, "bin": "slow", "deadline_in_ms": 51_000.0, "age_ms": 3000.0, "workers": [],
        "is_waiting_for_kernel": False,
        "why": "behind 1,812 rows of 3 clients; worker cpu-0 is busy for about 120 ms more",
    },
]  # fmt: skip


def lines_of(view: RenderableType, width: int) -> list[str]:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere, markup=False, emoji=False)
        console.print(view)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_status_shows_how_the_broker_schedules(width: int) -> None:
    lines = lines_of(render(BODY, "ipc:///x"), width)
    words = " ".join(" ".join(lines).split())
    for part in (
        "fast(<100ms):1,200", "medium(100-500ms):30", "slow(>=500ms):4", "all:4", "<8.72ms:12", "8.7-155ms:800",
        "notebook.py 1,200 64 1 62 % 13 min 32 s", "agent-7 34 2 3 38 % 12.0 s",
        "admission: 42.5 s of work queued; closed to new work of priority 8, 9",
        "breaker: generate on w2 is half open, tried again in 3.2 s",
        "batch sizes: embed on w1: fast 64, slow 16", "1 min 5 s breaker opened generate on w2 6 of 10 batches failed [red]",
        "configuration: /etc/penstock.toml, read 5 min 0 s ago", "is not used: scheduling.max_bins must be above 0",
    ):  # fmt: skip
        assert part in words
    assert "matmul 9,812 77 <8.72ms:12" in words
    assert "count (stream) 3 1 - - -" in words
    assert "generate on w1" not in words
    assert "a-status" not in words
    assert max(map(len, lines)) <= width
    (embed,) = (line for line in lines if line.startswith("embed "))
    assert embed.split()[-4:] == ["8", "%", "95", "%"]
    (stream,) = (line for line in lines if line.startswith("generate (stream)"))
    assert stream.split()[-2:] == ["-", "-"], "nothing was measured yet"
    if width == 120:
        assert "fast(<100ms):1,200  medium(100-500ms):30  slow(>=500ms):4" in embed


def test_sections_without_content_are_not_shown() -> None:
    quiet = {"pid": 7, "is_ready": True, "bins": [], "accounts": [], "events": [], "breakers": [], "limits": [],
             "admission": {"queued_s": 0.0, "closed_classes": []}, "config": {"path": None, "error": None}}  # fmt: skip
    assert lines_of(render(quiet, "u"), 80) == lines_of(render({"pid": 7, "is_ready": True}, "u"), 80)


@pytest.mark.parametrize(
    ("occupancy", "shown"), [([], "bounds:100|500ms"), ([{"bin": "slow", "queued": 3}], "slow:3  bounds:100|500ms")]
)
def test_boundaries_are_shown_though_bins_are_empty(occupancy: list[dict[str, Any]], shown: str) -> None:
    view = render({"bins": [{**BINS[0], "occupancy": occupancy}]}, "u")
    assert f"  {shown}  " in next(line for line in lines_of(view, 120) if line.startswith("embed "))


def test_long_lists_are_cut() -> None:
    events = [{"age_s": float(i), "kind": "k", "subject": f"s{i}", "reason": "r"} for i in range(20)]
    limits = [{"worker": f"w{i}", "kernel": "k", "class": "fast", "limit": 64} for i in range(12)]
    text = "\n".join(lines_of(render({"events": events, "limits": limits}, "u"), 100))
    assert f"s{MAX_EVENTS - 1} " in text
    assert f"s{MAX_EVENTS} " not in text
    assert f"w{MAX_LIMITS - 1}:" in text
    assert f"w{MAX_LIMITS}:" not in text
    assert "... 4 more (--json)" in text
    assert "too long for a message: kernels" in "\n".join(lines_of(render({"left_out": ["kernels"]}, "u"), 100))


# --- tasks ---------------------------------------------------------------------------------------------------------


def test_open_tasks_have_their_reason_below_them_on_a_narrow_terminal() -> None:
    lines = lines_of(tasks.render(TASKS, 80), 80)
    assert lines[0].split() == ["id", "client", "kernel", "rows", "state", "pos", "eta", "prio", "cplx"]
    assert lines[1].split() == ["3fa9c1d2", "notebook.…", "embed", "64", "running", "0", "120", "ms", "5", "3.2"]
    assert lines[2] == "  it runs on w1"
    assert lines[3].split() == ["3fb9c1d2", "a-client-…", "generate-lo…", "1", "queued", "1,812", "4.2", "s", "8", "9.7"]
    assert lines[4] == f"  {TASKS[1]['why']}"
    assert max(map(len, lines)) <= 80


def test_open_tasks_are_a_line_each_on_a_wide_one() -> None:
    lines = lines_of(tasks.render(TASKS, 120), 120)
    assert len(lines) == 3
    assert lines[0].endswith("cplx  why")
    assert "a-client-with-a-lon…" in lines[2]
    assert "behind 1,812 rows" in lines[2]
    assert len(lines[2]) <= 120
    assert lines_of(tasks.render(TASKS, 200), 200)[2].endswith("about 120 ms more")


def test_what_an_older_broker_leaves_out_is_a_dash() -> None:
    lines = lines_of(tasks.render([{"id": ID, "state": "queued"}], 80), 80)
    assert lines[1].split() == ["3fa9c1d2", "-", "-", "-", "queued", "-", "-", "-", "-"]
    assert lines_of(tasks.render([], 80), 80) == ["no open tasks"]
    assert lines_of(tasks.render([{"id": ID}] * 100, 80), 80)[-1] == "these are the most urgent; there may be more"


def test_one_task_with_all_of_it() -> None:
    shown = dict(line.split("  ", 1) for line in lines_of(tasks.render_one({**TASKS[1], "strange_fact": 1.26}), 140))
    assert {name: text.strip() for name, text in shown.items()} == {
        "id": "3fb9c1d2" + "0" * 24, "client": "a-client-with-a-long-name", "kernel": "generate-long", "state": "queued",
        "why": "behind 1,812 rows of 3 clients; worker cpu-0 is busy for about 120 ms more",
        "rows": "1 (1 queued, 0 leased, 0 done)", "position": "1,812 rows before it, 12 of them in its queue",
        "eta": "4.2 s", "alone": "640 ms", "time limit": "in 51.0 s", "age": "3.0 s", "priority": "8",
        "complexity": "9.7", "bin": "slow", "strange fact": "1.3",
    }  # fmt: skip
    assert lines_of(tasks.render_one({"id": ID, "state": "finished"}), 80)[1].split() == ["state", "finished"]


# --- commands ------------------------------------------------------------------------------------------------------


class FakeClient:
    """Answers as a broker with two open tasks does."""

    reload_error: Exception | None = None

    def __init__(self, url: str | None, **_: object) -> None:
        self.url = url

    def __enter__(self) -> "FakeClient":
        return self

    def __exit__(self, *_: object) -> None: ...

    def tasks(self) -> list[dict[str, Any]]:
        return TASKS

    def task(self, id: str) -> dict[str, Any]:
        return next((task for task in TASKS if task["id"] == id), {"state": "unknown"})

    def reload(self) -> None:
        if self.reload_error is not None:
            raise self.reload_error


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "Client", FakeClient)


def test_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    assert "behind 1,812 rows of 3 clients" in capsys.readouterr().out
    assert main(["tasks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == TASKS


@pytest.mark.parametrize("id", ["3fa", "3FA9", ID, f"{ID}/7"])
def test_a_task_by_the_beginning_of_its_id(id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", id]) == 0
    assert "it runs on w1" in capsys.readouterr().out
    assert main(["task", id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == TASKS[0]


@pytest.mark.parametrize(
    ("id", "says"),
    [
        ("3f", f"2 of your most urgent open tasks begin with '3f': {ID}, 3fb9"),
        ("4", "none of your"),
        ("0" * 32, "no task 0000"),
    ],
)
def test_a_task_that_cannot_be_meant(id: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", id]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert says in told.err


def test_reload(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["reload"]) == 0
    assert "new configuration" in capsys.readouterr().out
    monkeypatch.setattr(FakeClient, "reload_error", InvalidInput("penstock.toml: scheduling.max_bins must be above 0"))
    assert main(["reload"]) == 1
    assert capsys.readouterr().err == "penstock: penstock.toml: scheduling.max_bins must be above 0\n"

"""What a simulation is asked for: services, traces, clients, the command line; and what it answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.broker.simulator import clients, service
from penstock.broker.simulator.__main__ import main
from penstock.broker.simulator.clients import Client, ClientsError, Source
from penstock.broker.simulator.experiment import Setup
from penstock.broker.simulator.service import ServiceError
from penstock.broker.simulator.sweep import KNEE, LOADS, sweep

FEW = ["--service", "uniform:1:20", "--batch", "8", "--tasks", "200"]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main([*args, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# --- services ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mean", "deviation"),
    [
        ("uniform:1:20", 10.5, 19 / 12**0.5),
        ("exponential:3", 3.0, 3.0),
        ("lognormal:1:0.5", np.exp(1.125), np.exp(1.125) * (np.exp(0.25) - 1) ** 0.5),
        ("bimodal:0.25:1:9", 7.0, 8 * (0.25 * 0.75) ** 0.5),
        ("uniform:4:4", 4.0, 0.0),
    ],
)
def test_a_service_has_the_moments_that_it_says(text: str, mean: float, deviation: float) -> None:
    times = service.parse(text).draw(np.random.default_rng(1), 200_000)
    assert times.mean() == pytest.approx(mean, rel=0.01)
    assert times.std() == pytest.approx(deviation, rel=0.02)
    assert times.min() >= 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("normal:1:2", "unknown service 'normal:1:2'"),
        ("uniform", "uniform:a:b"),
        ("uniform:1", "uniform:a:b"),
        ("uniform:1:2:3", "uniform:a:b"),
        ("uniform:one:two", "uniform:a:b"),
        ("uniform:nan:2", "uniform:a:b"),
        ("uniform:5:1", "a <= b"),
        ("uniform:-1:1", "a <= b"),
        ("exponential:0", "above 0"),
        ("exponential:inf", "exponential:mean"),
        ("lognormal:1:-1", "sigma"),
        ("bimodal:2:1:1", "share"),
        ("trace:", "unknown service"),
        ("trace:/nowhere/at.all", "No such file"),
    ],
)
def test_a_service_that_makes_no_sense_is_refused_with_a_reason(text: str, part: str) -> None:
    with pytest.raises(ServiceError, match=part):
        service.parse(text)


TRACES = {
    "lines.txt": "3\n1\n2.5\n",
    "heading.csv": "seconds,name\n3,a\n1,b\n2.5,c\n",
    "column.csv:ms": "name,ms\na,3\nb,1\nc,2.5\n",
    "comment.csv": "# measured\n3\n\n1\n2.5\n",
    "numbers.json": "[3, 1, 2.5]",
    "rows.json:ms": '[{"ms": 3}, {"ms": 1}, {"ms": 2.5}]',
    "columns.json:ms": '{"name": ["a"], "ms": [3, 1, 2.5]}',
    "rows.jsonl:ms": '{"ms": 3}\n{"ms": 1}\n\n{"ms": 2.5}\n',
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_replayed_in_its_order_and_again(name: str, tmp_path: Path) -> None:
    (tmp_path / name.partition(":")[0]).write_text(TRACES[name], encoding="utf-8")
    found = service.parse(f"trace:{tmp_path / name}")
    random = np.random.default_rng(0)
    assert found.draw(random, 4).tolist() == [3, 1, 2.5, 3]
    assert found.draw(random, 3, 4).tolist() == [1, 2.5, 3]
    assert found.sample(random, 99).tolist() == [3, 1, 2.5]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("t", "", "1 to"),
        ("t", "1\n-2\n", "negative"),
        ("t", "0\n0\n", "all 0"),
        ("t", "1\ntwo\n", "two"),
        ("t", "1\nnan\n", "negative"),
        ("t:b", "a,c\n1,2\n", "no column 'b'; there are: a, c"),
        ("t:b", "a,b\n1,2\n3\n", "a line without column"),
        ("t", "[1, 2", "not JSON"),
        ("t", '{"a": [1]}', "trace:FILE:COLUMN"),
        ("t:b", '[{"a": 1}]', "under 'b'"),
        ("t", '["1"]', "list of numbers"),
    ],
)
def test_a_trace_that_cannot_be_read_is_refused_with_a_reason(name: str, content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(content, encoding="utf-8")
    with pytest.raises(ServiceError, match=part):
        service.parse(f"trace:{tmp_path / name}")


# --- clients -------------------------------------------------------------------------------------------------------


def test_clients_are_read_from_their_short_form() -> None:
    assert clients.parse(
        "greedy:tasks=10000, light:closed=1:weight=2:priority=0,r:rate=5:size=0.5:timeout=3:rows=4:start=2:account=a"
    ) == [
        Client("greedy", tasks=10_000),
        Client("light", closed=1, weight=2.0, priority=0),
        Client("r", rate=5.0, size=0.5, timeout=3.0, rows=4, start=2.0, account="a"),
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "1 to"),
        ("a,a", "names of their own"),
        ("a:tasks", "KEY=VALUE"),
        ("a:speed=1", "KEY=VALUE"),
        ("a:name=b", "KEY=VALUE"),
        ("a:tasks=many", "whole number"),
        ("a:tasks=1.5", "whole number"),
        ("a:rate=fast", "number"),
        ("a:weight=0", "above 0"),
        ("a:rate=inf", "above 0"),
        ("a:size=nan", "above 0"),
        ("a:priority=10", "0 to 9"),
        ("a:start=-1", "start"),
        ("a:rate=1:closed=1", "not both"),
        (":tasks=1", "1 to 64 characters"),
    ],
)
def test_clients_that_make_no_sense_are_refused_with_a_reason(text: str, part: str) -> None:
    with pytest.raises(ClientsError, match=part):
        clients.parse(text)


def test_a_share_of_predictions_is_that_of_another_task() -> None:
    source = Source(Client(size=2.0), 0, service.parse("uniform:1:2"), 1.0, 0.25, seed=3)
    tasks = [source.make(0.0) for _ in range(8000)]
    wrong = [task for task in tasks if task.predicted_ms != task.service_ms]
    assert len(wrong) / len(tasks) == pytest.approx(0.25, abs=0.02)
    assert all(2000 <= task.predicted_ms <= 4000 for task in wrong)
    right = Source(Client(size=2.0), 0, service.parse("uniform:1:2"), 1.0, 0.0, seed=3)
    assert [right.make(0.0).service_ms for _ in range(8000)] == [task.service_ms for task in tasks]


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_answer_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, *FEW, "--bins", "2", "--boundaries", "equal", "--clients", "a,b:closed=1:weight=3", "--seed", "4")
    assert found["boundaries"] == [pytest.approx(10.5, rel=0.01)]
    assert {k: found[k] for k in ("policy", "service", "unit", "batch", "bins", "servers", "arrival", "seed")} == {
        "policy": "static", "service": "uniform:1:20", "unit": "s", "batch": 8, "bins": 2, "servers": 1, "arrival": "burst",
        "seed": 4,
    }  # fmt: skip
    assert found["throughput"] == pytest.approx(found["finished"] / found["elapsed"])
    assert 0 < found["useful_work_ratio"] <= 1
    assert found["latency"]["p50"] <= found["latency"]["p95"] <= found["latency"]["p99"] <= found["elapsed"]
    assert found["clients"]["b"]["weight"] == 3
    assert found["drops"] == {"deadline": 0, "refused": 0}
    assert len(found["per_bin"]) == 2


def test_the_unit_says_what_numbers_are_in(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = printed(capsys, *FEW)
    milliseconds = printed(capsys, "--service", "uniform:1000:20000", "--unit", "ms", *FEW[2:])
    assert seconds["throughput"] == pytest.approx(1000 * milliseconds["throughput"])
    assert seconds["throughput"] == seconds["throughput_per_s"] == pytest.approx(milliseconds["throughput_per_s"])
    assert seconds["latency"]["mean"] == pytest.approx(milliseconds["latency"]["mean"] / 1000)
    per_s = printed(capsys, "--service", "uniform:10:20", "--unit", "ms", *FEW[2:], "--arrival", "poisson:50/s")
    per_ms = printed(capsys, "--service", "uniform:10:20", "--unit", "ms", *FEW[2:], "--arrival", "poisson:0.05")
    assert per_s == per_ms


def test_the_answer_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--bins", "2", "--clients", "a,b:closed=1"]) == 0
    shown = capsys.readouterr()
    for word in ("throughput", "tasks/s", "p95", "useful work", "bin ", "client ", "refused"):
        assert word in shown.out
    assert shown.err == ""


def test_a_trace_is_run_once_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "jobs.txt"
    file.write_text("1\n5\n2\n6\n", encoding="utf-8")
    assert printed(capsys, "--service", f"trace:{file}", "--batch", "2")["elapsed"] == 11.0
    assert printed(capsys, "--service", f"trace:{file}", "--batch", "2", "--bins", "2")["elapsed"] == 8.0
    assert printed(capsys, "--service", f"trace:{file}", "--batch", "2", "--tasks", "8")["elapsed"] == 22.0


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--service", "uniform"], "uniform:a:b"),
        ([*FEW, "--bins", "some"], "whole number"),
        ([*FEW, "--bins", "0"], "1 to 64 bins"),
        ([*FEW, "--bins", "auto"], "only --policy dynamic"),
        ([*FEW, "--arrival", "burst:3"], "poisson:RATE"),
        ([*FEW, "--arrival", "poisson"], "is not a number"),
        ([*FEW, "--arrival", "poisson:3/h"], "poisson:RATE"),
        ([*FEW, "--arrival", "poisson:-3"], "above 0"),
        ([*FEW, "--mispredict", "2"], "share"),
        ([*FEW, "--batch", "0"], "batch size"),
        ([*FEW, "--tasks", "0"], "num_tasks"),
        ([*FEW, "--servers", "2", "--slowness", "1"], "2 numbers"),
        ([*FEW, "--clients", "a:b"], "KEY=VALUE"),
        ([*FEW, "--warmup", "200"], "warm-up"),
        ([*FEW, "--set", "max_bins"], "NAME=VALUE"),
        ([*FEW, "--set", "most_bins=3"], "unknown setting scheduling.most_bins"),
        ([*FEW, "--max-wait-ms", "-1"], "max_wait_ms"),
        ([*FEW, "--config", "/nowhere/penstock.toml"], "penstock.toml"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(args: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    shown = capsys.readouterr()
    assert part in shown.err and shown.out == ""


def test_it_is_a_program_of_its_own() -> None:
    command = [sys.executable, "-P", "-m", "penstock.broker.simulator", *FEW, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["tasks"] == 200
    assert done.stderr == ""  # no bar where nobody looks


# --- pictures ------------------------------------------------------------------------------------------------------


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*FEW, "--plot", "load.png"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "pip install 'penstock[plot]'" in shown.err


def test_a_sweep_goes_from_a_tenth_of_the_capacity_to_past_it() -> None:
    told = list[int]()
    one, chosen = sweep(Setup(service.parse("uniform:1:20"), batch_size=16, bins=3, num_tasks=1500), told.append)
    assert told == list(range(1, 2 * (1 + len(one.rates)) + 1))
    assert len(LOADS) < len(one.rates) <= len(LOADS) + len(KNEE)
    assert chosen.capacity / one.capacity == pytest.approx(1.37, rel=0.05)
    assert chosen.rates == one.rates == sorted(one.rates)
    assert (one.rates[0], one.rates[-1]) == (0.1 * chosen.capacity, 1.1 * chosen.capacity)
    assert chosen.points[2]["throughput"] == pytest.approx(chosen.rates[2], rel=0.1)
    assert chosen.points[-1]["throughput"] < 1.02 * chosen.capacity
    with pytest.raises(ValueError, match="rate="):
        sweep(Setup(service.parse("uniform:1:20"), clients=(Client("c", closed=1),)))


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "load.png"
    found = printed(capsys, *FEW[:4], "--tasks", "300", "--bins", "2", "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [series["label"] for series in found["series"]] == ["1 bin", "2 bins, dp"]
    assert main([*FEW, "--plot", str(tmp_path / "no" / "such.png")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([*FEW[:4], "--tasks", "20", "--plot", str(tmp_path / "load.exe")]) == 1
    assert "cannot write" in capsys.readouterr().err

"""`name=value` on a command line, and results on a terminal."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.client.cli.values import ValueProblem, parse, show, show_timings, split, to_json

SPEC = {
    "inputs": [
        ["x", "tensor", {"dtypes": None, "rank": None, "ragged": "exact"}],
        ["text", "blob", {"kind": "text"}],
        ["data", "blob", {"kind": "bytes"}],
        ["seconds", "row", {"default": None}],
        ["setting", "static", {"required": False}],
    ]
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x=[1, 2.5]", [1, 2.5]),
        ("x=[[true]]", [[True]]),
        ("x=-3", -3),
        ("text=123", "123"),
        ("text=", ""),
        ("text=a=b", "a=b"),
        ("data=abc", b"abc"),
        ("data=ä", b"\xc3\xa4"),
        ("seconds=0.5", 0.5),
        ("setting=7", 7),
        ('setting="7"', "7"),
        ("setting=seven", "seven"),
        ('setting=["a", 1, null]', ["a", 1, None]),
        ("unknown=[1]", [1]),
    ],
)
def test_a_value_becomes_what_the_kernel_declares(argument: str, value: object) -> None:
    parsed = parse([argument], SPEC)[argument.partition("=")[0]]
    assert (type(parsed), parsed) == (type(value), value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x"], "no name=value"),
        (["=1"], "no name=value"),
        (["a-b=1"], "no name=value"),
        (["x=1", "x=2"], "twice"),
        (["x=abc"], "no JSON value"),
        (["seconds=soon"], "no JSON value"),
        (["x=@/nowhere/at.all"], "/nowhere/at.all"),
        (["text=@/nowhere/at.all"], "cannot be read"),
    ],
)
def test_what_cannot_be_read_says_what_would_do(arguments: list[str], says: str) -> None:
    with pytest.raises(ValueProblem, match=says) as caught:
        parse(arguments, SPEC)
    assert "\n" not in str(caught.value)


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array) if allow_pickle else np.save(file, array)
    return file.getvalue()


def test_files(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    (tmp_path / "x.npy").write_bytes(npy(array))
    (tmp_path / "x.json").write_text("[[1, 2]]")
    (tmp_path / "raw").write_bytes(b"\x00\xff")
    read = parse([f"x=@{tmp_path}/x.npy"], SPEC)["x"]
    assert (read.dtype, read.tolist()) == (array.dtype, array.tolist())
    assert parse([f"x=@{tmp_path}/x.json"], SPEC) == {"x": [[1, 2]]}
    assert parse([f"text=@{tmp_path}/x.json"], SPEC) == {"text": "[[1, 2]]"}
    assert parse([f"data=@{tmp_path}/raw", f"text=@{tmp_path}/x.json"], SPEC)["data"] == b"\x00\xff"
    for name in ("x", "text", "setting"):
        with pytest.raises(ValueProblem, match="UTF-8"):
            parse([f"{name}=@{tmp_path}/raw"], SPEC)


def test_objects_in_a_file_are_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "objects.npy"
    path.write_bytes(npy(np.array([object], dtype=object), allow_pickle=True))
    with pytest.raises(ValueProblem, match="readable"):
        parse([f"x=@{path}"], SPEC)
    path.write_bytes(npy(np.zeros(4))[:-3])
    with pytest.raises(ValueProblem, match="readable"):
        parse([f"x=@{path}"], SPEC)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(npy(np.ones(2)))))
    assert parse(["x=@-"], SPEC)["x"].tolist() == [1.0, 1.0]


def test_split_keeps_everything_after_the_first_sign() -> None:
    assert split("a==") == ("a", "=")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.array([0.5, 0.25], np.float32), "float32 [2] [0.5  0.25]"),
        (np.zeros((2, 1), np.int64), "int64 [2, 1]\n[[0]\n [0]]"),
        (np.array(3.5), "3.5"),
        ({"step": np.array(1), "token": "ab"}, "step: 1\ntoken: ab"),
        (b"\x01\xff", "2 bytes 01 ff"),
        ([np.zeros(1), "b"], "[float64 [1] [0.], b]"),
        ("", ""),
    ],
)
def test_show(value: object, shown: str) -> None:
    assert show(value) == shown


def test_large_results_are_short() -> None:
    for value in (np.arange(1e6), "x" * 100_000, bytes(100_000), np.zeros((100, 100, 100))):
        assert len(show(value)) < 1500


def test_to_json() -> None:
    value = {"a": np.array([1, np.nan, np.inf], np.float32), "b": b"\x01\xff", "c": [np.array(2), "x"], "d": float("nan")}
    assert json.loads(json.dumps(to_json(value), allow_nan=False)) == {
        "a": [1, None, None], "b": "01ff", "c": [2, "x"], "d": None,
    }  # fmt: skip


def test_timings_are_one_line() -> None:
    line = show_timings({"queue_ms": 0.123, "compute_ms": 4.0, "batch_size": 3, "worker": "w", "bin": "all"})
    assert line == "ms: queue 0.12, compute 4.00; batch of 3 on w"
    assert "\n" not in show_timings({})

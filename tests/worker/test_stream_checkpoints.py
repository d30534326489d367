"""Checkpoints on the worker's side: what is saved, when, and that a task goes on from it as if it had never stopped."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import worker_kernels as kernels
from fake_broker import assign
from test_runner import make_runner

from penstock.broker.columns import Block, pack
from penstock.broker.layout import Column
from penstock.broker.protocol import Checkpoint, Welcome, WorkerPartial
from penstock.kernels import Step, kernel
from penstock.worker.checkpoints import to_block, values_of
from penstock.worker.link import CheckpointLimits, Link
from penstock.worker.streams import Ended, Streams

ALWAYS = CheckpointLimits(0.0, 1 << 20)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def saving_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these tests see every moment; one says what share of the time it may take."""
    monkeypatch.setattr("penstock.worker.checkpoints.MAX_SHARE", float("inf"))


def prompt(text: str) -> Block:
    return pack([(Column("prompt", "str", (), True), [len(text)], [text.encode()])], 1)


def think(lease: int = 1, text: str = "why", checkpoint: Checkpoint | None = None, **statics: Any) -> Any:
    went_on = {} if checkpoint is None else {"checkpoint": checkpoint.block, "part": checkpoint.part}
    return assign(lease, "think", prompt(text), mode="stream", statics=statics, **went_on)


def events(streams: Streams, limits: CheckpointLimits | None = ALWAYS) -> Iterator[Any]:
    while len(streams):
        yield from streams.step(limits)


def result(ended: Ended) -> tuple[list[int], float]:
    assert ended.answer is not None
    assert ended.answer.block is not None, ended.answer.error
    tokens, heat = (bytes(ended.answer.block.row(index, 0)) for index in range(2))
    return np.frombuffer(tokens, np.int64).tolist(), float(np.frombuffer(heat, np.float64)[0])


def whole(**statics: Any) -> tuple[list[int], float]:
    streams = Streams(make_runner(kernels.Think))
    assert streams.open(think(**statics), 0.0) is None
    return result(next(event for event in events(streams, None) if isinstance(event, Ended)))


def test_another_worker_goes_on_with_the_same_bits() -> None:
    streams = Streams(make_runner(kernels.Think))
    streams.open(think(), 0.0)
    saved = [event for event in events(streams) if isinstance(event, Checkpoint)]
    assert [checkpoint.part for checkpoint in saved] == list(range(1, 20)), "none after the end"
    expected = whole()
    for checkpoint in saved[::6]:
        other = Streams(make_runner(kernels.Think))
        kernels.Think.num_steps = 0
        assert other.open(think(checkpoint=checkpoint), 0.0) is None
        told = list(events(other, None))
        assert [event.part for event in told if isinstance(event, WorkerPartial)] == list(range(checkpoint.part, 20))
        assert result(told[-1]) == expected
        assert kernels.Think.num_steps == 20 - checkpoint.part, "what was done is not done again"


def test_a_checkpoint_is_a_copy() -> None:
    """The kernel goes on writing into its buffer, 80 kB and a frame of its own, while the message waits to leave."""
    streams = Streams(make_runner(kernels.Think))
    streams.open(think(num_tokens=10_000), 0.0)
    first = next(event for event in events(streams) if isinstance(event, Checkpoint))
    before = values_of(first.block, CPU)["tokens"]
    for _ in range(3):
        list(streams.step())
    assert torch.equal(values_of(first.block, CPU)["tokens"], before)


def test_neighbours_keep_their_own() -> None:
    streams = Streams(make_runner(kernels.Think))
    for lease, text in enumerate(["one", "two", "three"]):
        streams.open(think(lease, text), 0.0)
    for _ in range(5):
        list(streams.step())
    saved = {event.lease: event for event in streams.step(ALWAYS) if isinstance(event, Checkpoint)}
    other = Streams(make_runner(kernels.Think))
    for lease, text in enumerate(["one", "two", "three"]):
        other.open(think(lease, text, saved[lease]), 0.0)
    ended = {event.lease: result(event) for event in events(other, None) if isinstance(event, Ended)}
    for lease, text in enumerate(["one", "two", "three"]):
        assert ended[lease] == whole(text=text)


def test_the_kernel_chooses_the_moment() -> None:
    streams = Streams(make_runner(kernels.Think))
    streams.open(think(saves="not now"), 0.0)
    assert [event.part for event in events(streams) if isinstance(event, Checkpoint)] == [7, 14]


def test_there_is_at_most_one_in_an_interval() -> None:
    streams = Streams(make_runner(kernels.Think))
    began = time.perf_counter()
    streams.open(think(num_tokens=40, pause=0.01), 0.0)
    saved = [event for event in events(streams, CheckpointLimits(0.1, 1 << 20)) if isinstance(event, Checkpoint)]
    assert 1 <= len(saved) <= (time.perf_counter() - began) / 0.1


def test_saving_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.worker.checkpoints.MAX_SHARE", 0.05)

    @kernel("slow_to_save")
    class SlowToSave:
        num_saved = 0

        def open(self, x: torch.Tensor) -> list[int]:
            return [0]

        def step(self, states: list[list[int]]) -> list[Step]:
            time.sleep(0.002)
            return [Step()]

        def checkpoint(self, state: list[int]) -> dict[str, Any]:
            time.sleep(0.02)
            type(self).num_saved += 1
            return {"at": 0}

        def restore(self, state: list[int], saved: Any) -> list[int]:
            return state

    streams = Streams(make_runner(SlowToSave))
    block = pack([(Column("x", "float32", (2,)), None, [bytes(8)])], 1)
    streams.open(assign(1, "slow_to_save", block, mode="stream"), 0.0)
    began = time.perf_counter()
    while time.perf_counter() - began < 0.6:
        list(streams.step(ALWAYS))
    assert SlowToSave.num_saved in (1, 2), "20 ms, then not for 400"


@pytest.mark.parametrize(("saves", "why"), [("fails", "nothing to hand over"), ("large", "the broker takes 5,000")])
def test_what_cannot_be_saved_is_said_once_and_goes_on(saves: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    streams = Streams(make_runner(kernels.Think))
    streams.open(think(saves=saves), 0.0)
    told = list(events(streams, CheckpointLimits(0.0, 5000)))
    assert not any(isinstance(event, Checkpoint) for event in told)
    assert result(told[-1]) == whole()
    assert [why in record.message for record in caplog.records] == [True]


def test_what_cannot_be_restored_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    streams = Streams(make_runner(kernels.Think))
    streams.open(think(saves="cannot"), 0.0)
    checkpoint = next(event for event in events(streams) if isinstance(event, Checkpoint))
    other = Streams(make_runner(kernels.Think))
    other.open(think(saves="cannot", checkpoint=checkpoint), 0.0)
    told = list(events(other, None))
    assert [event.part for event in told if isinstance(event, WorkerPartial)] == list(range(20))
    assert result(told[-1]) == whole()
    assert "begins anew" in caplog.text


def test_a_kernel_without_checkpoints_has_none() -> None:
    streams = Streams(make_runner(kernels.Count))
    block = pack([(Column("start", "int64"), None, [(5).to_bytes(8, "little")])], 1)
    streams.open(assign(1, "count", block, mode="stream"), 0.0)
    assert not any(isinstance(event, Checkpoint) for event in events(streams))


DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(dtype: str) -> None:
    wanted = getattr(torch, dtype)
    values = {f"x{n}": (torch.rand(shape) * 9).to(wanted) for n, shape in enumerate([(), (0,), (3,), (2, 0), (70, 1000)])}
    found = values_of(to_block("k", values), CPU)
    for name, value in values.items():
        assert found[name].dtype == wanted
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


def test_numbers_and_texts_come_back() -> None:
    given = {"a": 0.1, "b": 2**53 + 1, "c": True, "d": "", "e": b"\x00\xff", "f": np.arange(3.0)}
    found = values_of(to_block("k", given), CPU)
    assert (float(found["a"]), int(found["b"]), bool(found["c"])) == (0.1, 2**53 + 1, True)
    assert (found["d"], found["e"], found["f"].tolist()) == ("", b"\x00\xff", [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"checkpoint_ms": 5000.0, "max_checkpoint_bytes": 7}, CheckpointLimits(5.0, 7)),
        ({}, None),
        ({"checkpoint_ms": 5000.0}, None),
        ({"checkpoint_ms": "soon", "max_checkpoint_bytes": 7}, None),
    ],
)
def test_a_broker_says_what_it_takes(limits: dict[str, Any], expected: CheckpointLimits | None) -> None:
    link = Link("w", "cpu", 100)
    link.hello()
    link.on_welcome(Welcome(epoch=1, heartbeat_ms=100.0, limits=limits))
    assert link.checkpoints == expected

"""Streaming leases without sockets: parts, results, isolated failures, cancelling."""

from typing import Any

import numpy as np
import torch
import worker_kernels as kernels
from fake_broker import assign, tensor_block
from test_runner import make_runner

from penstock.broker.protocol import Code, WorkerPartial
from penstock.kernels import Step, kernel
from penstock.worker.streams import Ended, Streams


def begin(streams: Streams, lease: int, start: int, **statics: Any) -> Ended | None:
    block = tensor_block(np.array([start], np.int64), "start")
    return streams.open(assign(lease, "count", block, mode="stream", statics=statics), 0.0)


def drive(streams: Streams) -> tuple[dict[int, list[WorkerPartial]], dict[int, Ended]]:
    partials: dict[int, list[WorkerPartial]] = {}
    ended: dict[int, Ended] = {}
    for _ in range(100):
        for event in streams.step():
            if isinstance(event, Ended):
                assert event.lease not in ended
                ended[event.lease] = event
            else:
                assert event.lease not in ended
                partials.setdefault(event.lease, []).append(event)
    assert len(streams) == 0
    return partials, ended


def test_parts_are_numbered_and_the_result_is_whole() -> None:
    streams = Streams(make_runner(kernels.Count))
    assert begin(streams, 1, 10) is None
    assert begin(streams, 2, 20, steps=5) is None
    partials, ended = drive(streams)
    assert [p.part for p in partials[1]] == [0, 1, 2]
    assert [p.part for p in partials[2]] == [0, 1, 2, 3, 4]
    assert bytes(partials[2][4].block.row(1, 0)) == b"24"
    block = ended[2].answer.block
    assert block is not None
    assert np.frombuffer(block.row(0, 0), np.int64).tolist() == [20, 21, 22, 23, 24]
    assert ended[1].clock.timings()["compute_ms"] > 0


def test_only_the_guilty_stream_fails() -> None:
    streams = Streams(make_runner(kernels.Count))
    for lease, start in enumerate([1, 666, 3]):
        begin(streams, lease, start)
    partials, ended = drive(streams)
    assert {lease: len(parts) for lease, parts in partials.items()} == {0: 3, 1: 1, 2: 3}
    error = ended[1].answer.error
    assert error is not None
    assert error.code == Code.FAILED
    assert "the number of the beast" in error.message
    assert ended[0].answer.block is not None
    assert ended[2].answer.block is not None


def test_a_task_that_cannot_be_opened_is_answered_at_once() -> None:
    streams = Streams(make_runner(kernels.Count))
    failed = begin(streams, 1, 667)
    refused = begin(streams, 2, 1, nonsense=1)
    assert failed is not None
    assert failed.answer.error is not None
    assert failed.answer.error.code == Code.FAILED
    assert refused is not None
    assert refused.answer.error is not None
    assert refused.answer.error.code == Code.INVALID
    assert len(streams) == 0


def test_cancel_drops_the_state() -> None:
    streams = Streams(make_runner(kernels.Count))
    begin(streams, 1, 1)
    begin(streams, 2, 2)
    assert list(streams.step())
    ended = streams.cancel(1)
    assert ended is not None
    assert ended.answer.error is not None
    assert ended.answer.error.code == Code.CANCELLED
    assert streams.cancel(1) is None
    _, others = drive(streams)
    assert list(others) == [2]


def test_a_wrong_chunk_or_number_of_steps_is_the_kernels_failure() -> None:
    @kernel("wrong", max_batch_size=4)
    class Wrong:
        def open(self, x: torch.Tensor, what: str = "") -> str:
            return what

        def step(self, states: list[str]) -> list[Step]:
            if states[0] == "short":
                return []
            return [Step(chunk={"out": object()}) if s == "chunk" else Step(result={}) for s in states]

    for what, message in [("short", "one Step per state"), ("chunk", "no array or text"), ("empty", "0 outputs")]:
        streams = Streams(make_runner(Wrong))
        block = tensor_block(np.ones((1, 2)))
        assert streams.open(assign(1, "wrong", block, mode="stream", statics={"what": what}), 0.0) is None
        _, ended = drive(streams)
        error = ended[1].answer.error
        assert error is not None
        assert error.code == Code.FAILED
        assert message in error.message

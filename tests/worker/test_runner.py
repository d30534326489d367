"""One batch, run without sockets: who fails and who does not, what is run again, loading, memory."""

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worker_kernels as kernels
from fake_broker import assign, tensor_block

from penstock.broker.columns import pack
from penstock.broker.layout import Column
from penstock.broker.protocol import Answer, Code, Error, Resident
from penstock.kernels import Tensor, kernel, registry
from penstock.worker.batch import run_alone
from penstock.worker.runner import Runner


def make_runner(*targets: Any, announced: list[Resident] | None = None, **options: Any) -> Runner:
    made = [registry.create(target, **options) for target in targets]
    told = announced if announced is not None else []
    return Runner({k.spec.name: k for k in made}, torch.device("cpu"), Path("/tmp"), told.append)


def column(*firsts: float) -> np.ndarray:
    return np.array([[first, 0.5] for first in firsts], np.float32)


def timings_of(runner: Runner, name: str, *blocks: Any, **fields: Any) -> dict[str, float]:
    """What the answer to a batch says of its times and of what was out of the ordinary."""
    _, clock, _ = run_alone(runner, assign(1, name, *blocks, **fields), 0.0)
    return clock.timings()


def solve(runner: Runner, name: str, *blocks: np.ndarray, **fields: Any) -> dict[int, Any]:
    """Row -> its values or its error; checks that each row is answered once."""
    answers, clock, fault = run_alone(runner, assign(1, name, *map(tensor_block, blocks), **fields), 0.0)
    assert fault is None
    assert all(ms >= 0 for ms in clock.timings().values())
    return by_row(answers, sum(map(len, blocks)))


def by_row(answers: list[Answer], num_rows: int) -> dict[int, Any]:
    rows: dict[int, Any] = {}
    for answer in answers:
        for i in range(answer.start, answer.stop):
            assert i not in rows
            if answer.block is None:
                assert answer.error is not None
                rows[i] = answer.error
            else:
                data = bytes(answer.block.row(0, i - answer.start))
                rows[i] = np.frombuffer(data, answer.block.columns[0].dtype)
    assert sorted(rows) == list(range(num_rows))
    return rows


def test_a_batch_of_several_blocks_has_one_answer() -> None:
    answers, _, _ = run_alone(
        make_runner(kernels.scale),
        assign(1, "scale", tensor_block(column(1, 2)), tensor_block(column(3)), statics={"factor": 3}),
        0.0,
    )
    assert len(answers) == 1
    rows = by_row(answers, 3)
    np.testing.assert_array_equal(np.stack([rows[i] for i in range(3)]), column(1, 2, 3) * 3)


@pytest.mark.parametrize("guilty", range(64))
def test_only_the_guilty_row_of_64_fails(guilty: int) -> None:
    runner = make_runner(kernels.picky)
    firsts = [666.0 if i == guilty else float(i % 10) for i in range(64)]
    rows = solve(runner, "picky", column(*firsts[:20]), column(*firsts[20:]))
    assert runner.num_runs <= 1 + 13
    for i, row in rows.items():
        if i == guilty:
            assert isinstance(row, Error)
            assert row.code == Code.FAILED
            assert row.message == "kernel 'picky': ValueError: the number of the beast"
            assert "worker_kernels.py" in row.detail
            assert "batch.py" not in row.detail
        else:
            assert row.tolist() == [firsts[i] + 1, 1.5]


def test_several_guilty_rows_fail_each_for_its_own_reason() -> None:
    rows = solve(make_runner(kernels.picky), "picky", column(1, 666, 2, 13, 3))
    assert [r.code if isinstance(r, Error) else None for r in rows.values()] == [
        None, Code.FAILED, None, Code.INVALID, None,
    ]  # fmt: skip


def test_what_is_not_idempotent_runs_once() -> None:
    runner = make_runner(kernels.once)
    rows = solve(runner, "once", column(1, 666, 3))
    assert runner.num_runs == 1
    assert {r.code for r in rows.values() if isinstance(r, Error)} == {Code.FAILED}
    assert len([r for r in rows.values() if isinstance(r, Error)]) == 3
    assert "not idempotent" in rows[0].message


def test_rows_that_do_not_fit_a_batch_are_found_before_the_kernel_runs() -> None:
    runner = make_runner(kernels.once)
    rows = solve(runner, "once", column(1, 2), np.ones((2, 3), np.float32))
    assert [getattr(row, "code", None) for row in rows.values()] == [None] * 4
    assert runner.num_runs == 2  # each shape by itself


def test_out_of_memory_splits_until_it_fits() -> None:
    runner = make_runner(kernels.hungry)
    firsts = [*map(float, range(9)), 999.0, *map(float, range(10, 16))]
    rows = solve(runner, "hungry", column(*firsts))
    error = rows.pop(9)
    assert isinstance(error, Error)
    assert error.code == Code.FAILED
    assert "ran out of memory" in error.message
    assert all(not isinstance(row, Error) and row[0] == firsts[i] for i, row in rows.items())


TIMES = {"batch_wait_ms", "load_ms", "h2d_ms", "compute_ms", "d2h_ms"}


def test_a_plain_batch_costs_no_facts_on_the_wire() -> None:
    assert timings_of(make_runner(kernels.scale), "scale", tensor_block(column(1, 2))).keys() == TIMES
    rows = [ragged(3), ragged(3)]
    assert timings_of(make_runner(kernels.pads), "pads", *rows).keys() == TIMES


def test_a_batch_that_was_bisected_says_how_often_it_ran() -> None:
    runner = make_runner(kernels.picky)
    timings = timings_of(runner, "picky", tensor_block(column(1, 666, 2, 3)))
    assert timings.keys() - TIMES == {"num_runs"}
    assert timings["num_runs"] == runner.num_runs == 5  # 4 rows, 2, 1, 1, and the other 2


def test_a_batch_out_of_memory_says_what_did_not_fit() -> None:
    timings = timings_of(make_runner(kernels.hungry), "hungry", tensor_block(column(*range(16))))
    assert {k: timings[k] for k in timings.keys() - TIMES} == {"num_runs": 7, "num_oom": 3, "oom_rows": 8}
    alone = timings_of(make_runner(kernels.hungry), "hungry", tensor_block(column(999)))
    assert {k: alone[k] for k in alone.keys() - TIMES} == {"num_oom": 1, "oom_rows": 1}


def test_a_batch_that_never_ran_says_so() -> None:
    runner = make_runner(kernels.scale, kernels.pads)
    assert timings_of(runner, "nothing", tensor_block(column(1)))["num_runs"] == 0
    assert timings_of(runner, "pads", tensor_block(np.ones(1, np.float32)))["num_runs"] == 0


@pytest.mark.parametrize(
    ("lengths", "ratio"),
    [((1, 3), 0.5), ((4, 4, 4, 0), 1 / 3), ((2, 2), None), ((0, 0), None), ((7,), None)],
)
def test_padding_is_told(lengths: tuple[int, ...], ratio: float | None) -> None:
    timings = timings_of(make_runner(kernels.pads), "pads", *map(ragged, lengths))
    assert timings.get("padding_ratio") == (ratio if ratio is None else pytest.approx(ratio))


def test_the_padding_of_a_batch_is_that_of_the_whole() -> None:
    @kernel("small", inputs={"x": Tensor(ragged="pad")}, max_batch_size=8)
    def small(x: torch.Tensor, x_lengths: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise ValueError("one at a time")
        return x_lengths

    timings = timings_of(make_runner(small), "small", ragged(1), ragged(3))
    assert (timings["num_runs"], timings["padding_ratio"]) == (3, pytest.approx(0.5))


def test_the_time_of_failed_runs_counts() -> None:
    @kernel("tries", max_batch_size=8)
    def tries(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        if len(x) > 1:
            raise ValueError("one at a time")
        return x

    timings = timings_of(make_runner(tries), "tries", tensor_block(column(1, 2)))
    assert timings["num_runs"] == 3
    assert timings["compute_ms"] >= 15.0


def ragged(length: int) -> Any:
    """One row of `length` steps of two numbers."""
    row = np.ones((length, 2), np.float32)
    return pack([(Column("x", "float32", (2,), True), [length], [row.tobytes()])], 1)


def test_a_failed_run_is_free_before_the_next_one_begins() -> None:
    alive: list[int] = []
    held: list[Any] = []

    @kernel("leaky", max_batch_size=8)
    def leaky(x: torch.Tensor) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in held))
        big = torch.ones(1000)
        held.append(weakref.ref(big))
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x

    gc.disable()  # reference counts must be enough
    try:
        solve(make_runner(leaky), "leaky", column(1, 2, 3, 4))
    finally:
        gc.enable()
    assert alive == [0] * 7


@pytest.mark.parametrize(
    ("raised", "is_memory"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"), True),
        (MemoryError(), True),
        (ValueError("out of ideas"), False),
    ],
)
def test_out_of_memory_in_disguise(raised: Exception, is_memory: bool) -> None:
    @kernel("raises")
    def raises(x: torch.Tensor) -> torch.Tensor:
        raise raised

    row = solve(make_runner(raises), "raises", column(1))[0]
    assert isinstance(row, Error)
    assert ("ran out of memory" in row.message) == is_memory


@pytest.mark.parametrize("idempotent", [True, False])
def test_a_broken_device_ends_the_batch_and_tells(idempotent: bool) -> None:
    """What may run again is left without an answer, for the broker to find the guilty row; the rest must not."""

    @kernel("breaks", max_batch_size=8, idempotent=idempotent)
    def breaks(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runner = make_runner(breaks)
    answers, _, fault = run_alone(runner, assign(1, "breaks", tensor_block(column(1, 2, 3, 4))), 0.0)
    assert fault is not None
    assert runner.num_runs == 1
    if idempotent:
        assert answers == []
    else:
        assert all(isinstance(row, Error) and "illegal memory" in row.message for row in by_row(answers, 4).values())


def test_rows_answered_before_the_device_broke_keep_their_answers() -> None:
    @kernel("worse", max_batch_size=8)
    def worse(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise ValueError("one at a time")
        if x[0, 0] == 2:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return x

    answers, _, fault = run_alone(make_runner(worse), assign(1, "worse", tensor_block(column(1, 2, 3, 4))), 0.0)
    assert fault is not None
    assert [(a.start, a.stop, a.error) for a in answers] == [(0, 1, None)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(5), "has 5 rows for a batch of 2"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (None, "must return a tensor or a dict"),
        ({"out": [object(), object()]}, "list of object"),
    ],
)
def test_a_wrong_output_fails_the_batch_and_names_the_kernel(value: Any, message: str) -> None:
    kernels.Returns.values = value
    for row in solve(make_runner(kernels.Returns), "returns", column(1, 2)).values():
        assert isinstance(row, Error)
        assert row.code == Code.FAILED
        assert "'returns'" in row.message
        assert message in row.message


def test_statics_and_leases_that_do_not_fit() -> None:
    runner = make_runner(kernels.scale)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"statics": {"nonsense": 1}}, Code.INVALID),
        ({"digest": b"12345678"}, Code.UNAVAILABLE),
        ({"mode": "stream"}, Code.INVALID),
    ]
    for fields, code in cases:
        row = solve(runner, "scale", column(1), **fields)[0]
        assert isinstance(row, Error)
        assert row.code == code
    missing = solve(runner, "nothing", column(1))[0]
    assert isinstance(missing, Error)
    assert missing.code == Code.UNAVAILABLE
    assert runner.num_runs == 0


def test_loading_is_told_and_tried_again(tmp_path: Path) -> None:
    announced: list[Resident] = []
    weights = tmp_path / "weights"
    runner = make_runner(kernels.Heavy, announced=announced, file=str(weights))
    assert runner.resident == {"heavy": "absent"}
    first = solve(runner, "heavy", column(1, 2))
    assert {r.code for r in first.values() if isinstance(r, Error)} == {Code.UNAVAILABLE}
    assert "no weights at" in first[0].message
    weights.write_text("broken")
    second = solve(runner, "heavy", column(1))[0]
    assert isinstance(second, Error)
    assert second.code == Code.FAILED
    assert "a header that is no header" in second.message
    weights.write_text("fine")
    for _ in range(2):
        assert solve(runner, "heavy", column(1))[0].tolist() == [2, 1.5]
    assert [r.state for r in announced] == ["loading", "failed", "loading", "failed", "loading", "ready"]
    assert runner.resident == {"heavy": "ready"}


def test_an_exit_is_not_swallowed() -> None:
    @kernel("leaves")
    def leaves(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(make_runner(leaves), "leaves", column(1))

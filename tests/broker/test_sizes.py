"""Batch sizes: the steps one by one, any order of reports within bounds, and a simulated worker with a memory and a knee."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker.scheduling import sizes as sizes_module
from penstock.broker.scheduling.sizes import MAX_ROWS, MIN_BATCHES, PATIENCE, BatchSizes, knee

FAST, MEDIUM, SLOW = 5.0, 100.0, 500.0
NO_KNEE = (1.0, 0.0)
"""Fixed and per-row ms of a batch that takes as long with any number of rows."""


def limit(sizes: BatchSizes, ms: float = FAST, most: int = MAX_ROWS, worker: str = "gpu0", now: float = 0.0) -> int:
    return sizes.limit(worker, "embed", ms, most, now)


def run_full(sizes: BatchSizes, num_batches: int = 1, ms: float = FAST, times: tuple[float, float] = NO_KNEE) -> None:
    for _ in range(num_batches):
        sizes.completed("gpu0", "embed", ms, limit(sizes, ms), True, *times)


# Growth


def test_first_limits_by_class_and_the_kernels_own() -> None:
    sizes = BatchSizes()
    assert [limit(sizes, ms) for ms in (0.0, 99.9, 100.0, 499.9, 500.0, 1e9)] == [64, 64, 32, 32, 16, 16]
    assert limit(sizes, most=20) == 20 and limit(sizes, most=1) == 1
    assert BatchSizes((4, 2, 1)).limit("gpu0", "embed", SLOW, 100, 0.0) == 1


@pytest.mark.parametrize("first", [(1, 2), (0, 1, 1), (1, 1, MAX_ROWS + 1), (1, 1, 1, 1)])
def test_first_limits_must_be_three_and_in_bounds(first: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="three first limits"):
        BatchSizes(first)


def test_full_batches_raise_the_limit_by_an_eighth() -> None:
    sizes = BatchSizes((64, 32, 3))
    seen = []
    for _ in range(6):
        run_full(sizes)
        seen.append(limit(sizes))
    assert seen == [72, 81, 91, 102, 114, 128]
    run_full(sizes, ms=SLOW)
    assert limit(sizes, SLOW) == 4, "at least by one"
    assert limit(sizes, MEDIUM) == 32 and limit(sizes, worker="gpu1") == 64, "each class and worker for itself"
    run_full(sizes, 200)
    assert limit(sizes) == MAX_ROWS


def test_after_a_fault_a_worker_begins_with_one_row_and_doubles() -> None:
    sizes = BatchSizes((64, 32, 16))
    run_full(sizes, 20)
    sizes.begin_slowly("gpu0")
    assert limit(sizes, worker="gpu1") == 64, "others are as they were"
    seen = []
    for _ in range(8):
        seen.append(limit(sizes))
        run_full(sizes)
    assert seen == [1, 2, 4, 8, 16, 32, 64, 72]
    assert limit(sizes, SLOW) == 1, "each class for itself"
    sizes.forget_worker("gpu0")
    assert limit(sizes) == 64


def test_memory_that_runs_out_while_it_begins_slowly_ends_that() -> None:
    sizes = BatchSizes((64, 32, 16))
    sizes.begin_slowly("gpu0")
    run_full(sizes, 3)
    sizes.out_of_memory("gpu0", "embed", 8, FAST)
    assert limit(sizes) == 4
    run_full(sizes, 3)
    assert limit(sizes) == 7


def test_batches_with_room_left_do_not() -> None:
    sizes = BatchSizes()
    for _ in range(50):
        sizes.completed("gpu0", "embed", FAST, 40, False, *NO_KNEE)
        sizes.completed("gpu0", "embed", FAST, 40, True, *NO_KNEE)  # full by another budget, or by the kernel's own limit
    assert limit(sizes) == 64


# Out of memory


def test_out_of_memory_halves_what_failed_and_growth_stops_below_it() -> None:
    sizes = BatchSizes()
    run_full(sizes, 4)
    assert limit(sizes) == 102
    assert sizes.out_of_memory("gpu0", "embed", 102, FAST) == "out of memory with 102 rows of 'embed' on gpu0: at most 51 now"
    assert limit(sizes) == 51
    run_full(sizes, PATIENCE - 1)
    assert limit(sizes) == 102 - 102 // 8
    run_full(sizes, 20)
    assert limit(sizes) > 102, "forgiven: tried again"


def test_a_second_batch_in_flight_does_not_halve_twice() -> None:
    sizes = BatchSizes()
    for _ in range(2):
        sizes.out_of_memory("gpu0", "embed", 64, FAST)
    assert limit(sizes) == 32
    sizes.completed("gpu0", "embed", FAST, 64, True, *NO_KNEE)
    assert limit(sizes) == 32, "the failed batch, split by its worker, is no proof that 64 rows fit"


def test_a_size_that_fails_again_is_tried_less_often() -> None:
    sizes = BatchSizes((64, 1, 1))
    waits = []
    for _ in range(7):
        sizes.out_of_memory("gpu0", "embed", 64, FAST)
        num_batches = 0
        while limit(sizes) < 64:
            run_full(sizes)
            num_batches += 1
        waits.append(num_batches)
    assert [round(wait, -2) for wait in waits] == [100, 200, 400, 800, 1600, 1600, 1600]


def test_out_of_memory_without_a_time_counts_for_every_class() -> None:
    sizes = BatchSizes()
    sizes.out_of_memory("gpu0", "embed", 20)
    assert [limit(sizes, ms) for ms in (FAST, MEDIUM, SLOW)] == [10, 10, 10]
    sizes.out_of_memory("gpu0", "embed", 1)
    assert [limit(sizes, ms) for ms in (FAST, MEDIUM, SLOW)] == [1, 1, 1]
    run_full(sizes, PATIENCE - 1)
    assert limit(sizes) == 1, "one row failed: the limit stays there"
    assert limit(sizes, worker="gpu1") == 64


# Memory nearly full


def test_high_memory_lowers_every_limit_of_the_worker_now_and_then() -> None:
    sizes = BatchSizes()
    assert sizes.memory_high("gpu0", 0.99, 0.0) is None, "nothing to lower"
    run_full(sizes)
    run_full(sizes, ms=SLOW)
    assert sizes.memory_high("gpu0", 0.95, 1.0) is None and sizes.memory_high("gpu0", 0.97, 1.0, 0.98) is None
    text = sizes.memory_high("gpu0", 0.97, 1.0)
    assert text == "97 % of the memory of gpu0 is used: 3 batch limits lowered by a quarter"
    assert (limit(sizes), limit(sizes, MEDIUM), limit(sizes, SLOW)) == (54, 24, 14)
    assert sizes.memory_high("gpu0", 0.97, 10.9) is None and sizes.memory_high("gpu1", 0.97, 10.9) is None
    run_full(sizes, 50)
    assert limit(sizes) == 72 - 9, "growth stops below what was too much"
    assert sizes.memory_high("gpu0", 0.97, 11.0) is not None
    assert limit(sizes) == 48


def test_high_memory_is_not_fought_with_small_batches_for_ever() -> None:
    sizes = BatchSizes()
    run_full(sizes)
    for second in range(0, 1000, 10):
        sizes.memory_high("gpu0", 1.0, float(second))
    assert [limit(sizes, ms) for ms in (FAST, MEDIUM, SLOW)] == [16, 8, 4]
    assert sizes.memory_high("gpu0", 1.0, 2000.0) is None


def test_a_remedy_halves_a_kernel_on_a_worker() -> None:
    sizes = BatchSizes()
    assert sizes.reduce("gpu0", "embed") == "3 batch limits of 'embed' on gpu0 halved: fast 32, medium 16, slow 8"
    assert limit(sizes) == 32 and sizes.limit("gpu0", "search", FAST, 100, 0.0) == 64
    run_full(sizes, 50)
    assert limit(sizes) == 56


def test_a_remedy_that_does_not_help_is_taken_back() -> None:
    sizes = BatchSizes()
    run_full(sizes)
    sizes.reduce("gpu0", "embed")
    sizes.reduce("gpu0", "embed")
    sizes.reduce("gpu1", "embed")
    assert limit(sizes) == 18 and limit(sizes, worker="gpu1") == 32
    sizes.restore("search")
    assert limit(sizes) == 18
    sizes.restore("embed")
    assert limit(sizes) == 72 and limit(sizes, worker="gpu1") == 64
    run_full(sizes)
    assert limit(sizes) == 81, "nothing holds it down"


def test_what_failed_since_a_remedy_is_not_forgotten_with_it() -> None:
    sizes = BatchSizes()
    sizes.reduce("gpu0", "embed")
    sizes.out_of_memory("gpu0", "embed", 32, FAST)
    sizes.restore("embed")
    assert (limit(sizes), limit(sizes, MEDIUM)) == (16, 32)


def test_a_remedy_of_long_ago_is_not_taken_back() -> None:
    sizes = BatchSizes()
    sizes.reduce("gpu0", "embed")
    run_full(sizes, PATIENCE + 10)
    run_full(sizes, 60, times=(1.75, 1.0))  # knee at 38
    sizes.restore("embed")
    assert limit(sizes) == 38


# The knee


@pytest.mark.parametrize(("fixed_ms", "row_ms"), [(10.0, 0.5), (10.0, 2.0), (0.0, 0.05), (3.0, 0.017)])
def test_the_knee_has_95_percent_of_the_throughput_and_one_row_less_has_not(fixed_ms: float, row_ms: float) -> None:
    rows = knee(fixed_ms, row_ms, 1)
    assert rows is not None
    share = [row_ms * b / (fixed_ms + sizes_module.TRIP_MS + row_ms * b) for b in (rows - 1, rows)]
    assert share[0] < 0.95 <= share[1] + 1e-12


def test_a_knee_needs_times_that_grow_and_is_not_tiny() -> None:
    assert knee(5.0, 0.0, 8) is None and knee(5.0, -1.0, 8) is None and knee(5.0, float("nan"), 8) is None
    assert knee(1000.0, 1e-9, 8) is None, "past any batch"
    assert knee(0.0, 50.0, 8) == knee(-3.0, 50.0, 8) == 8


def test_growth_stops_at_the_knee_and_a_limit_past_it_comes_down() -> None:
    sizes = BatchSizes()
    run_full(sizes, 10 + MIN_BATCHES, times=(4.75, 1.0))  # knee at 95, of 4.75 + 0.25 ms fixed
    assert limit(sizes) == 95
    run_full(sizes, times=(1.75, 1.0))
    assert limit(sizes) == 95 - 95 // 8, "a step at a time"
    run_full(sizes, 20, times=(1.75, 1.0))
    assert limit(sizes) == 38
    run_full(sizes, 60, ms=SLOW, times=(0.0, 500.0))
    assert limit(sizes, SLOW) == 2, "slow rows that add up gain nothing together"


def test_the_first_batches_know_no_knee_and_do_not_go_far() -> None:
    sizes = BatchSizes()
    run_full(sizes, MIN_BATCHES - 1, times=(0.0, 50.0))
    assert limit(sizes) == 128
    run_full(sizes, times=(0.0, 50.0))
    assert limit(sizes) == 112
    run_full(sizes, 40, times=(0.0, 50.0))
    assert limit(sizes) == 8


# Emergency


def test_an_emergency_means_single_rows_until_it_ends() -> None:
    sizes = BatchSizes()
    sizes.emergency("embed", 10.0)
    assert limit(sizes, now=9.9) == 1 and sizes.is_emergency("embed", 9.9)
    assert sizes.limit("gpu0", "search", FAST, 100, 9.9) == 64
    sizes.emergency("embed", 5.0)
    assert limit(sizes, now=9.9) == 1, "a shorter one does not end a longer one"
    assert limit(sizes, now=10.0) == 64 and not sizes.is_emergency("embed", 0.0), "ended, and forgotten"


# Tables


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes_module, "MAX_SIZES", 3)
    monkeypatch.setattr(sizes_module, "MAX_EMERGENCIES", 2)
    sizes = BatchSizes()
    for n in range(5):
        sizes.completed("gpu0", f"k{n}", FAST, 64, True, *NO_KNEE)
        sizes.emergency(f"k{n}", 100.0)
    assert [row["kernel"] for row in sizes.report()] == ["k2", "k3", "k4"]
    assert [sizes.is_emergency(f"k{n}", 0.0) for n in range(5)] == [False, False, False, True, True]
    assert sizes.limit("gpu0", "k0", FAST, 100, 200.0) == 64
    assert sizes.limit("gpu0", "k4", FAST, 100, 200.0) == 72


def test_a_forgotten_worker_starts_again() -> None:
    sizes = BatchSizes()
    run_full(sizes)
    sizes.memory_high("gpu0", 0.99, 0.0)
    sizes.completed("gpu1", "embed", FAST, 64, True, *NO_KNEE)
    sizes.forget_worker("gpu0")
    assert limit(sizes) == 64 and limit(sizes, worker="gpu1") == 72
    run_full(sizes)
    assert sizes.memory_high("gpu0", 0.99, 1.0) is not None, "nor does it owe a pause"


def test_the_report_has_a_row_for_what_has_run() -> None:
    sizes = BatchSizes()
    run_full(sizes)
    sizes.out_of_memory("gpu0", "embed", 200, SLOW)
    assert sizes.report() == [
        {
            "worker": "gpu0", "kernel": "embed", "class": "fast", "limit": 72, "knee": None, "failed_at": None,
            "out_of_memory": 0, "batches": 1,
        },
        {
            "worker": "gpu0", "kernel": "embed", "class": "slow", "limit": 16, "knee": None, "failed_at": 200,
            "out_of_memory": 1, "batches": 0,
        },
    ]  # fmt: skip


# Any order of reports


TIMES = st.floats(-10, 1e4) | st.just(float("nan"))
REPORTS = st.one_of(
    st.tuples(st.just("completed"), st.integers(1, 5000), st.booleans(), TIMES, TIMES),
    st.tuples(st.just("full"), st.integers(1, 60), st.floats(0, 100), st.floats(0, 10)),
    st.tuples(st.just("oom"), st.integers(1, 5000), st.none() | st.floats(0, 1e4)),
    st.tuples(st.just("memory"), st.floats(0, 1)),
    st.tuples(st.sampled_from(["reduce", "restore"])),
    st.tuples(st.just("emergency"), st.floats(0, 50)),
    st.tuples(st.just("forget")),
)


def tell(sizes: BatchSizes, report: tuple[Any, ...], ms: float, now: float) -> None:
    match report:
        case "completed", num_rows, was_full, fixed_ms, row_ms:
            sizes.completed("gpu0", "embed", ms, num_rows, was_full, fixed_ms, row_ms)
        case "full", num_batches, fixed_ms, row_ms:
            run_full(sizes, num_batches, ms, (fixed_ms, row_ms))
        case "oom", num_rows, row_time:
            before = limit(sizes, FAST if row_time is None else row_time, now=1e9)
            sizes.out_of_memory("gpu0", "embed", num_rows, row_time)
            after = limit(sizes, FAST if row_time is None else row_time, now=1e9)
            assert after <= max(1, num_rows // 2) and after <= before
        case "memory", fraction:
            sizes.memory_high("gpu0", fraction, now)
        case "reduce", *_:
            sizes.reduce("gpu0", "embed")
        case "restore", *_:
            sizes.restore("embed")
        case "emergency", seconds:
            sizes.emergency("embed", now + seconds)
        case _:
            sizes.forget_worker("gpu0")


@settings(deadline=None, max_examples=200)
@given(
    first=st.tuples(*[st.integers(1, MAX_ROWS)] * 3),
    reports=st.lists(st.tuples(REPORTS, st.sampled_from([FAST, MEDIUM, SLOW])), max_size=30),
    most=st.integers(1, 5000),
)
def test_a_limit_is_always_from_one_to_most(first: tuple[int, int, int], reports: list[Any], most: int) -> None:
    sizes = BatchSizes(first)
    for second, (report, ms) in enumerate(reports):
        tell(sizes, report, ms, float(second))
        for some_ms in (FAST, MEDIUM, SLOW):
            assert 1 <= limit(sizes, some_ms, most, now=float(second)) <= min(most, MAX_ROWS)
        assert all(1 <= row["limit"] <= MAX_ROWS for row in sizes.report())


# Closed loop


def run_worker(
    sizes: BatchSizes, num_batches: int, cap: int, fixed_ms: float, row_ms: float, most: int = MAX_ROWS
) -> tuple[list[int], int]:
    """Batches as large as they may be, on a worker that runs out of memory past `cap` rows: (their sizes, how many failed)."""
    seen, num_failed = list[int](), 0
    for _ in range(num_batches):
        rows = limit(sizes, most=most)
        seen.append(rows)
        if rows > cap:
            num_failed += 1
            sizes.out_of_memory("gpu0", "embed", rows, FAST)
        else:
            sizes.completed("gpu0", "embed", FAST, rows, rows == limit(sizes, most=most), fixed_ms, row_ms)
    return seen, num_failed


@pytest.mark.parametrize("cap", [3, 10, 40, 63, 64, 100, 150, 333, 1000, 4000])
def test_a_worker_with_little_memory_is_used_well_and_seldom_overfilled(cap: int) -> None:
    seen, num_failed = run_worker(BatchSizes(), 2000, cap, *NO_KNEE)
    assert num_failed < 0.02 * len(seen)
    settled = seen[60:]
    assert 0.7 * cap <= sorted(settled)[len(settled) // 2] <= cap
    assert sum(0.7 * cap <= rows <= cap for rows in settled) > 0.9 * len(settled)
    assert sum(settled) > 0.7 * cap * len(settled)


@pytest.mark.parametrize(("fixed_ms", "row_ms"), [(5.0, 1.0), (20.0, 1.0), (1.0, 0.3), (0.5, 1.0)])
def test_a_worker_without_a_bound_settles_at_the_knee(fixed_ms: float, row_ms: float) -> None:
    seen, _ = run_worker(BatchSizes(), 200, MAX_ROWS, fixed_ms, row_ms)
    assert seen[-1] == seen[-50] == knee(fixed_ms, row_ms, 8)
    rows = seen[-1]
    assert rows / (fixed_ms + row_ms * rows) >= 0.95 / row_ms
    assert rows <= 1.6 * 19 * fixed_ms / row_ms, "no larger than it needs to be, but for the trip"


def test_the_kernels_own_limit_holds_growth_back() -> None:
    sizes = BatchSizes()
    seen, num_failed = run_worker(sizes, 300, 100, *NO_KNEE, most=20)
    assert set(seen) == {20} and num_failed == 0
    assert limit(sizes) == 64

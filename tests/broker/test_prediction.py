"""The predictor: models per kernel and worker, the reference among them, workers that come and go, and the file."""

import contextlib
import copy
import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.scheduling.linear import MAX_MS, MIN_MS
from penstock.broker.scheduling.prediction import SHORT_SHARE, BatchLoad, Predictor

CONTEXT = b"12345678"


def load(rows: int = 1, cost_ms: float = 1.0, kernel: str = "k", context: bytes = CONTEXT, combine: str = "sum") -> BatchLoad:
    """`cost_ms` of each row; equal rows."""
    is_sum = combine == "sum"
    return BatchLoad(kernel, context, combine, rows, cost_ms * (rows if is_sum else 1), 1000.0 * (rows if is_sum else 1))


def random_load(rng: random.Random, combine: str = "sum", kernel: str = "k") -> BatchLoad:
    return load(rng.randrange(1, 33), math.exp(rng.uniform(-1.0, 3.0)), kernel, combine=combine)


def time_of(batch: BatchLoad) -> float:
    return 3.0 + 2.0 * batch.cost_ms + 0.1 * batch.num_rows


def train(
    predictor: Predictor, rng: random.Random, count: int, worker: str = "w", device: str = "cpu", slow: float = 1.0
) -> None:
    for _ in range(count):
        batch = random_load(rng)
        predictor.observe(batch, worker, device, slow * time_of(batch) * math.exp(rng.gauss(0.0, 0.05)))


def away(predictor: Predictor, worker: str, slow: float = 1.0) -> float:
    """The mean relative error of batch times."""
    rng = random.Random(99)
    loads = [random_load(rng) for _ in range(100)]
    return sum(abs(predictor.batch_ms(b, worker)[0] / (slow * time_of(b)) - 1.0) for b in loads) / len(loads)


def test_before_anything_is_measured_the_declared_cost_counts() -> None:
    predictor = Predictor()
    guess = predictor.estimate("k", CONTEXT, 7.0, 10.0)
    assert (guess.mean_ms, guess.q95) == (7.0, 2.0)
    assert predictor.estimate("k", CONTEXT, [7.0, 0.0, math.nan], 10.0).mean_ms == [7.0, 0.01, 0.01]
    assert predictor.batch_ms(load(4, 2.0), "w") == (8.0, 16.0)
    assert predictor.slowness("k", "w") == 1.0
    assert predictor.fixed_and_row_ms("k", "w") == (0.0, 0.0)
    assert not predictor.is_known("k")


def test_a_kernel_is_known_after_20_batches() -> None:
    predictor, rng = Predictor(), random.Random(1)
    train(predictor, rng, 19)
    assert not predictor.is_known("k")
    train(predictor, rng, 1)
    assert predictor.is_known("k")


def test_observe_returns_what_was_predicted_before() -> None:
    predictor, rng = Predictor(), random.Random(2)
    for _ in range(100):
        batch = random_load(rng)
        before = predictor.batch_ms(batch, "w")[0]
        assert predictor.observe(batch, "w", "cpu", time_of(batch)) == before


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_batches_and_tasks_alone_are_predicted(combine: str) -> None:
    predictor, rng = Predictor(), random.Random(3)
    for _ in range(800):
        batch = random_load(rng, combine)
        predictor.observe(batch, "w", "cpu", time_of(batch) * math.exp(rng.gauss(0.0, 0.05)))
    alone = load(1, 5.0, combine=combine)
    guess = predictor.estimate("k", CONTEXT, 5.0, 1000.0)
    assert guess.mean_ms == pytest.approx(time_of(alone), rel=0.08)
    assert guess.q95 == pytest.approx(math.exp(1.645 * 0.05), rel=0.05)
    each = predictor.estimate("k", CONTEXT, [5.0, 15.0], 1000.0).mean_ms
    assert isinstance(each, list)
    assert each == pytest.approx([13.1, 33.1], rel=0.08)
    many = load(16, 5.0, combine=combine)
    mean_ms, q95_ms = predictor.batch_ms(many, "w")
    assert mean_ms == pytest.approx(time_of(many), rel=0.08)
    assert q95_ms == pytest.approx(mean_ms * guess.q95)


def test_a_worker_three_times_slower_is_found() -> None:
    predictor, rng = Predictor(), random.Random(4)
    train(predictor, rng, 300, "fast")
    train(predictor, rng, 5, "slow", "cpu2", slow=3.0)
    assert away(predictor, "slow", slow=3.0) < 0.15  # its own model is still cold
    train(predictor, rng, 100, "slow", "cpu2", slow=3.0)
    assert predictor.slowness("k", "slow") == pytest.approx(3.0, rel=0.1)
    assert predictor.slowness("k", "fast") == 1.0
    assert predictor.slowness("k", "nobody") == 1.0
    assert away(predictor, "slow", slow=3.0) < 0.1
    assert away(predictor, "fast") < 0.08


def test_keys_that_the_reference_never_met_say_nothing_about_slowness() -> None:
    predictor, rng = Predictor(), random.Random(15)
    train(predictor, rng, 600, "a")
    train(predictor, rng, 50, "b", "cpu2", slow=2.0)
    for _ in range(100):
        predictor.observe(load(4, context=b"only b"), "b", "cpu2", 1000.0)
    assert predictor.slowness("k", "b") == pytest.approx(2.0, rel=0.1)


def test_the_reference_changes_only_for_a_worker_with_twice_as_many_samples() -> None:
    predictor, rng = Predictor(), random.Random(5)
    train(predictor, rng, 100, "first")
    train(predictor, rng, 190, "second", "cpu2", slow=3.0)
    assert predictor.slowness("k", "second") == pytest.approx(3.0, rel=0.1)
    train(predictor, rng, 30, "second", "cpu2", slow=3.0)
    assert predictor.slowness("k", "second") == 1.0
    assert predictor.slowness("k", "first") == pytest.approx(1 / 3.0, rel=0.1)
    train(predictor, rng, 200, "first")
    assert predictor.slowness("k", "first") == pytest.approx(1 / 3.0, rel=0.1)
    [row] = [r for r in predictor.report() if r["is_reference"]]
    assert row["worker"] == "second"


def test_when_the_reference_leaves_the_next_one_takes_its_place() -> None:
    predictor, rng = Predictor(), random.Random(6)
    train(predictor, rng, 300, "a")
    train(predictor, rng, 100, "b", "cpu2", slow=2.0)
    predictor.forget_worker("a")
    assert predictor.slowness("k", "b") == 1.0
    assert predictor.estimate("k", CONTEXT, 5.0, 1000.0).mean_ms == pytest.approx(2 * 13.1, rel=0.1)
    predictor.forget_worker("b")
    predictor.forget_worker("b")
    assert predictor.is_known("k")
    assert predictor.estimate("k", CONTEXT, 5.0, 1000.0).mean_ms == pytest.approx(2 * 13.1, rel=0.1)


def test_a_cold_worker_does_not_replace_a_reference_that_is_gone() -> None:
    predictor, rng = Predictor(), random.Random(7)
    train(predictor, rng, 300, "a")
    predictor.forget_worker("a")
    train(predictor, rng, 1, "b", "cpu2")
    assert predictor.is_known("k")
    assert predictor.estimate("k", CONTEXT, 5.0, 1000.0).mean_ms == pytest.approx(13.1, rel=0.1)


def test_a_new_worker_starts_from_what_is_known_of_its_kind_of_device() -> None:
    predictor, rng = Predictor(), random.Random(8)
    train(predictor, rng, 300, "a", "gpu")
    train(predictor, rng, 300, "b", "cpu", slow=10.0)
    predictor.add_worker("c", "cpu")
    assert away(predictor, "c", slow=10.0) < 0.1  # beside a live one
    train(predictor, rng, 50, "c", "cpu", slow=20.0)
    assert away(predictor, "b", slow=10.0) < 0.1  # which it does not touch
    predictor.forget_worker("b")
    predictor.forget_worker("c")
    predictor.add_worker("d", "gpu")
    predictor.forget_worker("a")
    predictor.add_worker("e", "gpu")
    assert away(predictor, "e") < 0.1  # after the last one


def test_of_short_batches_one_in_eight_is_learned() -> None:
    predictor = Predictor()
    for i in range(200 + 8000):
        predictor.observe(load(1, 1.0, context=b"%d" % (i % 8)), "w", "cpu", 0.5)
    [row] = predictor.report()
    assert row["samples"] == pytest.approx(200 + 8000 * SHORT_SHARE, abs=5)
    contexts = predictor._kernels["k"].reference._contexts.values()
    assert [found.times[1][2] for found in contexts] == pytest.approx([150.0] * 8, abs=10)  # though they come in turns
    before = row["samples"]
    for _ in range(100):
        predictor.observe(load(1, 1.0), "w", "cpu", 5.0)
    assert predictor.report()[0]["samples"] == before + 100  # no longer short


@pytest.mark.parametrize("ms", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e10])
def test_what_is_no_time_is_ignored_and_counted(ms: float) -> None:
    predictor, rng = Predictor(), random.Random(9)
    train(predictor, rng, 100)
    before = json.dumps(predictor.dump())
    assert predictor.observe(load(4), "w", "cpu", ms) == predictor.batch_ms(load(4), "w")[0]
    assert predictor.num_ignored == 1
    assert json.dumps(predictor.dump()) == before


def test_complexity_is_the_rank_among_the_times_of_tasks_alone() -> None:
    predictor, rng = Predictor(), random.Random(10)
    for _ in range(4000):
        kernel = rng.choice(("short", "long"))
        cost = 10.0 if kernel == "short" else 1000.0
        predictor.observe(load(8, cost, kernel), "w", "cpu", 8 * cost)
    assert predictor.complexity(1.0) == pytest.approx(1.0, abs=0.1)
    assert predictor.complexity(100.0) == pytest.approx(5.5, abs=0.3)
    assert predictor.complexity(5000.0) == pytest.approx(10.0, abs=0.1)


def test_fixed_and_row_parts_belong_to_the_worker() -> None:
    predictor, rng = Predictor(), random.Random(11)
    for _ in range(400):
        rows = rng.randrange(1, 33)
        predictor.observe(load(rows, 1.0), "w", "cpu", 10.0 + rows)
        predictor.observe(load(rows, 1.0), "v", "gpu", 1.0 + 0.1 * rows)
    assert predictor.fixed_and_row_ms("k", "w") == pytest.approx((10.0, 1.0), rel=0.15)
    assert predictor.fixed_and_row_ms("k", "v") == pytest.approx((1.0, 0.1), rel=0.15)
    assert predictor.fixed_and_row_ms("k", "nobody") == predictor.fixed_and_row_ms("k", "w")


def test_the_report_scores_before_it_learns() -> None:
    predictor = Predictor()
    predictor.edges_ms = [10.0]
    predictor.observe(load(1, 8.0), "w", "cpu", 40.0)
    [row] = predictor.report()
    assert row["mape"] == pytest.approx(0.8)
    assert (row["coverage"], row["faster"]) == (0.0, 0.0)
    assert row["last"] == [8.0, 16.0, 40.0]
    assert (row["kernel"], row["worker"], row["device"], row["samples"]) == ("k", "w", "cpu", 1)


def test_a_restart_predicts_as_before() -> None:
    predictor, rng = Predictor(), random.Random(12)
    train(predictor, rng, 300, "a", "cpu")
    train(predictor, rng, 300, "b", "gpu", slow=0.2)
    saved = json.loads(json.dumps(predictor.dump()))
    again = Predictor()
    again.restore(saved)
    assert again.is_known("k")
    assert again.complexity(20.0) == pytest.approx(predictor.complexity(20.0), abs=0.1)
    again.add_worker("c", "gpu")
    again.add_worker("d", "cpu")
    for _ in range(50):
        batch = random_load(rng)
        assert again.batch_ms(batch, "c") == pytest.approx(predictor.batch_ms(batch, "b"), rel=3e-3)
        assert again.batch_ms(batch, "d") == pytest.approx(predictor.batch_ms(batch, "a"), rel=3e-3)


def test_the_file_has_one_model_per_kernel_and_device() -> None:
    predictor, rng = Predictor(), random.Random(13)
    train(predictor, rng, 100, "a", "cpu")
    train(predictor, rng, 50, "b", "cpu")
    predictor.forget_worker("b")
    train(predictor, rng, 30, "c", "gpu")
    saved = predictor.dump()
    assert {(m["kernel"], m["device"], m["samples"]) for m in saved["models"]} == {("k", "cpu", 150), ("k", "gpu", 30)}


def saved_of(count: int) -> dict[str, Any]:
    predictor, rng = Predictor(), random.Random(14)
    train(predictor, rng, count)
    saved: dict[str, Any] = json.loads(json.dumps(predictor.dump()))
    return saved


@pytest.mark.parametrize("saved", [None, [], {}, {"version": 99, "models": []}, {"version": 1}, {"version": 1, "models": {}}])
def test_a_file_of_another_kind_is_refused(saved: Any) -> None:
    with pytest.raises(ValueError, match="version 1"):
        Predictor().restore(saved)


def test_what_is_unusable_in_a_file_is_skipped_and_told() -> None:
    saved = saved_of(100)
    saved["models"] = [{"kernel": "x", "device": "y"}, *saved["models"], "nonsense"]
    predictor = Predictor()
    with pytest.raises(ValueError, match="2 of the saved predictions are unusable"):
        predictor.restore(saved)
    assert predictor.is_known("k")
    assert not predictor.is_known("x")


JUNK = [None, "text", -1, math.nan, math.inf, 1e300, [], {}, [[1, 2], 3], [1, [1e99] * 4, [2]], True]


@given(st.sampled_from([5, 60]), st.data())
def test_a_damaged_file_never_breaks_predictions(count: int, data: st.DataObject) -> None:
    saved = copy.deepcopy(SAVED[count])
    model = saved["models"][0]
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = model
        key: Any = data.draw(st.sampled_from(sorted(model)))
        while isinstance(place[key], list | dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = (
                data.draw(st.sampled_from(sorted(place)))
                if isinstance(place, dict)
                else data.draw(st.integers(0, len(place) - 1))
            )
        place[key] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
    predictor = Predictor()
    with contextlib.suppress(ValueError):
        predictor.restore(saved)
    predictor.add_worker("w", "cpu")
    for rows in (1, 30):
        mean_ms, q95_ms = predictor.batch_ms(load(rows), "w")
        assert MIN_MS <= mean_ms <= q95_ms < math.inf
        predictor.observe(load(rows), "w", "cpu", 5.0)
        predictor.estimate("k", CONTEXT, 3.0, 100.0)


SAVED = {count: saved_of(count) for count in (5, 60)}

numbers = st.one_of(st.floats(), st.sampled_from([0.0, 1e9, 1e-9, -1.0]))
batches = st.builds(
    BatchLoad,
    st.sampled_from(["k", "l"]),
    st.binary(max_size=1),
    st.sampled_from(["sum", "max"]),
    st.integers(1, 4096),
    numbers,
    numbers,
)
events = st.one_of(
    st.tuples(st.just("observe"), batches, st.sampled_from(["a", "b", "c"]), numbers),
    st.tuples(st.just("forget"), st.sampled_from(["a", "b", "c"])),
    st.tuples(st.just("add"), st.sampled_from(["a", "b", "c"])),
)


@given(st.lists(events, max_size=80))
def test_whatever_comes_predictions_are_positive_and_finite(history: list[tuple[Any, ...]]) -> None:
    predictor = Predictor()
    for event in history:
        if event[0] == "forget":
            predictor.forget_worker(event[1])
        elif event[0] == "add":
            predictor.add_worker(event[1], "device of " + event[1])
        else:
            _, batch, worker, ms = event
            assert MIN_MS <= predictor.observe(batch, worker, "device of " + worker, ms) <= MAX_MS
            mean_ms, q95_ms = predictor.batch_ms(batch, worker)
            assert MIN_MS <= mean_ms <= q95_ms < math.inf
            guess = predictor.estimate(batch.kernel, batch.context, [batch.cost_ms, 1.0], batch.num_bytes)
            assert isinstance(guess.mean_ms, list)
            assert all(MIN_MS <= each <= MAX_MS for each in guess.mean_ms)
            assert 0.0 < predictor.slowness(batch.kernel, worker) < math.inf
            assert all(0.0 <= part < math.inf for part in predictor.fixed_and_row_ms(batch.kernel, worker))
    again = Predictor()
    again.restore(json.loads(json.dumps(predictor.dump())))
    assert sum(row["is_reference"] for row in predictor.report()) <= 2


def test_kernels_are_bounded() -> None:
    predictor = Predictor()
    for i in range(1100):
        predictor.observe(load(kernel=f"k{i}"), "w", "cpu", 1.0)
    assert len(predictor._kernels) <= 1024
    predictor.forget_worker("w")
    assert len(predictor._archive) <= 512

"""One model of one kernel on one worker: does it find the times that a kernel takes, and keep to them."""

import json
import math
import random
from collections.abc import Callable
from statistics import mean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.scheduling.cold_start import NUM_FIRST
from penstock.broker.scheduling.corrections import Correction, Curve, Quantile
from penstock.broker.scheduling.linear import MAX_MS, MIN_MS, Linear
from penstock.broker.scheduling.models import MAX_CONTEXTS, Features, Model

CONTEXT = b"12345678"
Time = Callable[[Features], float]


def feed(model: Model, loads: list[Features], time: Time) -> list[float]:
    """Predict, then learn; log(predicted / true) of each."""
    errors = []
    for load in loads:
        predicted = model.predict(*load)
        measured = time(load)
        model.learn(load, measured, predicted)
        errors.append(math.log(predicted / measured))
    return errors


def noisy(rng: random.Random, exact: Time, sigma: float = 0.1) -> Time:
    return lambda load: exact(load) * math.exp(rng.gauss(0.0, sigma))


def loads(rng: random.Random, count: int, contexts: int = 1) -> list[Features]:
    """Batches whose rows differ in size, so that bytes, cost and rows all vary."""
    made = []
    for _ in range(count):
        rows = rng.randrange(1, 33)
        size = math.exp(rng.uniform(6.0, 12.0))
        made.append((b"%08d" % rng.randrange(contexts), rows * (0.05 + 1e-5 * size), rows * size, rows))
    return made


def away(model: Model, exact: Time, tried: list[Features]) -> float:
    """The mean relative error against times without noise."""
    return mean(abs(model.predict(*load) / exact(load) - 1.0) for load in tried)


def linear_time(load: Features) -> float:
    _, cost_ms, num_bytes, num_rows = load
    return 2.0 + 3.0 * cost_ms + 2e-6 * num_bytes + 0.2 * num_rows


def test_linear_times_are_found() -> None:
    rng = random.Random(1)
    model, tried = Model(), loads(rng, 200)
    feed(model, loads(rng, 600), noisy(rng, linear_time))
    assert away(model, linear_time, tried) < 0.08


def test_times_that_grow_faster_than_the_declared_cost_are_found() -> None:
    """n^3 where n^2 was declared, and a cliff where a cache ends."""

    def cubic(load: Features) -> float:
        return 0.3 * load[1] ** 1.5 * (1.0 if load[1] < 8.0 else 1.6)

    rng = random.Random(2)
    model = Model()
    feed(model, loads(rng, 1000), noisy(rng, cubic))
    tried = [load for load in loads(rng, 300) if not 5.0 < load[1] < 13.0]  # the cliff itself has no width
    assert away(model, cubic, tried) < 0.1


def test_many_small_rows_are_told_from_a_few_large_ones_of_the_same_cost() -> None:
    """Copies that a single row saves: no line through the number of rows shows that."""

    def copied(load: Features) -> float:
        return load[1] * (1.0 if load[3] == 1 else 1.6)

    rng = random.Random(20)
    model = Model()
    many = [(CONTEXT, math.exp(rng.uniform(0.0, 4.0)), 1e5, rng.choice((1, 1, 2, 4, 9))) for _ in range(1500)]
    feed(model, many, noisy(rng, copied))
    for rows in (1, 2, 8):
        tried = [(CONTEXT, 1.5 * 2**i, 1e5, rows) for i in range(5)]
        assert mean(model.predict(*load) / copied(load) for load in tried) == pytest.approx(1.0, abs=0.08)


def test_statics_that_nobody_declared_are_found() -> None:
    """Ten batch keys, whose times differ by a factor of 100."""

    def by_context(load: Features) -> float:
        return linear_time(load) * 100.0 ** (int(load[0]) / 9.0)

    rng = random.Random(3)
    model, tried = Model(), loads(rng, 300, contexts=10)
    feed(model, loads(rng, 2000, contexts=10), noisy(rng, by_context))
    assert away(model, by_context, tried) < 0.08


def test_a_batch_that_comes_again_has_its_own_time() -> None:
    """Rows of one shape: three rows take longer than four, as with matrix products; no smooth curve has that."""
    steps = {1: 7.0, 2: 9.0, 3: 20.0, 4: 10.0, 5: 11.0}
    rng = random.Random(4)
    model = Model()
    again = [(CONTEXT, 0.5 * rows, 1024.0 * rows, rows) for rows in (rng.randrange(1, 6) for _ in range(400))]
    feed(model, again, noisy(rng, lambda load: steps[load[3]]))
    for rows, ms in steps.items():
        assert model.predict(CONTEXT, 0.5 * rows, 1024.0 * rows, rows) == pytest.approx(ms, rel=0.1)


def test_the_cold_start_goes_from_the_declared_cost_to_means_per_octave_to_the_model() -> None:
    model = Model()
    assert model.predict(CONTEXT, 3.0, 100.0, 1) == 3.0
    feed(model, [(CONTEXT, 3.0, 100.0, 1)] * 4, lambda load: 30.0)
    assert model.predict(CONTEXT, 3.5, 100.0, 1) == pytest.approx(35.0)  # the same octave: the mean of ratios
    feed(model, [(CONTEXT, 300.0, 100.0, 1)] * 4, lambda load: 600.0)
    assert model.predict(CONTEXT, 400.0, 100.0, 1) == pytest.approx(800.0)
    assert model.predict(CONTEXT, 3.0, 100.0, 1) == pytest.approx(30.0)
    assert 2.0 < model.predict(CONTEXT, 40.0, 100.0, 1) / 40.0 < 10.0  # an octave never seen: the mean of all
    assert not model.is_warm
    feed(model, loads(random.Random(5), NUM_FIRST - 8), linear_time)
    assert model.is_warm


def test_the_first_model_fits_the_first_samples() -> None:
    rng = random.Random(6)
    model, tried = Model(), loads(rng, 100)
    feed(model, loads(rng, NUM_FIRST), linear_time)
    assert away(model, linear_time, tried) < 0.25


@pytest.mark.parametrize("contexts", [1, 8])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_times_that_change_are_followed_within_100_samples(contexts: int, factor: float) -> None:
    rng = random.Random(7)
    model, tried = Model(), loads(rng, 200, contexts)
    feed(model, loads(rng, 1000, contexts), noisy(rng, linear_time))
    feed(model, loads(rng, 100, contexts), noisy(rng, lambda load: factor * linear_time(load)))
    assert away(model, lambda load: factor * linear_time(load), tried) < 0.15


def test_a_neighbours_noise_moves_the_mean_by_less_than_a_tenth() -> None:
    rng = random.Random(8)

    def disturbed(load: Features) -> float:
        return linear_time(load) * math.exp(rng.gauss(0.0, 0.05)) * (5.0 if rng.random() < 0.2 else 1.0)

    for repeated in (False, True):
        model, tried = Model(), loads(rng, 50)
        many = [rng.choice(tried) for _ in range(3000)] if repeated else loads(rng, 3000)
        ratios = []
        for load in many:
            predicted = model.predict(*load)
            ratios.append(math.log(predicted / linear_time(load)))
            model.learn(load, disturbed(load), predicted)
        assert -0.03 < mean(ratios[1000:]) < math.log(1.1)


def test_a_kernel_that_is_always_called_alike_stays_sane() -> None:
    """One shape for 20,000 batches; then others: nothing has wound up, and one is as good as before."""
    rng = random.Random(9)
    model, first = Model(), loads(rng, 300)
    feed(model, first, noisy(rng, linear_time))
    before = away(model, linear_time, first)
    same = (CONTEXT, 4.0, 5000.0, 8)
    feed(model, [same] * 20_000, noisy(rng, linear_time))
    assert model.predict(*same) == pytest.approx(linear_time(same), rel=0.05)
    assert away(model, linear_time, first) < 2.0 * before + 0.1
    assert all(0.0 <= slope < 1e6 for slope in model._linear.slopes)
    feed(model, loads(rng, 50), noisy(rng, linear_time))
    assert away(model, linear_time, first) < 0.1


def test_the_linear_part_forgets_only_where_it_learns() -> None:
    """20,000 equal samples: what is uncertain in other directions stays so, and does not grow; then a new slope is followed."""
    rng = random.Random(17)

    def sample(factor: float) -> tuple[float, float, int, float]:
        _, cost_ms, num_bytes, num_rows = loads(rng, 1)[0]
        return cost_ms, num_bytes, num_rows, factor * linear_time((b"", cost_ms, num_bytes, num_rows))

    def learn(cost_ms: float, num_bytes: float, num_rows: int, ms: float) -> None:
        base_ms = linear.ms(cost_ms, num_bytes, num_rows)
        linear.learn(cost_ms, num_bytes, num_rows, base_ms, math.log(ms / base_ms))

    linear = Linear([sample(1.0) for _ in range(20)])
    before = linear._covariance
    for _ in range(20_000):
        learn(4.0, 5000.0, 8, linear_time((b"", 4.0, 5000.0, 8)))
    trace_before, trace_after = (sum(c[i] for i in (0, 4, 7, 9)) for c in (before, linear._covariance))
    assert 0.1 * trace_before < trace_after < trace_before + 0.01
    for _ in range(1000):
        learn(*sample(2.0))
    for cost_ms, num_bytes, num_rows, ms in (sample(2.0) for _ in range(20)):
        assert linear.ms(cost_ms, num_bytes, num_rows) == pytest.approx(ms, rel=0.15)


def test_batch_keys_unlike_the_others_do_not_move_them() -> None:
    rng = random.Random(18)
    model, tried = Model(), loads(rng, 100)
    feed(model, loads(rng, 500), noisy(rng, linear_time))
    foreign = [(b"foreign%d" % i, *load[1:]) for i, load in enumerate(loads(rng, 30))]
    feed(model, foreign, lambda load: 1000.0 * linear_time(load))
    assert away(model, linear_time, tried) < 0.25


def test_first_calls_that_take_long_do_not_count() -> None:
    correction = Correction(Curve(0, 0.0))
    for ms in (500.0, 100.0, 102.0, 400.0, 99.0):
        correction.note(1, 1.0, math.log(ms), 0.2)
    assert math.exp(correction.times[1][1]) == pytest.approx(102.0)
    for _ in range(100):
        correction.note(1, 1.0, math.log(120.0), 0.2)
    assert math.exp(correction.times[1][1]) == pytest.approx(120.0, rel=0.01)
    for ms in (400.0, 400.0, 400.0, 120.0):
        correction.note(1, 1.0, math.log(ms), 0.2)
    assert math.exp(correction.times[1][1]) < 130.0  # a neighbour
    for ms in (40.0, 40.0, 40.0, 42.0, 41.0):
        correction.note(1, 1.0, math.log(ms), 0.2)
    assert math.exp(correction.times[1][1]) == pytest.approx(41.0, rel=0.03)  # another machine
    correction.note(1, 2.0, math.log(7.0), 0.2)
    assert correction.times[1][:3] == [2.0, math.log(7.0), 1.0]


def test_where_only_full_batches_are_seen_time_is_in_proportion_to_the_cost() -> None:
    """What a task alone takes is then a guess; the best one is that nothing is fixed."""
    model = Model()
    feed(model, [(CONTEXT, 16.0, 32_000.0, 32)] * 500, noisy(random.Random(10), lambda load: 64.0))
    assert model.predict(CONTEXT, 0.5, 1000.0, 1) == pytest.approx(2.0, rel=0.5)


def test_the_fixed_part_and_the_part_per_row_are_told_apart() -> None:
    rng = random.Random(11)
    model = Model()
    many = [(CONTEXT, 0.5 * rows, 1000.0 * rows, rows) for rows in (rng.randrange(1, 33) for _ in range(500))]
    feed(model, many, noisy(rng, lambda load: 10.0 + 0.5 * load[3], 0.02))
    fixed_ms, row_ms = model.fixed_and_row_ms()
    assert fixed_ms == pytest.approx(10.0, rel=0.1)
    assert row_ms == pytest.approx(0.5, rel=0.1)


def test_the_quantile_is_exceeded_one_time_in_twenty_whatever_the_distribution() -> None:
    rng = random.Random(12)
    draws: list[Callable[[], float]] = [
        lambda: rng.gauss(0.0, 0.1), lambda: rng.gauss(0.0, 1.0), lambda: math.log(rng.expovariate(1.0) + 1e-9),
        lambda: 1.5 if rng.random() < 0.2 else 0.0,
    ]  # fmt: skip
    for draw in draws[:3]:
        tracker, exceeded = Quantile(), 0
        for _ in range(20_000):
            ratio = draw()
            exceeded += ratio > math.log(tracker.factor)
            tracker.learn(ratio)
        assert exceeded / 20_000 == pytest.approx(0.05, abs=0.005)
    tracker = Quantile()
    for _ in range(2000):
        tracker.learn(draws[3]())
    assert 1.0 <= tracker.factor < 10.0


def test_short_and_long_times_spread_apart() -> None:
    rng = random.Random(19)
    model = Model()

    def time(load: Features) -> float:
        return load[1] * math.exp(rng.gauss(0.0, 0.3 if load[1] < 4.0 else 0.03))

    for cost_ms, other in ((1.0, 50.0), (50.0, 1.0)):
        model = Model()
        feed(model, [(CONTEXT, cost_ms, 0.0, 1)] * 400, time)
        assert model.q95.factor(other) == model.q95.factor(cost_ms)  # none of the other kind yet
        factors = []
        for _ in range(1500):
            feed(model, [(CONTEXT, rng.choice((1.0, 50.0)), 0.0, 1)], time)
            factors.append((model.q95.factor(1.0), model.q95.factor(50.0)))
        short, long = (math.log(median(column)) for column in zip(*factors[500:], strict=True))
        assert short == pytest.approx(1.645 * 0.3, rel=0.25)
        assert long == pytest.approx(1.645 * 0.03, rel=0.4)
        assert model.q95.factor_of_all([50.0, 1.0, 70.0]) == model.q95.factor(1.0)


def test_a_list_of_costs_is_predicted_as_one_by_one() -> None:
    rng = random.Random(13)
    model = Model()
    costs = [0.0, 1e-9, 0.3, 1.7, 20.0, 1e6, math.inf, math.nan, -1.0]
    for count in (0, 5, 500):
        feed(model, loads(rng, count, contexts=3), linear_time)
        for context in (b"00000000", b"unknown"):
            alone = [model.predict(context, cost, 700.0, 1) for cost in costs]
            assert model.predict_each(context, costs, 700.0) == pytest.approx(alone, rel=1e-9)


def test_a_dump_is_small_and_predicts_the_same() -> None:
    rng = random.Random(14)
    for count, contexts in ((0, 1), (7, 1), (300, 1), (3000, 2)):
        model, tried = Model(), loads(rng, 50, contexts)
        feed(model, loads(rng, count, contexts), noisy(rng, linear_time))
        text = json.dumps(model.dump())
        assert len(text) <= 1100
        restored = Model.restore(json.loads(text))
        assert restored.num_samples == model.num_samples
        assert restored.q95.factor(1.0) == pytest.approx(model.q95.factor(1.0), rel=1e-3)
        for load in tried:
            assert restored.predict(*load) == pytest.approx(model.predict(*load), rel=2e-3)


def test_the_dump_of_a_model_with_many_batch_keys_keeps_the_last_ones() -> None:
    rng = random.Random(15)
    model = Model()
    feed(model, loads(rng, 3000, contexts=60), noisy(rng, lambda load: linear_time(load) * (1 + int(load[0]))))
    assert len(json.dumps(model.dump())) <= 1100
    last = next(reversed(model._contexts))
    assert Model.restore(model.dump()).knows(last)


def test_a_copy_learns_on_its_own() -> None:
    rng = random.Random(16)
    for count in (10, 200):
        model = Model()
        feed(model, loads(rng, count), linear_time)
        load = loads(rng, 1)[0]
        before = model.predict(*load)
        copy = model.copy()
        assert copy.predict(*load) == before
        feed(copy, loads(rng, 100), lambda load: 9.0 * linear_time(load))
        assert model.predict(*load) == before


def test_batch_keys_and_their_times_are_bounded() -> None:
    model = Model()
    feed(model, [(b"%08d" % i, 1.0 + i % 7, 10.0, 1 + i % 50) for i in range(1000)], linear_time)
    assert len(model._contexts) == MAX_CONTEXTS
    correction = Correction(Curve(0, 0.0))
    for rows in range(1000):
        correction.note(rows, 1.0, 0.0, 1.0)
    assert len(correction.times) <= 32


def test_a_curve_is_straight_between_knots_and_flat_beyond() -> None:
    curve = Curve(5, 0.0)
    for place in (5.0, 6.0, 7.0):
        for _ in range(200):
            curve.learn(place, place - curve.at(place), 10.0)
    assert curve.at(5.5) == pytest.approx(5.5, abs=0.01)
    assert curve.at(6.25) == pytest.approx(6.25, abs=0.01)
    assert curve.at(2.0) == curve.at(5.0)
    assert curve.at(40.0) == curve.at(8.0)


anything = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1e-300, 1e9, 1e15, -1.0]))
samples = st.tuples(
    st.sampled_from([b"a", b"b"]), st.floats(0.01, 1e12), st.floats(0.0, 1e15), st.integers(1, 4096), st.floats(MIN_MS, MAX_MS)
)


@given(st.lists(samples, max_size=60), st.lists(st.tuples(st.sampled_from([b"a", b"c"]), anything, anything), min_size=1))
def test_whatever_is_learned_predictions_are_positive_and_finite(
    learned: list[tuple[bytes, float, float, int, float]], asked: list[tuple[bytes, float, float]]
) -> None:
    model = Model()
    for *load, measured in learned:
        features: Features = tuple(load)  # type: ignore[assignment]
        model.learn(features, measured, model.predict(*features))
    for model_or_copy in (model, Model.restore(json.loads(json.dumps(model.dump())))):
        for context, cost_ms, num_bytes in asked:
            for rows in (1, 4096):
                assert MIN_MS <= model_or_copy.predict(context, cost_ms, num_bytes, rows) <= MAX_MS
        assert all(MIN_MS <= ms <= MAX_MS for ms in model_or_copy.predict_each(b"a", [c for _, c, _ in asked], 1e3))
        assert all(0.0 <= ms < math.inf for ms in model_or_copy.fixed_and_row_ms())
        assert 1.0 <= model_or_copy.q95.factor_of_all([1.0, 1e3]) < 30.0


@given(st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(0.0, 1e9), st.integers(1, 512), st.floats(-3.0, 3.0)), max_size=300))
def test_least_squares_never_lose_their_footing(steps: list[tuple[float, float, int, float]]) -> None:
    linear = Linear([(1.0, 100.0, 1, 2.0), (8.0, 500.0, 4, 9.0)])
    for cost_ms, num_bytes, num_rows, residual in steps:
        linear.learn(cost_ms, num_bytes, num_rows, linear.ms(cost_ms, num_bytes, num_rows), residual)
        assert all(0.0 <= slope < math.inf for slope in linear.slopes)
        assert all(math.isfinite(entry) for entry in linear._covariance)
        assert all(linear._covariance[i] > -1e-9 for i in (0, 4, 7, 9)), "a variance is negative"

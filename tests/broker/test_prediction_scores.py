"""The figures that say how good predictions are, on sequences whose answer is known."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.scheduling.scores import MEMORY, BucketMean, LastValue, MaxOfTen, Ranks, Scores


def test_scores_of_a_known_sequence() -> None:
    scores = Scores()
    scores.add(10.0, 15.0, 12.5, [13.0, 20.0])  # 20 % too low, covered, put into a slower bin
    scores.add(10.0, 11.0, 10.0, [13.0, 20.0])  # exact, covered, right bin
    scores.add(10.0, 12.0, 25.0, [13.0, 20.0])  # 60 % too low, above q95, put into a faster bin
    scores.add(20.0, 30.0, 25.0, [13.0, 20.0])  # 20 % too low, covered, right bin
    assert scores.num_batches == 4
    assert scores.mape == pytest.approx((0.2 + 0.0 + 0.6 + 0.2) / 4)
    assert scores.coverage == pytest.approx(3 / 4)
    assert scores.bin_accuracy == pytest.approx(2 / 4)
    assert scores.faster == pytest.approx(1 / 4)
    assert scores.bias == pytest.approx(math.log((10 / 12.5) * (10 / 25) * (20 / 25)) / 4)
    assert scores.last == (20.0, 30.0, 25.0)
    assert scores.report()["last"] == [20.0, 30.0, 25.0]


def test_old_scores_fade() -> None:
    scores = Scores()
    for _ in range(1000):
        scores.add(10.0, 20.0, 20.0)
    for _ in range(int(3 * MEMORY)):
        scores.add(10.0, 20.0, 10.0)
    assert scores.mape == pytest.approx(0.5 * math.exp(-3), rel=0.02)


def test_the_classic_bins_are_the_ones_to_begin_with() -> None:
    scores = Scores()
    scores.add(90.0, 99.0, 101.0)
    assert (scores.bin_accuracy, scores.faster) == (0.0, 1.0)
    scores = Scores()
    scores.add(90.0, 101.0, 120.0)
    assert (scores.bin_accuracy, scores.faster) == (1.0, 0.0)


def test_the_rank_of_a_time_is_its_complexity() -> None:
    ranks, rng = Ranks(), random.Random(1)
    for _ in range(4000):
        ranks.add(math.exp(rng.uniform(math.log(1.0), math.log(1000.0))))
    assert ranks.score(0.5) == pytest.approx(1.0, abs=0.05)
    assert ranks.score(2000.0) == pytest.approx(10.0, abs=0.05)
    assert ranks.score(math.sqrt(1000.0)) == pytest.approx(5.5, abs=0.3)
    assert ranks.score(100.0) == pytest.approx(7.0, abs=0.3)


def test_before_anything_is_known_longer_is_still_more_complex() -> None:
    scores = [Ranks().score(10.0**exponent) for exponent in range(-1, 6)]
    assert scores == sorted(scores)
    assert 1.0 <= scores[0] < 1.5
    assert 9.5 < scores[-1] <= 10.0


def test_the_histogram_forgets() -> None:
    ranks = Ranks()
    for _ in range(5000):
        ranks.add(1.0)
    for _ in range(30_000):  # far enough for the weights to be scaled back
        ranks.add(1000.0)
    assert ranks.score(999.0) == pytest.approx(5.5, abs=0.1)
    assert ranks.score(500.0) == pytest.approx(1.0, abs=0.1)
    other = Ranks()
    other.restore(ranks.dump())
    assert other.score(999.0) == pytest.approx(ranks.score(999.0), abs=0.01)


@given(st.lists(st.floats(1e-3, 1e9), max_size=50), st.lists(st.floats(allow_nan=False), min_size=2, max_size=5))
def test_a_score_is_from_1_to_10_and_grows_with_time(times: list[float], asked: list[float]) -> None:
    ranks = Ranks()
    for ms in times:
        ranks.add(ms)
    scores = [ranks.score(ms) for ms in sorted(asked)]
    assert scores == sorted(scores)
    assert all(1.0 <= score <= 10.0 for score in scores)


@pytest.mark.parametrize("saved", [{"-1": 0.5}, {"400": 0.5}, {"a": 0.5}, {"3": -1.0}, {"3": math.nan}, [1], {"3": "x"}])
def test_a_broken_histogram_is_refused(saved: dict[str, float]) -> None:
    ranks = Ranks()
    before = ranks.score(5.0)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        ranks.restore(saved)
    assert ranks.score(5.0) == before


def test_the_maximum_of_the_last_ten_is_exceeded_one_time_in_eleven() -> None:
    """Clockwork's bound, on independent times: 9.1 %."""
    rng, bound, exceeded, count = random.Random(2), MaxOfTen(), 0, 100_000
    for i in range(count + 10):
        ms = rng.lognormvariate(1.0, 0.3)
        predicted = bound.predict("key", 1.0)
        exceeded += i >= 10 and predicted is not None and ms > predicted
        bound.learn("key", 1.0, ms)
    assert exceeded / count == pytest.approx(1 / 11, abs=0.003)


def test_baselines_keep_keys_and_octaves_apart() -> None:
    last, bucket, most = LastValue(), BucketMean(gain=0.5), MaxOfTen()
    for model in (last, bucket, most):
        assert model.predict("a", 1.0) is None
        for ms in (10.0, 20.0):
            model.learn("a", 1.0, ms)
    assert last.predict("a", 99.0) == 20.0
    assert bucket.predict("a", 1.2) == 15.0
    assert most.predict("a", 1.2) == 20.0
    for model in (bucket, most):
        assert model.predict("a", 3.0) is None
        assert model.predict("b", 1.0) is None
    for ms in range(10):
        most.learn("a", 1.0, float(ms))
    assert most.predict("a", 1.0) == 9.0

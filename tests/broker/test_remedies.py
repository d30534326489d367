"""Regressions and what is tried against them, on synthetic series in virtual time."""

import heapq
import random
from itertools import pairwise

import pytest

from penstock.broker.scheduling.remedies import EPISODE_S, Remedy, Watch

K = "embed"


class Load:
    """Workers that run one kernel's batches, one after another; times are `batch_ms` x factors x noise.

    `remedies` has (time, number of batches so far, remedy). `learning` is how far the prediction follows with every batch.
    """

    def __init__(
        self, num_workers: int = 1, seed: int = 0, sigma: float = 0.3, batch_ms: float = 50.0, num_rows: int = 32
    ) -> None:
        self.rng = random.Random(seed)
        self.watch = Watch()
        self.sigma, self.batch_ms, self.num_rows = sigma, batch_ms, num_rows
        self.factor, self.pause_ms, self.errors, self.learning = 1.0, 0.0, 0.0, 0.0
        self.slow: dict[str, float] = {}
        self.predicted = {f"w{i}": batch_ms for i in range(num_workers)}
        self.num_queued = 10_000
        self.now = self.decided_at = 100.0
        self.num_batches = 0
        self.remedies: list[tuple[float, int, Remedy]] = []
        self.ends = [(self.now, worker, 0.0) for worker in self.predicted]

    def run(self, num_batches: int) -> list[str]:
        """So many batches more; the kinds of what was decided during them."""
        before = len(self.remedies)
        for _ in range(num_batches):
            self._step()
        return [remedy.kind for _, _, remedy in self.remedies[before:]]

    def idle(self, seconds: float) -> list[str]:
        before = len(self.remedies)
        until = self.now + seconds
        while self.decided_at + 0.5 <= until:
            self._decide(self.decided_at + 0.5, {})
        self.now = until
        self.ends = [(until, worker, 0.0) for _, worker, _ in self.ends]
        return [remedy.kind for _, _, remedy in self.remedies[before:]]

    def _step(self) -> None:
        end, worker, measured_ms = heapq.heappop(self.ends)
        while self.decided_at + 0.5 <= end:
            self._decide(self.decided_at + 0.5, {K: self.num_queued})
        self.now = end
        if measured_ms:
            self.num_batches += 1
            num_failed = sum(self.rng.random() < self.errors for _ in range(self.num_rows)) if self.errors else 0
            predicted_ms = self.predicted[worker]
            self.watch.completed(K, worker, self.num_rows, measured_ms, predicted_ms, num_failed, end, 10.0 * predicted_ms)
            self.predicted[worker] += self.learning * (measured_ms - self.predicted[worker])
        next_ms = self.batch_ms * self.factor * self.slow.get(worker, 1.0) * self.rng.lognormvariate(0.0, self.sigma)
        heapq.heappush(self.ends, (end + (next_ms + self.pause_ms) / 1000.0, worker, next_ms))

    def _decide(self, now: float, queued: dict[str, int]) -> None:
        self.decided_at = now
        self.remedies += [(now, self.num_batches, remedy) for remedy in self.watch.decide(now, queued)]

    def first(self) -> Remedy:
        return self.remedies[0][2]


# --- when nothing is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_workers", "num_rows", "errors"), [(1, 32, 0.0), (1, 8, 0.005), (4, 32, 0.02), (1, 1, 0.002)])
def test_no_false_alarm_in_ten_thousand_noisy_batches(num_workers: int, num_rows: int, errors: float, seed: int) -> None:
    load = Load(num_workers, seed, num_rows=num_rows)
    load.errors = errors
    assert load.run(10_000) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("batch_ms", "sigma"), [(1.0, 0.3), (2000.0, 0.3), (50.0, 1.5), (50.0, 0.0)])
def test_nor_with_other_times_and_noise(batch_ms: float, sigma: float, seed: int) -> None:
    load = Load(2, seed, sigma=sigma, batch_ms=batch_ms)
    assert load.run(10_000) == []


def test_hiccups_are_no_regression() -> None:
    load = Load(sigma=0.02)
    for _ in range(100):
        assert load.run(50) == []
        load.factor = 20.0
        assert load.run(1) == []
        load.factor = 1.0


def test_a_stall_is_no_regression() -> None:
    load = Load(2, sigma=0.1)
    for _ in range(5):
        load.run(1000)
        load.pause_ms = 20_000.0
        load.run(1)
        load.pause_ms = 0.0
    assert load.remedies == []


def test_short_disturbances_are_no_regression() -> None:
    load = Load(sigma=0.02, batch_ms=10.0)
    load.run(2000)
    for _ in range(5):
        load.factor = 1.8
        load.run(84)
        load.factor = 1.0
        load.run(1000)
    assert load.remedies == []


def test_a_suspended_machine_does_not_blind() -> None:
    load = Load(sigma=0.1)
    load.run(200)
    load.factor = 1e5
    load.run(1)
    load.factor = 1.0
    assert load.run(200) == []
    load.factor = 1.6
    assert load.run(100) == ["reduce_batch"]


def test_another_mix_of_work_is_none() -> None:
    """Tasks three times as long, predicted as such, with fewer of them per second: no measure is worse."""
    watch, now = Watch(), 0.0
    for number in range(4000):
        times = 3.0 if number >= 2000 else 1.0
        now += 0.1 * times
        watch.completed(K, "w0", 32, 100.0 * times, 100.0 * times, 0, now, alone_ms=1000.0 * times)
        assert watch.decide(now, {K: 1000}) == []


def test_another_kernel_on_the_worker_is_none() -> None:
    """Half of the device goes to another kernel: half the throughput, but not because this one got worse."""
    watch, now = Watch(), 0.0
    for number in range(4000):
        now += 0.1
        kernel = "other" if number >= 2000 and number % 2 else K
        watch.completed(kernel, "w0", 32, 100.0, 100.0, 0, now)
        assert watch.decide(now, {K: 1000}) == []


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_worker_that_comes_or_goes_is_none(is_gone: bool) -> None:
    """It may be gone, or be there and run none of the kernel."""
    load = Load(3, sigma=0.05)
    assert load.run(1000) == []
    load.ends = [entry for entry in load.ends if entry[1] != "w2"]
    heapq.heapify(load.ends)
    if is_gone:
        load.watch.forget_worker("w2")
        assert "w2" not in load.watch._busy_ms
    assert load.run(1000) == []
    heapq.heappush(load.ends, (load.now, "w2", 0.0))
    assert load.run(1000) == []


def test_a_short_queue_tells_nothing_of_throughput() -> None:
    load = Load(sigma=0.05)
    load.num_queued = 16
    load.run(1000)
    load.pause_ms = 100.0  # a third of the throughput, as few tasks come
    assert load.run(1000) == []


def test_nothing_is_decided_while_a_kernel_is_idle() -> None:
    load = Load(sigma=0.05)
    load.run(500)
    load.factor = 2.0
    load.run(18)  # about to be noticed
    assert load.remedies == []
    assert load.idle(3600.0) == []
    load.factor = 1.0
    assert load.run(500) == []


# --- latency ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("num_workers", "num_before"), [(1, 1000), (1, 3000), (4, 2000)])
def test_a_step_of_forty_percent_is_noticed_within_a_hundred_batches(num_workers: int, num_before: int, seed: int) -> None:
    load = Load(num_workers, seed, batch_ms=50.0 * num_workers)
    assert load.run(num_before) == []
    load.factor = 1.4
    assert load.run(100) == ["reduce_batch"]
    assert load.first().kernel == K and load.first().worker == ""
    assert "before" in load.first().reason and load.first().reason.endswith("the batch limit is halved (1 of 3)")


@pytest.mark.parametrize("sigma", [0.3, 0.1, 0.01])
def test_a_step_of_twelve_percent_is_not(sigma: float) -> None:
    load = Load(sigma=sigma)
    load.run(2000)
    load.factor = 1.12
    assert load.run(3000) == []


def test_what_gets_worse_slowly_is_noticed_too() -> None:
    load = Load(sigma=0.1, batch_ms=1000.0)
    load.num_queued = 0
    load.run(2000)
    for _ in range(600):
        load.factor *= 1.0008
        load.run(1)
    assert load.remedies and load.first().kind == "reduce_batch"


def test_a_judgement_needs_twenty_batches() -> None:
    load = Load(sigma=0.0, batch_ms=1000.0)
    load.run(100)
    load.idle(100.0)
    load.factor = 2.0
    assert load.run(20) == []
    assert load.run(10) == ["reduce_batch"]


def test_a_step_that_the_prediction_follows_is_noticed_and_then_normal() -> None:
    load = Load(sigma=0.1)
    load.learning = 0.005
    load.run(2000)
    load.factor = 1.5
    assert load.run(100) == ["reduce_batch"]
    assert load.run(300) in ([], ["reduce_batch"])
    assert load.run(10_000) == []


def test_a_slow_drift_that_the_prediction_follows_is_a_new_baseline() -> None:
    load = Load(seed=2)
    load.learning = 0.01
    load.run(1000)
    for _ in range(3000):
        load.factor *= 1.001  # twenty times as long in the end
        load.run(1)
    load.run(1000)
    assert load.remedies == []


def test_reducing_three_times_in_vain_restores_and_accepts() -> None:
    load = Load(seed=3)
    load.run(1000)
    load.factor = 1.6
    assert load.run(20_000) == ["reduce_batch"] * 3 + ["restore"]
    times = [at for at, *_ in load.remedies]
    assert all(b - a >= 10.0 for a, b in pairwise(times))
    last = load.remedies[-1][2]
    assert last.worker == "" and "3 times did not help: the limit is restored" in last.reason
    load.factor = 2.4
    assert load.run(100) == ["reduce_batch"], "it is watched against the new baseline"


@pytest.mark.parametrize("batch_ms", [50.0, 1000.0])
@pytest.mark.parametrize(("factor", "pause"), [(1.6, 0.0), (1.0, 0.6)])
def test_a_remedy_that_helps_is_not_repeated(batch_ms: float, factor: float, pause: float) -> None:
    load = Load(seed=4, batch_ms=batch_ms, sigma=0.1)
    load.run(1000)
    load.factor, load.pause_ms = factor, pause * batch_ms
    while not load.remedies:
        load.run(1)
    load.factor, load.pause_ms = 1.0, 0.0
    assert load.run(5000) == [] and [r.kind for *_, r in load.remedies] == ["reduce_batch"]


def test_reductions_count_anew_after_a_quiet_time() -> None:
    load = Load(seed=5)
    load.run(1000)
    for _ in range(5):
        load.factor = 1.6
        assert load.run(100) == ["reduce_batch"] and load.remedies[-1][2].reason.endswith("(1 of 3)")
        load.factor = 1.0
        assert load.run(int(EPISODE_S / 0.05)) == []


@pytest.mark.parametrize("predicted_ms", [None, 0.0])
def test_an_unknown_prediction_is_not_judged(predicted_ms: float | None) -> None:
    watch = Watch()
    for number in range(1000):
        measured_ms = 10.0 if number < 500 else 100.0
        watch.completed(K, "w0", 32, measured_ms, predicted_ms, 0, 0.1 * number)
        assert watch.decide(0.1 * number, {}) == []


# --- errors and throughput -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.03), (0.005, 0.05), (0.03, 0.1)])
def test_errors(before: float, after: float) -> None:
    load = Load(seed=6, num_rows=16)
    load.errors = before
    assert load.run(2000) == []
    load.errors = after
    assert load.run(150) == ["reduce_batch"]
    assert "% of the rows fail" in load.first().reason
    load.errors = before
    assert load.run(2000) == []


def test_errors_below_a_percent_are_none() -> None:
    load = Load(seed=7)
    load.run(2000)
    load.errors = 0.006
    assert load.run(2000) == []


def test_some_more_errors_than_ever_are_none() -> None:
    load = Load(batch_ms=1.0)  # many batches: no noise hides it
    load.errors = 0.03
    load.run(20_000)
    load.errors = 0.038
    assert load.run(10_000) == []


def test_a_single_batch_that_fails_whole_is_an_accident() -> None:
    load = Load(sigma=0.05)
    for _ in range(20):
        load.run(60)
        load.errors = 1.0
        load.run(1)
        load.errors = 0.0
    load.run(60)
    assert load.remedies == []


def test_throughput_under_backlog() -> None:
    """Batches take as long as ever, but the workers pause in between: only throughput shows it."""
    load = Load(2, seed=8, sigma=0.1)
    assert load.run(2000) == []
    load.pause_ms = 15.0
    assert load.run(400) == ["reduce_batch"]
    assert load.first().reason.startswith("throughput under backlog is down")


# --- other remedies --------------------------------------------------------------------------------------------------


def test_one_slow_worker_is_spared_until_it_recovers() -> None:
    load = Load(4, seed=9)
    load.run(2000)
    load.slow["w2"] = 1.5
    assert load.run(400) == ["rebalance"]
    remedy = load.first()
    assert remedy.worker == "w2" and remedy.reason.endswith("on w2, not on the others")
    assert load.run(10_000) == [], "once is enough"
    del load.slow["w2"]
    assert load.run(400) == ["restore"] and load.remedies[-1][2].worker == "w2"
    load.slow["w2"] = 1.5
    assert load.run(1500) == ["rebalance"]
    del load.slow["w2"]
    load.run(10_000)
    (_, _, rebalance), (_, _, restore) = load.remedies[-2:]
    assert (rebalance.kind, restore.kind) == ("rebalance", "restore")
    assert load.remedies[-1][0] - load.remedies[-2][0] >= 60.0


def test_a_spared_worker_counts_no_more() -> None:
    load = Load(2, sigma=0.1)
    load.run(2000)
    load.slow["w1"] = 4.0
    assert load.run(2000) == ["rebalance"]
    load.pause_ms = 20.0
    assert load.run(200) == ["reduce_batch"] and load.remedies[-1][2].reason.startswith("throughput")


@pytest.mark.parametrize("is_new", [False, True])
def test_a_spared_worker_that_runs_nothing_has_not_recovered(is_new: bool) -> None:
    """A new one of its name is not spared, though, and may be found to be slow again."""
    load = Load(2, sigma=0.1)
    load.run(2000)
    load.slow["w1"] = 2.0
    for _ in range(1 + is_new):
        load.watch.forget_worker("w1")
        count = len(load.remedies)
        while len(load.remedies) == count:
            load.run(1)
        assert load.remedies[-1][2].kind == "rebalance"
    load.ends = [entry for entry in load.ends if entry[1] != "w1"]
    assert load.run(3000) == []


def test_a_failing_worker_is_spared_until_it_fails_no_more() -> None:
    load = Load(2, sigma=0.1)
    load.run(1000)
    for number in range(3000):
        load.run(2)
        now = load.now + 1e-6
        load.watch.completed(K, "w1", 32, 50.0, 50.0, 32 if number % 10 == 0 else 0, now)
    assert [(r.kind, r.worker) for *_, r in load.remedies] == [("rebalance", "w1")]
    assert load.run(200) == ["restore"]


def test_a_worker_that_left_is_not_judged() -> None:
    load = Load(2, sigma=0.1)
    load.run(1000)
    load.slow["w1"] = 3.0
    while load.watch._cases[K].alarm_since == float("inf"):
        load.run(1)
    load.watch.forget_worker("w1")
    load.ends = [entry for entry in load.ends if entry[1] != "w1"]
    assert load.run(500) == []


def test_what_is_slow_everywhere_is_no_single_worker() -> None:
    load = Load(4, seed=10)
    load.run(2000)
    load.factor = 1.5
    assert load.run(400)[0] == "reduce_batch"


def test_a_regression_after_a_change_is_rolled_back_once() -> None:
    load = Load(4, seed=11)
    load.run(2000)
    load.watch.config_changed(load.now)
    load.factor = 1.4
    assert load.run(400) == ["roll_back"]
    assert "after a change of the configuration" in load.first().reason
    assert load.run(1000)[0] == "reduce_batch", "it was not the configuration"


@pytest.mark.parametrize("seed", range(5))
def test_a_change_that_changes_nothing_is_kept(seed: int) -> None:
    load = Load(1, seed)
    load.run(1000)
    for _ in range(10):
        load.watch.config_changed(load.now)
        assert load.run(300) == []


def test_a_roll_back_that_helps_is_the_end_of_it() -> None:
    """What one worker did under the other configuration is not held against it."""
    load = Load(2, sigma=0.02, batch_ms=1000.0)
    load.run(1000)
    load.watch.config_changed(load.now)
    load.slow["w1"] = 2.5
    while not load.remedies:
        load.run(1)
    load.slow.clear()
    assert load.run(1000) == [] and load.first().kind == "roll_back"


@pytest.mark.parametrize(("factor", "pause_ms"), [(1.5, 0.0), (1.0, 25.0)])
def test_a_change_is_not_blamed_for_what_was_bad_before(factor: float, pause_ms: float) -> None:
    """An operator who answers a regression with a change must not see it taken back."""
    load = Load(sigma=0.1)
    load.run(1000)
    load.factor, load.pause_ms = factor, pause_ms
    while load.watch._cases[K].figures.is_all_well:
        load.run(1)
    assert load.remedies == []
    load.watch.config_changed(load.now)
    assert load.run(1000) == []


def test_a_late_regression_is_not_the_changes_fault() -> None:
    load = Load(sigma=0.1)
    load.run(1000)
    load.watch.config_changed(load.now)
    load.run(1300)
    load.factor = 1.5
    assert load.run(100) == ["reduce_batch"]


def test_one_roll_back_for_all_kernels() -> None:
    watch, remedies = Watch(), list[Remedy]()
    for number in range(1600):
        if number == 1000:
            watch.config_changed(0.1 * number)
        for kernel in ("a", "b"):
            watch.completed(kernel, "w0", 8, 50.0 if number < 1000 else 100.0, 50.0, 0, 0.1 * number)
        if number % 5 == 0:
            remedies += watch.decide(0.1 * number, {})
        if number == 1099:
            assert [r.kind for r in remedies] == ["roll_back"]


def test_kernels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.broker.scheduling.remedies.MAX_KERNELS", 10)
    watch = Watch()
    for number in range(100):
        watch.completed(f"k{number}", "w0", 1, 1.0, 1.0, 0, float(number))
    assert list(watch._cases) == [f"k{n}" for n in range(90, 100)]
